"""Searching a recipe's fields for the best model that a target can run: trials in, a Pareto front of runs out."""
