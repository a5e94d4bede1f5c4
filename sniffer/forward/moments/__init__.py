"""Sums over all positions of what attention receives, beside the rows that are sampled."""
