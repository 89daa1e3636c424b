"""One module a command: a run directory in, the same with one step's results out."""
