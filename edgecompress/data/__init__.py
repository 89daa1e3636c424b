"""Images in, batches out: where they come from, how they are read, prepared and augmented."""
