"""Moments over all positions, where a run has summed them up (docs/moments.md): no sample, and so no sampling error."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from sniffer.reader.run import Run
from sniffer.types import Moments as OfHead

from .moments import Moments


def has_exact(run: Run, kind: str, weights: str) -> bool:
    """Whether a run has full moments of a kind, and rows are to stand for all positions."""
    layout = run.manifest.moments_layout
    there = layout is not None and kind in layout.kinds and layout.second == "full" and bool(run.manifest.moment_files)
    return there and weights == "positions" and run.sections_only is None


def exact_heads(run: Run, layer: int, kind: str, weights: str) -> dict[int, OfHead] | None:
    """By head; None where there are none to be taken."""
    if not has_exact(run, kind, weights):
        return None
    return {head: run.moments(layer=layer, head=head, kind=kind) for head in run.counted_heads(layer, kind)}


def exact_moments(
    run: Run, layer: int, kind: str, weights: str, heads: tuple[int, ...] | None = None
) -> Moments | None:
    """Of some heads (None: of all that were counted), as `experiments.common.moments` has them.

    What they have to do with position is not known: those fields are NaN.
    """
    found = exact_heads(run, layer, kind, weights)
    if found is None or (heads is not None and not set(heads) <= found.keys()):
        return None
    chosen = [found[head] for head in (found if heads is None else heads)]
    mean = np.stack([one.mean for one in chosen])
    covariance = np.stack([one.covariance for one in chosen if one.covariance is not None])
    return Moments(float(chosen[0].n), mean, covariance, np.nan, np.nan, np.full_like(mean, np.nan))


def root_mean_square(found: Moments) -> Float64[np.ndarray, "heads dim"]:
    """Of each value."""
    return np.sqrt(np.diagonal(found.covariance, axis1=1, axis2=2) + found.mean**2)


def told(run: Run, what: str) -> str:
    """The sentence that says so."""
    return f"{what} from the moments of all {run.manifest.counts['tokens']:,} positions, not from the sampled ones."
