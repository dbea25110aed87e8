"""Statistics of columns over the joined batch, and the size of cross-correlations."""
