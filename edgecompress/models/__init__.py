"""Networks: which exist, how one is built, changed in shape, kept on disk and counted."""
