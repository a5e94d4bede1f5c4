"""Engines: what runs the model over the batches: this process (local.py), or workers on a cluster (ray.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from sniffer.config.schema import Config
from sniffer.dataset.feed import Feed
from sniffer.forward.estimate import Estimate, Room
from sniffer.forward.selection import Selection
from sniffer.process.clock import Clock
from sniffer.process.stop import Stop
from sniffer.sampler import Picker
from sniffer.storage.store import Store
from sniffer.types import LayerGeometry, LengthClasses, ModelFacts


@dataclass(frozen=True)
class Plan:
    """What a run will capture, resolved against the loaded model.

    `lengths` says which documents may share a batch.
    """

    geometry: dict[int, LayerGeometry]
    selection: Selection
    picker: Picker
    expected: Estimate
    batch_tokens: int
    dtype: str
    compression: str
    lengths: LengthClasses


class Engine(Protocol):
    def open(self, config: Config, folder: Path) -> ModelFacts:
        """Brings up the model; raises SnifferError where it cannot be had."""

    def room(self, wanted: int | None) -> Room:
        """What captured rows may take; `wanted` is output.memory_limit."""

    def device(self) -> dict[str, str]:
        """What computes, for the manifest."""

    def threads(self) -> int:
        """Of one forward pass."""

    def infer(self, plan: Plan, feed: Feed, store: Store, clock: Clock, stop: Stop) -> None:
        """Runs the model over the documents; what `store.kept` has is not captured again.

        Raises:
            Stopped: a signal came.
            SnifferError: as a run.
        """

    def commit(self, plan: Plan, store: Store, *, last: bool) -> None:
        """Writes what was captured and is not on disk yet; `last` when the inference has ended well."""

    def close(self) -> None:
        """Gives back what was borrowed."""


def describe_device(model: ModelFacts) -> dict[str, str]:
    """What kind of device computed, without naming the machine."""
    device = {"type": model.device.type, "dtype": dtype_name(model.dtype)}
    if model.device.type == "cuda":
        device["name"] = torch.cuda.get_device_name(model.device)
    return device


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
