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
from typing import Any, cast

import numpy as np
import polars as pl
import yaml
from jaxtyping import Float64, Int32

from sniffer.errors import RunError, first_line, unbroken
from sniffer.reader.scan import check_parts, join, read_rows, require_room, scan_parts
from sniffer.reader.texts import Decoder, texts_of, tokenizer_of, tokens_of, with_token
from sniffer.reader.vectors import Pairs, Vectors, probabilities
from sniffer.storage.examples import examples_table
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.schema import Part
from sniffer.storage.untrusted import read_yaml
from sniffer.types import KIND, KINDS, Rows


class Run:
    """A run folder, opened for reading."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.manifest.status}, {self.manifest.rows:,} rows)"

    @property
    def complete(self) -> bool:
        """False while the run goes on and after an interruption: what is there is right, but not all."""
        return self.manifest.status == "complete"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration that made the run."""
        path = self.folder / RunFolder.CONFIG
        try:
            return dict(read_yaml(path))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise RunError(f"could not read {path}: {first_line(error)}; restore the file, or capture again") from error

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.manifest.selection)

    @property
    def kinds(self) -> tuple[str, ...]:
        captured = {kind for kinds in self.manifest.selection.values() for kind in kinds}
        return tuple(kind for kind in KINDS if kind in captured)

    def heads(self, layer: int, kind: str) -> tuple[int, ...]:
        """The captured heads of one layer and kind.

        Raises:
            RunError: the layer or the kind was not captured; the message says which were.
        """
        self._check("layer", layer, self.layers, "this run")
        self._check("kind", kind, tuple(self.manifest.selection[layer]), f"layer {layer}")
        return self.manifest.selection[layer][kind]

    def captured(self, layers: Iterable[int] | None = None, kinds: Iterable[str] | None = None) -> set[tuple[int, str]]:
        """The captured (layer, kind) pairs among those wanted; None wants all.

        Raises:
            RunError: a layer or kind was not captured at all.
        """
        layers = self.layers if layers is None else tuple(layers)
        kinds = self.kinds if kinds is None else tuple(kinds)
        for layer in layers:
            self._check("layer", layer, self.layers, "this run")
        for kind in kinds:
            self._check("kind", kind, self.kinds, "this run")
        return {(layer, kind) for layer in layers for kind in kinds if kind in self.manifest.selection[layer]}

    def examples(self) -> pl.DataFrame:
        """The captured documents: example_id, source_id, n_tokens, truncated; of windows also source and offset."""
        if self.manifest.examples is None:
            raise RunError(f"{self.folder} has no examples yet: the run was stopped before its first commit")
        path = self.folder / self.manifest.examples.path
        try:
            return cast(pl.DataFrame, pl.from_arrow(examples_table(path, self.manifest.examples)))
        except (OSError, ValueError) as error:
            reason = unbroken(error)
            raise RunError(f"could not read {path}: {reason}; `python -m sniffer.runs verify` tells more") from error

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
    ) -> pl.LazyFrame:
        """All captured rows, lazily.

        Args:
            layers, kinds: what to read; None reads all. A filter on the result does as well.
            inclusion_probability: whether to add that column (float64), each row's probability of
                having been kept.
            token: whether to add that column (string), each row's token as the vocabulary spells it; or the tokenizer
                to spell it with (see `texts`).

        Returns:
            A frame with columns layer, kind, head, bucket, position, token_id, example_id, vector. The
            vector is an Array of float32, or a List where vectors of different lengths meet.

        Raises:
            RunError: a layer or kind was not captured, or the tokenizer is not at hand.
        """
        pairs = self.captured(layers, kinds)
        by_dim: dict[int, list[Part]] = {dim: [] for dim in sorted({self._dim(*pair) for pair in pairs})}
        for part in self.manifest.parts:
            if (part.layer, part.kind) in pairs:
                by_dim[self._dim(part.layer, part.kind)].append(part)
        frame = join([scan_parts(self.folder, parts, dim) for dim, parts in by_dim.items()])
        if inclusion_probability:
            law = self._probability_by_bucket
            column = pl.col("bucket").replace_strict(list(law), list(law.values()), return_dtype=pl.Float64)
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
        kept = None if buckets is None else frozenset(buckets)
        parts, dim = self.manifest.parts_of(layer, kind), self._dim(layer, kind)
        n_rows = sum(part.rows for part in parts) // len(self.heads(layer, kind))
        require_room(f"layer {layer}, kind {kind}, head {head}", n_rows, dim)
        rows, vectors = read_rows(self.folder, parts, head, dim, kept, max_position)
        return Vectors(vectors, rows, self._probabilities(rows))

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
        keys = self._head(layer, key_kind, k_head).select("example_id", "position", k="vector")
        table = queries.join(keys, on=["example_id", "position"]).sort("bucket", "example_id", "position").collect()
        rows = Rows.from_columns(table)
        probability = self._probabilities(rows)
        if "kind" in self.manifest.sampler.get("seed_by", ()):
            probability **= 2  # two independent draws
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

    def _head(self, layer: int, kind: str, head: int) -> pl.LazyFrame:
        self._check("head", head, self.heads(layer, kind), f"layer {layer}, kind {kind}")
        parts = self.manifest.parts_of(layer, kind)
        return scan_parts(self.folder, parts, self._dim(layer, kind)).filter(pl.col("head") == head)

    def _probabilities(self, rows: Rows) -> Float64[np.ndarray, " n"]:
        """With which each row was kept."""
        if unknown := set(np.unique(rows.bucket).tolist()) - self._probability_by_bucket.keys():
            raise RunError(
                f"{self.folder} has rows of buckets {_ranges(unknown)}, which its manifest does not know: "
                f"`python -m sniffer.runs verify {self.folder}` tells more"
            )
        return probabilities(self._probability_by_bucket, rows.bucket)

    @cached_property
    def _probability_by_bucket(self) -> dict[int, float]:
        law = self.manifest.probability_by_bucket
        unknown = self.manifest.rows_by_bucket.keys() - law.keys()
        if unknown:
            raise RunError(
                f"{self.folder / RunFolder.MANIFEST} is broken: it gives no probability for buckets "
                f"{_ranges(unknown)}; restore the file, or capture again"
            )
        return law

    def _dim(self, layer: int, kind: str) -> int:
        return self.manifest.layer(layer).dims[kind]

    def _check(self, what: str, value: Any, known: Sequence[Any], where: str) -> None:
        if value not in known:
            raise RunError(f"{what} {value} was not captured: {where} has {what}s {_ranges(known)}")


def _ranges(values: Iterable[Any]) -> str:
    """Names values briefly: 0-29, 31."""
    values = list(values)
    if not all(isinstance(value, int) for value in values):
        return ", ".join(map(str, values))
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
