"""How many dimensions the keys of a layer really use, before and after RoPE; see README.md here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float64, Int64
from matplotlib.figure import Figure

from sniffer.errors import ConfigError
from sniffer.reader.run import Run

from ..common.entry import progress
from ..common.exact import exact_moments, has_exact, told
from ..common.figures import canvas, head_map
from ..common.moments import Moments, moments_of, ratio
from ..common.results import Result, head_columns, middle
from ..common.rows import LayerVectors, chosen_layers, has_rows, load, of_sections

KEYS = {"k_pre": "Before RoPE", "k": "After RoPE"}


@dataclass(frozen=True)
class KeyRank:
    """Rank of the keys at a share of their variance, by head, and by layer with all its heads side by side.

    Attributes:
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        sections: only rows of these; None for all.
        variance: the share that the counted dimensions must hold.
    """

    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    variance: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.variance < 1:
            raise ConfigError(f"key_rank.variance={self.variance} must lie between 0 and 1")

    def measure(self, run: Run) -> Result:
        """Tables: heads (per kind and key head), layers (per kind, of all heads' keys as one long vector)."""
        run = of_sections(run, self.sections)
        layers = chosen_layers(run, self.layers, "k")
        jobs = [(layer, kind) for layer in layers for kind in KEYS if kind in run.manifest.selection[layer]]
        found = [self._layer(run, *job) for job in progress(jobs, "key rank")]
        heads, joint = (pl.concat(tables) for tables in zip(*found, strict=True))
        said = _findings(heads, self.variance)
        if any(has_exact(run, kind, self.weights) for _, kind in jobs[:1]):
            said.append(told(run, "Ranks of heads are"))
        return Result({"heads": heads, "layers": joint}, said, partial(_figures, heads, self.variance))

    def _layer(self, run: Run, layer: int, kind: str) -> tuple[pl.DataFrame, pl.DataFrame]:
        heads = run.heads(layer, kind)
        exact = exact_moments(run, layer, kind, self.weights, heads)
        if exact is not None and not has_rows(run, layer, kind):
            table = self._table(layer, kind, heads, exact, int(exact.weight))
            return table, table.head(0).drop("head")
        rows = load(run, layer, kind, self.weights)
        side, n = moments_of(side_by_side(rows)), len(rows)
        table = self._table(layer, kind, heads, exact or moments_of(rows), int(exact.weight) if exact else n)
        return table, self._table(layer, kind, (-1,), side, n).drop("head")

    def _table(self, layer: int, kind: str, heads: tuple[int, ...], found: Moments, rows: int) -> pl.DataFrame:
        values = spectrum(found)
        table = head_columns(
            layer,
            heads,
            rank=rank_at(values, self.variance),
            effective_rank=effective_rank(values),
            dim=[values.shape[1]] * len(heads),
            rows=[rows] * len(heads),
        )
        return table.with_columns(pl.lit(kind).alias("kind"))


def side_by_side(rows: LayerVectors) -> LayerVectors:
    """All heads of a layer as one: its vectors behind one another."""
    heads, n, dim = rows.vectors.shape
    joined = rows.vectors.transpose(1, 0, 2).reshape(1, n, heads * dim)
    return replace(rows, heads=(0,), vectors=joined)


def spectrum(keys: Moments) -> Float64[np.ndarray, "heads dim"]:
    """Eigenvalues of each head's covariance, largest first."""
    return np.maximum(np.linalg.eigvalsh(keys.covariance)[:, ::-1], 0)


def rank_at(values: Float64[np.ndarray, "heads dim"], variance: float) -> Int64[np.ndarray, " heads"]:
    """The fewest principal components that hold this share of the variance; 0 where nothing varies.

    Source: Loki, Singhania and others, 2024 (arXiv 2406.02542), who find keys of rank far below their length.
    """
    running = np.cumsum(values, axis=1)
    # Rounding must not add a dimension where the share is met exactly.
    wanted = variance * running[:, -1:] * (1 - 1e-12)
    return np.where(running[:, -1] > 0, (running < wanted).sum(1) + 1, 0)


def effective_rank(values: Float64[np.ndarray, "heads dim"]) -> Float64[np.ndarray, " heads"]:
    """exp of the entropy of the eigenvalues' shares (Roy and Vetterli, 2007): between 1 and dim."""
    shares = ratio(values, values.sum(1, keepdims=True))
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.exp(-(shares * logs).sum(1))


def _findings(heads: pl.DataFrame, variance: float) -> list[str]:
    said = []
    for kind, when in KEYS.items():
        some = heads.filter(kind=kind)
        if len(some):
            low, high = some.sort("rank").row(0, named=True), some.sort("rank").row(-1, named=True)
            said.append(
                f"{when}, {variance:.0%} of the keys' variance takes {middle(some['rank']):.0f} of {some['dim'][0]} "
                f"dimensions (median of {len(some)} key heads), from {low['rank']} (layer {low['layer']}, head "
                f"{low['head']}) to {high['rank']} (layer {high['layer']}, head {high['head']})."
            )
    wide = heads.pivot("kind", index=["layer", "head"], values="rank")
    if "k_pre" in wide.columns:
        more = int((wide["k"] > wide["k_pre"]).sum())
        said.append(f"RoPE raises the rank in {more} of {len(wide)} key heads.")
    else:
        said.append("Keys before RoPE were not captured: add k_pre to capture.kinds to compare.")
    if (short := heads.filter(pl.col("rows") < 4 * pl.col("dim"))).height:
        said.append(f"Careful: {short.height} heads have fewer than four rows per dimension; their ranks come out low.")
    return said


def _figures(heads: pl.DataFrame, variance: float) -> dict[str, Figure]:
    figure, axes = canvas(f"key rank at {variance:.0%} of variance; each head a dot, the line their mean")
    for kind, when in KEYS.items():
        some = heads.filter(kind=kind)
        if len(some):
            mean = some.group_by("layer").agg(pl.col("rank").mean()).sort("layer")
            line = axes.plot(mean["layer"], mean["rank"], label=when)[0]
            axes.scatter(some["layer"], some["rank"], s=8, alpha=0.5, color=line.get_color())
    axes.set(xlabel="layer", ylabel="rank", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return {"rank": figure, "rank_map": head_map(heads.filter(kind="k"), "rank", "key rank after RoPE")}
