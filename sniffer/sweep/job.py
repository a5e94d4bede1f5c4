"""A sweep while it runs: what `python -m sniffer -m` adds to its jobs.

A job that fails is told and noted, and the next one begins. Run again into the same folder
(hydra.sweep.dir=FOLDER), a sweep leaves alone what is complete, goes on with what was interrupted, and begins what
failed before it had begun. Jobs in one process share the model, if they want the same. At the end one table names
every job.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
from rich.table import Table

from sniffer.config.saving import as_chosen, saved_config
from sniffer.config.schema import Config
from sniffer.config.trust import NO_MIRROR, Trust
from sniffer.engine.model_cache import LastModel
from sniffer.errors import RunError, SnifferError, first_line
from sniffer.process.environment import versions
from sniffer.process.memory import let_go
from sniffer.reader.index import read_jobs, swept, update
from sniffer.runs.code import COPY, changed_code
from sniffer.runs.mirror import mirror
from sniffer.runs.resume import resume
from sniffer.storage.away import require_files
from sniffer.storage.layout import SweepFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.mirror import catch_up, has_all
from sniffer.storage.same_run import as_plain, differences
from sniffer.sweep.figure import draw_sweep
from sniffer.terminal.printing import Grid, line, say
from sniffer.terminal.progress import waiting_for
from sniffer.terminal.tables import show_table
from sniffer.words import one_line, size

log = logging.getLogger(__name__)

MODEL = LastModel()
"""Of the jobs that run in this process."""


@contextmanager
def noted(sweep: Path, folder: Path) -> Iterator[None]:
    """Keeps the index of the sweep while a job runs. An error is told and noted, and ends only this job."""
    job, failed_of = folder.relative_to(sweep).as_posix(), None
    update(sweep, job)
    try:
        yield
    except Exception as error:
        failed_of = one_line(error) if isinstance(error, SnifferError) else f"{type(error).__name__}: {one_line(error)}"
        log.error("job %s failed: %s", job, failed_of, exc_info=not isinstance(error, SnifferError))
        let_go(error)  # the next job is to find the memory free
    finally:
        update(sweep, job, failed_of)


def go_on(config: Config, folder: Path) -> None:
    """A job whose folder already holds results: nothing to do if they are complete, else the rest of it.

    Raises:
        RunError: they are results of another configuration or model.
        SnifferError: as a fresh run.
    """
    remote_code = bool(config.saved["model"].get("trust_remote_code"))
    url = config.output.mirror
    trust = Trust(config.trusted_targets, remote_code, config.engine.address, url or NO_MIRROR)
    saved = saved_config(folder)
    if found := differences({"config": saved}, {"config": as_chosen(config.saved, saved)}):
        raise RunError(
            f"{folder} holds results of another configuration ({'; '.join(found[:3])}): "
            "choose another hydra.sweep.dir, or remove the folder"
        )
    if not is_whole(folder):
        resume(folder, trust, load=MODEL.load)
        return
    manifest = Manifest.load(folder, parts_must_exist=False)
    if found := _another_model(manifest, config):
        raise RunError(
            f"{folder} holds results of another model ({'; '.join(found[:3])}): "
            "put it back as it was, choose another hydra.sweep.dir, or remove the folder"
        )
    if url is not None and not has_all(folder, url):
        try:
            log.info("%s", mirror(folder, url))
        except RunError as error:  # the job itself is complete
            log.warning("%s (%s catches up)", error, catch_up(folder, url))


def _another_model(manifest: Manifest, config: Config) -> list[str]:
    """What differs between the model of a complete job and that of its configuration now, without loading it.

    Another release of a package is told, and not held against a job that is complete.
    """
    then = manifest.as_json()
    if newer := differences({"versions": then["versions"]}, {"versions": versions()}):
        log.warning("a complete job was made with other versions: %s", "; ".join(newer))
    before, now = ({**model, "transformers": None} for model in (then["model"], as_plain(config.model.describe())))
    copies = [line for line in changed_code(manifest, config.model) if COPY in line]
    return [*differences({"model": before}, {"model": now}), *copies]


def is_whole(folder: Path) -> bool:
    """Whether a run is complete, with all of its files there, or at its mirror alone."""
    try:
        manifest = Manifest.load(folder, parts_must_exist=False)
        require_files(folder, manifest, all_here=False)
        return manifest.status == "complete"
    except RunError:
        return False


def finish(sweep: Path, done_before: frozenset[str], lost: str = "") -> int:
    """Ends a sweep: its index, figure and table. Returns the exit code.

    Args:
        done_before: jobs that were complete when the sweep began.
        lost: what the launcher ended of, if not well. Jobs in processes of their own may run on; they are waited for.

    Raises:
        SnifferError: the index cannot be written.
    """
    MODEL.clear()
    if lost:
        log.error("the launcher has lost a job: %s", lost)
        wait_for_jobs(sweep)
    if not (sweep / SweepFolder.INDEX).exists():
        _leave_nothing(sweep)
        return int(bool(lost))
    jobs = update(sweep)
    try:
        draw_sweep(jobs, sweep)
    except Exception as error:  # of a library that draws: any; the jobs are what they are
        log.warning("no figure of the sweep: %s: %s", type(error).__name__, first_line(error))
    show_table(jobs_table(jobs, done_before))
    say(sweep, style="bold")
    unfinished = jobs.filter(pl.col("status") != "complete")
    if unfinished.is_empty() and not lost:
        return 0
    line(told(unfinished, len(jobs)) if len(unfinished) else AGAIN, error=True)
    return 1


AGAIN = "all jobs that began are complete; the same command again goes on with the rest, if there is any"
LOOK_EVERY = 1.0
"""Seconds."""


def wait_for_jobs(sweep: Path) -> None:
    """Waits until no process runs a job of the sweep."""
    while running := [job.name for job in read_jobs(sweep) if job.status == "running"]:
        with waiting_for(f"waiting for jobs that still run: {', '.join(running)}"):
            time.sleep(LOOK_EVERY)


def _leave_nothing(sweep: Path) -> None:
    """Of a sweep that began no job, Hydra leaves its own record behind."""
    if {path.name for path in sweep.glob("*")} == {SweepFolder.MULTIRUN}:
        (sweep / SweepFolder.MULTIRUN).unlink()
        sweep.rmdir()


def jobs_table(jobs: pl.DataFrame, done_before: frozenset[str] = frozenset()) -> Table:
    """Every job with what was swept and how it ended; complete ones of an earlier session are `skipped`."""
    grid = Grid(title="jobs")
    keys = swept(jobs)
    for name in ("job", *keys, "status"):
        grid.add_column(name, overflow="fold")
    for name in ("rows", "bytes", "seconds"):
        grid.add_column(name, justify="right")
    for job in jobs.iter_rows(named=True):
        status = "skipped" if job["status"] == "complete" and job["job"] in done_before else job["status"]
        rows = "" if job["rows"] is None else f"{job['rows']:,}"
        seconds = "" if job["seconds"] is None else f"{job['seconds']:.1f}"
        on_disk = "" if job["bytes"] is None else size(job["bytes"])
        grid.add_row(job["job"], *(str(job[key]) for key in keys), status, rows, on_disk, seconds)
    return grid


def told(unfinished: pl.DataFrame, n_jobs: int) -> str:
    """Which jobs are not complete, and why the first one is not, in one line."""
    names = ", ".join(f"{job} {status}" for job, status in unfinished.select("job", "status").iter_rows())
    why = [f"job {job}: {error}" for job, error in unfinished.select("job", "error").iter_rows() if error]
    return "; ".join([f"{len(unfinished)} of {n_jobs} jobs are not complete ({names})", *why[:1]])
