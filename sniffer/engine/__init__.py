"""What runs the model over the batches: this process (local), or workers on a cluster (crew, worker, ray)."""
