"""What runs the model over the batches: workers, each with a model of its own.

engine     how a run comes by a crew          local, ray   one worker in this process; workers on a cluster
crew       workers come and go                shift        batches to them, rows from them
worker     captures a batch, writes parts     pool         how workers are reached
"""
