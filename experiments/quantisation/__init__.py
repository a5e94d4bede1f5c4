"""What quantising keys costs, per channel and per token, before and after RoPE; see README.md here."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from sniffer.errors import ConfigError
from sniffer.reader.run import Run

from ..common.entry import progress
from ..common.exact import exact_moments, has_exact, root_mean_square, told
from ..common.figures import head_map, lines
from ..common.results import Result, head_columns, middle
from ..common.rows import LayerVectors, chosen_layers, load, of_sections
from .core import PER, channel_size, outliers, over_median, quantised, relative_error

KEYS = {"k_pre": "Before RoPE", "k": "After RoPE"}


@dataclass(frozen=True)
class Quantisation:
    """Relative error of quantised keys, and their outlier channels.

    Attributes:
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        sections: only rows of these; None for all.
        bits: the widths to try.
        group: numbers that share a scale: tokens of a channel, or channels of a token.
        outlier: from how many times the median channel's size a channel is an outlier.
    """

    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    bits: list[int] = field(default_factory=lambda: [2, 3, 4, 8])
    group: int = 32
    outlier: float = 4.0

    def __post_init__(self) -> None:
        if not self.bits or not all(1 <= width <= 16 for width in self.bits):
            raise ConfigError(f"quantisation.bits={self.bits} must be widths from 1 to 16")
        if self.group < 2 or self.outlier <= 1:
            raise ConfigError("quantisation wants group 2 or more, and outlier above 1")

    def measure(self, run: Run) -> Result:
        """Tables: errors (per kind, key head, bits and grouping), channels (per kind, key head and channel)."""
        run = of_sections(run, self.sections)
        layers = chosen_layers(run, self.layers, "k")
        jobs = [(layer, kind) for layer in layers for kind in KEYS if kind in run.manifest.selection[layer]]
        found = [self._layer(run, load(run, *job, self.weights)) for job in progress(jobs, "quantisation")]
        errors, channels = (pl.concat(tables) for tables in zip(*found, strict=True))
        heads = _by_head(errors, channels)
        tables, said = {"heads": heads, "errors": errors, "channels": channels}, _findings(errors, channels, self)
        if any(has_exact(run, kind, self.weights) for _, kind in jobs[:1]):
            said.append(told(run, "Sizes of channels are"))
        return Result(tables, said, partial(_figures, heads, errors))

    def _layer(self, run: Run, rows: LayerVectors) -> tuple[pl.DataFrame, pl.DataFrame]:
        # Groups of a channel are tokens that follow one another in their document, as far as they were sampled.
        rows = rows.take(np.lexsort((rows.positions, rows.example_ids)))
        errors = [self._errors(rows, bits, per) for bits in self.bits for per in PER]
        exact = exact_moments(run, rows.layer, rows.kind, self.weights, rows.heads)
        size = channel_size(rows.vectors, rows.weights) if exact is None else over_median(root_mean_square(exact))
        heads, dim = size.shape
        channels = pl.DataFrame(
            {
                "layer": np.full(heads * dim, rows.layer, dtype=np.int16),
                "head": np.repeat(np.array(rows.heads, dtype=np.int16), dim),
                "kind": [rows.kind] * (heads * dim),
                "channel": np.tile(np.arange(dim, dtype=np.int32), heads),
                "size": size.ravel(),
                "outlier": outliers(size, self.outlier).ravel(),
            }
        )
        return pl.concat(errors), channels

    def _errors(self, rows: LayerVectors, bits: int, per: str) -> pl.DataFrame:
        error = relative_error(rows.vectors, quantised(rows.vectors, bits, per, self.group), rows.weights)
        labels = [pl.lit(rows.kind).alias("kind"), pl.lit(bits).alias("bits"), pl.lit(per).alias("per")]
        return head_columns(rows.layer, rows.heads, error=error).with_columns(*labels)


def _by_head(errors: pl.DataFrame, channels: pl.DataFrame) -> pl.DataFrame:
    """One row per kind and key head: each error as a column, such as channel_2bit, and the outlier channels."""
    named = errors.with_columns(pl.format("{}_{}bit", "per", "bits").alias("name"))
    wide = named.pivot("name", index=["layer", "head", "kind"], values="error")
    counts = channels.group_by("layer", "head", "kind").agg(
        pl.col("outlier").sum().alias("outlier_channels"), pl.col("size").max().alias("largest_channel")
    )
    return wide.join(counts, on=["layer", "head", "kind"]).sort("layer", "head", "kind")


def _findings(errors: pl.DataFrame, channels: pl.DataFrame, settings: Quantisation) -> list[str]:
    said = []
    bits = 2 if 2 in settings.bits else min(settings.bits)
    for kind, when in KEYS.items():
        some = errors.filter(kind=kind, bits=bits)
        if len(some):
            by = {per: middle(some.filter(per=per)["error"]) for per in PER}
            wide = some.pivot("per", index=["layer", "head"], values="error")
            better = int((wide["channel"] < wide["token"]).sum())
            said.append(
                f"{when}, at {bits} bits, the median relative error is {by['channel']:.3f} per channel and "
                f"{by['token']:.3f} per token; per channel is better in {better} of {len(wide)} key heads."
            )
            large = channels.filter(kind=kind)
            top = large.sort("size", descending=True).row(0, named=True)
            with_any = large.group_by("layer", "head").agg(pl.col("outlier").any())
            said.append(
                f"{when}, {int(with_any['outlier'].sum())} of {len(with_any)} key heads have a channel "
                f"{settings.outlier:g} times the median one; the largest is {top['size']:.0f} times (layer "
                f"{top['layer']}, head {top['head']}, channel {top['channel']})."
            )
    return said


def _figures(heads: pl.DataFrame, errors: pl.DataFrame) -> dict[str, Figure]:
    curves = {}
    for kind, when in KEYS.items():
        for per in PER:
            some = errors.filter(kind=kind, per=per).group_by("bits").agg(pl.col("error").median()).sort("bits")
            if len(some):
                curves[f"{when}, per {per}"] = (some["bits"].to_list(), some["error"].to_list())
    figure = lines(curves, "quantising keys: median over heads", "bits", "relative error", log_y=True)
    outlier_map = head_map(heads.filter(kind="k"), "largest_channel", "largest channel over the median one, after RoPE")
    return {"errors": figure, "largest_channel": outlier_map}
