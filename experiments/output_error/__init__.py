"""What quantised or dropped keys and values do to the head's output; see README.md here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run

from ..common.entry import progress
from ..common.figures import by_layer, head_map, lines
from ..common.results import Result, head_columns, middle
from ..common.rows import WEIGHTS, chosen_layers, of_sections
from ..quantisation.core import quantised
from .core import heavy, logit_error, recent, relative_error, weighted_median, weights
from .grids import uneven
from .layer import Layer, Text, before_rope

GRIDS = {"kivi": "even grids (as KIVI)", "kvquant": "uneven grids (as KVQuant)"}
DROPS = {"recent": "the first and the latest keys", "heavy": "the latest keys and heavy hitters"}
Measured = tuple[np.ndarray, ...]
"""Errors of the output, of the output with changed keys alone and with changed values alone, and of logits."""


@dataclass(frozen=True)
class OutputError:
    """Relative error of the outputs of sampled queries, from a run with all keys and values.

    Attributes:
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`; of queries.
        sections: only queries in these; None for all. Keys are all there are.
        queries: how many of each document, evenly spaced among the captured ones.
        bits: the widths to try.
        group: numbers that share a scale in even grids: tokens of a key's channel, or channels of a value.
        outliers: share of numbers that uneven grids keep as they are.
        first: positions from the beginning that uneven grids keep as they are.
        keep: shares of the keys a query sees that are left when others are dropped.
        sinks: first positions that are never dropped where the latest keys are kept.
        history: captured queries of each document over whose weights heavy hitters are summed, evenly spaced.
    """

    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    queries: int = 8
    bits: list[int] = field(default_factory=lambda: [2, 3, 4, 8])
    group: int = 32
    outliers: float = 0.01
    first: int = 1
    keep: list[float] = field(default_factory=lambda: [0.5, 0.25, 0.1])
    sinks: int = 4
    history: int = 64

    def __post_init__(self) -> None:
        if not self.bits or not all(1 <= width <= 8 for width in self.bits):
            raise ConfigError(f"output_error.bits={self.bits} must be widths from 1 to 8")
        if not all(0 < share <= 1 for share in self.keep):
            raise ConfigError(f"output_error.keep={self.keep} must be shares above 0, 1 at most")
        if not 0 <= self.outliers < 1:
            raise ConfigError(f"output_error.outliers={self.outliers} must be a share below 1")
        if min(self.queries, self.history) < 1 or self.group < 2 or min(self.sinks, self.first) < 0:
            raise ConfigError(
                "output_error wants queries and history 1 or more, group 2 or more, sinks and first 0 or more"
            )
        if self.weights not in WEIGHTS:
            raise ConfigError(f"weights={self.weights} must be one of {', '.join(WEIGHTS)}")

    def measure(self, run: Run) -> Result:
        """Tables: heads (an error of the output per column), errors (per query head, method and setting).

        Raises:
            RunError: keys or values were sampled or not captured, or a layer's logits cannot be had from q and k.
        """
        some = of_sections(run, self.sections)
        layers = chosen_layers(run, self.layers, "q", "k", "v")
        require_all_keys(run)
        lengths = dict(run.examples().select("example_id", "n_tokens").iter_rows())
        found = [self._layer(run, some, layer, lengths) for layer in progress(layers, "output error")]
        errors = pl.concat([table for table, _ in found])
        heads = _by_head(errors)
        reasons = {layer: reason for layer, (_, reason) in zip(layers, found, strict=True) if reason}
        tables, said = {"heads": heads, "errors": errors}, _findings(errors, self, reasons, layers)
        return Result(tables, said, partial(_figures, errors, heads, self))

    def _layer(self, run: Run, some: Run, layer: int, lengths: dict[int, int]) -> tuple[pl.DataFrame, str]:
        """The errors of one layer, and why keys before RoPE are not among them; empty where they are."""
        here = Layer.of(run, some, layer, self.weights)
        texts = list(here.texts(lengths, self.queries, self.history))
        exact = [weights(text.logits, here.sinks) for text in texts]
        outputs = [
            here.outputs(shares, text.keys, here.values.vectors) for text, shares in zip(texts, exact, strict=True)
        ]
        counts = here.queries.weights[np.concatenate([text.queries for text in texts])]
        before = before_rope(run, here.keys, max(lengths.values()))
        rows = []
        for method, setting, changed in (*self._quantised(here, texts, before), *self._dropped(here, texts)):
            measured = [
                _measured(here, text, shares, output, change)
                for text, shares, output, change in zip(texts, exact, outputs, changed, strict=True)
            ]
            middles = [weighted_median(np.concatenate(one, axis=1), counts) for one in zip(*measured, strict=True)]
            rows.append(_rows(layer, here.queries.heads, method, setting, middles, len(counts)))
        return pl.concat(rows), before[2]

    def _quantised(self, here: Layer, texts: list[Text], before: Any) -> Iterator[tuple[str, float, Any]]:
        keys, values = here.keys.vectors, here.values.vectors
        for width in self.bits:
            even = keys.copy(), quantised(values, width, "token", self.group)
            for text in texts:
                even[0][:, text.keys] = quantised(keys[:, text.keys], width, "channel", self.group)
            yield "kivi", width, [even] * len(texts)
        rows, turn, _ = before
        source, kept = keys if rows is None else rows.vectors, here.keys.positions < self.first
        by_channel = uneven(_channels(source), self.bits, self.outliers)
        by_token = uneven(_tokens(values), self.bits, self.outliers)
        for width, some_keys, some_values in zip(self.bits, by_channel, by_token, strict=True):
            back = np.ascontiguousarray(some_keys.reshape(*source.shape[::2], -1).swapaxes(1, 2))
            restored = some_values.reshape(values.shape[1], len(values), -1).swapaxes(0, 1)
            back[:, kept], restored[:, kept] = source[:, kept], values[:, kept]
            yield "kvquant", width, [(turn(back), restored)] * len(texts)

    def _dropped(self, here: Layer, texts: list[Text]) -> Iterator[tuple[str, float, Any]]:
        for share in self.keep:
            yield "recent", share, [recent(text.seen, share, self.sinks) for text in texts]
            yield "heavy", share, [np.stack([heavy(text.seen, share, sums) for sums in text.sums]) for text in texts]


def require_all_keys(run: Run) -> None:
    """Raises RunError unless the run kept keys and values at all positions."""
    laws = [run.manifest.probability_by_bucket(kind) for kind in ("k", "v")]
    if any(not law or min(law.values()) < 1 for law in laws):
        raise RunError(
            f"{run.folder} has a sample of the keys, and an output is a sum over all: capture few queries and all keys "
            "with sampler=per_side (or everything with sampler=all) and 'capture.kinds=[q,k,v,k_pre]'"
        )


def _channels(x: np.ndarray) -> np.ndarray:
    """(heads, n, dim) as a line for each channel of each head."""
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(-1, x.shape[1])


def _tokens(x: np.ndarray) -> np.ndarray:
    """(heads, n, dim) as a line for each token, all heads side by side."""
    return np.ascontiguousarray(x.swapaxes(0, 1)).reshape(x.shape[1], -1)


def _measured(here: Layer, text: Text, shares: np.ndarray, output: np.ndarray, change: Any) -> Measured:
    """Errors, (heads, queries) each: of what is changed keys and values, or a mask of keys that are kept."""
    if isinstance(change, np.ndarray):
        kept = weights(np.where(change, text.logits, -np.inf), here.sinks)
        error = relative_error(here.outputs(kept, text.keys, here.values.vectors), output)
        return error, *[np.full_like(error, np.nan)] * 3
    keys, values = change
    logits = here.logits(text.queries, text.keys, keys)
    other = weights(logits, here.sinks)
    pairs = (other, values), (other, here.values.vectors), (shares, values)
    errors = [relative_error(here.outputs(one, text.keys, vectors), output) for one, vectors in pairs]
    return *errors, logit_error(logits, text.logits)


def _rows(
    layer: int, heads: tuple[int, ...], method: str, setting: float, middles: list[np.ndarray], queries: int
) -> pl.DataFrame:
    names = ("error", "error_keys", "error_values", "logit_error")
    columns: dict[str, Any] = {name: pl.Series(one).fill_nan(None) for name, one in zip(names, middles, strict=True)}
    labels = [pl.lit(method).alias("method"), pl.lit(float(setting)).alias("setting"), pl.lit(queries).alias("queries")]
    return head_columns(layer, heads, **columns).with_columns(*labels)


def named(method: str, setting: float) -> str:
    """A column of `heads`: kivi_2bit, recent_25."""
    return f"{method}_{setting:.0f}bit" if method in GRIDS else f"{method}_{100 * setting:g}"


def _by_head(errors: pl.DataFrame) -> pl.DataFrame:
    cases = errors.select("method", "setting").unique(maintain_order=True).iter_rows()
    wide = [
        errors.filter(method=method, setting=setting).select(
            "layer", "head", pl.col("error").alias(named(method, setting))
        )
        for method, setting in cases
    ]
    return pl.concat([wide[0], *(table.select(table.columns[-1]) for table in wide[1:])], how="horizontal")


def _findings(errors: pl.DataFrame, asked: OutputError, reasons: dict[int, str], layers: list[int]) -> list[str]:
    width, said = min(asked.bits), []
    for method, name in GRIDS.items():
        some = errors.filter(method=method, setting=float(width))
        worst = some.sort("error").row(-1, named=True)
        said.append(
            f"At {width} bits, {name} change an output by {middle(some['error']):.1%} (median of {len(some)} heads, "
            f"of each the median query): by {middle(some['error_keys']):.1%} with the keys alone, by "
            f"{middle(some['error_values']):.1%} with the values alone; most in layer {worst['layer']}, head "
            f"{worst['head']}: {worst['error']:.0%}."
        )
    said.append(_compared(errors, ("kvquant", "kivi"), float(width), f"At {width} bits", GRIDS))
    if reasons:
        why = next(iter(reasons.values()))
        said.append(f"Uneven grids are of keys after RoPE in {len(reasons)} of {len(layers)} layers: {why}.")
    for share in asked.keep:
        first, other = (middle(errors.filter(method=method, setting=share)["error"]) for method in DROPS)
        said.append(
            f"With {share:.0%} of the keys, outputs are off by {first:.1%} where {DROPS['recent']} are kept, and by "
            f"{other:.1%} where {DROPS['heavy']} are (median of heads)."
        )
    if asked.keep:
        share = min(asked.keep)
        said.append(_compared(errors, ("heavy", "recent"), share, f"With {share:.0%} of the keys", DROPS))
    return said


def _compared(errors: pl.DataFrame, pair: tuple[str, str], setting: float, when: str, names: dict[str, str]) -> str:
    wide = errors.filter(setting=setting).pivot("method", index=["layer", "head"], values="error")
    better = int((wide[pair[0]] < wide[pair[1]]).sum())
    return f"{when}, {names[pair[0]]} do less harm than {names[pair[1]]} in {better} of {len(wide)} heads."


def _figures(errors: pl.DataFrame, heads: pl.DataFrame, asked: OutputError) -> dict[str, Figure]:
    by_setting = errors.group_by("method", "setting").agg(pl.col("error", "error_keys", "error_values").median())
    width, parts = min(asked.bits), {"error": "both", "error_keys": "keys alone", "error_values": "values alone"}
    curves = {
        f"{method}, {part}": _curve(by_setting, method, column) for method in GRIDS for column, part in parts.items()
    }
    title = "output of a head: median over heads"
    figures = {"bits": lines(curves, title, "bits", "relative error", log_y=True)}
    figures["even_map"] = head_map(
        heads, named("kivi", width), f"relative error of the output, even grids, {width} bits"
    )
    if asked.keep:
        dropped = {method: _curve(by_setting, method, "error") for method in DROPS}
        figures["keep"] = lines(dropped, title, "share of keys that are kept", "relative error")
        share = min(asked.keep)
        figures["heavy_map"] = head_map(heads, named("heavy", share), f"relative error, {share:.0%} of the keys, heavy")
    each = {f"{method}, {width} bits": named(method, width) for method in GRIDS}
    return figures | {"by_layer": by_layer(heads, each, "error of the output by layer", "relative error")}


def _curve(by_setting: pl.DataFrame, method: str, column: str) -> tuple[list[float], list[float]]:
    some = by_setting.filter(method=method).sort("setting")
    return some["setting"].to_list(), some[column].to_list()
