"""A sweep: one run folder per job, read as one table with each job's overrides as columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import yaml

from sniffer.errors import RunError
from sniffer.scan import join

if TYPE_CHECKING:
    from sniffer.reader import Run


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep by job, with what each job overrode.

    `overrides` maps job -> key -> the value as it was typed, such as {"0": {"sampler.base_rate": "0.5"}}.
    Jobs that failed before they wrote a manifest are not among them.
    """

    folder: Path
    runs: Mapping[str, Run]
    overrides: Mapping[str, Mapping[str, str]]

    @property
    def complete(self) -> bool:
        """Whether every run here is complete."""
        return all(run.complete for run in self.runs.values())

    def jobs(self) -> pl.DataFrame:
        """One row per job: job, its overrides as columns, status, rows, bytes, path."""
        manifests = [run.manifest for run in self.runs.values()]
        return self._columns().with_columns(
            pl.Series("status", [manifest.status for manifest in manifests]),
            pl.Series("rows", [manifest.rows for manifest in manifests]),
            pl.Series("bytes", [manifest.bytes for manifest in manifests]),
            pl.Series("path", [str(run.folder) for run in self.runs.values()]),
        )

    def scan(
        self,
        layers: Iterable[int] | None = None,
        kinds: Iterable[str] | None = None,
        inclusion_probability: bool = False,
    ) -> pl.LazyFrame:
        """All rows of all jobs, lazily: job and the overrides as columns, then those of `Run.scan`.

        `layers` and `kinds` select as in `Run.scan`, from each job those that it captured.

        Raises:
            RunError: no job captured one of them.
        """
        wanted_layers = None if layers is None else tuple(layers)
        wanted_kinds = None if kinds is None else tuple(kinds)
        self._check("layer", wanted_layers, {layer for run in self.runs.values() for layer in run.layers})
        self._check("kind", wanted_kinds, {kind for run in self.runs.values() for kind in run.kinds})
        frames = []
        for run, labels in zip(self.runs.values(), self._columns().iter_slices(1), strict=True):
            layers = _among(wanted_layers, run.layers)
            kinds = _among(wanted_kinds, run.kinds)
            if not run.captured(layers, kinds):
                continue
            constants = [pl.lit(value[0], dtype=value.dtype).alias(value.name) for value in labels]
            frames.append(run.scan(layers, kinds, inclusion_probability).select(*constants, pl.all()))
        return join(frames)

    def _columns(self) -> pl.DataFrame:
        """One row per job: job and the overrides, typed where all jobs' values allow."""
        keys = dict.fromkeys(key for overrides in self.overrides.values() for key in overrides)
        columns = {key: typed([self.overrides[job].get(key) for job in self.runs]) for key in keys}
        return pl.DataFrame({"job": list(self.runs), **columns})

    @staticmethod
    def _check(what: str, wanted: Sequence[Any] | None, known: set[Any]) -> None:
        for value in wanted or ():
            if value not in known:
                names = ", ".join(map(str, sorted(known)))
                raise RunError(f"{what} {value} was captured by no job of this sweep: they have {what}s {names}")


def overrides_of(job: Path) -> dict[str, str]:
    """What a job of a Hydra sweep overrode: key -> value, as typed; empty outside Hydra.

    Raises:
        RunError: the job's list of overrides cannot be read.
    """
    path = job / ".hydra" / "overrides.yaml"
    if not path.exists():
        return {}
    try:
        entries = [str(entry) for entry in yaml.safe_load(path.read_text(encoding="utf-8")) or ()]
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise RunError(f"could not read {path}: {str(error).splitlines()[0]}; restore the file") from error
    split = (entry.lstrip("+~").partition("=") for entry in entries)
    return {key: value for key, _, value in split}


def typed(texts: Sequence[str | None]) -> list[Any]:
    """Values of one key over all jobs: integers, floats or booleans if all of them read so, else text."""
    readers: tuple[Callable[[str], Any], ...] = (int, float, _boolean)
    for read in readers:
        try:
            return [None if text is None else read(text) for text in texts]
        except ValueError:
            continue
    return list(texts)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _among(wanted: Sequence[Any] | None, known: Sequence[Any]) -> Sequence[Any] | None:
    return None if wanted is None else [value for value in wanted if value in known]
