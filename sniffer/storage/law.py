"""What a manifest says of the sampler: its class and fields, and the keep probability of each bucket.

Where queries and keys have samplers of their own, each says so of itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64

from sniffer.sampler import SIDES, Picker, describe
from sniffer.types import KIND

LAW = "probability_by_bucket"
Law = Mapping[int, float]


def with_law(picker: Picker, longest: int) -> dict[str, Any]:
    """The sampler as plain values, with its law over documents of so many tokens at most."""
    told = describe(picker.sampler)
    if all(picker.side(name) is picker for name in SIDES):
        return {**told, LAW: picker.probability_by_bucket(longest)}
    sides = {name: with_law(picker.side(name), longest) for name in SIDES}
    return {**told, **sides}


def fields_of(sampler: Mapping[str, Any]) -> dict[str, Any]:
    """What a manifest says, without the law: as a configuration has it."""
    plain = {name: value for name, value in sampler.items() if name != LAW}
    return plain | {name: fields_of(plain[name]) for name in SIDES if isinstance(plain.get(name), Mapping)}


def side_of(sampler: Mapping[str, Any], draw: str) -> Mapping[str, Any]:
    """What a manifest says of the sampler of a draw's side."""
    side = sampler.get(draw)
    return side if isinstance(side, Mapping) else sampler


def law_of_kind(sampler: Mapping[str, Any], kind: str) -> Law:
    """The keep probability of each bucket of a kind; empty where an early release did not say."""
    law: Law = side_of(sampler, KIND[kind].draw).get(LAW, {})
    return law


def kept_whole(sampler: Mapping[str, Any], draw: str) -> list[str]:
    """Sections of which a draw's side keeps every position."""
    return list(side_of(sampler, draw).get("keep_sections", ()))


def has_sides(sampler: Mapping[str, Any]) -> bool:
    """Whether queries have a sampler of their own."""
    return any(isinstance(sampler.get(name), Mapping) for name in SIDES)


def laws(sampler: Mapping[str, Any]) -> Iterator[tuple[str, Law]]:
    """Every law of a manifest, and which kinds' it is: of all ("") or of a side."""
    for name in SIDES:
        if isinstance(sampler.get(name), Mapping):
            yield name, sampler[name].get(LAW, {})
    if LAW in sampler or not has_sides(sampler):
        yield "", sampler.get(LAW, {})


def from_json(sampler: Mapping[str, Any]) -> dict[str, Any]:
    """As it was before it was JSON, which has no integer keys."""
    found = dict(sampler)
    if LAW in found:
        found[LAW] = {int(number): value for number, value in found[LAW].items()}
    return found | {name: from_json(found[name]) for name in SIDES if isinstance(found.get(name), Mapping)}


def joint(
    sampler: Mapping[str, Any], query: Float64[np.ndarray, " n"], key: Float64[np.ndarray, " n"]
) -> Float64[np.ndarray, " n"]:
    """The probability that a query and a key of one position are both kept, from that of each.

    Two draws of one hash keep together what the rarer keeps; of hashes of their own, the product.
    """
    sides = [side_of(sampler, name).get("seed_by", ()) for name in SIDES]
    one_hash = "kind" not in sides[0] and sorted(sides[0]) == sorted(sides[1])
    return np.minimum(query, key) if one_hash else query * key
