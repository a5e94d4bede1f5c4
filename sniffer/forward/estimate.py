"""What a run will hold and write, told before it starts, and whether this machine can take it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sniffer.errors import CaptureError
from sniffer.forward.selection import Selection
from sniffer.sampler import Picker
from sniffer.types import KIND, WIDE, Checkpoint, LayerGeometry, MomentsLayout, Sections, WorkingMemory, codec

if TYPE_CHECKING:
    import torch
from sniffer.words import size

RAM_HEADROOM = 1.3
"""Peak memory over captured bytes, while sorting and writing."""

PINNED_BATCHES = 4
"""Batches in pinned memory where a model runs on CUDA: two are on their way, and PyTorch's allocator of pinned memory
rounds each block up to a power of two (sniffer/forward/transfer.py)."""

MEMORY_SHARE = 0.5
"""Of the memory that is available once the model is loaded: what captured rows may take by default."""

ADVICE = "lower sampler.base_rate, capture.layers, capture.kinds, dataset.max_examples or dataset.max_tokens"


@dataclass(frozen=True)
class Estimate:
    """Expected vectors and bytes; `exact_lengths` when every document's length was known.

    `ram_bytes` are all captured rows at once, `batch_bytes` those of the largest batch. `moments_bytes` are those of
    sums over all positions, which neither leave memory before the end nor grow with documents.
    """

    rows: dict[str, float]
    ram_bytes: float
    batch_bytes: float
    file_bytes: float
    exact_lengths: bool
    moments_bytes: float = 0.0

    @property
    def vectors(self) -> float:
        return sum(self.rows.values())


def estimate(
    picker: Picker,
    selection: Selection,
    geometry: Mapping[int, LayerGeometry],
    lengths: Sequence[int],
    n_documents: int,
    itemsize: int,
    batch_tokens: int,
    stored: float,
    sections: Sequence[Sections | None] = (),
    moments: MomentsLayout | None = None,
) -> Estimate:
    """Expects picks from the sampler's law.

    Args:
        lengths: tokens of the documents that were read so far.
        n_documents: how many there will be in all; more than len(lengths) scales up.
        itemsize: bytes of one value in the model's dtype.
        batch_tokens: of a batch of several documents, at most.
        stored: bytes of one value on disk, as `stored_bytes` has it.
        sections: of these documents, where they have some.
        moments: which sums over all positions there are, if any.
    """
    scale = n_documents / max(1, len(lengths))
    picks = {draw: picker.side(draw).expected(lengths, sections) * scale for _, draw in selection.draws}
    rows = dict.fromkeys(selection.kinds, 0.0)
    ram = file = 0.0
    for (layer, kind), heads in selection.heads.items():
        kept = picks[KIND[kind].draw] * len(heads)
        rows[kind] += kept
        values = kept * geometry[layer].dims[kind]
        # Statistics are float32, whatever the model computes in.
        ram += values * (4 if KIND[kind].statistics else itemsize)
        file += values * (stored_bytes("none", "float32") if KIND[kind].statistics else stored)
    # Positions, buckets, tokens and examples: 20 bytes a pick for each draw.
    ram += 20 * sum(picks[draw] for _, draw in selection.draws)
    # A batch is one document, or several of about one length; of sides that keep more or less, the one that keeps more.
    share = max(
        _expected(picker.side(draw), n, sections) * max(1, min(batch_tokens // n, n_documents)) / max(1e-9, picks[draw])
        for n in {max(lengths), min(lengths)}
        for draw in picks
    )
    batch = ram * share
    held = 0.0 if moments is None else moments_bytes(picker, selection, geometry, moments, max(lengths))
    return Estimate(rows, ram, batch, file + held, n_documents == len(lengths), held)


def moments_bytes(
    picker: Picker, selection: Selection, geometry: Mapping[int, LayerGeometry], layout: MomentsLayout, longest: int
) -> float:
    """Bytes that sums over all positions take, of documents up to a length."""
    total = 0.0
    for (layer, kind), heads in selection.moments.items():
        dim = geometry[layer].dims[kind]
        second = dim * dim if layout.second == "full" else layout.seconds(dim)
        buckets = len(np.unique(picker.side(KIND[kind].draw).buckets_until(longest)))
        numbers = 2 * dim + second + 1 + dim // 2
        total += 8.0 * numbers * len(heads) * buckets * (1 + len(layout.sections))
    return total


def _expected(picker: Picker, length: int, sections: Sequence[Sections | None]) -> float:
    """The most picks of one draw that are expected of a document of this length."""
    alike: list[Sections | None] = [found for found in sections if found is not None and len(found) == length]
    return max(picker.expected([length], [found]) for found in alike or [None])


def stored_bytes(compression: str, dtype: str) -> float:
    """Bytes that a value of this dtype takes in a file, places included; `compression` as in the configuration."""
    if codec(compression, dtype) == "none":
        return 4.2
    return 3.5 if dtype in WIDE else 1.5


def largest_batch(lengths: Sequence[int], batch_tokens: int) -> tuple[int, int]:
    """Rows and tokens of the batch with the longest document, which needs the most on its device."""
    longest = max(lengths, default=1)
    return max(1, min(batch_tokens // longest, len(lengths))), longest


def largest_forward(model: Checkpoint, lengths: Sequence[int], batch_tokens: int) -> WorkingMemory | None:
    """What that batch needs on its device; None where nobody knows, as a checkpoint class of a user's own may not."""
    ask = getattr(model, "working_memory", None)
    found: WorkingMemory | None = None if ask is None else ask(*largest_batch(lengths, batch_tokens))
    return found


def device_warning(needed: WorkingMemory, rows_bytes: float, free: int) -> str | None:
    """What to say where a forward, and what is gathered in it, may not fit into the free memory of its device."""
    total = needed.peak + rows_bytes
    if total <= free:
        return None
    masks = (
        f" ({size(needed.mask)} of it for a mask of tokens x tokens, which model.attn_implementation=flash_attention_2 "
        "or flex_attention does without)"
        if needed.mask > total / 4
        else ""
    )
    return (
        f"a batch of {needed.rows} x {needed.tokens:,} tokens needs about {size(total)} on the device{masks}, "
        f"{size(free)} is free: lower batch.max_tokens or dataset.max_tokens, or spread the model with model.device_map"
    )


@dataclass(frozen=True)
class Room:
    """Bytes for captured rows where the model runs: what is available, and beyond how many they are written.

    `pinned` is how many batches' rows are in pinned memory beside them.
    """

    available: float
    limit: float
    pinned: int = 0

    @classmethod
    def of(cls, available: float, wanted: int | None, device: torch.device) -> Room:
        """`wanted` is output.memory_limit; without it, a share of what is available."""
        limit = MEMORY_SHARE * available if wanted is None else wanted
        return cls(available, limit, PINNED_BATCHES if device.type == "cuda" else 0)


def peak_ram(expected: Estimate, limit: float, pinned: int = 0) -> float:
    """Bytes that captured rows take at most, if they are written beyond `limit`, with those of `pinned` batches.

    Moments are there twice, since those of a batch count when it is over.
    """
    rows = min(expected.ram_bytes, limit + 2 * expected.batch_bytes) * RAM_HEADROOM
    return rows + pinned * expected.batch_bytes + 2 * expected.moments_bytes


COMMIT_AFTER = 4
"""Times the memory limit that parts which do not count yet may hold in bytes."""


def commit_bytes(expected: Estimate, documents: int, every: int | None, limit: float) -> float:
    """Bytes of files of the largest commit: of so many documents, or of what is written beyond the memory limit."""
    share = 1.0 if every is None else min(1.0, every / max(1, documents))
    largest = min(share * expected.ram_bytes, (2 + COMMIT_AFTER) * limit)
    return expected.file_bytes * largest / max(1.0, expected.ram_bytes)


def refuse_if_too_large(
    expected: Estimate, folder: Path, room: Room, on_disk: int = 0, passing: float | None = None
) -> None:
    """Stops a run that memory or the folder's disk cannot hold.

    Args:
        room: where the model runs. A batch's rows are all in memory, and the next one's too.
        on_disk: bytes that an earlier session has written already.
        passing: bytes that are on disk at a time where what counts leaves it; None where all stays.

    Raises:
        CaptureError: with what is needed, what there is, and what to lower.
    """
    needed = peak_ram(expected, room.limit, room.pinned)
    advice = ADVICE if 2 * expected.moments_bytes < needed / 2 else f"take capture.moments.second=diagonal, or {ADVICE}"
    if needed > room.available:
        raise CaptureError(
            f"the captures need about {size(needed)} of RAM, {size(room.available)} is available: {advice}"
        )
    free = shutil.disk_usage(folder).free
    if passing is not None and passing > free:
        raise CaptureError(
            f"a commit needs about {size(passing)} of disk, {size(free)} is free at {folder}: lower "
            "output.checkpoint_every or output.memory_limit"
        )
    if passing is None and expected.file_bytes - on_disk > free:
        raise CaptureError(
            f"the captures need about {size(expected.file_bytes)} of disk, {size(free)} is free at {folder}: {ADVICE}"
        )
