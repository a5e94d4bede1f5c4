"""The command line of every analysis: `python -m sniffer.experiments NAME run=RUN [key=value ...]`.

conf/analysis/NAME.yaml is the analysis' constructor call written down; key=value changes it. `run` is a run
folder, or a sweep's, whose jobs are then analysed one by one. `out` is where results go instead of
RUN/experiments/NAME. An error is one line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import polars as pl
import rich
import yaml
from rich.progress import track

from sniffer import open_run
from sniffer.config.build import build
from sniffer.config.resolve import conf_folder
from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.storage.remote import RemotePath
from sniffer.terminal.command import exit_code, refusal
from sniffer.terminal.printing import say

from . import results
from .results import Result

Item = TypeVar("Item")
_bar = False
"""Whether one is drawn: a terminal has room for one."""
PATHS = ("run", "runs", "out", "scores", "baseline")
"""Keys whose values are text as they are, even where YAML would make a number or a date of it."""


@runtime_checkable
class Analysis(Protocol):
    """A dataclass whose fields are its settings."""

    def measure(self, run: Run) -> Result: ...


@runtime_checkable
class Quick(Protocol):
    """An analysis that can also give the numbers of heads that cost little alone, for who measures many times."""

    def quick(self, run: Run) -> pl.DataFrame: ...


def main(
    name: str, arguments: Sequence[str] | None = None, act: Callable[[str, Sequence[str]], None] | None = None
) -> int:
    """Runs one analysis from the command line; the exit code is 0, 1 (refused) or 130 (interrupted).

    `act` is what to do with the name and the words instead of `analyse`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        if any(word in ("-h", "--help") for word in words):
            print(usage(name))
        else:
            (act or analyse)(name, words)
        return 0

    def told(error: Exception) -> str | None:
        return f"not enough memory for {name}" if isinstance(error, MemoryError) else refusal(error)

    return exit_code(run, told)


def analyse(name: str, words: Sequence[str]) -> None:
    settings = overrides(words)
    run, out = settings.pop("run", None), settings.pop("out", None)
    if not isinstance(run, str):
        raise ConfigError(f"no run is given: python -m sniffer.experiments {name} run=outputs/RUN")
    analysis = make(name, settings)
    jobs = opened(run)
    if out is not None and len(jobs) > 1:
        raise ConfigError(f"out={out} would mix the results of {len(jobs)} jobs: leave it out, or give one job as run")
    for job in jobs:
        folder = destination(out, job.folder, name)
        result = told_of_sections(analysis.measure(job), analysis)
        results.save(result, folder, job, analysis)
        _tell(result, folder)


def told_of_sections(result: Result, analysis: Analysis) -> Result:
    """What is said of some rows only says so first."""
    sections = getattr(analysis, "sections", None)
    if sections is None:
        return result
    return replace(result, findings=[f"Of the rows of these sections only: {', '.join(sections)}.", *result.findings])


def make(name: str, settings: dict[str, Any]) -> Analysis:
    """The analysis that conf/analysis/NAME.yaml and some changed settings describe.

    Raises:
        ConfigError: an unknown key, or a value that cannot be used.
    """
    defaults = yaml.safe_load((conf_folder() / "analysis" / f"{name}.yaml").read_text(encoding="utf-8"))
    return cast(Analysis, build({**defaults, **settings}, name))


def opened(path: str) -> list[Run]:
    """The run, or the jobs of a sweep.

    Raises:
        RunError: neither, or nothing captured yet.
    """
    found = open_run(path)
    runs = [found] if isinstance(found, Run) else list(found.runs.values())
    for run in runs:
        if not run.manifest.rows:
            raise RunError(f"{run.folder} has no rows yet: wait for its first commit, or capture again")
    return runs


def destination(out: str | None, run: Path, name: str) -> Path:
    """Where results go: `out`, else beside the run.

    Raises:
        ConfigError: they would lie among the run's own files, or at a URL.
        RunError: they would leave the run's folder through a link, or lie among someone's own files.
    """
    if out is None and isinstance(run, RemotePath):
        raise ConfigError(
            f"{run} is a URL, where no results are written: give a folder of this machine with out=FOLDER"
        )
    folder = results.folder_of(run, name) if out is None else Path(out).expanduser().absolute()
    inside, own = folder.resolve(), run.resolve()
    if inside == own or inside.is_relative_to(own / "captures"):
        raise ConfigError(f"out={folder} lies among the run's own files: use {own / 'experiments'} or another place")
    results.refuse_place(folder)
    return folder


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """key=value words, values read as YAML.

    Raises:
        ConfigError: a word that is not key=value, or a key given twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not key=value: write run=outputs/RUN and settings so, or --help")
        if key in found:
            raise ConfigError(f"{key} is given twice: keep one")
        try:
            found[key] = text if key in PATHS else yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}={text} cannot be read: quote it as on any command line") from error
    return found


def usage(name: str) -> str:
    text = (conf_folder() / "analysis" / f"{name}.yaml").read_text(encoding="utf-8")
    settings = "\n".join(f"  {line}" for line in text.splitlines() if not line.startswith("_target_"))
    several = "runs=SWEEP, or runs=[A,B,...]"
    either = f"run=RUN, or {several}"
    told = {"compare": several, "published": either, "stability": either, "report": "run=RUN [results=FOLDER]"}
    runs = told.get(name, "run=RUN")
    return f"python -m sniffer.experiments {name} {runs} [out=FOLDER] [key=value ...]\n\nSettings:\n\n{settings}"


def progress(items: Iterable[Item], title: str, total: int | None = None) -> Iterator[Item]:
    """Goes through the items under a progress bar; silent where there is no terminal, and below another bar."""
    global _bar
    if _bar:
        yield from items
        return
    _bar, console = True, rich.get_console()
    try:
        yield from track(items, title, total=total, console=console, transient=True, disable=not console.is_terminal)
    finally:
        _bar = False


def _tell(result: Result, folder: Path) -> None:
    for sentence in result.findings:
        say(sentence)
    say(folder, style="bold")
