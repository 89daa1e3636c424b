"""Post-training int8: from a float module to a graph whose every tensor has a scale that the runtime's kernels use."""
