"""Which rotary frequencies a head uses, and whether for position or for content; see README.md here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run

from ..common.entry import progress
from ..common.exact import exact_heads, has_exact, told
from ..common.figures import head_map
from ..common.results import Result, middle
from ..common.rows import chosen_layers, load, of_sections
from .core import LAYOUTS, Numbers, concentration, exact_pairs, find_layout, norms, rotary_pairs, speeds


@dataclass(frozen=True)
class RopeFrequencies:
    """Norm and concentration of each rotary pair, from vectors before RoPE.

    Attributes:
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        sections: only rows of these; None for all.
        layout: of rotary pairs: "half", "interleaved", or "auto", which finds it where the run has q too.
        rotary: leading dimensions that RoPE turns; None finds it where the run has q too, else all.
    """

    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    layout: str = "auto"
    rotary: int | None = None

    def __post_init__(self) -> None:
        if self.layout not in ("auto", *LAYOUTS):
            raise ConfigError(f"rope_frequencies.layout={self.layout} must be auto, {' or '.join(LAYOUTS)}")
        if self.rotary is not None and (self.rotary < 2 or self.rotary % 2):
            raise ConfigError(f"rope_frequencies.rotary={self.rotary} must be an even number, 2 or more")

    def measure(self, run: Run) -> Result:
        """Tables: pairs (per kind, head and rotary pair), heads (per head: its strongest and most fixed pair)."""
        run = of_sections(run, self.sections)
        layers = chosen_layers(run, self.layers, "q_pre")
        tables = [self._layer(run, layer) for layer in progress(layers, "rope frequencies")]
        pairs = pl.concat(tables)
        heads = _by_head(pairs)
        said = _findings(pairs, heads)
        if layers and has_exact(run, "q_pre", self.weights):
            said.append(told(run, "Norms and concentrations are"))
        return Result({"heads": heads, "pairs": pairs}, said, partial(_figures, pairs, heads))

    def _layer(self, run: Run, layer: int) -> pl.DataFrame:
        queries = load(run, layer, "q_pre", self.weights)
        layout, rotary, speed = self.layout, self.rotary, None
        if "q" in run.manifest.selection[layer]:
            rotated = load(run, layer, "q", self.weights)
            if layout == "auto":
                layout, found = find_layout(queries, rotated)
                rotary = rotary or found
            self._check(rotary, queries.vectors.shape[2])
            width = self._width(rotary, queries.vectors)
            before, after = (rotary_pairs(rows.vectors, layout, width) for rows in (queries, rotated))
            speed = speeds(before, after, queries)
        layout = "half" if layout == "auto" else layout
        kinds = [kind for kind in ("q_pre", "k_pre") if kind in run.manifest.selection[layer]]
        return pl.concat([self._kind(run, layer, kind, layout, rotary, speed) for kind in kinds])

    def _kind(
        self, run: Run, layer: int, kind: str, layout: str, rotary: int | None, speed: np.ndarray | None
    ) -> pl.DataFrame:
        exact = self._exact(run, layer, kind, layout, rotary)
        if exact is not None:
            return self._table(layer, kind, run.heads(layer, kind), *exact, speed)
        rows = load(run, layer, kind, self.weights)
        self._check(rotary, rows.vectors.shape[2])
        z = rotary_pairs(rows.vectors, layout, self._width(rotary, rows.vectors))
        return self._table(layer, kind, rows.heads, *norms(z, rows.weights), concentration(z, rows.weights), speed)

    def _exact(self, run: Run, layer: int, kind: str, layout: str, rotary: int | None) -> Numbers | None:
        """From moments over all positions, which pair dimensions as the layer does; None without them."""
        found, heads = exact_heads(run, layer, kind, self.weights), run.heads(layer, kind)
        if found is None or not set(heads) <= found.keys() or any(found[head].pairs is None for head in heads):
            return None
        rope = run.rope(layer)
        if layout != rope.layout.split("_")[0] or rotary not in (None, rope.rotary) or rope.first:
            return None
        return exact_pairs([found[head] for head in heads], rope.places(pre=True))

    @staticmethod
    def _table(
        layer: int,
        kind: str,
        of_heads: tuple[int, ...],
        norm: np.ndarray,
        share: np.ndarray,
        concentrated: np.ndarray,
        speed: np.ndarray | None,
    ) -> pl.DataFrame:
        heads, count = norm.shape
        return pl.DataFrame(
            {
                "layer": np.full(heads * count, layer, dtype=np.int16),
                "head": np.repeat(np.array(of_heads, dtype=np.int16), count),
                "kind": [kind] * (heads * count),
                "pair": np.tile(np.arange(count, dtype=np.int16), heads),
                "norm": norm.ravel(),
                "energy_share": share.ravel(),
                "concentration": concentrated.ravel(),
                "speed": pl.Series(
                    [None] * (heads * count) if speed is None else np.tile(speed, heads), dtype=pl.Float64
                ),
            }
        )

    @staticmethod
    def _width(rotary: int | None, vectors: np.ndarray) -> int:
        return vectors.shape[2] // 2 * 2 if rotary is None else rotary

    @staticmethod
    def _check(rotary: int | None, dim: int) -> None:
        if rotary is not None and rotary > dim:
            raise RunError(f"rotary={rotary} is more than the {dim} dimensions of a vector: leave it out to find it")


def _by_head(pairs: pl.DataFrame) -> pl.DataFrame:
    place = pl.col("pair").sort_by
    return (
        pairs.group_by("kind", "layer", "head")
        .agg(
            (pl.col("concentration") * pl.col("energy_share")).sum().alias("concentration"),
            pl.col("concentration").max().alias("largest_concentration"),
            place("concentration").last().alias("most_fixed_pair"),
            place("norm").last().alias("strongest_pair"),
            pl.col("energy_share").max().alias("strongest_share"),
        )
        .sort("layer", "head", "kind")
    )


def _findings(pairs: pl.DataFrame, heads: pl.DataFrame) -> list[str]:
    said = []
    for kind, name in (("q_pre", "Queries"), ("k_pre", "Keys")):
        some = heads.filter(kind=kind)
        if not len(some):
            continue
        fixed = int((some["largest_concentration"] >= 0.9).sum())
        said.append(
            f"{name} before RoPE have a concentration of {middle(some['concentration']):.2f} (median over heads, pairs "
            f"weighted by energy); {fixed} of {len(some)} heads have a pair of 0.9 or more, which points nearly one "
            "way whatever the token."
        )
    queries = pairs.filter(kind="q_pre").sort("pair")
    count = queries["pair"].n_unique()
    energy = queries.group_by("pair", maintain_order=True).agg(pl.col("energy_share").mean())["energy_share"]
    slow = float(energy.to_numpy()[count // 2 :].sum())
    said.append(f"The slower half of the {count} pairs holds {slow:.0%} of the queries' energy (mean over heads).")
    if queries["speed"].has_nulls():
        said.append("How fast pairs turn is unknown, and their layout assumed: add q to capture.kinds to measure both.")
    else:
        speed = queries["speed"].abs().to_numpy()
        said.append(
            f"Measured from the vectors, RoPE turns by {speed.max():.3g} radians per position in the fastest pair and "
            f"by {speed.min():.3g} in the slowest, one turn in {2 * np.pi / speed.min():,.0f} positions."
        )
    return said


def _figures(pairs: pl.DataFrame, heads: pl.DataFrame) -> dict[str, Figure]:
    queries = pairs.filter(kind="q_pre")
    by_pair = queries.group_by("layer", "pair").agg(pl.col("energy_share", "concentration").mean())
    return {
        "energy": head_map(by_pair, "energy_share", "queries' energy by rotary pair, mean over heads", column="pair"),
        "concentration": head_map(by_pair, "concentration", "concentration R of queries before RoPE", column="pair"),
        "concentration_heads": head_map(
            heads.filter(kind="q_pre"), "concentration", "concentration of queries, pairs weighted by energy"
        ),
    }
