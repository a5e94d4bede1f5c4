"""One head's captured vectors as arrays, and where they are from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from sniffer.types import Names, Rows


class FromRows:
    """Where vectors are from, column by column."""

    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def positions(self) -> Int32[np.ndarray, " n"]:
        return self.rows.position

    @property
    def buckets(self) -> Int32[np.ndarray, " n"]:
        return self.rows.bucket

    @property
    def token_ids(self) -> Int32[np.ndarray, " n"]:
        return self.rows.token_id

    @property
    def sections(self) -> np.ndarray | None:
        """The section of each, as an array of str; None in a run without sections."""
        return None if self.rows.section is None else self.rows.section.array

    @property
    def example_ids(self) -> Int64[np.ndarray, " n"]:
        return self.rows.example_id


@dataclass(frozen=True)
class Vectors(FromRows):
    """Captured vectors of one head, ordered by (bucket, example, position).

    `rows` say where they are from; `positions`, `buckets`, `token_ids`, `example_ids` and `sections` are its
    columns.
    `inclusion_probability` is the probability with which the sampler kept each position: weight by
    its inverse to estimate sums over all positions without bias (Horvitz and Thompson, 1952).
    """

    vectors: Float32[np.ndarray, "n head_dim"]
    rows: Rows
    inclusion_probability: Float64[np.ndarray, " n"]


@dataclass(frozen=True)
class Pairs(FromRows):
    """The query of one head and the key it is compared with, at the positions where both were kept.

    `rows` as in `Vectors`. `inclusion_probability` is that of the pair.
    """

    q: Float32[np.ndarray, "n head_dim"]
    k: Float32[np.ndarray, "n head_dim"]
    q_head: int
    k_head: int
    rows: Rows
    inclusion_probability: Float64[np.ndarray, " n"]


def probabilities(
    law: Mapping[int, float], buckets: Int32[np.ndarray, " n"], section: Names | None = None, kept: Sequence[str] = ()
) -> Float64[np.ndarray, " n"]:
    """The probability with which each of some rows was kept, from that of its bucket; KeyError for one it lacks.

    Args:
        section: of each row, where there are sections.
        kept: those that are kept whole, as the sampler's `keep_sections` says.
    """
    found, place = np.unique(buckets, return_inverse=True)
    probability = np.array([law[int(bucket)] for bucket in found], dtype=np.float64)[place]
    return probability if section is None or not kept else np.where(section.among(kept), 1.0, probability)
