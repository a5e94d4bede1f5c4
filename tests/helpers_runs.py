"""Runs of the tiny model in this process, which can be stopped after so many batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import polars as pl
from hydra import compose, initialize_config_dir

from sniffer import capture
from sniffer.config.resolve import conf_folder, register, resolve
from sniffer.config.trust import Trust
from sniffer.engine import worker
from sniffer.forward import passes
from sniffer.forward.generation import session
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs.resume import resume
from sniffer.runs.verify import verify
from tests.helpers_config import save_config
from tests.tiny_run import overrides, save_checkpoint, save_texts

TEXTS = {f"doc-{n}": f"the cat number {n} sat on the mat. " * (1 + n * 5 % 7) for n in range(14)}
LAW = ("sampler.base_rate=20", "batch.max_tokens=300")
ORDER = ["layer", "kind", "head", "example_id", "position"]


def save_place(place: Path) -> Path:
    """The tiny model and its texts, for `Runs`."""
    save_checkpoint(place / "checkpoint")
    save_texts(place / "texts.jsonl", TEXTS)
    return place


class Interrupted(Exception):  # noqa: N818 - what stops a run is no error of it
    """What stops a run in these tests."""


class Runs:
    """Runs of one model over one set of texts."""

    def __init__(self, checkpoint: Path, texts: Path, place: Path) -> None:
        self.checkpoint, self.texts, self.place = checkpoint, texts, place

    def words(self) -> list[str]:
        """The command line that all of them have in common."""
        return overrides(self.checkpoint, self.texts, *LAW)

    def start(self, name: str, *more: str, stop_after: int | None = None) -> Path:
        """Captures into a folder of that name, and stops before a batch if told to."""
        register()
        folder = self.place / name
        folder.mkdir()
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            cfg = compose("config", [*self.words(), *more])
        save_config(folder, cfg)
        with stopping_after(stop_after):
            capture.run(resolve(cfg), folder)
        return folder


@contextmanager
def stopping_after(batches: int | None) -> Iterator[None]:
    """Raises Interrupted when batch number `batches` is about to be drawn; swallows it here."""
    honest, seen = worker.draw, [0]

    def draw(*arguments):
        if seen[0] == batches:
            raise Interrupted("enough")
        seen[0] += 1
        return honest(*arguments)

    with patch.object(worker, "draw", draw), patch.object(session, "draw", draw):
        try:
            yield
        except Interrupted:
            assert batches is not None


def counting_forwards() -> tuple[list[int], Callable]:
    """Documents of the batches that go through the model, and a patch that notes them."""
    seen: list[int] = []

    class Noting(passes.Observer):
        def __init__(self, batch, *more) -> None:
            seen.extend(document.example_id for document in batch.documents)
            super().__init__(batch, *more)

    return seen, patch.object(passes, "Observer", Noting)


def rows(folder: Path) -> pl.DataFrame:
    found = open_run(folder)
    assert isinstance(found, Run)
    return found.scan().collect().sort(ORDER)


def must_be_whole(folder: Path, reference: Path) -> None:
    """Complete, verified, and with exactly the rows of the reference."""
    manifest, problems = verify(folder)
    assert problems == []
    whole = verify(reference)[0]
    assert (manifest.status, manifest.digest, manifest.counts) == ("complete", whole.digest, whole.counts)


def take_up(folder: Path, **options) -> bool:
    return resume(folder, Trust(), **options)
