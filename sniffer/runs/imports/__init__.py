"""`runs import FOLDER`: captures of others, in the layout of one folder per layer, head and kind, become a run.

heads        finding and reading such files, and what is wrong with them
census       what all of them together say: documents, buckets, windows, which heads share their positions
law          the sampler that they are told to be drawn by, and whether they can be
making       the run
"""
