"""The sampler that imported rows are told to be drawn by, held against what was drawn.

Buckets must be the sampler's, position by position. How many positions of a bucket were kept must be what its
probability can give: Bernstein's inequality says how far off a sum of independent draws may be, and a number that
comes up by chance once in a thousand million times is refused. Of a document its last bucket does not count, since
where in it the document ends is not known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sniffer.config.build import build
from sniffer.errors import ConfigError, RunError
from sniffer.runs.imports.census import Census
from sniffer.sampler import All, LogUniform, Picker, Sampler, Uniform

SAMPLERS: dict[str, type[Sampler]] = {"log_uniform": LogUniform, "uniform": Uniform, "all": All}
CHANCE = 1e-9
USAGE = "such as --sampler log_uniform base_rate=1 min_bucket_size=128"


def told_sampler(words: Sequence[str]) -> Sampler:
    """From words such as `uniform base_rate=10 bucket_size=2048`.

    Raises:
        ConfigError: no sampler of ours, or not its keys.
    """
    name, *settings = words
    if name not in SAMPLERS:
        raise ConfigError(f"--sampler {name} is none of {', '.join(SAMPLERS)}: {USAGE}")
    values: dict[str, object] = {}
    for word in settings:
        key, equals, text = word.partition("=")
        try:
            values[key] = int(text) if text.lstrip("-").isdecimal() else float(text)
        except ValueError:
            raise ConfigError(f"--sampler {name} {word} is not key=number: {USAGE}") from None
        if not equals:
            raise ConfigError(f"--sampler {name} {word} is not key=number: {USAGE}")
    kind = SAMPLERS[name]
    made: Sampler = build({"_target_": f"{kind.__module__}.{kind.__name__}", **values}, "sampler")
    return made


def check_law(census: Census, sampler: Sampler) -> None:
    """Raises RunError where the rows cannot have been drawn by a sampler."""
    picker = Picker(sampler, seed=0)
    law = picker.probability_by_bucket(census.longest)
    buckets = picker.buckets_until(census.longest)
    met = census.buckets >= 0
    if (wrong := met & (census.buckets != buckets)).any():
        at = int(np.argmax(wrong))
        raise _other(sampler, f"have position {at} in bucket {census.buckets[at]}", f"puts it in {buckets[at]}")
    widths = np.bincount(buckets, minlength=1 + max(law))
    last = {number: int(buckets[n_tokens - 1]) for number, n_tokens in census.positions.items()}
    reached = np.array(list(last.values()))
    looked = (1 + len(census.kept)) * len(law)
    all_found, all_there = np.zeros(len(widths)), np.zeros(len(widths))
    for kept in census.kept.values():
        inside = kept.buckets < np.array([last[number] for number in kept.example_ids.tolist()])
        counts = np.bincount(kept.buckets[inside], weights=kept.counts[inside], minlength=len(widths))
        there = widths * (reached[:, None] > np.arange(len(widths))).sum(0)
        for bucket, probability in law.items():
            _refuse(sampler, bucket, int(counts[bucket]), int(there[bucket]), probability, looked)
        all_found += counts
        all_there += there
    for bucket, probability in law.items():
        _refuse(sampler, bucket, int(all_found[bucket]), int(all_there[bucket]), probability, looked)


def _refuse(sampler: Sampler, bucket: int, found: int, positions: int, probability: float, looked: int) -> None:
    if not _can_be(found, positions, probability, looked):
        kept = f"have {found:,} of {positions:,} positions of bucket {bucket}"
        raise _other(sampler, kept, f"keeps {probability:.4g} of them")


def _other(sampler: Sampler, found: str, told: str) -> RunError:
    return RunError(
        f"the files {found}, and {type(sampler).__name__} as told {told}: tell the sampler that drew them, or leave "
        "--sampler out"
    )


def _can_be(kept: int, positions: int, probability: float, looked: int) -> bool:
    """Whether so many may have been kept of so many; `looked` are the numbers that are looked at alike."""
    if probability in (0.0, 1.0):
        return kept == probability * positions
    off, variance = abs(kept - probability * positions), positions * probability * (1 - probability)
    return off == 0 or 2 * math.exp(-(off**2) / 2 / (variance + off / 3)) >= CHANCE / looked
