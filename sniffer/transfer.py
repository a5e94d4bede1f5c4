"""Moving indices to the model's device and vectors back, without making the model wait.

One class per device kind. On CUDA a batch's indices go over once from pinned memory; the gathers run on
the compute stream; the copies back run on a side stream into pinned buffers; and nothing waits until
`settle`, which the capture loop calls for one batch only after it has started the next.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int32, Shaped
from torch import Tensor

Vectors = dict[tuple[int, str], Tensor]
"""Gathered rows by (layer, kind)."""


@runtime_checkable
class Transfer(Protocol):
    def upload(self, indices: Int32[np.ndarray, " n"]) -> Int32[Tensor, " n"]:
        """Starts moving indices to the device."""

    def download(self, vectors: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
        """Starts moving vectors to the host; they are whole only once `settle` has returned them."""

    def end_batch(self) -> None:
        """Marks the end of a batch's downloads."""

    def settle(self, vectors: Vectors) -> Vectors:
        """The downloads of the oldest ended batch, whole and in ordinary memory, waiting if need be."""


class HostTransfer:
    """For models on the CPU: everything is where it should be."""

    def upload(self, indices: Int32[np.ndarray, " n"]) -> Int32[Tensor, " n"]:
        return torch.from_numpy(indices)

    def download(self, vectors: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
        return vectors

    def end_batch(self) -> None: ...

    def settle(self, vectors: Vectors) -> Vectors:
        return vectors


class CudaTransfer:
    """For models on a CUDA device: pinned memory, and a side stream for the way back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.ended: deque[torch.cuda.Event] = deque()

    def upload(self, indices: Int32[np.ndarray, " n"]) -> Int32[Tensor, " n"]:
        return torch.from_numpy(indices).pin_memory().to(self.device, non_blocking=True)

    def download(self, vectors: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
        host = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(vectors, non_blocking=True)
        # The caching allocator must not hand this memory out again before the copy has read it.
        vectors.record_stream(self.stream)
        return host

    def end_batch(self) -> None:
        event = torch.cuda.Event()
        event.record(self.stream)
        self.ended.append(event)

    def settle(self, vectors: Vectors) -> Vectors:
        self.ended.popleft().synchronize()
        # Pinned memory is scarce: copying out lets the next batches use the same buffers again.
        return {pair: chunk.clone() for pair, chunk in vectors.items()}


class BlockingTransfer:
    """For every other device (mps): plain copies, which wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def upload(self, indices: Int32[np.ndarray, " n"]) -> Int32[Tensor, " n"]:
        return torch.from_numpy(indices).to(self.device)

    def download(self, vectors: Shaped[Tensor, ...]) -> Shaped[Tensor, ...]:
        return vectors.cpu()

    def end_batch(self) -> None: ...

    def settle(self, vectors: Vectors) -> Vectors:
        return vectors


def transfer_for(device: torch.device) -> Transfer:
    if device.type == "cpu":
        return HostTransfer()
    return CudaTransfer(device) if device.type == "cuda" else BlockingTransfer(device)
