"""The config group `generate`: how a model goes on with each document. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from sniffer.errors import ConfigError
from sniffer.types import BACKENDS, CACHES, Answer, Caching

METHODS = ("greedy", "sample")
EOS = ("auto", "none")
BOTH = "both"
DEFAULT_BACKEND = "quanto"
CACHING = ("cache", "cache_backend", "prefill_chunk_size")
"""Keys of a cache; null leaves it to transformers."""
LARGEST = (1 << 31) - 1

if TYPE_CHECKING:
    Texts: TypeAlias = tuple[str, ...]
else:
    # OmegaConf takes what a user writes: a list, or one.
    Texts = Any


@dataclass
class GenerateConfig:
    """How a model goes on with a document.

    `greedy` takes the likeliest token; `sample` draws one, of `temperature`, of the `top_k` likeliest, and of the
    likeliest that have `top_p` of the probability together (null: of all), by `seed`, the document and the position.
    `stop`: texts that end it; `eos`: auto for the tokens that the model's generation config and its tokenizer name,
    none, or token ids. `live`: true captures in each step; false generates first, and captures from one forward over
    the whole document; both does both, keeps what is live, and tells how far they are apart. `cache` is one of
    sniffer.types.CACHES, `cache_backend` of a quantized one one of BACKENDS, null for what transformers takes;
    `prefill_chunk_size`: tokens of a prompt that go through the model at a time, null for all.
    """

    method: str = "greedy"
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0
    stop: Texts = ()
    eos: Any = "auto"
    live: Any = True
    cache: str | None = None
    cache_backend: str | None = None
    prefill_chunk_size: int | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"generate.method={self.method} is not one of {', '.join(METHODS)}")
        if not 1 <= self.max_new_tokens <= LARGEST:
            raise ConfigError(f"generate.max_new_tokens={self.max_new_tokens} must be 1 or more")
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"generate.temperature={self.temperature} must be more than 0; generate=greedy draws none"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"generate.top_p={self.top_p} must be more than 0 and at most 1, or null")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"generate.top_k={self.top_k} must be 1 or more, or null")
        if self.method == "greedy" and (self.temperature != 1.0 or self.top_p is not None or self.top_k is not None):
            raise ConfigError("generate.temperature, .top_p and .top_k are for generate=sample: greedy draws nothing")
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in stop):
            raise ConfigError(f"generate.stop={list(stop)} must be texts, none of them empty")
        self.stop = stop
        if self.eos not in EOS:
            ids = (self.eos,) if type(self.eos) is int else self.eos
            if not isinstance(ids, list | tuple) or not ids or not all(type(one) is int and one >= 0 for one in ids):
                raise ConfigError(f"generate.eos={self.eos} is not one of {', '.join(EOS)}, or token ids")
            self.eos = tuple(ids)
        if self.live not in (True, False, BOTH) or type(self.live) is int:
            raise ConfigError(f"generate.live={self.live} is not one of true, false, {BOTH}")
        self._check_cache()

    def _check_cache(self) -> None:
        if self.cache not in (None, *CACHES):
            raise ConfigError(f"generate.cache={self.cache} is not one of {', '.join(CACHES)}, or null")
        if self.cache_backend not in (None, *BACKENDS):
            raise ConfigError(
                f"generate.cache_backend={self.cache_backend} is not one of {', '.join(BACKENDS)}, or null"
            )
        if self.cache_backend is not None and self.cache != "quantized":
            raise ConfigError("generate.cache_backend is for generate.cache=quantized: set both, or leave it out")
        if self.prefill_chunk_size is not None and not 1 <= self.prefill_chunk_size <= LARGEST:
            raise ConfigError(f"generate.prefill_chunk_size={self.prefill_chunk_size} must be 1 or more, or null")

    @property
    def caching(self) -> Caching:
        """With what quantises a cache if nothing else is said, which is transformers' choice too."""
        backend = (self.cache_backend or DEFAULT_BACKEND) if self.cache == "quantized" else None
        return Caching(self.cache, backend, self.prefill_chunk_size)


@dataclass(frozen=True)
class Continuing:
    """What a run does with prompts, resolved against the model: `eos` are the tokens that end a text."""

    how: GenerateConfig
    eos: tuple[int, ...]
    answer: Answer

    @classmethod
    def of(cls, how: GenerateConfig, eos: tuple[int, ...], ending: int | None, answer: Answer) -> Continuing:
        """`eos` as the model has them, `ending` as its tokenizer does."""
        if how.eos == "auto":
            return cls(how, tuple(sorted({*eos, *([] if ending is None else [ending])})), answer)
        return cls(how, () if how.eos == "none" else tuple(how.eos), answer)

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        drawn = {key: getattr(self.how, key) for key in ("temperature", "top_p", "top_k", "seed")}
        return {
            "method": self.how.method,
            "max_new_tokens": self.how.max_new_tokens,
            **(drawn if self.how.method == "sample" else {}),
            "stop": list(self.how.stop),
            "eos": list(self.eos),
            "live": self.how.live,
            **self.how.caching.as_json(),
            "sections": list(self.answer.known),
        }
