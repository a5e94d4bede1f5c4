"""The reader: what a run captured, as tables and arrays.

A run is its manifest: only the files it names are read. Lazy polars scans skip files by layer and kind (from
the path) and row groups by head, bucket and position (from their statistics), and so does pyarrow where one
head is wanted as arrays: asking for one head of one layer reads one head of one layer. Neither torch nor
the model is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import polars as pl
from jaxtyping import Int32

from sniffer.errors import RunError
from sniffer.reader.documents import chosen_sections, documents_of, sections_of
from sniffer.reader.held import Held
from sniffer.reader.laws import inclusion_probability as inclusion_probability_of
from sniffer.reader.laws import of_buckets
from sniffer.reader.moments import moments_of
from sniffer.reader.remote_scan import scan_remote
from sniffer.reader.rotary import Rotary, rotary
from sniffer.reader.scan import check_parts, join, read_rows, require_room, scan_parts
from sniffer.reader.scores import scores
from sniffer.reader.texts import Decoder, texts_of, tokenizer_of, tokens_of, with_token
from sniffer.reader.training.in_batches import InBatches
from sniffer.reader.vectors import Pairs, Vectors
from sniffer.storage.law import joint
from sniffer.storage.manifest import Manifest
from sniffer.storage.remote import RemotePath
from sniffer.storage.schema import Part
from sniffer.types import ATTENTION, KIND, SECTION, Column, Moments, Rows


class Run(Held, InBatches):
    """A run folder, opened for reading; where it is opened `only` for some sections, other rows are not there."""

    def __init__(self, folder: Path, manifest: Manifest, only: tuple[str, ...] | None = None) -> None:
        super().__init__(folder, manifest)
        self._only = only

    @property
    def sections_only(self) -> tuple[str, ...] | None:
        """The sections that it is opened for; None for all rows."""
        return self._only

    @cached_property
    def sections(self) -> tuple[str, ...]:
        """The sections that its documents have; none in a run without sections."""
        return sections_of(self.folder, self.manifest)

    def only(self, sections: Iterable[str]) -> Run:
        """The same run, of which all that reads rows gives those of some sections, such as ["answer"].

        Raises:
            RunError: the run has no sections, or none of that name.
        """
        return Run(self.folder, self.manifest, chosen_sections(self.folder, self.manifest, sections, self.sections))

    def examples(self) -> pl.DataFrame:
        """The captured documents: example_id, source_id, n_tokens, truncated; of windows also source and offset.

        Where some part from another one (`branches`), also first_position: rows are of that one and those behind it.
        In a run with sections also those: of each document a list of {start, end, label} in tokens.
        """
        return cast(pl.DataFrame, pl.from_arrow(documents_of(self.folder, self.manifest)))

    def tokens(self, example_id: int) -> Int32[np.ndarray, " n_tokens"]:
        """The token ids of a document, as the model read them, special tokens included.

        Raises:
            RunError: the run has no such document, or kept no token ids.
        """
        return tokens_of(self.folder, self.manifest, example_id).token_ids

    def texts(
        self,
        example_ids: Iterable[int] | None = None,
        tokenizer: Decoder | None = None,
        special_tokens: bool = True,
    ) -> dict[int, str]:
        """What documents said, decoded from their token ids, by example_id.

        Args:
            example_ids: which; None takes all.
            tokenizer: one of transformers; None for the run's own, which must be at hand and do what it did then.
            special_tokens: whether to spell special tokens too, such as a BOS that was added.

        Raises:
            RunError: a document has no token ids, or there is no tokenizer.
        """
        table = tokens_of(self.folder, self.manifest)
        decoder = self._tokenizer if tokenizer is None else tokenizer
        return texts_of(table, example_ids, decoder, special_tokens=special_tokens)

    @cached_property
    def _tokenizer(self) -> Decoder:
        return tokenizer_of(self.manifest)

    def scan(
        self,
        layers: Iterable[int] | None = None,
        kinds: Iterable[str] | None = None,
        inclusion_probability: bool = False,
        token: bool | Decoder = False,
        kind: str | None = None,
    ) -> pl.LazyFrame:
        """All captured rows, lazily.

        Args:
            layers, kinds: what to read; None reads all vectors. A filter on the result does as well.
            kind: one kind alone; "attention" for the statistics of attention, whose columns are other than a vector's.
            inclusion_probability: whether to add that column (float64), each row's probability of
                having been kept.
            token: whether to add that column (string), each row's token as the vocabulary spells it; or the tokenizer
                to spell it with (see `texts`).

        Returns:
            A frame with columns layer, kind, head, bucket, position, token_id, example_id, vector, and section
            before it in runs with sections (an empty text where a token belongs to none). The vector is an Array of
            float32, or a List where vectors of different lengths meet. Statistics of attention have a column each in
            place of the vector.

        Raises:
            RunError: a layer or kind was not captured, vectors and statistics are asked for at once, or the tokenizer
                is not at hand.
        """
        if kind is not None:
            kinds = (kind,)
        pairs = self.captured(layers, kinds)
        if len({KIND[name].statistics for _, name in pairs}) > 1:
            raise RunError("statistics of attention have other columns than vectors: scan them with kind='attention'")
        by_columns: dict[tuple[Column, ...], list[Part]] = {}
        for columns in sorted({self.manifest.columns(*pair) for pair in pairs}, key=str):
            by_columns[columns] = []
        for part in self.manifest.parts:
            if (part.layer, part.kind) in pairs:
                by_columns[self.manifest.columns(part.layer, part.kind)].append(part)
        frame = join([self._scan(parts, columns) for columns, parts in by_columns.items()])
        if inclusion_probability:
            column = inclusion_probability_of(self.folder, self.manifest, {kind for _, kind in pairs})
            frame = frame.with_columns(column.alias("inclusion_probability"))
        if token is False:
            return frame
        return with_token(frame, self._tokenizer if token is True else token)

    def vectors(
        self,
        *,
        layer: int,
        head: int,
        kind: str = "q",
        buckets: Iterable[int] | None = None,
        max_position: int | None = None,
    ) -> Vectors:
        """One head's vectors as arrays; only that head's part of the file is read.

        Args:
            layer, head, kind: which; heads count key heads for k, v and k_pre.
            buckets: the buckets to keep; None keeps all.
            max_position: the last position to keep.

        Raises:
            RunError: the layer, kind or head was not captured; the message says which were.
        """
        self._check("head", head, self.heads(layer, kind), f"layer {layer}, kind {kind}")
        if KIND[kind].statistics:
            raise RunError(f"kind {kind} has no vectors: run.attention(layer={layer}, q_head={head}) has its columns")
        kept = None if buckets is None else frozenset(buckets)
        parts, dim = self.manifest.parts_of(layer, kind), self._dim(layer, kind)
        n_rows = sum(part.rows for part in parts) // len(self.heads(layer, kind))
        require_room(f"layer {layer}, kind {kind}, head {head}", n_rows, dim)
        sections = self.manifest.has_sections, self._only
        rows, vectors = read_rows(self.folder, parts, head, dim, kept, max_position, *sections)
        return Vectors(vectors, rows, of_buckets(self.folder, self.manifest, kind, rows.bucket, rows.section))

    def attention(self, *, layer: int, q_head: int) -> pl.DataFrame:
        """What the sampled queries of one head do with their keys, ordered by (bucket, example_id, position).

        Returns:
            A frame with columns example_id, position, bucket, token_id (section), and those of the captured statistics
            (sniffer.types.STATISTICS): numbers, or Arrays of them where a statistic has several.

        Raises:
            RunError: the layer, the head or statistics of attention were not captured.
        """
        rows = self._head(layer, ATTENTION, q_head).sort("bucket", "example_id", "position")
        values = [column.name for column in self.manifest.columns(layer, ATTENTION)]
        values = [*([SECTION] if self.manifest.has_sections else []), *values]
        return rows.select("example_id", "position", "bucket", "token_id", *values).collect()

    def moments(
        self, *, layer: int, head: int, kind: str, bucket: int | None = None, section: str | None = None
    ) -> Moments:
        """What all positions of all documents sum up to, of one head: n, mean, covariance, extremes and more.

        Args:
            layer, head, kind: which; heads count key heads for k, v and k_pre.
            bucket, section: of positions there alone; None for all. Sections as `capture.moments.sections` counts them
                apart, the empty text for all others.

        Raises:
            RunError: the run has no such moments; the message says which it has.
        """
        return moments_of([self], layer, head, kind, bucket, section)

    def rotary(self, layer: int) -> Rotary:
        """What turns q_pre and k_pre of a layer to any positions, and q and k back.

        Where q and q_pre, or k and k_pre, were captured, they are shown to be what it makes of one another.

        Raises:
            RunError: the layer was not captured, its RoPE is not known, and why, or does not give what was captured.
        """
        return rotary(self, layer)

    def scores(self, *, layer: int, q_head: int, example_id: int) -> pl.DataFrame:
        """Logits of all captured queries and keys of one document, as attention has them before softmax.

        Returns:
            A row for each query and key, by position: query_position, key_position, seen (False where a mask or window
            is between them; then logit is -inf), logit, key_inclusion_probability, and where `lse` was captured
            probability, the key's weight. Sums over keys by 1 / key_inclusion_probability are unbiased.

        Raises:
            RunError: q or k of that head and document were not captured, or a layer's logits cannot be had from them.
        """
        return scores(self, layer, q_head, example_id)

    def pairs(self, *, layer: int, q_head: int, key_kind: str = "k", query_kind: str = "q") -> Pairs:
        """Queries and keys at the same (example, position), ordered by (bucket, example, position).

        The key head is the one that the query head attends with (grouped-query attention). When q and
        k are drawn independently, few positions have both: capture with `sampler.seed_by` without
        "kind", or with sampler=all, to have all.

        Raises:
            RunError: the layer, a kind or a head was not captured; the message says which were.
        """
        if any(kind in KIND and KIND[kind].draw != draw for kind, draw in ((query_kind, "q"), (key_kind, "k"))):
            raise RunError(
                f"pairs of query_kind={query_kind!r} and key_kind={key_kind!r} make no sense: "
                "take q or q_pre for the first, and k, v or k_pre for the second"
            )
        queries = self._head(layer, query_kind, q_head).rename({"vector": "q"})
        self._check("kind", key_kind, tuple(self.manifest.selection[layer]), f"layer {layer}")
        k_head = self.manifest.layer(layer).key_head(q_head, key_kind)
        keys = self._head(layer, key_kind, k_head).select("example_id", "position", k="vector", k_bucket="bucket")
        table = queries.join(keys, on=["example_id", "position"]).sort("bucket", "example_id", "position").collect()
        rows = Rows.from_columns(table)
        of_query = of_buckets(self.folder, self.manifest, query_kind, rows.bucket, rows.section)
        of_key = of_buckets(self.folder, self.manifest, key_kind, table["k_bucket"].to_numpy(), rows.section)
        probability = joint(self.manifest.sampler, of_query, of_key)
        return Pairs(table["q"].to_numpy(), table["k"].to_numpy(), q_head, k_head, rows, probability)

    def check(self, layer: int, kind: str) -> None:
        """Looks at what is about to be read whole, all heads of one layer and kind, before memory is taken for it.

        Raises:
            RunError: a file is missing, damaged, or no part; or there is not so much memory.
        """
        parts, dim = self.manifest.parts_of(layer, kind), self._dim(layer, kind)
        what = f"layer {layer}, kind {kind}"
        require_room(what, sum(part.rows for part in parts), dim)
        check_parts(what, self.folder, parts, dim)

    def _together(self, layer: int, kind: str) -> list[tuple[Held, tuple[str, ...] | None]]:
        self.heads(layer, kind)
        return [(self, self._only)]

    def _head(self, layer: int, kind: str, head: int) -> pl.LazyFrame:
        self._check("head", head, self.heads(layer, kind), f"layer {layer}, kind {kind}")
        parts = self.manifest.parts_of(layer, kind)
        return self._scan(parts, self.manifest.columns(layer, kind)).filter(pl.col("head") == head)

    def _scan(self, parts: Sequence[Part], columns: Sequence[Column]) -> pl.LazyFrame:
        sections = self.manifest.has_sections
        if isinstance(self.folder, RemotePath):
            frame = scan_remote(self.folder, parts, columns, sections)
        else:
            frame = scan_parts(self.folder, parts, columns, sections)
        return frame if self._only is None else frame.filter(pl.col(SECTION).is_in(self._only))
