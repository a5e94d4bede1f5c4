"""The figures as a picture: each one against the limit it is held to, 1 being the limit itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Figure

MET, MISSED = "#2a7f5e", "#b3402a"


def draw(figures: Sequence[Figure], path: Path) -> None:
    """Writes a PNG with one line per figure that has a limit, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    held = [one for one in figures if one.limit]
    canvas, axes = pyplot.subplots(figsize=(11, 0.8 + 0.33 * len(held)), layout="constrained")
    for row, one in enumerate(reversed(held)):
        assert one.limit
        low, middle, high = (max(value, 1e-6) / one.limit for value in (one.low, one.value, one.high))
        color = MET if one.met else MISSED
        axes.plot([low, high], [row, row], color=color, linewidth=2, alpha=0.5)
        axes.plot(middle, row, "o", color=color)
        axes.annotate(f" {one.value:.3g}", (high, row), va="center", fontsize=8)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("measured / limit: left of the line is within it (dot: median, bar: lowest to highest)")
    axes.set_yticks(range(len(held)), [f"{one.name}  (<= {one.limit:.3g})" for one in reversed(held)], fontsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    canvas.savefig(path, dpi=150)
    pyplot.close(canvas)
