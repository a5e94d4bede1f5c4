"""A run whose rows are all in memory, and whose model is somebody else's: written in one piece."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sniffer.errors import CaptureError, RunError
from sniffer.forward.accumulator import Accumulator
from sniffer.sampler import Picker
from sniffer.storage.durable import temporary_for
from sniffer.storage.layout import RunFolder
from sniffer.storage.made_folder import made
from sniffer.storage.manifest import Manifest
from sniffer.storage.model_config import with_model_config
from sniffer.storage.moments import Moved, write_moments
from sniffer.storage.schema import Example
from sniffer.storage.store import Store
from sniffer.types import Document, MomentRows

WHOLE: Mapping[int, int] = {}


def save_whole(
    folder: Path,
    manifest: Manifest,
    picker: Picker,
    source_dtype: str,
    accumulator: Accumulator,
    documents: Sequence[Document],
    model_config: Mapping[str, Any],
    moments: Iterable[Sequence[MomentRows]] | None = None,
    begins: Mapping[int, int] = WHOLE,
) -> Manifest:
    """Writes a run, with the token ids of its documents; it appears when it is complete. Rows stay in memory.

    Args:
        moments: of all positions of the documents, where the run has some.
        begins: by example id, from which position on rows and moments are of a document, where that is not 0.

    Raises:
        RunError: there is something of that name already.
        CaptureError: the disk is full or cannot be written to; nothing is left there.
    """
    place = temporary_for(folder)
    if taken := next((one for one in (folder, place) if one.exists()), None):
        raise RunError(f"{taken} is there already: choose another folder")
    try:
        with made(place):
            store = Store(place, with_model_config(place, manifest, model_config), picker, source_dtype, tokens=True)
            store.begin()
            store.tokens.add(documents)
            number = store.next_number()
            parts = [store.writer.write(accumulator, pair, number) for pair in accumulator.by_size()]
            moved = None
            if moments is not None:
                ids = [one.example_id for one in documents]
                moved = Moved(write_moments(place, RunFolder.moments(number), moments, ids), None)
            known = [replace(Example.of(one), first_position=begins.get(one.example_id, 0)) for one in documents]
            store.adopt(parts, known, whole=True, moments=moved)
            store.complete(last=True)
            store.close({}, {})
            place.rename(folder)
    except OSError as error:
        raise CaptureError(f"{folder} cannot be written to ({error.strerror}): choose another folder") from error
    return store.manifest
