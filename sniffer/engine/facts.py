"""What a worker tells of its model, once it has it: plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sniffer.types import LayerGeometry, LengthClasses, Rope, ScoreFacts


@dataclass(frozen=True)
class Facts:
    """What a worker's model is, and where: `sniffer.types.ModelFacts`, and what the driver plans with.

    `model` is what the checkpoint says of itself where the worker is, `described` is its device.
    `available` and `resident` are bytes of memory: what its machine has left, and what the process holds;
    `device_free` what a GPU has left, None for a processor. `scores` are what logits are made of, `rope` how q and k
    are turned by position, by layer; `model_config` is the config of the model as it runs. `eos` and `pads` are of a
    model that goes on with documents, as `sniffer.types.LanguageModel` has them.
    """

    geometry: tuple[LayerGeometry, ...]
    dtype: torch.dtype
    device: torch.device
    pre_missing: str
    vocabulary: int
    lengths: LengthClasses
    backbone: Mapping[str, Any]
    described: Mapping[str, str]
    model: Mapping[str, Any]
    threads: int
    versions: Mapping[str, str]
    process: int
    available: int
    resident: int
    device_free: int | None = None
    scores: Mapping[int, ScoreFacts] = field(default_factory=dict)
    rope: Mapping[int, Rope] = field(default_factory=dict)
    model_config: Mapping[str, Any] = field(default_factory=dict)
    eos: tuple[int, ...] = ()
    pads: bool = True

    def describe(self) -> dict[str, Any]:
        return dict(self.backbone)
