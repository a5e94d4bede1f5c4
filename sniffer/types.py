"""The things that travel through the pipeline, and the words for them.

A *position* is a token's place in its document, from 0. A *kind* names which vector of attention is
meant. A *draw* is one set of kept positions; kinds that describe the same token side share it. A
*bucket* is a range of positions that is sampled at one rate.

This module needs numpy only, so that reading a run never imports torch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, Int64

if TYPE_CHECKING:
    import torch

KINDS = ("q", "k", "v", "q_pre", "k_pre")
"""q, k, v: what attention receives. q_pre, k_pre: what it would receive if RoPE were the identity."""

COMPRESSIONS = ("auto", "zstd", "none")
"""Of vectors on disk, as output.compression has it; see `codec`."""

WIDE = ("float32", "float64")
"""Dtypes of models whose values, stored as float32, compression does little for."""

DRAW_OF_KIND = {"q": "q", "q_pre": "q", "k": "k", "k_pre": "k", "v": "k"}
"""Kinds of one vector share its draw, so that q_pre has q's positions, and k_pre and v have k's."""


def codec(compression: str, source_dtype: str) -> str:
    """The codec of vectors on disk, zstd or none.

    Args:
        compression: one of COMPRESSIONS; auto is zstd where the model's dtype is narrower than the float32 on disk.
        source_dtype: the model's dtype, such as bfloat16.
    """
    if compression != "auto":
        return compression
    return "none" if source_dtype in WIDE else "zstd"


@dataclass(frozen=True)
class Document:
    """One tokenised text.

    `source_id` is the exact id in the data; `example_id` the 63-bit integer that stands for it in
    every table and seeds its draws. `truncated`: tokens were cut off to respect a limit. `first_position` is that of
    the first token, 0 but where a call in a notebook begins in the middle of a text.
    """

    example_id: int
    source_id: str
    token_ids: Int32[np.ndarray, " n_tokens"]
    truncated: bool
    first_position: int = 0

    @property
    def n_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class TokenBatch:
    """Documents that go through the backbone together, padded on the right to the longest."""

    documents: tuple[Document, ...]
    pad_id: int

    @property
    def seq_len(self) -> int:
        return max(document.n_tokens for document in self.documents)

    @property
    def n_tokens(self) -> int:
        """Real tokens, without padding."""
        return sum(document.n_tokens for document in self.documents)

    @property
    def n_rows(self) -> int:
        """A row each document; calls in a notebook may hold several in one."""
        return len(self.documents)

    @property
    def padded_tokens(self) -> int:
        return self.n_rows * self.seq_len

    def input_ids(self) -> Int64[np.ndarray, "batch seq"]:
        ids = np.full((len(self.documents), self.seq_len), self.pad_id, dtype=np.int64)
        for row, document in enumerate(self.documents):
            ids[row, : document.n_tokens] = document.token_ids
        return ids

    def cells(self, picks: Picks) -> Int32[np.ndarray, " picks"]:
        """Where picks lie in the batch: row * seq + column."""
        return picks.rows * np.int32(self.seq_len) + picks.positions

    def tokens(self, picks: Picks) -> Int32[np.ndarray, " picks"]:
        """The token ids at picks."""
        starts = np.cumsum([0] + [document.n_tokens for document in self.documents[:-1]])
        tokens = np.concatenate([document.token_ids for document in self.documents])
        return tokens[starts[picks.rows] + picks.positions].astype(np.int32)


@dataclass(frozen=True)
class Picks:
    """The positions of one batch that one draw keeps, ordered by (row, position).

    `rows` says which document of the batch each pick is from. All heads of the draw's layer and
    kinds share them.
    """

    rows: Int32[np.ndarray, " picks"]
    positions: Int32[np.ndarray, " picks"]
    buckets: Int32[np.ndarray, " picks"]

    def __len__(self) -> int:
        return len(self.positions)


@dataclass(frozen=True)
class LengthClasses:
    """Which lengths a model treats alike, so that documents of these lengths may share a batch.

    A forward is as long as its longest document, and some models turn positions by other angles in a long one.

    Attributes:
        breaks: the lengths at which another class begins, ascending.
        apart_from: from this length on, each length is a class of its own; None if none is.
    """

    breaks: tuple[int, ...] = ()
    apart_from: int | None = None

    def of(self, length: int) -> tuple[int, int]:
        """The class of a length: equal for lengths that are treated alike."""
        apart = self.apart_from is not None and length >= self.apart_from
        return bisect_right(self.breaks, length), length if apart else 0

    def as_json(self) -> dict[str, Any]:
        """As plain values; empty where all lengths are alike."""
        apart = {} if self.apart_from is None else {"apart_from": self.apart_from}
        return ({"breaks": list(self.breaks)} if self.breaks else {}) | apart


@dataclass(frozen=True)
class LayerGeometry:
    """Shapes and facts of one attention layer, as seen at its tap.

    `heads` and `dims` map each kind to its number of heads and its vector length. `scaling` is the
    factor on q.k before softmax, where the call names it; `sliding_window` the number of positions a
    query can look back over, itself included, or None for full attention.
    """

    layer: int
    module: str
    heads: Mapping[str, int]
    dims: Mapping[str, int]
    scaling: float | None
    sliding_window: int | None


@dataclass(frozen=True)
class ModelLimits:
    """What a checkpoint's config tells before any weight is read; None where it does not say.

    Attributes:
        layers, query_heads: there are no more than these.
        max_positions: the tokens of the longest document that the model was made for.
        reach: the tokens that it can be given at most, where a scaling of RoPE serves longer ones.
        position_key: how the config calls the number of positions.
        rows_before: what that number counts beside positions.
        rope: whether positions are rotary.
    """

    layers: int | None
    query_heads: int | None
    key_heads: int | None
    max_positions: int | None
    reach: int | None = None
    position_key: str = "max_position_embeddings"
    rows_before: int = 0
    rope: bool = False


@dataclass(frozen=True)
class Outline:
    """A model's shapes, without its weights: the layers that would be tapped, and what the backbone weighs.

    `pre_missing` as in `Backbone`; `dtype` is a name such as bfloat16, `itemsize` the bytes of one value.
    """

    geometry: tuple[LayerGeometry, ...]
    dtype: str
    itemsize: int
    parameters: int
    pre_missing: str = ""


@runtime_checkable
class Tokenize(Protocol):
    """Text to token ids, special tokens included as the model's tokenizer adds them."""

    def __call__(self, text: str) -> Int[np.ndarray, " n_tokens"]: ...


class ModelFacts(Protocol):
    """What is known of a loaded model, wherever it is.

    `pre_missing` says why it shows no q_pre and k_pre; empty where it does. `vocabulary` counts the rows of its
    embedding. `lengths` says which documents may share a batch.
    """

    @property
    def geometry(self) -> tuple[LayerGeometry, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def pre_missing(self) -> str: ...

    @property
    def vocabulary(self) -> int: ...

    @property
    def lengths(self) -> LengthClasses: ...

    def describe(self) -> dict[str, Any]:
        """What the manifest records of the loaded model beyond its geometry, such as layers left out."""


class Backbone(ModelFacts, Protocol):
    """A loaded model without its head, ready to be tapped."""

    layer_of: Mapping[torch.nn.Module, int]

    def __call__(self, input_ids: torch.Tensor) -> Any:
        """Runs (batch, seq) token ids, right-padded, with no cache and no mask."""


class Checkpoint(Protocol):
    """A model that can be had: what `config.model` builds. Cheap questions first, weights last."""

    def check(self) -> None:
        """Finds out within seconds, before torch is imported, whether it can be had; raises CheckpointError."""

    def limits(self) -> ModelLimits: ...

    def tokenizer(self) -> tuple[Tokenize, int]:
        """A tokenize function and the id to pad with."""

    def load(self) -> Backbone: ...

    def outline(self) -> Outline:
        """The shapes that `load` would bring, without any weights; for plans."""

    def describe(self) -> dict[str, Any]:
        """What the manifest records of it: architecture, revision, file digests."""


class Dataset(Protocol):
    """Texts that can be read: what `config.dataset` builds."""

    @property
    def max_tokens(self) -> int | None:
        """Tokens to keep of each text; None for as many as the model takes."""

    def __len__(self) -> int: ...

    def check(self) -> None:
        """Meets everything that can be known to be wrong without reading all texts; raises DatasetError."""

    def texts(self) -> Iterator[tuple[int, str, str]]:
        """Yields (example_id, source_id, text) in order; empty texts included."""

    def describe(self) -> dict[str, Any]: ...
