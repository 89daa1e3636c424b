"""What the command line is made of, beside the commands themselves."""
