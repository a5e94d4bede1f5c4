"""What a run will capture, and on what: plain data that goes to every worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sniffer.forward.estimate import Estimate
from sniffer.forward.generation.request import Continuing
from sniffer.forward.selection import Selection
from sniffer.process.devices import hardware
from sniffer.sampler import Picker
from sniffer.types import AttentionLayout, LayerGeometry, LengthClasses, ModelFacts, MomentsLayout


@dataclass(frozen=True)
class Plan:
    """What a run will capture, resolved against the loaded model.

    `attention` is what is kept of what queries do with their keys, if anything; then no document is longer than
    `longest` tokens. `lengths` says which documents may share a batch. Workers write what they hold after
    `checkpoint_every` documents in all, and beyond `memory_limit` bytes each. `sections`: whether documents have any.
    `moments`: what is summed over all positions, if anything.
    `continuing`: how the model goes on with documents, if it does.
    """

    geometry: dict[int, LayerGeometry]
    selection: Selection
    picker: Picker
    expected: Estimate
    batch_tokens: int
    dtype: str
    compression: str
    lengths: LengthClasses
    checkpoint_every: int | None
    memory_limit: float
    attention: AttentionLayout | None = None
    longest: int = 0
    sections: bool = False
    moments: MomentsLayout | None = None
    continuing: Continuing | None = None

    def moments_told(self) -> dict[str, Any] | None:
        """As the manifest has it: what is summed, and the heads by layer and kind."""
        if self.moments is None:
            return None
        return {**self.moments.as_json(), "heads": self.selection.counted_by_layer()}


def describe_device(model: ModelFacts) -> dict[str, str]:
    """What kind of device computed, without naming the machine."""
    return {"type": model.device.type, "dtype": dtype_name(model.dtype), **hardware(model.device)}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
