"""A small run folder made with the real writer, and the rows that went into it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml

from sniffer.forward.columns import Columns
from sniffer.sampler import LogUniform, Picker, describe
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.schema import Example, FileRecord, Footer, Part
from sniffer.storage.writer import Listing, write_part
from sniffer.types import KIND, KINDS, Document, LayerGeometry, Rows, TokenBatch

SAMPLER = LogUniform(base_rate=4.0, min_bucket_size=8)
HEADS = {"q": 4, "k": 2, "v": 2, "q_pre": 4, "k_pre": 2}
LENGTHS = (5, 70, 33, 128)


def random_floats(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bit pattern may come up, and the special values do."""
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}[dtype]
    info = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(info.min, info.max + 1, shape, generator=generator, dtype=torch.int64)
    floats = numbers.to(bits).view(dtype)
    special = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny / 4], dtype=dtype)
    flat = floats.view(-1)
    flat[: min(len(flat), 6)] = special[: len(flat)]
    return floats


def make_columns(
    rows: int = 50,
    heads: Sequence[int] = (0, 2),
    dim: int = 4,
    dtype: torch.dtype = torch.float32,
    chunks: int = 3,
    seed: int = 0,
) -> Columns:
    """Rows in random order, cut into chunks of random lengths (empty ones too)."""
    rng = np.random.default_rng(seed)
    positions = rng.choice(1000, size=rows, replace=False).astype(np.int32)
    cuts = np.sort(rng.integers(0, rows + 1, size=chunks - 1))
    vectors = random_floats((rows, len(heads) * dim), dtype, seed)
    return Columns(
        heads=tuple(heads),
        vectors=[chunk.clone() for chunk in torch.tensor_split(vectors, torch.from_numpy(cuts))],
        rows=Rows(
            bucket=(positions // 128).astype(np.int32),
            position=positions,
            token_id=rng.integers(0, 50_000, size=rows, dtype=np.int32),
            example_id=rng.choice(np.array([0, 7, 2**62 + 1]), size=rows),
        ),
        dim=dim,
    )


def make_footer(layer: int = 3, kind: str = "q", dim: int = 4, source_dtype: str = "float32") -> Footer:
    return Footer(layer, kind, dim, source_dtype, 512, 0.5, describe(SAMPLER), 7, ("example", "layer", "kind"))


def codecs(folder: Path) -> set[str]:
    """How the vectors of all parts of a run folder are compressed."""
    files = map(pq.ParquetFile, sorted(folder.glob("captures/**/*.parquet")))
    groups = [file.metadata.row_group(n) for file in files for n in range(file.metadata.num_row_groups)]
    return {group.column(group.num_columns - 1).compression for group in groups}


def take(columns: Columns, rows: np.ndarray) -> Columns:
    """Some of the rows, as one chunk."""
    return Columns(
        columns.heads,
        [torch.cat(columns.vectors)[torch.from_numpy(rows)]],
        columns.rows[rows],
        columns.dim,
    )


@dataclass(frozen=True)
class SmallRun:
    """A run on disk, and what was captured by (layer, kind)."""

    folder: Path
    captured: dict[tuple[int, str], Columns]


def make_run(
    folder: Path,
    *,
    kinds: Sequence[str] = ("q", "k"),
    layers: Sequence[int] = (0, 2),
    sampler: LogUniform = SAMPLER,
    dims: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    parts: int = 1,
    status: str = "complete",
    first: int = 0,
) -> SmallRun:
    """Draws positions of four documents as a real run would, with random vectors, and writes them.

    `first` sets the documents apart from those of another run.
    """
    dims = dict.fromkeys(HEADS, 8) | (dims or {})
    folder.mkdir(parents=True, exist_ok=True)
    picker = Picker(sampler, seed=7)
    documents = make_documents(first)
    captured = {
        (layer, kind): _draw(picker, documents, layer, kind, dims[kind], dtype) for layer in layers for kind in kinds
    }
    written: list[Part] = []
    for (layer, kind), columns in captured.items():
        footer = make_footer(layer, kind, dims[kind], str(dtype).removeprefix("torch."))
        for number, rows in enumerate(np.array_split(np.arange(len(columns)), parts)):
            path = RunFolder.part(layer, kind, number, n_layers=3)
            written.append(write_part(folder, path, take(columns, rows), footer))
    examples = write_examples(folder, map(Example.of, documents))
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 7, "capture": {"kinds": list(kinds)}}))
    manifest = make_manifest(kinds, layers, dims, picker)
    replace(manifest, parts=tuple(written), examples=examples, status=status).save(folder)
    return SmallRun(folder, captured)


def make_documents(first: int = 0) -> list[Document]:
    rng = np.random.default_rng(0)
    return [
        Document(2**61 + first + row, f"text/ü-{row}", rng.integers(0, 999, size=n, dtype=np.int32), row == 1)
        for row, n in enumerate(LENGTHS)
    ]


def make_manifest(
    kinds: Sequence[str] = ("q", "k"),
    layers: Sequence[int] = (0, 2),
    dims: dict[str, int] | None = None,
    picker: Picker | None = None,
) -> Manifest:
    dims = dims or dict.fromkeys(HEADS, 8)
    picker = picker or Picker(SAMPLER, seed=7)
    law = {**describe(picker.sampler), "probability_by_bucket": picker.probability_by_bucket(max(LENGTHS))}
    return Manifest(
        status="running",
        seed=7,
        model={"checkpoint": "tiny"},
        dataset={"path": "texts"},
        sampler=law,
        geometry=tuple(LayerGeometry(layer, f"layers.{layer}.self_attn", HEADS, dims, 0.5, None) for layer in range(3)),
        selection={layer: {kind: tuple(range(HEADS[kind])) for kind in kinds} for layer in layers},
    )


def _draw(
    picker: Picker, documents: Sequence[Document], layer: int, kind: str, dim: int, dtype: torch.dtype
) -> Columns:
    batch = TokenBatch(tuple(documents), pad_id=0)
    picks = picker.pick(batch, layer, KIND[kind].draw)
    return Columns(
        heads=tuple(range(HEADS[kind])),
        vectors=[random_floats((len(picks), HEADS[kind] * dim), dtype, seed=layer * 10 + KINDS.index(kind))],
        rows=Rows(
            picks.buckets,
            picks.positions,
            np.array(
                [documents[row].token_ids[position] for row, position in zip(picks.rows, picks.positions, strict=True)],
                dtype=np.int32,
            ),
            np.array([documents[row].example_id for row in picks.rows], dtype=np.int64),
        ),
        dim=dim,
    )


def write_examples(folder: Path, examples: Iterable[Example]) -> FileRecord:
    """Writes examples.parquet; CaptureError as `Listing.write`."""
    listing = Listing.of(examples)
    listing.write(folder)
    return listing.record
