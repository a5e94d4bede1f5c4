"""Statistics of attention, had of a backbone as a run has them, and recomputed with NumPy from its weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sniffer.forward.attention.attending import AttentionPlan
from sniffer.forward.attention.prove import prove
from sniffer.forward.observer import Observer, Wanted, draw
from sniffer.forward.selection import CaptureConfig, select
from sniffer.forward.transfer import HostTransfer
from sniffer.sampler import All, Picker, Sampler
from sniffer.types import ALL_STATISTICS, ATTENTION, AttentionLayout, Document, TokenBatch

TOP = 4


def batch_of(ids: torch.Tensor, lengths: list[int] | None = None) -> TokenBatch:
    """A document for each row of token ids, as long as is said."""
    lengths = lengths or [ids.shape[1]] * len(ids)
    rows = zip(ids.numpy().astype(np.int32), lengths, strict=True)
    return TokenBatch(tuple(Document(n, str(n), row[:size], False) for n, (row, size) in enumerate(rows)), pad_id=1)


def captured(
    backbone: Any,
    batch: TokenBatch,
    sampler: Sampler | None = None,
    statistics: tuple[str, ...] = (*ALL_STATISTICS, "out"),
    layers: list[int] | None = None,
    outputs: list[Any] | None = None,
) -> dict[int, dict[str, np.ndarray]]:
    """By layer and column: (picks, heads) or (picks, heads, numbers); with every position as a bucket of its own.

    Where `outputs` are wanted, the forward goes on to its end and adds its own.
    """
    picker = Picker(sampler or All(bucket_size=1), seed=0)
    longest = batch.seq_len
    buckets = picker.buckets_until(longest)
    layout = AttentionLayout(statistics, 1 + int(buckets.max()), longest.bit_length(), TOP)
    selection = select(backbone.geometry, CaptureConfig(kinds=["q"], layers=layers, attention=list(statistics)))
    geometry = {one.layer: layout.of_layer(one) for one in backbone.geometry}
    plan = AttentionPlan(layout, prove(backbone, selection.layers), buckets)
    wanted = Wanted(selection, geometry, backbone.layer_of, HostTransfer(), torch.device("cpu"), plan)
    observer = Observer(batch, draw(picker, selection, batch), wanted)
    observer.stops = outputs is None
    with torch.inference_mode(), observer.open():
        output = backbone(torch.from_numpy(batch.input_ids()))
        if outputs is not None:
            outputs.append(output)
    found: dict[int, dict[str, np.ndarray]] = {}
    for layer in selection.layers:
        rows = (
            observer.vectors[layer, ATTENTION]
            .numpy()
            .reshape(-1, geometry[layer].heads[ATTENTION], _width(geometry, layer))
        )
        first, named = 0, {}
        for column in layout.columns(geometry[layer].dims["v"]):
            values = rows[:, :, first : first + column.values]
            named[column.name] = values[:, :, 0] if column.width is None else values
            first += column.values
        found[layer] = named
    return found


def _width(geometry: Any, layer: int) -> int:
    width: int = geometry[layer].dims[ATTENTION]
    return width


def from_weights(weights: np.ndarray) -> dict[str, np.ndarray]:
    """What follows from the weights of one text alone, (heads, tokens, tokens), in double precision, loop by loop.

    What is missing from a sum of one is the weight of sinks.
    """
    heads, tokens, _ = weights.shape
    weights = weights.astype(np.float64)
    sink = 1 - weights.sum(-1)
    sink[np.abs(sink) < 1e-5] = 0
    entropy = np.zeros((tokens, heads))
    distance = np.zeros((tokens, heads, tokens.bit_length()))
    top, where = np.zeros((tokens, heads, TOP)), np.full((tokens, heads, TOP), -1)
    for head in range(heads):
        for query in range(tokens):
            row = weights[head, query]
            parts = [*row[row > 0], *([sink[head, query]] if sink[head, query] > 0 else [])]
            entropy[query, head] = -sum(part * np.log(part) for part in parts)
            for key in range(query + 1):
                distance[query, head, int(np.floor(np.log2(1 + query - key)))] += row[key]
            order = [key for key in np.argsort(-row, kind="stable") if row[key] > 0][:TOP]
            top[query, head, : len(order)], where[query, head, : len(order)] = row[order], order
    return {
        "entropy": entropy,
        "first": weights[:, :, 0].T,
        "self": np.stack([weights[:, n, n] for n in range(tokens)]),
        "sink": sink.T,
        "mass": weights.transpose(1, 0, 2),
        "distance": distance,
        "top": top,
        "top_position": where,
    }


def differences(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest difference by column. Where the largest weights tie, either position will do."""
    worst = {name: float(np.abs(found[name] - wanted[name]).max()) for name in wanted if name not in ("top_position",)}
    if "top_position" in wanted:
        weights = np.take_along_axis(wanted["mass"], np.maximum(found["top_position"], 0).astype(np.int64), axis=2)
        there = np.where(found["top_position"] < 0, 0, weights)
        worst["top_position"] = float(np.abs(there - wanted["top"]).max())
    return worst
