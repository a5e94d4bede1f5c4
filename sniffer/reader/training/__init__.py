"""Reading for training: `Run.batches` goes over all rows of a layer and kind again and again, in a drawn order.

in_batches     the method itself, of a run and of a sweep
shares         which row groups have the wanted rows, and which rows of them a rank has in an epoch
blocks         rows in memory: some row groups at a time, the next ones read meanwhile
batches        one block after the other in batches, and the state that a loop is taken up from
torch_dataset  the same as an IterableDataset; the only file here that imports torch
"""
