"""Runs with a known truth: vectors made by a formula, written with the real writer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import yaml
from sniffer.experiments.common.rows import LayerVectors

from sniffer import open_run
from sniffer.forward.columns import Columns
from sniffer.reader.run import Run
from sniffer.sampler import Picker, Sampler, Uniform, describe
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.schema import Example, Footer
from sniffer.storage.writer import write_part
from sniffer.types import KIND, Document, LayerGeometry, Rope, Rows, ScoreFacts, Sections, TokenBatch, by_rope
from tests.helpers_storage import write_examples

HEADS = {"q": 4, "k": 2, "v": 2, "q_pre": 4, "k_pre": 2}
DIM = 8

Formula = Callable[[int, str, np.ndarray, np.random.Generator], np.ndarray]
"""(layer, kind, positions, rng) -> vectors of shape (n, heads, dim)."""


def noise(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(len(positions), HEADS[kind], DIM))


PLAIN = ScoreFacts()
SPEEDS = np.array([1.0, 0.1, 0.01, 0.0003])


def rope(x: np.ndarray, positions: np.ndarray, layout: str, rotary: int = DIM) -> np.ndarray:
    """x (..., n, dim) turned as RoPE does, written out pair by pair."""
    y = x.copy()
    for f in range(rotary // 2):
        i, j = (f, f + rotary // 2) if layout == "half" else (2 * f, 2 * f + 1)
        c, s = np.cos(SPEEDS[f] * positions), np.sin(SPEEDS[f] * positions)
        y[..., i], y[..., j] = c * x[..., i] - s * x[..., j], s * x[..., i] + c * x[..., j]
    return y


def roped(layout: str = "half") -> Formula:
    """q and k are q_pre and k_pre after RoPE, which point one way in pair 2."""

    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        # Before and after RoPE begin from the same numbers.
        x = noise(layer, kind, positions, np.random.default_rng([layer, ord(kind[0])]))
        i, j = (2, 2 + DIM // 2) if layout == "half" else (4, 5)
        x[..., [i, j]] += 30
        return x if kind.endswith("pre") or kind == "v" else rope(x.swapaxes(0, 1), positions, layout).swapaxes(0, 1)

    return formula


def planted_run(
    folder: Path,
    formula: Formula = noise,
    *,
    kinds: Sequence[str] = ("q", "k"),
    layers: Sequence[int] = (0, 1),
    lengths: Sequence[int] = (300, 200, 256),
    sampler: Sampler | None = None,
    heads: Mapping[str, int] = HEADS,
    sections: Callable[[int], Sections] | None = None,
    facts: ScoreFacts = PLAIN,
    turns: Rope | None = None,
    window: int | None = None,
) -> Run:
    """A complete run whose vectors follow the formula; q and k share positions by default.

    `sections`: of a document of so many tokens. `facts` of logits, `turns` and `window` are told of all layers.
    """
    sampler = sampler or Uniform(base_rate=32.0, bucket_size=64, seed_by=["example", "layer"])
    picker = Picker(sampler, seed=7)
    folder.mkdir(parents=True)
    documents = tuple(
        Document(
            100 + row,
            f"text-{row}",
            np.zeros(n, dtype=np.int32),
            False,
            sections=None if sections is None else sections(n),
        )
        for row, n in enumerate(lengths)
    )
    batch = TokenBatch(documents, pad_id=0)
    parts = []
    for layer in layers:
        for number, kind in enumerate(kinds):
            picks = picker.pick(batch, layer, KIND[kind].draw)
            vectors = formula(layer, kind, picks.positions, np.random.default_rng([layer, number]))
            flat = torch.from_numpy(vectors.astype(np.float32).reshape(len(picks), -1))
            columns = Columns(
                heads=tuple(range(heads[kind])),
                vectors=[flat],
                rows=Rows(
                    picks.buckets,
                    picks.positions,
                    np.zeros(len(picks), dtype=np.int32),
                    np.array([documents[row].example_id for row in picks.rows], dtype=np.int64),
                    batch.sections(picks),
                ),
                dim=DIM,
            )
            footer = Footer(layer, kind, DIM, "float32", None, 0.5, describe(sampler), 7, tuple(sampler.seed_by))
            path, named = RunFolder.part(layer, kind, 0, n_layers=max(layers) + 1), sections is not None
            parts.append(write_part(folder, path, columns, footer, sections=named))
    dims = dict.fromkeys(heads, DIM)
    manifest = Manifest(
        status="complete",
        seed=7,
        model={"checkpoint": "planted"},
        dataset={"path": "texts", **({} if sections is None else {"sections": True})},
        sampler={**describe(sampler), "probability_by_bucket": picker.probability_by_bucket(max(lengths))},
        geometry=tuple(LayerGeometry(layer, f"layers.{layer}", heads, dims, 0.5, window) for layer in layers),
        selection={layer: {kind: tuple(range(heads[kind])) for kind in kinds} for layer in layers},
        counts={"examples": len(lengths), "tokens": sum(lengths), "truncated": 0, "skipped_empty": 0},
        timings={"inference": 1.0},
        parts=tuple(parts),
        examples=write_examples(folder, map(Example.of, documents)),
        scores={layer: facts.as_json() for layer in layers},
        rope=() if turns is None else by_rope(dict.fromkeys(layers, turns)),
    )
    replace(manifest).save(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 7}))
    opened = open_run(folder)
    assert isinstance(opened, Run)
    return opened


def rows(
    vectors: np.ndarray,
    positions: np.ndarray,
    *,
    bucket_size: int = 64,
    examples: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    kind: str = "q",
) -> LayerVectors:
    """Vectors (heads, n, dim) as an analysis sees them."""
    n = len(positions)
    return LayerVectors(
        layer=0,
        kind=kind,
        heads=tuple(range(len(vectors))),
        vectors=vectors.astype(np.float32),
        positions=positions.astype(np.int32),
        buckets=(positions // bucket_size).astype(np.int32),
        example_ids=np.zeros(n, dtype=np.int64) if examples is None else examples.astype(np.int64),
        weights=np.ones(n) if weights is None else weights,
    )
