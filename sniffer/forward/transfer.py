"""Moving tokens and indices to the model's device and vectors back, without making the model wait.

One class per device kind. On CUDA a batch's indices go over once from pinned memory; the gathers run on
the compute stream; the copies back run on a side stream into pinned buffers; and nothing here waits until
`settle`, which the capture loop calls for one batch only after it has started the next.

Pinned buffers are not kept here: PyTorch's own allocator of pinned memory hands one out again as soon as it is
let go of and its stream has done what it had to do by then. Batches take turns with two side streams, so that the
copies of the next batch are not among that, and the buffers of two batches serve a whole run.

Rows are held until they are written, which may be at the end of the run, and pinned memory is no place for that: the
system can neither move nor swap it, each block is rounded up to a power of two, and making a new one costs about what
copying as much does and may hold up the device. So rows are copied once, out of pinned memory, and each buffer is let
go of before the next one is copied: of a batch's rows, one (layer, kind) at most is there twice.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

Vectors = dict[tuple[int, str], Tensor]
"""Gathered rows by (layer, kind)."""


@runtime_checkable
class Transfer(Protocol):
    def upload(self, indices: Int[np.ndarray, "*shape"], device: torch.device) -> Int[Tensor, "*shape"]:
        """Starts moving indices, or token ids, to the device."""

    def download(self, vectors: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
        """Starts moving vectors to the host; they are whole only once `settle` has returned them."""

    def end_batch(self) -> None:
        """Marks the end of a batch's downloads."""

    def settle(self, vectors: Vectors) -> Vectors:
        """The downloads of the oldest ended batch, whole and in ordinary memory, waiting if need be.

        Takes `vectors` over: where they are copied, each is let go of before the next one is.
        """


class HostTransfer:
    """For models on the CPU: everything is where it should be."""

    def upload(self, indices: Int[np.ndarray, "*shape"], device: torch.device) -> Int[Tensor, "*shape"]:
        return torch.from_numpy(indices)

    def download(self, vectors: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
        return vectors

    def end_batch(self) -> None: ...

    def settle(self, vectors: Vectors) -> Vectors:
        return vectors


class CudaTransfer:
    """For models on CUDA devices: pinned memory, and two side streams on each device for the way back."""

    def __init__(self) -> None:
        self.streams: deque[dict[torch.device, torch.cuda.Stream]] = deque([{}, {}])
        """Those of the batch under way, and those of the one before it."""
        self.ended: deque[list[torch.cuda.Event]] = deque()

    def upload(self, indices: Int[np.ndarray, "*shape"], device: torch.device) -> Int[Tensor, "*shape"]:
        return torch.from_numpy(indices).pin_memory().to(device, non_blocking=True)

    def download(self, vectors: Shaped[Tensor, "picks values"]) -> Shaped[Tensor, "picks values"]:
        stream = self._stream(vectors.device)
        host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(vectors.device))
        with torch.cuda.stream(stream):
            host.copy_(vectors, non_blocking=True)
        # The caching allocator must not hand this memory out again before the copy has read it.
        vectors.record_stream(stream)
        return host

    def end_batch(self) -> None:
        self.ended.append([stream.record_event() for stream in self.streams[0].values()])
        self.streams.rotate()

    def settle(self, vectors: Vectors) -> Vectors:
        for event in self.ended.popleft():
            event.synchronize()
        return _one_by_one(vectors, lambda chunk: chunk.clone())

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        streams = self.streams[0]
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
        return streams[device]


class BlockingTransfer:
    """For every other device (mps, xpu): plain copies, which wait.

    So rows stay on the device until the batch is settled: one wait a batch, and not one per layer and kind.
    """

    def upload(self, indices: Int[np.ndarray, "*shape"], device: torch.device) -> Int[Tensor, "*shape"]:
        return torch.from_numpy(indices).to(device)

    def download(self, vectors: Shaped[Tensor, "picks values"]) -> Shaped[Tensor, "picks values"]:
        return vectors

    def end_batch(self) -> None: ...

    def settle(self, vectors: Vectors) -> Vectors:
        return _one_by_one(vectors, lambda chunk: chunk.cpu())


def _one_by_one(vectors: Vectors, copy: Callable[[Tensor], Tensor]) -> Vectors:
    """Copies of all, each made once its predecessor's original is let go of."""
    return {pair: copy(vectors.pop(pair)) for pair in list(vectors)}


def transfer_for(device: torch.device) -> Transfer:
    """The way to and from a model whose input goes to `device`."""
    if device.type == "cpu":
        return HostTransfer()
    return CudaTransfer() if device.type == "cuda" else BlockingTransfer()
