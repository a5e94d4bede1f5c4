"""What is said and drawn of virtual distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl
from matplotlib.figure import Figure

from sniffer.reader.laws import ranges

from ..common.figures import canvas, head_map, lines
from ..common.results import middle

PARTS = {"observed": "observed", "rope": "RoPE alone", "drift": "drift", "content": "content"}


def findings(tables: Mapping[str, pl.DataFrame], dropped: pl.DataFrame, still: Sequence[int], near: int) -> list[str]:
    """`dropped`: counts by layer of what was left out; `still`: layers without RoPE."""
    heads, curves, wins = tables["heads"], tables["curves"], tables["preferences"]
    found = []
    far = int(curves["distance"].max() or 1)  # type: ignore[arg-type]
    if heads["fall"].is_not_nan().any():
        parts = ""
        if heads["fall_rope"].is_not_nan().any():
            falls = [middle(heads[f"fall_{name}"].drop_nans()) for name in ("rope", "drift", "content")]
            parts = (
                f"; of it RoPE alone gives {falls[0]:+.2f}, drift {falls[1]:+.2f}, content {falls[2]:+.2f} (medians)"
            )
        found.append(
            f"From pairs at most {near:,} positions apart to those farthest apart ({far:,} or more, where a layer sees "
            f"so far) the mean logit falls by {middle(heads['fall'].drop_nans()):.2f} in the median head{parts}."
        )
    else:
        found.append(
            f"No pairs are told to be near and others far: none, or all, are at most {near:,} positions apart."
        )
    if curves["rope"].is_nan().all():
        found.append("RoPE, drift and content cannot be told apart: that takes two documents or more.")
    if count := int(dropped["triples"].sum()):
        found += _preferred(heads["content_wins"].drop_nans(), wins.filter(pl.col("together").is_not_nan()), count)
    for column, what in (("first", "keys at the first positions"), ("sinks", "keys as sinks")):
        if (most := int(dropped[column].max() or 0)) > 0:  # type: ignore[arg-type]
            found.append(f"Left out are {what}: {most:,} positions in the layer that has most of them.")
    if (most := int(dropped["alone"].max() or 0)) > 0:  # type: ignore[arg-type]
        found.append(f"Curves leave out up to {most:,} rows of a layer at positions that one document alone reaches.")
    if still:
        found.append(f"Layers {ranges(still)} turn nothing by position and are left out.")
    return found


def _preferred(changed: pl.Series, wins: pl.DataFrame, count: int) -> list[str]:
    middles = wins.group_by("distance").agg(pl.col("together", "further").median()).sort("distance")
    last = middles.row(-1, named=True)
    return [
        f"After two keys have changed places the query still prefers the same one in {middle(changed):.0%} of "
        f"{count:,} triples (median head): 100% would be content alone, 0% place alone.",
        f"Moved {last['distance']:,} positions further away, two keys keep their order in {last['further']:.0%} of "
        f"them; both put at that one distance, in {last['together']:.0%}.",
    ]


def figures(tables: Mapping[str, pl.DataFrame]) -> dict[str, Figure]:
    heads = tables["heads"]
    found = {
        "curves": _curves(tables["curves"]),
        "virtual": _virtual(tables["virtual"]),
        "preferences": _preferences(tables["preferences"]),
        "content_wins": head_map(heads, "content_wins", "same key preferred after two keys change places"),
    }
    for name in ("fall", "fall_rope", "fall_drift", "fall_content"):
        if heads[name].is_not_nan().all():
            of = {"fall": "", "fall_rope": " by RoPE alone", "fall_drift": " by drift", "fall_content": " by content"}
            found[name] = head_map(heads, name, f"fall of the mean logit from near to far{of[name]}", signed=True)
    return found


def _curves(curves: pl.DataFrame) -> Figure:
    """Medians over heads: the mean logit by distance, and what makes it up."""
    middles = curves.group_by("distance").agg(pl.col(list(PARTS)).fill_nan(None).median()).sort("distance")
    shown = {
        title: (middles["distance"].to_list(), middles[name].to_list())
        for name, title in PARTS.items()
        if middles[name].is_not_null().any()
    }
    return lines(shown, "mean logit by distance, median of heads", "distance (from)", "logit", log_x=True)


def _virtual(table: pl.DataFrame) -> Figure:
    """Contents of pairs that are really so far apart, at all distances; each head's against its largest."""
    scale = pl.col("logit").abs().max().over("layer", "head")
    middles = (
        table.with_columns(logit=pl.col("logit") / pl.when(scale > 0).then(scale).otherwise(1))
        .group_by("distance", "virtual_distance")
        .agg(pl.col("logit").median())
        .sort("distance", "virtual_distance")
    )
    real, virtual = (middles[name].unique().sort().to_list() for name in ("distance", "virtual_distance"))
    figure, axes = canvas("mean logit over its largest: contents by real distance, at others")
    matrix = middles["logit"].to_numpy().reshape(len(real), len(virtual))
    limit = float(abs(matrix).max()) or 1.0
    image = axes.imshow(matrix, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set_xticks(range(len(virtual)), [f"{one:,}" for one in virtual], rotation=60, fontsize=7)
    axes.set_yticks(range(len(real)), [f"{one:,}" for one in real], fontsize=7)
    axes.set(xlabel="distance that pairs are put at", ylabel="distance that they have (from)")
    figure.colorbar(image, ax=axes)
    return figure


def _preferences(table: pl.DataFrame) -> Figure:
    wins = table.filter(pl.col("together").is_not_nan(), pl.col("distance") > 0)
    middles = wins.group_by("distance").agg(pl.col("together", "further").median()).sort("distance")
    x = middles["distance"].to_list()
    curves = {
        "both keys that much further away": (x, middles["further"].to_list()),
        "both keys at that distance": (x, middles["together"].to_list()),
    }
    figure = lines(curves, "preferences between two keys that stand, median of heads", "distance", "share", log_x=True)
    figure.axes[0].set_ylim(0, 1.02)
    return figure
