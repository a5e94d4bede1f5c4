"""Models: what is known of one before and after it is loaded, and what it can be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from sniffer.types.documents import Chat, LengthClasses
from sniffer.types.rope import Rope

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LayerGeometry:
    """Shapes and facts of one attention layer, as seen at its tap.

    `heads` and `dims` map each kind to its number of heads and its vector length. `scaling` is the
    factor on q.k before softmax, where the call names it or a probe has shown it; `sliding_window` the number of
    positions a query can look back over, itself included, or None for full attention. Where a layer is `chunked`, that
    number is the size of chunks instead, side by side from position 0, and a query sees those of its own. A layer that
    `selects` attends to some of these keys alone, chosen by what they hold.
    """

    layer: int
    module: str
    heads: Mapping[str, int]
    dims: Mapping[str, int]
    scaling: float | None
    sliding_window: int | None
    chunked: bool = False
    selects: bool = False

    @property
    def full(self) -> bool:
        """Whether a query attends to all keys before it."""
        return self.sliding_window is None and not self.selects

    def first_key(self, positions: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """The first position that queries at these can see; the last is their own."""
        return first_key(positions, self.sliding_window, chunked=self.chunked)

    def key_head(self, query_head: int, kind: str = "k") -> int:
        """The key head of a kind that a query head attends with (grouped-query attention, Ainslie et al., 2023)."""
        return key_head(query_head, self.heads["q"], self.heads[kind])


def first_key(positions: Int[np.ndarray, " n"], window: int | None, *, chunked: bool = False) -> Int[np.ndarray, " n"]:
    """As `LayerGeometry.first_key`, of a window or chunk."""
    if window is None:
        return np.zeros_like(positions)
    return positions - positions % window if chunked else np.maximum(0, positions - window + 1)


def key_head(query_head: int, query_heads: int, key_heads: int) -> int:
    """The key head that a query head attends with, of so many of each."""
    return query_head * key_heads // query_heads


def by_number(geometry: Iterable[LayerGeometry]) -> dict[int, LayerGeometry]:
    """Layers by their number in the model."""
    return {layer.layer: layer for layer in geometry}


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
        vocabulary: token ids are below this.
    """

    layers: int | None
    query_heads: int | None
    key_heads: int | None
    max_positions: int | None
    reach: int | None = None
    position_key: str = "max_position_embeddings"
    rows_before: int = 0
    rope: bool = False
    vocabulary: int | None = None


@dataclass(frozen=True)
class Outline:
    """A model's shapes, without its weights: the layers that would be tapped, and what the backbone weighs.

    `pre_missing` as in `Backbone`; `dtype` is a name such as bfloat16, `itemsize` the bytes of one value. Where weights
    are quantised as they are loaded, by `quantization`, they take `quantized_bytes`, about.
    """

    geometry: tuple[LayerGeometry, ...]
    dtype: str
    itemsize: int
    parameters: int
    pre_missing: str = ""
    quantization: str | None = None
    quantized_bytes: int | None = None

    @property
    def weights(self) -> int:
        """Bytes of the backbone."""
        return self.parameters * self.itemsize if self.quantized_bytes is None else self.quantized_bytes


@dataclass(frozen=True)
class WorkingMemory:
    """What a forward of so many rows and tokens needs beside the weights.

    `peak` are bytes in use at one time, at most; `mask` those of the largest attention mask among them, 0 where a model
    attends to everything before, which fused kernels know without one.
    """

    rows: int
    tokens: int
    peak: int
    mask: int


@runtime_checkable
class Tokenize(Protocol):
    """Text to token ids, special tokens included as the model's tokenizer adds them.

    A plain function will do. What else a dataset may ask for, a tokenizer has if it is a `FullTokenize`.
    """

    def __call__(self, text: str) -> Int[np.ndarray, " n_tokens"]: ...


class FullTokenize(Tokenize, Protocol):
    """A tokenizer that can be asked for all that a dataset may want."""

    @property
    def beginning(self) -> int | None:
        """The token that texts begin with, where it has one; whether it adds it is another matter."""

    @property
    def ending(self) -> int | None:
        """The token that ends a text, where it has one."""

    def without_special(self, text: str) -> Int[np.ndarray, " n_tokens"]:
        """Text to token ids, nothing added."""

    @property
    def has_offsets(self) -> bool:
        """Whether it says which characters tokens stand for."""

    def offsets(self, text: str, special: bool) -> Int[np.ndarray, "3 n_tokens"]:
        """Token ids, the first character that each stands for, and the one after the last; equal where it is for none.

        `special`: whether special tokens are added.
        """

    def template(self, wanted: str | None) -> str:
        """The chat template that is meant by its name, its text, or by nothing; raises ValueError."""

    def chat(self, chat: Chat) -> Int[np.ndarray, " n_tokens"]:
        """A chat to token ids, as its template has them; raises what the template raises."""

    def rendered(self, chat: Chat) -> str:
        """A chat as its template has it, before that is turned into token ids; raises what the template raises."""

    def describe(self) -> dict[str, str]:
        """What the manifest records of it."""


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


class LanguageModel(Protocol):
    """A loaded model with its head, which goes on with a text token by token, with a cache.

    `eos` are the tokens that end its texts. `pads`: whether rows of different lengths may share a batch, padded on the
    left.
    """

    eos: tuple[int, ...]
    pads: bool

    def generate(
        self,
        input_ids: Int[np.ndarray, "batch seq"],
        mask: Int[np.ndarray, "batch seq"],
        choose: Callable[[torch.Tensor], Int[np.ndarray, " batch"] | None],
        most: int,
    ) -> None:
        """Runs prompts, padded on the left, and then a token of each row at a time.

        After each forward `choose` is given the logits (batch, vocabulary) of the last tokens, and says which tokens
        come next, or None to end it; there are at most so many forwards.
        """


class Backbone(ModelFacts, Protocol):
    """A loaded model without its head, ready to be tapped; with a `language_model` where it was asked for."""

    layer_of: Mapping[torch.nn.Module, int]
    rope: Mapping[int, Rope]

    @property
    def language_model(self) -> LanguageModel | None:
        return None

    def __call__(self, input_ids: torch.Tensor) -> Any:
        """Runs (batch, seq) token ids, right-padded, with no cache and no mask."""

    def model_config(self) -> dict[str, Any]:
        """The config of the model as it runs, as plain values."""


class Checkpoint(Protocol):
    """A model that can be had: what `config.model` builds. Cheap questions first, weights last."""

    def check(self) -> None:
        """Finds out within seconds, before torch is imported, whether it can be had; raises CheckpointError."""

    def limits(self) -> ModelLimits: ...

    def load_tokenizer(self) -> tuple[Tokenize, int]:
        """A tokenize function and the id to pad with."""

    def load(self) -> Backbone: ...

    def outline(self) -> Outline:
        """The shapes that `load` would bring, without any weights; for plans."""

    def working_memory(self, rows: int, tokens: int) -> WorkingMemory | None:
        """What a forward would need beside the weights, found without any; None where nobody knows."""
        return None

    def describe(self) -> dict[str, Any]:
        """What the manifest records of it: architecture, revision, file digests."""
