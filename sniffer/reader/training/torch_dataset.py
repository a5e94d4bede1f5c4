"""Batches as a dataset of PyTorch, whose workers share what a rank has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.reader.sweep import Sweep
from sniffer.reader.training.batches import Batch, Batches


def torch_dataset(
    run: Run | Sweep, *, rank: int | None = None, world: int | None = None, **choices: Any
) -> TorchBatches:
    """What `run.batches(**choices)` gives, for `DataLoader(dataset, batch_size=None, num_workers=...)`.

    Args:
        rank, world: None for those of torch.distributed where it has begun, else 0 of 1.
        choices: the other arguments of `Run.batches`.

    Raises:
        RunError: as there; or only one of rank and world is given.
    """
    if (rank is None) != (world is None):
        raise RunError("give both rank and world, or neither: torch.distributed says where it has begun")
    if rank is None or world is None:
        began = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if began else (0, 1)
    return TorchBatches(run.batches(rank=rank, world=world, **choices))


class TorchBatches(IterableDataset):
    """Gives dictionaries of tensors: vectors (float32, n x head_dim), head, bucket, position, token_id and example_id.

    Beside them `weight` where weights were asked for, and in runs with sections `section`, a list of texts. Each worker
    of a DataLoader has as many batches as the others, and memory of its own. Which rows a batch has follows from the
    number of workers too.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._state: tuple[int, int] | None = None

    def count(self, workers: int = 0) -> int:
        """Batches that a DataLoader with so many workers gives in all epochs."""
        return len(self._shard(0, workers)) * max(1, workers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises RunError where the state is of another number of workers."""
        info = get_worker_info()
        number, workers = (0, 0) if info is None else (info.id, info.num_workers)
        given, then = (0, workers) if self._state is None else self._state
        self._state = None
        if then != workers:
            raise RunError(f"the state is of num_workers={then}, this DataLoader has num_workers={workers}")
        if info is None:
            return map(tensors, self._batches)
        # A DataLoader takes workers in turn from the first on, which takes the part of the one whose turn it was.
        part = (number + given) % workers
        mine = self._shard(part, workers)
        mine.load_state_dict({**mine.state_dict(), "batches": given // workers + (part < given % workers)})
        return map(tensors, mine)

    def state_dict(self, given: int | None = None, workers: int = 0) -> dict[str, Any]:
        """Where the last loop is; in the process of the DataLoader.

        Args:
            given: batches that the DataLoader has given in all, which must be said where it has workers.
            workers: its num_workers.

        Raises:
            RunError: it has workers, and `given` is not said, or cannot be.
        """
        if get_worker_info() is not None or (workers and given is None):
            raise RunError("workers read ahead: say state_dict(given=BATCHES, workers=NUM_WORKERS) in the main process")
        state = self._batches.state_dict()
        if given is not None:
            self._require(given, workers)
            state["batches"] = given
        return {**state, "workers": workers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Lets the next loop begin where a state says, with as many workers.

        Raises:
            RunError: as `Batches.load_state_dict`.
        """
        given, workers = state.get("batches"), state.get("workers")
        if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
            raise RunError("this is no state of a torch_dataset: it has no number of 'workers'")
        if workers:
            self._batches.load_state_dict({**state, "batches": 0})
            self._require(given, workers)
        else:
            self._batches.load_state_dict(state)
        self._state = (int(given or 0), workers)

    def _require(self, given: Any, workers: int) -> None:
        if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= self.count(workers):
            raise RunError(f"{given!r} batches cannot have been given: there are {self.count(workers):,}")

    def _shard(self, number: int, workers: int) -> Batches:
        return self._batches.shard(number, workers) if workers else self._batches


def tensors(batch: Batch) -> dict[str, Any]:
    found: dict[str, Any] = {"vectors": torch.from_numpy(batch.vectors), "head": torch.from_numpy(batch.heads)}
    found |= {name: torch.from_numpy(column) for name, column in batch.rows.columns().items()}
    if batch.weights is not None:
        found["weight"] = torch.from_numpy(batch.weights)
    if batch.sections is not None:
        found["section"] = batch.sections.tolist()
    return found
