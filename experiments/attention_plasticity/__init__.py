"""How far content can still change which key a head prefers; see README.md here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run

from ..common.entry import progress
from ..common.figures import by_layer, canvas, grid, head_map
from ..common.results import Result, head_columns, middle
from ..common.rows import chosen_layers, load_queries_and_keys
from .core import COVARIANCES, BucketPairs, measure, model_queries
from .pairs import RULES, draw_pairs

AVERAGES = ("bucket_pairs", "key_pairs")


@dataclass(frozen=True)
class AttentionPlasticity:
    """Plasticity of every head, by the buckets of query and keys.

    Attributes:
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        covariance: of the queries' residuals: "full", or "diagonal" in a basis whose first axis is the drift.
        pairs: keys of one "bucket", or within a "distance" of each other.
        distance: how far, as a share of the document's length.
        average: over "bucket_pairs" or "key_pairs".
        count: key pairs drawn per key bucket, and the seed that draws them.
        min_rows: queries that a bucket must have to be modelled.
    """

    layers: Any = None
    weights: str = "positions"
    covariance: str = "full"
    pairs: str = "bucket"
    distance: float = 0.05
    average: str = "bucket_pairs"
    count: int = 256
    seed: int = 0
    min_rows: int = 8

    def __post_init__(self) -> None:
        choices = {"covariance": COVARIANCES, "pairs": RULES, "average": AVERAGES}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise ConfigError(f"attention_plasticity.{key}={getattr(self, key)} must be {' or '.join(known)}")
        if self.count < 1 or self.min_rows < 2 or not 0 < self.distance <= 1:
            raise ConfigError("attention_plasticity wants count 1 or more, min_rows 2 or more, distance in (0, 1]")

    def measure(self, run: Run) -> Result:
        """Tables: heads, bucket_pairs (per head, query bucket and key bucket), profile (per head, query bucket)."""
        layers = chosen_layers(run, self.layers, "q", "k")
        lengths = dict(run.examples().select("example_id", "n_tokens").rows())
        found = [self._layer(run, layer, lengths) for layer in progress(layers, "attention plasticity")]
        heads, cells = (pl.concat(tables) for tables in zip(*found, strict=True))
        profile = (
            cells.group_by("layer", "head", "query_bucket", maintain_order=True)
            .agg(pl.col("plasticity").mean(), pl.col("query_position").first())
            .sort("layer", "head", "query_bucket")
        )
        tables = {"heads": heads, "bucket_pairs": cells, "profile": profile}
        return Result(tables, _findings(heads, profile), _figures(heads, cells, profile))

    def _layer(self, run: Run, layer: int, lengths: dict[int, int]) -> tuple[pl.DataFrame, pl.DataFrame]:
        queries, keys = load_queries_and_keys(run, layer, self.weights)
        rng = np.random.default_rng([self.seed, layer])
        drawn = draw_pairs(keys, self.pairs, self.count, rng, self.distance, lengths)
        found = measure(model_queries(queries, self.covariance, self.min_rows), keys, drawn)
        if not len(found.counts):
            raise RunError(
                f"layer {layer} of {run.folder} has no bucket of {self.min_rows} queries with two keys in an "
                "earlier bucket: capture more with sampler.base_rate, smaller buckets or longer documents"
            )
        heads = head_columns(
            layer,
            queries.heads,
            plasticity=found.mean(self.average),
            first=found.values[:, found.query_buckets == found.query_buckets.min()].mean(1),
            last=found.values[:, found.query_buckets == found.query_buckets.max()].mean(1),
        )
        return heads, _cells(layer, queries.heads, found)


def _cells(layer: int, heads: tuple[int, ...], found: BucketPairs) -> pl.DataFrame:
    count, cells = found.values.shape
    return pl.DataFrame(
        {
            "layer": np.full(count * cells, layer, dtype=np.int16),
            "head": np.repeat(np.array(heads, dtype=np.int16), cells),
            "query_bucket": np.tile(found.query_buckets, count).astype(np.int32),
            "key_bucket": np.tile(found.key_buckets, count).astype(np.int32),
            "query_position": np.tile(found.query_positions, count),
            "plasticity": found.values.ravel(),
            "key_pairs": np.tile(found.counts, count),
        }
    )


def _findings(heads: pl.DataFrame, profile: pl.DataFrame) -> list[str]:
    rigid, plastic = (heads.sort("plasticity", descending=way).row(0, named=True) for way in (False, True))
    falls = int((heads["last"] < heads["first"]).sum())
    curve = profile.group_by("query_bucket").agg(pl.col("plasticity").median()).sort("query_bucket")["plasticity"]
    return [
        f"The median plasticity is {middle(heads['plasticity']):.2f} (1: content decides which key wins, 0: it is "
        f"settled beforehand); {int((heads['plasticity'] < 0.5).sum())} of {len(heads)} heads are below 0.5.",
        f"Most rigid is layer {rigid['layer']}, head {rigid['head']} ({rigid['plasticity']:.2f}), most plastic layer "
        f"{plastic['layer']}, head {plastic['head']} ({plastic['plasticity']:.2f}).",
        f"From the first to the last bucket of queries the median over heads goes from {curve[0]:.2f} to "
        f"{curve[-1]:.2f}; it falls in {falls} of {len(heads)} heads.",
    ]


def _figures(heads: pl.DataFrame, cells: pl.DataFrame, profile: pl.DataFrame) -> dict[str, Figure]:
    return {
        "plasticity": head_map(heads, "plasticity", "attention plasticity"),
        "by_layer": by_layer(heads, {"all buckets": "plasticity"}, "attention plasticity by layer", "plasticity"),
        "profile": _profile(profile),
        "buckets": _buckets(cells),
    }


def _profile(profile: pl.DataFrame) -> Figure:
    """Every head's curve in grey, the median over heads in front."""
    figure, axes = canvas("plasticity over positions; median of heads in black")
    for _, head in profile.group_by("layer", "head"):
        axes.plot(head["query_position"], head["plasticity"], color="grey", alpha=0.15, linewidth=0.7)
    middle = profile.group_by("query_bucket").agg(pl.col("query_position", "plasticity").median()).sort("query_bucket")
    axes.plot(middle["query_position"], middle["plasticity"], color="black", marker="o")
    axes.set(xlabel="position of the query", ylabel="plasticity", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    return figure


def _buckets(cells: pl.DataFrame) -> Figure:
    middle = cells.group_by("query_bucket", "key_bucket").agg(pl.col("plasticity").median())
    matrix, queries, keys = grid(middle.rename({"query_bucket": "layer"}), "plasticity", "key_bucket")
    figure, axes = canvas("median plasticity of heads by buckets")
    image = axes.imshow(matrix, origin="lower", aspect="auto", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks(range(len(keys)), [str(bucket) for bucket in keys])
    axes.set_yticks(range(len(queries)), [str(bucket) for bucket in queries])
    axes.set(xlabel="bucket of the keys", ylabel="bucket of the query")
    figure.colorbar(image, ax=axes)
    return figure
