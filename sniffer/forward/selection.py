"""Selection: which heads of which layers are captured, for each kind.

Heads are chosen as query heads. The key heads that belong to them follow from the grouped-query map,
key head = query head * n_key_heads // n_query_heads, so that every captured query has its keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from sniffer.errors import ConfigError
from sniffer.forward.moments.request import MomentsConfig
from sniffer.forward.numbers import Heads, heads_of, layers_of, numbers
from sniffer.hashing import key_of
from sniffer.limits import HEADS, LAYERS
from sniffer.types import (
    ALL_STATISTICS,
    ATTENTION,
    KIND,
    KINDS,
    STATISTICS,
    LayerGeometry,
    ModelLimits,
    by_number,
    draw_of,
)

if TYPE_CHECKING:
    Kinds: TypeAlias = list[str]
else:
    # OmegaConf takes what a user writes: a list, or one.
    Kinds = Any


@dataclass
class HeadSampling:
    """Keeps `count` query heads in all (null: every one), drawn by `seed`."""

    count: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ConfigError(f"capture.head_sampling.count={self.count} must be 1 or more, or null for all")


@dataclass
class CaptureConfig:
    """Which vectors to keep, and which statistics of attention.

    `kinds` are a list, or one. `layers` and `heads` (query heads) are null for all, or numbers and ranges: 3, "0-7"
    (both ends included), "0:8" (the end left out), or a list of these. Here they become sorted tuples. Heads may be
    given by layer, {0: [1, 2], 5: "0-3"}, which says the layers too. `attention` is
    null, one or several names of sniffer.types.STATISTICS, or all; here it becomes a tuple in their order.
    `attention_top` is how many of the largest weights `top` keeps, `attention_sections` those that `section` weighs.
    `moments` says of what sums over all positions are kept.
    """

    kinds: Kinds = field(default_factory=lambda: ["q", "k"])
    layers: Any = None
    heads: Any = None
    head_sampling: HeadSampling = field(default_factory=HeadSampling)
    full_attention_only: bool = False
    attention: Any = None
    attention_top: int = 8
    attention_sections: Any = None
    moments: MomentsConfig = field(default_factory=MomentsConfig)

    def __post_init__(self) -> None:
        self.kinds = listed(self.kinds)
        self.attention_sections = section_names("capture.attention_sections", self.attention_sections)
        self.attention = statistics("capture.attention", self.attention, self.attention_sections or ())
        if not 1 <= self.attention_top <= MOST_TOP:
            raise ConfigError(f"capture.attention_top={self.attention_top} must be from 1 to {MOST_TOP}")
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds or len(set(self.kinds)) != len(self.kinds):
            raise ConfigError(f"capture.kinds={self.kinds} must name some of {list(KINDS)}, each once")
        self.layers = numbers("capture.layers", self.layers)
        self.heads = heads_of("capture.heads", self.heads)
        if isinstance(self.heads, dict):
            self.layers = layers_of(self.heads, self.layers)


MOST_TOP = 1 << 16


def section_names(key: str, value: Any) -> tuple[str, ...] | None:
    """Names of sections, in the order given; None stays None.

    Raises:
        ConfigError: no name, or one twice.
    """
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else tuple(value)
    if not names or len(set(names)) != len(names) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{key}={value} must name sections, each once")
    return names


def statistics(key: str, value: Any, sections: Sequence[str] = ()) -> tuple[str, ...] | None:
    """Names of statistics of attention, in the order of columns; None stays None.

    Args:
        sections: those whose weight may be asked for.

    Raises:
        ConfigError: a name that is none of them.
    """
    if value is None:
        return None
    named = [value] if isinstance(value, str) else list(value)
    every = (*ALL_STATISTICS, *(("section",) if sections else ()))
    wanted = {name for item in named for name in (every if item == "all" else (item,))}
    if unknown := [name for name in wanted if name not in STATISTICS]:
        raise ConfigError(f"{key} names {unknown}: take some of {list(STATISTICS)}, or all (which is all but out)")
    if "section" in wanted and not sections:
        raise ConfigError(f"{key} names section: say which in capture.attention_sections")
    return tuple(name for name in STATISTICS if name in wanted)


def listed(kinds: Any) -> list[Any]:
    """Kinds as a list, where one was given too."""
    return [*kinds] if isinstance(kinds, list | tuple) else [] if kinds is None else [kinds]


@dataclass(frozen=True)
class Selection:
    """The captured heads of each (layer, kind), ascending; a pair that is absent is not captured."""

    heads: Mapping[tuple[int, str], tuple[int, ...]]
    moments: Mapping[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    """Those of which sums over all positions are kept."""
    note: str | None = None
    """What a request got less of than it asked for."""

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for layer, _ in self.heads}))

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(kind for _, kind in self.heads))

    @property
    def draws(self) -> tuple[tuple[int, str], ...]:
        """The (layer, draw) pairs that need positions."""
        return tuple(dict.fromkeys(map(draw_of, self.heads)))

    @property
    def wants_pre(self) -> bool:
        return any(KIND[kind].pre for _, kind in (*self.heads, *self.moments))

    def by_layer(self) -> dict[int, dict[str, tuple[int, ...]]]:
        """The captured heads by layer, then kind."""
        return {layer: {kind: self.heads[layer, kind] for kind in self.kinds_of(layer)} for layer in self.layers}

    def counted_by_layer(self) -> dict[str, dict[str, list[int]]]:
        """The heads of which sums are kept, as the manifest has them."""
        found: dict[str, dict[str, list[int]]] = {}
        for (layer, kind), heads in self.moments.items():
            found.setdefault(str(layer), {})[kind] = list(heads)
        return found

    def kinds_of(self, layer: int) -> tuple[str, ...]:
        return tuple(kind for other, kind in self.heads if other == layer)


def check_request(capture: CaptureConfig, limits: ModelLimits) -> None:
    """Refuses layers and heads that the checkpoint's config already rules out.

    Raises:
        ConfigError: a layer or head that does not exist; or the checkpoint claims more than a run can count.
    """
    for what, claimed, most in (("layers", limits.layers, LAYERS), ("query heads", limits.query_heads, HEADS)):
        if claimed is not None and claimed > most:
            raise ConfigError(f"the checkpoint's config claims {claimed:,} {what}, more than a run can have ({most:,})")
    if limits.layers is not None and capture.layers is not None:
        _check_members("capture.layers", capture.layers, range(limits.layers), "layers")
    if limits.query_heads is not None and capture.heads is not None:
        by_layer = capture.heads.values() if isinstance(capture.heads, dict) else [capture.heads]
        for heads in by_layer:
            _check_members("capture.heads", heads, range(limits.query_heads), "query heads")


def select(geometry: Sequence[LayerGeometry], capture: CaptureConfig, pre_missing: str = "") -> Selection:
    """Resolves the request against the layers that the model really has.

    `pre_missing` says why the model shows no pre kinds, for the message.

    Raises:
        ConfigError: a layer, head or kind that does not exist, or nothing left to capture.
    """
    layers = by_number(geometry)
    wanted = tuple(layers) if capture.layers is None else tuple(capture.layers)
    _check_members("capture.layers", wanted, layers, "attention layers")
    eligible = [
        layers[number]
        for number in sorted(set(wanted))
        if not (capture.full_attention_only and not layers[number].full)
    ]
    for key, kinds in (("capture.kinds", capture.kinds), ("capture.moments.kinds", capture.moments.kinds or ())):
        for layer in eligible:
            _check_kinds(key, kinds, layer, pre_missing)
    query_heads = _sample_heads(_requested_heads(eligible, capture.heads), capture)
    heads, moments = (
        {
            (layer.layer, kind): _heads_of_kind(layer, kind, query_heads[layer.layer])
            for layer in eligible
            for kind in kinds
            if query_heads[layer.layer]
        }
        for kinds in ((*capture.kinds, *((ATTENTION,) if capture.attention else ())), capture.moments.kinds or ())
    )
    if not heads:
        raise ConfigError("the capture.* selection leaves no head to capture: widen layers, heads or kinds")
    return Selection(heads, moments, _fewer(eligible, capture))


def _requested_heads(layers: Iterable[LayerGeometry], heads: Heads) -> dict[int, tuple[int, ...]]:
    requested = {}
    for layer in layers:
        existing = range(layer.heads["q"])
        named = heads.get(layer.layer, ()) if isinstance(heads, dict) else heads
        wanted = existing if named is None else sorted(set(named))
        _check_members("capture.heads", wanted, existing, f"query heads of layer {layer.layer}")
        requested[layer.layer] = tuple(wanted)
    return requested


def _fewer(eligible: Sequence[LayerGeometry], capture: CaptureConfig) -> str | None:
    """That there are not so many heads as were to be drawn, so that all are taken."""
    count, there = capture.head_sampling.count, sum(map(len, _requested_heads(eligible, capture.heads).values()))
    if count is None or count <= there:
        return None
    return f"all {there} query heads are taken: capture.head_sampling.count={count} asks for more than there are"


def _sample_heads(requested: dict[int, tuple[int, ...]], capture: CaptureConfig) -> dict[int, tuple[int, ...]]:
    """Keeps `head_sampling.count` query heads in all, or as many as there are; a larger count keeps a superset."""
    count = capture.head_sampling.count
    if count is None:
        return requested
    pairs = [(layer, head) for layer, heads in requested.items() for head in heads]
    drawn = sorted(pairs, key=lambda pair: key_of(capture.head_sampling.seed, "head", *pair))[:count]
    return {layer: tuple(h for h in heads if (layer, h) in set(drawn)) for layer, heads in requested.items()}


def _heads_of_kind(layer: LayerGeometry, kind: str, query_heads: Sequence[int]) -> tuple[int, ...]:
    if KIND[kind].draw == "q":
        return tuple(query_heads)
    return tuple(sorted({layer.key_head(head, kind) for head in query_heads}))


def _check_kinds(key: str, kinds: Sequence[str], layer: LayerGeometry, pre_missing: str) -> None:
    missing = [kind for kind in kinds if kind not in layer.heads]
    if missing:
        reason = f" ({pre_missing})" if pre_missing else ""
        raise ConfigError(
            f"{key} names {missing}, which layer {layer.layer} of this model does not show{reason}:"
            f" take some of {list(layer.heads)}"
        )


def _check_members(key: str, wanted: Iterable[int], existing: Iterable[int], what: str) -> None:
    missing = sorted(set(wanted) - set(existing))
    if missing:
        numbers = sorted(existing)
        shown = f"{numbers[0]} to {numbers[-1]}" if numbers == list(range(len(numbers))) else str(numbers)
        raise ConfigError(f"{key} names {missing}, but the model's {what} are {shown}")
