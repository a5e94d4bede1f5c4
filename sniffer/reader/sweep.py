"""A sweep: one run folder per job, read as one table with each job's overrides as columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from jaxtyping import Int32

from sniffer.errors import RunError
from sniffer.reader.index import override_columns, read_jobs, table
from sniffer.reader.scan import join
from sniffer.reader.texts import Decoder, same_everywhere
from sniffer.storage.layout import RunFolder, SweepFolder

if TYPE_CHECKING:
    from sniffer.reader.run import Run
from sniffer.reader.held import Held
from sniffer.reader.index import errors, overrides_of
from sniffer.reader.job_folders import job_names
from sniffer.reader.moments import moments_of
from sniffer.reader.run import Run
from sniffer.reader.training.in_batches import InBatches
from sniffer.storage.manifest import Manifest
from sniffer.storage.remote import folder_at
from sniffer.types import Moments


@dataclass(frozen=True)
class Sweep(InBatches):
    """The runs of a sweep by job, with what each job overrode.

    `overrides` maps job -> key -> the value as it was typed, such as {"0": {"sampler.base_rate": "0.5"}}.
    Jobs that died before they wrote a manifest are not among them, but `jobs` lists them too.
    """

    folder: Path
    runs: Mapping[str, Run]
    overrides: Mapping[str, Mapping[str, str]]

    @property
    def complete(self) -> bool:
        """Whether every job is complete."""
        return all(job.status == "complete" for job in read_jobs(self.folder))

    def jobs(self) -> pl.DataFrame:
        """One row per job, as it stands now: job, its overrides as columns, status, rows, bytes, seconds, error, path.

        Raises:
            RunError: sweep.parquet or a job's list of overrides cannot be read.
        """
        jobs = read_jobs(self.folder)
        return table(jobs).with_columns(path=pl.Series([str(self.folder / job.name) for job in jobs], dtype=pl.String))

    def scan(
        self,
        layers: Iterable[int] | None = None,
        kinds: Iterable[str] | None = None,
        inclusion_probability: bool = False,
        token: bool | Decoder = False,
        kind: str | None = None,
    ) -> pl.LazyFrame:
        """All rows of all jobs, lazily: job and the overrides as columns, then those of `Run.scan`.

        `layers`, `kinds` and `kind` select as in `Run.scan`, from each job those that it captured.

        Raises:
            RunError: no job captured one of them.
        """
        wanted_layers = None if layers is None else tuple(layers)
        wanted_kinds = (kind,) if kind is not None else None if kinds is None else tuple(kinds)
        self._check("layer", wanted_layers, {layer for run in self.runs.values() for layer in run.layers})
        self._check("kind", wanted_kinds, {kind for run in self.runs.values() for _, kind in run.all_captured})
        frames = []
        for run, labels in zip(self.runs.values(), override_columns(self.overrides).iter_slices(1), strict=True):
            layers = _among(wanted_layers, run.layers)
            kinds = _among(wanted_kinds, sorted({kind for _, kind in run.all_captured}))
            if not run.captured(layers, kinds):
                continue
            constants = [pl.lit(value[0], dtype=value.dtype).alias(value.name) for value in labels]
            frames.append(run.scan(layers, kinds, inclusion_probability, token).select(*constants, pl.all()))
        return join(frames)

    def tokens(self, example_id: int) -> Int32[np.ndarray, " n_tokens"]:
        """The token ids of a document, as in `Run.tokens`, from the jobs that have it: shards, say.

        Raises:
            RunError: no job has it, or jobs have other tokens for it.
        """
        having = [(name, run) for name, run in self.runs.items() if run.manifest.tokens and _has(run, example_id)]
        return same_everywhere([(name, run.tokens(example_id)) for name, run in having], str(example_id))

    def texts(
        self,
        example_ids: Iterable[int] | None = None,
        tokenizer: Decoder | None = None,
        special_tokens: bool = True,
    ) -> dict[int, str]:
        """What documents said, as in `Run.texts`, of all jobs together.

        Raises:
            RunError: as `tokens`; or there is no tokenizer.
        """
        kept = {name: run for name, run in self.runs.items() if run.manifest.tokens}
        known = {number for run in kept.values() for number in run.examples()["example_id"].to_list()}
        wanted = sorted(known) if example_ids is None else [int(number) for number in example_ids]
        found: dict[int, str] = {}
        for number in wanted:
            self.tokens(number)  # jobs agree on it
            run = next(run for run in kept.values() if _has(run, number))
            found |= run.texts([number], tokenizer, special_tokens)
        return found

    def moments(
        self, *, layer: int, head: int, kind: str, bucket: int | None = None, section: str | None = None
    ) -> Moments:
        """As `Run.moments`, of the documents of all jobs together: shards, say.

        Raises:
            RunError: as there; or two jobs have a document in common, or other models.
        """
        runs = list(self.runs.values())
        self._require_apart(runs, "moments")
        if len({repr((run.manifest.model, run.manifest.moments)) for run in runs}) > 1:
            raise RunError(f"jobs of {self.folder} have other models, or other moments: open one of them")
        return moments_of(runs, layer, head, kind, bucket, section)

    def _together(self, layer: int, kind: str) -> list[tuple[Held, tuple[str, ...] | None]]:
        self._check("layer", (layer,), {layer for run in self.runs.values() for layer in run.layers})
        self._check("kind", (kind,), {kind for run in self.runs.values() for _, kind in run.all_captured})
        runs = [run for run in self.runs.values() if (layer, kind) in run.all_captured]
        if not runs:
            raise RunError(f"kind {kind} of layer {layer} was captured by no job of this sweep")
        self._require_apart(runs, "batches")
        if len({repr(run.manifest.model) for run in runs}) > 1:
            raise RunError(f"jobs of {self.folder} have other models: open one of them for its batches")
        return [(run, run.sections_only) for run in runs]

    @staticmethod
    def _require_apart(runs: Sequence[Run], what: str) -> None:
        """Raises RunError where two runs have a document in common."""
        met: set[int] = set()
        for run in runs:
            ids = set(run.examples()["example_id"].to_list())
            if met & ids:
                raise RunError(f"{run.folder} has documents that another job has: open one of them for its {what}")
            met |= ids

    @staticmethod
    def _check(what: str, wanted: Sequence[Any] | None, known: set[Any]) -> None:
        for value in wanted or ():
            if value not in known:
                names = ", ".join(map(str, sorted(known)))
                raise RunError(f"{what} {value} was captured by no job of this sweep: they have {what}s {names}")


def _has(run: Run, example_id: int) -> bool:
    return bool((run.examples()["example_id"] == example_id).any())


def _among(wanted: Sequence[Any] | None, known: Sequence[Any]) -> Sequence[Any] | None:
    return None if wanted is None else [value for value in wanted if value in known]


def open_run(path: str | Path) -> Run | Sweep:
    """Opens what a run wrote, or what a sweep of runs wrote.

    Args:
        path: a run folder, or a sweep's, or any other that holds run folders (job_folders.py says which count); or the
            URL of one (docs/remote.md).

    Raises:
        RunError: neither, or broken, or written by a newer release.
    """
    folder = folder_at(path)
    if not (folder / RunFolder.MANIFEST).exists():
        names = job_names(folder, errors)
        jobs = {name: folder / name for name in names if (folder / name / RunFolder.MANIFEST).exists()}
        if jobs or (folder / SweepFolder.INDEX).exists():
            return Sweep(
                folder=folder,
                runs={name: Run(job, Manifest.load(job)) for name, job in jobs.items()},
                overrides={name: overrides_of(job) for name, job in jobs.items()},
            )
    return Run(folder, Manifest.load(folder))
