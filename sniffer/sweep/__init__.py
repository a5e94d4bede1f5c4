"""A sweep while it runs: its jobs, their index, the figure at the end; reader/sweep.py reads it afterwards."""
