"""Which channels or weights go: scores, ratios to reach, and what each group is worth."""
