"""The stages of a recipe: each is a function from a checkpoint to a new one."""
