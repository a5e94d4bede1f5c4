"""Draws: the positions of documents that a sampler keeps."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt64

from sniffer.errors import ConfigError
from sniffer.hashing import GOLDEN, begun, key_after, mix64, spelled
from sniffer.sampler.base import SEED_PARTS, Sampler, check_sampler
from sniffer.sampler.law import NO_LAW, law_of
from sniffer.types import Document, Picks, Sections, TokenBatch

REMEMBERED = 1 << 12
"""Documents whose seeds are begun; a batch has fewer."""

BLOCK = 1 << 14
"""Positions hashed at a time: the working arrays of one block stay in the processor's cache."""


class Picker:
    """Draws the picks of a sampler, with the sampler's law tabulated once per position.

    Raises:
        ConfigError: here, or when longer documents come, where the sampler has no law (law.py).
    """

    def __init__(self, sampler: Sampler, seed: int) -> None:
        check_sampler(sampler)
        self.sampler = sampler
        self.seed = seed
        self._law = NO_LAW
        self._beginnings: dict[int, blake2b] = {}
        self._rests: dict[tuple[int, str], bytes] = {}
        self._tabulate(1 << 10)

    def __getstate__(self) -> dict[str, Any]:
        """Hashes that are begun stay in their process."""
        return {**vars(self), "_beginnings": {}}

    def side(self, draw: str) -> Picker:
        """What has the tables of queries' draws ("q"), or of keys' and values' ("k")."""
        return self

    def pick(self, batch: TokenBatch, layer: int, draw: str) -> Picks:
        """The positions of every document in `batch` that the draw (layer, draw) keeps."""
        documents, groups = batch.documents, []
        longest = max(document.first_position + document.n_tokens for document in documents)
        self._tabulate(longest)
        # Short documents are drawn together, as many as stay in the processor's cache.
        together = max(1, BLOCK // longest) if self.certain_until < longest else 1
        for first in range(0, len(documents), together):
            some = documents[first : first + together]
            if len(some) > 1:
                rows, positions = self._pick_together(some, longest, layer, draw)
            else:
                positions = self.positions(some[0], layer, draw)
                rows = np.zeros(len(positions), dtype=np.int32)
            groups.append((rows + np.int32(first), positions))
        rows, positions = (np.concatenate(columns) for columns in zip(*groups, strict=True))
        return Picks(rows, positions, self.buckets[positions])

    def _pick_together(
        self, documents: Sequence[Document], n: int, layer: int, draw: str
    ) -> tuple[Int32[np.ndarray, " picks"], Int32[np.ndarray, " picks"]]:
        """Rows and positions of some documents, none longer than `n`: a row of hashes each."""
        keys = np.array([self.key(document, layer, draw) for document in documents], dtype=np.uint64)
        begins = np.array([document.first_position for document in documents])[:, None]
        ends = np.array([document.first_position + document.n_tokens for document in documents])[:, None]
        keep = self._keep(keys, n)
        for row, document in enumerate(documents if self.sampler.keep_sections else ()):
            keep[row, self.certain(document)] = True
        if (begins > 0).any() or (ends < n).any():
            numbers = np.arange(n)
            keep &= (begins <= numbers) & (numbers < ends)
        rows, positions = np.divmod(np.flatnonzero(keep), n)
        return rows.astype(np.int32), positions.astype(np.int32)

    def positions(self, document: Document, layer: int, draw: str) -> Int32[np.ndarray, " picks"]:
        """The kept positions of one document, ascending."""
        first, end = document.first_position, document.first_position + document.n_tokens
        self._tabulate(end)
        if self.certain_until >= end:
            return np.arange(first, end, dtype=np.int32)
        key = np.array([self.key(document, layer, draw)], dtype=np.uint64)
        keep = self._keep(key, end, first)
        keep[0, self.certain(document) - first] = True
        return (first + np.flatnonzero(keep)).astype(np.int32)

    def certain(self, document: Document) -> Int64[np.ndarray, " positions"]:
        """The positions that are kept for certain, since they are of `keep_sections`.

        Raises:
            ConfigError: the document has no sections.
        """
        wanted = self.sampler.keep_sections
        if not wanted:
            return np.empty(0, dtype=np.int64)
        if document.sections is None:
            raise ConfigError(f"sampler.keep_sections={list(wanted)}: these documents have no sections")
        return document.first_position + np.flatnonzero(document.sections.names.among(wanted))

    def key(self, document: Document, layer: int, draw: str) -> int:
        """The 64-bit seed of one draw: `key_of` of the seed, and of name and value of each of `seed_by`."""
        return key_after(self._begun(document.example_id), self._rest(layer, draw))

    def _begun(self, example_id: int) -> blake2b:
        """The keys of a document up to layer and draw, of which it has many."""
        if example_id not in self._beginnings:
            if len(self._beginnings) >= REMEMBERED:
                self._beginnings.clear()
            named = ("example", example_id) if "example" in self.sampler.seed_by else ()
            self._beginnings[example_id] = begun(self.seed, *named)
        return self._beginnings[example_id]

    def _rest(self, layer: int, draw: str) -> bytes:
        """What comes after it, the same for all documents."""
        if (layer, draw) not in self._rests:
            values: dict[str, int | str] = {"layer": layer, "kind": draw}
            named = [(name, values[name]) for name in SEED_PARTS if name in values and name in self.sampler.seed_by]
            self._rests[layer, draw] = spelled(*chain.from_iterable(named))
        return self._rests[layer, draw]

    def expected(self, n_tokens: Sequence[int], sections: Sequence[Sections | None] = ()) -> float:
        """The expected number of picks of one draw over documents of these lengths, and with these sections."""
        self._tabulate(max(n_tokens, default=0))
        running = np.concatenate(([0.0], np.cumsum(self.probabilities)))
        by_law = float(running[np.asarray(n_tokens, dtype=np.int64)].sum())
        kept = self.sampler.keep_sections
        for found in sections if kept else ():
            if found is not None:
                by_law += float((1 - self.probabilities[: len(found)][found.names.among(kept)]).sum())
        return by_law

    def probability_by_bucket(self, n_positions: int) -> dict[int, float]:
        """The keep probability of each bucket that the first `n_positions` positions fall in."""
        self._tabulate(n_positions)
        buckets, first = np.unique(self.buckets[:n_positions], return_index=True)
        return {int(b): float(p) for b, p in zip(buckets, self.probabilities[first], strict=True)}

    def buckets_until(self, n_positions: int) -> Int32[np.ndarray, " {n_positions}"]:
        """The bucket of each of the first `n_positions` positions."""
        self._tabulate(n_positions)
        return self.buckets[:n_positions]

    def span(self, bucket: int) -> tuple[int, int]:
        """The first and last position of a bucket, among the positions that were asked about so far."""
        inside = np.flatnonzero(self.buckets == bucket)
        return int(inside[0]), int(inside[-1])

    def _keep(
        self, keys: UInt64[np.ndarray, " keys"], end: int, first: int = 0
    ) -> Bool[np.ndarray, "keys {end}-{first}"]:
        """Which of the positions from `first` up to `end` each of some draws keeps."""
        keep = np.empty((len(keys), end - first), dtype=bool)
        for start in range(first, end, BLOCK):
            block = slice(start, min(start + BLOCK, end))
            hashes = mix64(self.base_hashes[block] ^ keys[:, None])
            np.less_equal(hashes, self.thresholds[block], out=keep[:, block.start - first : block.stop - first])
        if self.has_zero:
            keep &= self.probabilities[first:end] > 0
        return keep

    def _tabulate(self, n: int) -> None:
        """Extends the tables to `n` positions, in powers of two so that it happens rarely."""
        if n <= len(self._law):
            return
        self._law = law_of(self.sampler, 1 << (n - 1).bit_length(), self._law)
        self.buckets, self.probabilities = self._law.buckets, self._law.probabilities
        positions = np.arange(len(self._law), dtype=np.int64)
        self.thresholds = _thresholds(self.probabilities)
        self.base_hashes = mix64((positions.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN))
        self.has_zero = bool((self.probabilities == 0).any())
        uncertain = np.flatnonzero(self.probabilities < 1)
        self.certain_until = int(uncertain[0]) if len(uncertain) else len(positions)


def _thresholds(probabilities: Float64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """T with P(h <= T) = probability for a uniform 64-bit h; probability 0 is the caller's case."""
    certain = probabilities >= 1
    scaled = np.ceil(np.ldexp(np.where(certain, 0.5, probabilities), 64))
    below = np.maximum(scaled, 1).astype(np.uint64) - np.uint64(1)
    return np.where(certain, np.uint64(2**64 - 1), below)
