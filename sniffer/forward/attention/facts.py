"""What a layer's logits are made of, found from a probe: what a reader needs to compute them again from q and k.

    logit = softcap * tanh(scaling * q.k / softcap) + alibi * key position        (without what a layer has none of)

and a sink's logit beside those of the keys. A probe has all logits (scores.py) and the q and k that they came from. A
straight line through logits over products and positions gives scaling and slopes; what is left over must be rounding.
Where it is not, the layer is said to be beyond this formula, and why.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float64

from sniffer.errors import SnifferError, first_line
from sniffer.forward.attention.prove import Probe, all_queries, logits_of, probe, scores_of
from sniffer.forward.attention.scores import FromCall, FromSoftmax
from sniffer.types import Backbone, LayerGeometry, ScoreFacts

LONGER = 600
"""Tokens of the text on which slopes are looked at once more: bfloat16 has no whole numbers beyond 256."""
ROUNDING = 1e-4
"""Of logits, over the largest of a layer; those of a softmax in a layer's own code come in the model's dtype."""
MASKED = -1e8
"""Below is no logit, but what a mask has made of one; in dtypes that end before, below half of their least number."""


@dataclass(frozen=True)
class Logits:
    """All of one layer in a probe; the first axis are texts and their queries, one after the other.

    `found` are logits over keys, `products` q.k, `keys` their positions, `seen` those that no mask has taken away,
    `rounding` how far a logit may be off, `dim` the numbers in a q or k.
    """

    found: Float64[np.ndarray, "queries heads keys"]
    products: Float64[np.ndarray, "queries heads keys"]
    seen: Bool[np.ndarray, "queries heads keys"]
    keys: Float64[np.ndarray, " keys"]
    rounding: float
    dim: int


@torch.inference_mode()
def score_facts(backbone: Backbone) -> dict[int, tuple[float | None, ScoreFacts]]:
    """Scaling and the rest, of each layer; where a layer cannot be looked at, why."""
    layers = [layer.layer for layer in backbone.geometry]
    try:
        shown = probe(backbone, layers)
    except Exception as error:  # of upstream code: any. A run does not need to know.
        reason = ScoreFacts(missing=f"a probe of its logits failed: {type(error).__name__}: {first_line(error)}")
        return {layer.layer: (layer.scaling, reason) for layer in backbone.geometry}
    found = {layer.layer: _facts(layer, shown) for layer in backbone.geometry}
    tilted = [layer for layer in backbone.geometry if found[layer.layer][1].alibi and not found[layer.layer][1].missing]
    if tilted and not _straight(backbone, tilted[0], *found[tilted[0].layer]):
        bent = "what it adds by position is no line in longer texts, or is rounded"
        found |= {one.layer: (found[one.layer][0], replace(found[one.layer][1], missing=bent)) for one in tilted}
    return found


def _straight(backbone: Backbone, layer: LayerGeometry, scaling: float | None, facts: ScoreFacts) -> bool:
    """Whether slopes that a short probe has shown hold in a longer one, as far as the model takes such."""
    assert facts.alibi is not None and scaling is not None
    try:
        scores = scores_of(layer.layer, probe(backbone, [layer.layer], rows=1, tokens=LONGER))
    except Exception:  # of upstream code: any; of a table of positions that ends before
        return True
    (queries,) = all_queries(scores)
    found = logits_of(scores, queries).cpu().double().numpy().swapaxes(0, 1)
    logits = _gathered(scores, found[:, :, :LONGER], None)
    told = scaling * logits.products + np.array(facts.alibi)[:, None] * logits.keys
    return bool(np.abs(np.where(logits.seen, logits.found - told, 0.0)).max() <= logits.rounding)


def _facts(layer: LayerGeometry, shown: Probe) -> tuple[float | None, ScoreFacts]:
    try:
        scores = scores_of(layer.layer, shown)
    except SnifferError as error:
        return layer.scaling, ScoreFacts(missing=str(error))
    pieces = [logits_of(scores, queries).cpu().double().numpy() for queries in all_queries(scores)]
    whole = np.concatenate([piece.swapaxes(0, 1) for piece in pieces])
    softcap = scores.call.options.get("softcap") if isinstance(scores, FromCall) else None
    n_keys = scores.k.shape[2]
    sinks, why = _sinks(whole[:, :, n_keys:])
    logits = _gathered(scores, whole[:, :, :n_keys], softcap)
    if layer.selects:
        why = why or "its queries attend to keys that they choose"
    why = why or _other_keys(layer, logits)
    scaling, alibi, left = _line(logits, layer.scaling)
    facts = ScoreFacts(None if softcap is None else float(softcap), sinks, alibi, why or left)
    return layer.scaling if scaling is None else scaling, facts


def _gathered(scores: FromCall | FromSoftmax, found: np.ndarray, softcap: float | None) -> Logits:
    q, k = (one.cpu().double().numpy() for one in (scores.q, scores.k))
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    products = (q @ k.swapaxes(2, 3)).swapaxes(1, 2).reshape(found.shape)
    seen = np.isfinite(found) & (found > max(MASKED, torch.finfo(scores.q.dtype).min / 2))
    if softcap is not None:
        found = softcap * np.arctanh(np.clip(found / softcap, -1 + 1e-12, 1 - 1e-12))
    largest = np.abs(found[seen]).max(initial=1e-30)
    eps = torch.finfo(torch.float32 if isinstance(scores, FromCall) else scores.q.dtype).eps
    rounding, keys = largest * max(ROUNDING, 4 * eps), np.arange(found.shape[2], dtype=np.float64)
    return Logits(found, products, seen, keys, rounding, q.shape[3])


def _sinks(columns: np.ndarray) -> tuple[tuple[float, ...] | None, str]:
    """The logit of each head's sink, and why not, if it has some that are no one number."""
    if columns.shape[2] == 0:
        return None, ""
    first = columns[0, :, 0]
    if columns.shape[2] > 1 or not np.allclose(columns[:, :, 0], first, rtol=1e-4, atol=1e-6):
        return None, "what it attends to beside keys is not one number a head"
    return tuple(first.tolist()), ""


def _other_keys(layer: LayerGeometry, logits: Logits) -> str:
    tokens = len(logits.keys)
    positions = np.tile(np.arange(tokens), len(logits.found) // tokens)
    keys = np.arange(tokens)
    wanted = (keys <= positions[:, None]) & (keys >= layer.first_key(positions)[:, None])
    same = (logits.seen == wanted[:, None, :]).all()
    return "" if same else "its queries see other keys than those before them in its window"


def _line(logits: Logits, named: float | None) -> tuple[float | None, tuple[float, ...] | None, str]:
    """Scaling, slopes over key positions, and why the logits are none of this."""
    weights = logits.seen.astype(np.float64)
    keys = np.broadcast_to(logits.keys, logits.found.shape)
    found, products, places = (
        _centred(np.where(logits.seen, one, 0.0), weights) for one in (logits.found, logits.products, keys)
    )
    # Normal equations of one factor for all heads and a slope for each: slopes go out, then the factor follows.
    pp, pf, pk = ((products * one).sum((0, 2)) for one in (products, found, places))
    kk, kf = ((places * one).sum((0, 2)) for one in (places, found))
    scaling = (pf - pk * kf / kk).sum() / (pp - pk**2 / kk).sum() if named is None else named
    if named is None:
        close = logits.rounding / np.abs(logits.found[logits.seen]).max(initial=1e-30)
        scaling = next((one for one in (logits.dim**-0.5, 1.0) if abs(scaling / one - 1) < close), scaling)
    slopes = (kf - scaling * pk) / kk
    tokens = len(logits.keys)
    if np.abs(slopes).max() * tokens < logits.rounding:
        slopes = np.zeros_like(slopes)
    # Rounding on a few tokens would be far more on many.
    for exact in (one * formula_slopes(len(slopes)) for one in (1.0, scaling)):
        if np.abs(slopes - exact).max() * tokens < logits.rounding:
            slopes = exact
    left = np.where(logits.seen, logits.found - scaling * logits.products - slopes[:, None] * logits.keys, 0.0)
    alibi = tuple(slopes.tolist()) if slopes.any() else None
    if np.abs(left).max() <= logits.rounding:
        return float(scaling), alibi, ""
    if np.abs(_centred(left, weights)).max() <= logits.rounding:
        return float(scaling), alibi, "it adds a constant to all logits of a query"
    return None, None, "its logits are no line over products of q and k"


def formula_slopes(heads: int) -> Float64[np.ndarray, " heads"]:
    """ALiBi's slopes (Press et al., 2022): powers of 2^(-8 / heads); where heads are no power of two, those of the next
    smaller one, then every other of twice as many."""
    whole = 1 << (heads.bit_length() - 1)
    more = 2.0 ** (-8 * np.arange(1, 2 * whole, 2) / (2 * whole))
    return np.concatenate([2.0 ** (-8 * np.arange(1, whole + 1) / whole), more])[:heads]


def _centred(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Without each query's mean over the keys that it sees; 0 where it sees none."""
    mean = (values * weights).sum(2, keepdims=True) / np.maximum(weights.sum(2, keepdims=True), 1)
    return np.asarray((values - mean) * weights)
