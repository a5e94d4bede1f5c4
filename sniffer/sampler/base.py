"""What every sampler is: a law of positions, and the parts that seed its draws."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float64, Int32, Int64

from sniffer.errors import ConfigError, first_line

SEED_PARTS = ("example", "layer", "kind")

MADE = {"made": ("bucket", "probability")}
"""Marks a field that is a sampler itself, as its configuration makes it, with what it must be able to do."""


@dataclass(frozen=True)
class Sampler(ABC):
    """What every sampler shares.

    `formula` says the law, for whoever reads a published run. `seed_by`: the parts that seed a draw beside `seed`.
    Without "kind", q and k keep the same positions; without "layer", all layers do. `keep_sections`: of documents with
    sections, every position of these is kept, whatever the law says of it; the others are as they would be without.
    """

    formula: ClassVar[str] = ""

    seed_by: list[str] = field(default_factory=lambda: list(SEED_PARTS))
    keep_sections: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        unknown = [part for part in self.seed_by if part not in SEED_PARTS]
        if unknown or len(set(self.seed_by)) != len(self.seed_by):
            raise ConfigError(
                f"sampler.seed_by={list(self.seed_by)} is not a selection of {list(SEED_PARTS)}, each at most once"
            )
        if len({*self.keep_sections}) != len(self.keep_sections) or not all(self.keep_sections):
            raise ConfigError(f"sampler.keep_sections={list(self.keep_sections)} must be names of sections, each once")

    def side(self, draw: str) -> Sampler:
        """What draws queries ("q"), or keys and values ("k"): this one, but where each has its own."""
        return self

    @abstractmethod
    def bucket(self, positions: Int64[np.ndarray, " n"]) -> Int32[np.ndarray, " n"]:
        """The bucket each position falls in."""

    @abstractmethod
    def probability(self, positions: Int64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
        """The probability, in [0, 1], that each position is kept; constant within a bucket."""


def check_sampler(sampler: Any) -> None:
    """Raises ConfigError for what is no sampler, or could not be recorded."""
    name = type(sampler).__name__
    if not isinstance(sampler, Sampler):
        raise ConfigError(f"{name} is no sampler: name a subclass of sniffer.sampler.Sampler, such as LogUniform")
    try:
        json.dumps(describe(sampler))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"sampler {name} has fields that cannot be recorded ({first_line(error)}): use numbers, text and lists of "
            "them as fields, and make all else of them in its methods"
        ) from error


def describe(sampler: Sampler) -> dict[str, object]:
    """The sampler as plain values: its class and its fields."""
    home = type(sampler).__dict__.get("home", type(sampler).__module__)
    name = f"{home}.{type(sampler).__qualname__}"
    # A sampler that keeps no sections is described as it was before there were any.
    names = (f.name for f in fields(sampler) if f.name != "keep_sections" or sampler.keep_sections)
    values = {name: getattr(sampler, name) for name in names}
    plain = {key: describe(value) if isinstance(value, Sampler) else value for key, value in values.items()}
    return {"_target_": name, **plain}
