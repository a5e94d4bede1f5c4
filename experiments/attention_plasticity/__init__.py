"""How far content can still change which key a head prefers; see README.md here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import polars as pl
from matplotlib.figure import Figure

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run

from ..common.entry import progress
from ..common.figures import by_layer, canvas, grid, head_map
from ..common.results import Result, head_columns, middle
from ..common.rows import LayerVectors, chosen_layers, load_queries_and_keys, of_sections
from .core import COVARIANCES, BucketPairs, measure, model_queries
from .pairs import RULES, draw_pairs
from .prefix import Prefix, measure_prefixes, model_buckets
from .prefix_tables import distances_figure, of_prefixes

AVERAGES = ("bucket_pairs", "key_pairs")

VARIANTS: dict[str, dict[str, str]] = {
    "thesis": {"covariance": "diagonal", "pairs": "prefix", "average": "positions"},
    "one_bucket": {"covariance": "full", "pairs": "bucket", "average": "bucket_pairs"},
    "one_bucket_diagonal": {"covariance": "diagonal", "pairs": "bucket", "average": "bucket_pairs"},
    "near": {"covariance": "full", "pairs": "distance", "average": "key_pairs"},
}
"""What was published under the name of plasticity: `thesis` as it is defined, the others as code had it on the way."""


@dataclass(frozen=True)
class AttentionPlasticity:
    """Plasticity of every head, by the buckets of query and keys.

    Attributes:
        layers: as capture.layers; None for all.
        weights: "positions" or "rows", see `experiments.common.rows.load`.
        sections: only rows of these; None for all.
        variant: one of VARIANTS; each of the next three is as it says unless given.
        covariance: of the queries: "full", or "diagonal" in a basis whose first axis is the drift.
        pairs: two keys of all the "prefix", of one "bucket", or within a "distance" of each other.
        distance: how far, as a share of the document's length.
        average: over the "positions" of queries, with pairs of the prefix; else over "bucket_pairs" or "key_pairs".
        count: key pairs drawn per bucket, of queries or of keys, and the seed that draws them.
        min_rows: queries that a bucket must have to be modelled.
    """

    layers: Any = None
    weights: str = "positions"
    sections: list[str] | None = None
    variant: str = "thesis"
    covariance: str | None = None
    pairs: str | None = None
    distance: float = 0.05
    average: str | None = None
    count: int = 256
    seed: int = 0
    min_rows: int = 8

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ConfigError(f"attention_plasticity.variant={self.variant} must be {' or '.join(VARIANTS)}")
        averages = ("positions",) if self.how("pairs") == "prefix" else AVERAGES
        if self.average is None and self.how("average") not in averages:
            object.__setattr__(self, "average", averages[0])
        choices = {"covariance": COVARIANCES, "pairs": ("prefix", *RULES), "average": averages}
        for key, known in choices.items():
            if self.how(key) not in known:
                raise ConfigError(f"attention_plasticity.{key}={self.how(key)} must be {' or '.join(known)}")
        if self.count < 1 or self.min_rows < 2 or not 0 < self.distance <= 1:
            raise ConfigError("attention_plasticity wants count 1 or more, min_rows 2 or more, distance in (0, 1]")

    def how(self, key: str) -> str:
        """A choice: as given, else as the variant has it."""
        given: str | None = getattr(self, key)
        return VARIANTS[self.variant][key] if given is None else given

    def measure(self, run: Run) -> Result:
        """Tables: heads, bucket_pairs (per head, query bucket and key bucket), profile (per head, query bucket).

        With pairs of the prefix also fifths (per head and fifth of the context) and distances (per head, by how far two
        keys are apart and their middle is from the query).
        """
        run = of_sections(run, self.sections)
        layers = chosen_layers(run, self.layers, "q", "k")
        lengths = dict(run.examples().select("example_id", "n_tokens").rows())
        found = [self._layer(run, layer, lengths) for layer in progress(layers, "attention plasticity")]
        tables = {name: pl.concat([one[name] for one in found]) for name in found[0]}
        if "profile" not in tables:
            tables["profile"] = self._profile(tables["bucket_pairs"])
        tables["profile"] = tables["profile"].sort("layer", "head", "query_bucket")
        return Result(tables, _findings(tables), partial(_figures, tables))

    def quick(self, run: Run) -> pl.DataFrame:
        """The table of heads alone."""
        if self.how("pairs") != "prefix":
            return self.measure(run).tables["heads"]
        run = of_sections(run, self.sections)
        longest = max(run.examples()["n_tokens"].to_list())
        found = []
        for layer in chosen_layers(run, self.layers, "q", "k"):
            pairs = self.prefixes(run, layer)
            found.append(_heads_of_prefixes(layer, run.heads(layer, "q"), pairs, pairs.fifths(longest)))
        return pl.concat(found)

    def _layer(self, run: Run, layer: int, lengths: dict[int, int]) -> dict[str, pl.DataFrame]:
        queries, keys = load_queries_and_keys(run, layer, self.weights)
        rng = np.random.default_rng([self.seed, layer])
        if self.how("pairs") == "prefix":
            return self._of_prefixes(run, layer, queries, keys, rng, max(lengths.values()))
        drawn = draw_pairs(keys, self.how("pairs"), self.count, rng, self.distance, lengths)
        found = measure(model_queries(queries, self.how("covariance"), self.min_rows), keys, drawn)
        self._require(len(found.counts), run, layer)
        first, last = found.query_buckets.min(), found.query_buckets.max()
        average = self.how("average")
        heads = head_columns(
            layer,
            queries.heads,
            plasticity=found.mean(average),
            first=found.of(found.query_buckets == first).mean(average),
            last=found.of(found.query_buckets == last).mean(average),
        ).with_columns(drop=pl.col("first") - pl.col("last"))
        return {"heads": heads, "bucket_pairs": _cells(layer, queries.heads, found)}

    def prefixes(self, run: Run, layer: int) -> Prefix:
        """Every drawn pair of one layer by its distances, as figures want it; with pairs of the prefix only.

        Raises:
            RunError: as `measure`.
        """
        rng = np.random.default_rng([self.seed, layer])
        return self._prefix(run, layer, *load_queries_and_keys(run, layer, self.weights), rng)

    def _prefix(
        self, run: Run, layer: int, queries: LayerVectors, keys: LayerVectors, rng: np.random.Generator
    ) -> Prefix:
        model = model_buckets(queries, self.how("covariance"), self.min_rows)
        sees = run.manifest.layer(layer)
        window, chunked = sees.sliding_window, sees.chunked
        found = measure_prefixes(queries, keys, model, self.count, rng, window, chunked=chunked)
        self._require(len(found.buckets), run, layer)
        return found

    def _of_prefixes(
        self, run: Run, layer: int, queries: LayerVectors, keys: LayerVectors, rng: np.random.Generator, longest: int
    ) -> dict[str, pl.DataFrame]:
        found = self._prefix(run, layer, queries, keys, rng)
        fifths = found.fifths(longest)
        heads = _heads_of_prefixes(layer, queries.heads, found, fifths)
        return {"heads": heads, **of_prefixes(layer, queries.heads, found, fifths)}

    def _require(self, found: int, run: Run, layer: int) -> None:
        if not found:
            raise RunError(
                f"layer {layer} of {run.folder} has no bucket of {self.min_rows} queries with two keys in an "
                "earlier bucket: capture more with sampler.base_rate, smaller buckets or longer documents"
            )

    def _profile(self, cells: pl.DataFrame) -> pl.DataFrame:
        weights = pl.col("key_pairs") if self.how("average") == "key_pairs" else pl.lit(1)
        value = (pl.col("plasticity") * weights).sum() / (weights * pl.col("plasticity").is_not_null()).sum()
        return cells.group_by("layer", "head", "query_bucket", maintain_order=True).agg(
            value.alias("plasticity"), pl.col("query_position").first()
        )


def _heads_of_prefixes(layer: int, heads: tuple[int, ...], found: Prefix, fifths: np.ndarray) -> pl.DataFrame:
    return head_columns(
        layer,
        heads,
        plasticity=found.overall(found.profile),
        first=fifths[:, 0],
        last=fifths[:, -1],
        empirical=found.overall(found.empirical),
    ).with_columns(
        pl.col("first", "last").fill_nan(None),
        drop=(pl.col("first") - pl.col("last")).fill_nan(None),
        beyond_gaussian=pl.col("empirical") - pl.col("plasticity"),
    )


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


def _findings(tables: Mapping[str, pl.DataFrame]) -> list[str]:
    heads, profile = tables["heads"], tables["profile"]
    rigid, plastic = (heads.sort("plasticity", descending=way).row(0, named=True) for way in (False, True))
    curve = profile.group_by("query_bucket").agg(pl.col("plasticity").median()).sort("query_bucket")["plasticity"]
    drops = heads["drop"].drop_nulls()
    ends = "fifth of the context" if "fifths" in tables else "bucket of queries"
    found = [
        f"The median plasticity is {middle(heads['plasticity']):.2f} (1: content decides which key wins, 0: it is "
        f"settled beforehand); {int((heads['plasticity'] < 0.5).sum())} of {len(heads)} heads are below 0.5.",
        f"Most rigid is layer {rigid['layer']}, head {rigid['head']} ({rigid['plasticity']:.2f}), most plastic layer "
        f"{plastic['layer']}, head {plastic['head']} ({plastic['plasticity']:.2f}).",
        f"From the first to the last bucket of queries the median over heads goes from {curve[0]:.2f} to "
        f"{curve[-1]:.2f}.",
    ]
    if len(drops):
        found.append(
            f"From the first to the last {ends} plasticity falls by {middle(drops):.3f} in the median; it falls in "
            f"{int((drops > 0).sum())} of {len(drops)} heads."
        )
    else:
        found.append(f"No queries were modelled in the first or in the last {ends}: a drop cannot be told.")
    if "beyond_gaussian" in heads.columns:
        found.append(
            f"Counted over the real queries instead of Gaussian ones, the median is {middle(heads['empirical']):.2f}; "
            f"the two differ by {middle(heads['beyond_gaussian'].abs()):.3f} in the median head."
        )
    return found


def _figures(tables: Mapping[str, pl.DataFrame]) -> dict[str, Figure]:
    heads = tables["heads"]
    figures = {
        "plasticity": head_map(heads, "plasticity", "attention plasticity"),
        "by_layer": by_layer(heads, {"all buckets": "plasticity"}, "attention plasticity by layer", "plasticity"),
        "profile": _profile(tables["profile"]),
        "buckets": _buckets(tables["bucket_pairs"]),
    }
    if "distances" in tables:
        figures["distances"] = distances_figure(tables["distances"])
        if heads["drop"].is_not_null().all():
            figures["drop"] = head_map(heads, "drop", "plasticity of the first fifth minus the last")
    return figures


def _profile(profile: pl.DataFrame) -> Figure:
    """Every head's curve in grey, the median over heads in front."""
    figure, axes = canvas("plasticity over positions; median of heads in black")
    for _, head in profile.group_by("layer", "head", maintain_order=True):
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
