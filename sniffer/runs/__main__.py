"""The command line of verbs on runs: `python -m sniffer.runs VERB RUN`; an error is one line.

Exit codes: 0 done, 1 refused, failed or found wrong, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import rich
from rich.console import Console, RenderableType

from sniffer.config.resolve import register
from sniffer.config.trust import Trust
from sniffer.errors import RunError
from sniffer.process.patched import patched
from sniffer.reader.job_folders import REPRODUCED
from sniffer.storage.layout import RunFolder
from sniffer.storage.ownership import is_run, never_began
from sniffer.terminal.command import exit_code, output_is_lost
from sniffer.terminal.logs import LineFormatter, LogFile, console_handler
from sniffer.terminal.printing import line

LOG = RunFolder.LOG
LAYOUTS = ("heads", "kvpress", "qfilters", "triattention", "kv_scales", "safetensors")
"""Of exports, all but the first of moments (exports/formats.py)."""
WIDTH = 180
"""Of tables that go to a file or a pipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb."""
    return exit_code(partial(run, arguments))


def run(arguments: Sequence[str] | None) -> int:
    chosen = parser().parse_args(arguments)
    register()
    with logging_to(chosen.run if chosen.verb == "resume" else None):
        code = VERBS[chosen.verb](chosen)
    # These do nothing but tell.
    return code or int(chosen.verb in ("list", "inspect", "verify", "compare") and output_is_lost())


def parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    top = argparse.ArgumentParser(prog="python -m sniffer.runs", description="Verbs on runs: what a run folder is for.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(verb: str, explained: str, run: str = "a run folder", **options: Any) -> argparse.ArgumentParser:
        made = verbs.add_parser(verb, help=explained, description=explained)
        made.add_argument("run", type=Path, metavar="RUN", help=run, **options)
        return made

    add("list", "a table of all runs and sweeps", "a folder of runs (outputs)", nargs="?", default=Path("outputs"))
    add("inspect", "what a run is, and how much of what it holds")

    verify = add("verify", "check every file and row against the manifest and the law", "a run, or a sweep of runs")
    verify.add_argument("--trust", action="append", default=[], metavar="PREFIX", help="packages of the sampler")

    resume = add("resume", "go on where a run was stopped, and mend what is damaged")
    resume.add_argument("--force", action="store_true", help="although something changed; the manifest records it")
    resume.add_argument("--restore", action="store_true", help="put config.yaml back to what the run was made with")
    resume.add_argument(
        "--extend",
        type=_more,
        nargs="?",
        const=0,
        metavar="dataset.max_examples=N",
        help="add to a complete run what its dataset has more of by now, or, given a larger N, up to so many documents",
    )
    _add_trust(resume)

    reproduce = add("reproduce", "run the saved configuration again and compare every row")
    reproduce.add_argument("--to", type=Path, metavar="FOLDER", help="of the new run (RUN_reproduced)")
    _add_trust(reproduce)

    compare = add("compare", "how far apart two runs are, where they have the same text, position and head")
    compare.add_argument("other", type=Path, metavar="OTHER", help="the run to compare it with")
    compare.add_argument("--to", type=Path, metavar="FILE", help="a Parquet file for all of it")

    export = add("export", "write a run in another layout, or its moments as a method loads them")
    export.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="heads (the default): l00h00q/data.parquet, and so on; the others are of moments over all positions "
        "(capture.moments.kinds), see docs/moments.md",
    )
    export.add_argument(
        "--to",
        metavar="FOLDER",
        help="where to (RUN_LAYOUT). Without --layout, the bare name of one is that layout and no folder: "
        "`--to kvpress` writes RUN_kvpress, `--to ./kvpress` would be a folder",
    )

    publish = add("publish", "push a run to the Hugging Face hub, with a dataset card")
    publish.add_argument("repo", metavar="REPO", help="owner/name")
    publish.add_argument("--dry-run", action="store_true", help="only write the folder that would be pushed")
    publish.add_argument("--to", type=Path, metavar="FOLDER", help="of the dry run (RUN_published)")
    publish.add_argument("--private", action="store_true", help="make the repository private")
    publish.add_argument("--text-licence", metavar="ID", help="the licence of the captured text, such as cc-by-4.0")
    publish.add_argument("--with-tokens", action="store_true", help="the token ids of the texts too; left out if not")
    return top


def _add_trust(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--trust", action="append", default=[], metavar="PREFIX", help="packages the config may name")
    verb.add_argument("--trust-remote-code", action="store_true", help="let the checkpoint run code of its own")
    verb.add_argument("--engine-address", metavar="ADDRESS", help="join this Ray cluster, not the one that was saved")


def _trust(chosen: argparse.Namespace) -> Trust:
    return Trust(chosen.trust, chosen.trust_remote_code, chosen.engine_address)


def _resume(chosen: argparse.Namespace) -> int:
    if chosen.extend is not None:
        return _extend(chosen)
    from sniffer.runs.resume import resume

    if not resume(chosen.run.absolute(), _trust(chosen), force=chosen.force, restore=chosen.restore):
        line(f"{chosen.run} is complete and whole: nothing to do")
    return 0


def _extend(chosen: argparse.Namespace) -> int:
    if chosen.force or chosen.restore:
        raise RunError("--extend adds to a run as it is, without --force or --restore: leave these out")
    from sniffer.runs.extend import extend

    documents = extend(chosen.run.absolute(), _trust(chosen), chosen.extend or None)
    if documents is None:
        line(f"{chosen.run} has all documents that its dataset gives: nothing to add")
    return 0


def _more(typed: str) -> int:
    """A number of documents, as it is given to --extend."""
    if (found := re.fullmatch(r"dataset\.max_examples=([1-9][0-9]*)", typed)) is None:
        raise argparse.ArgumentTypeError(f"{typed!r} is not dataset.max_examples=N (RUN comes before --extend)")
    return int(found[1])


def _verify(chosen: argparse.Namespace) -> int:
    from sniffer.runs.verify import verify_all

    return verify_all(chosen.run.absolute(), chosen.trust)


def _list(chosen: argparse.Namespace) -> int:
    from sniffer.runs.listing import table

    _print(table(chosen.run))
    return 0


def _inspect(chosen: argparse.Namespace) -> int:
    from sniffer.runs.inspect import tables

    _print(*tables(chosen.run.absolute()))
    return 0


def _reproduce(chosen: argparse.Namespace) -> int:
    from sniffer.runs.reproduce import reproduce

    identical, lines = reproduce(chosen.run.absolute(), _target(chosen, REPRODUCED), _trust(chosen))
    for told in lines:
        line(told)
    return 0 if identical else 1


def _compare(chosen: argparse.Namespace) -> int:
    from sniffer.runs.compare import told

    target = None if chosen.to is None else chosen.to.absolute()
    table, lines = told(chosen.run.absolute(), chosen.other.absolute(), target)
    _print(table)
    for said in lines:
        line(said)
    return 0


def _export(chosen: argparse.Namespace) -> int:
    if chosen.layout is None and chosen.to in LAYOUTS:
        chosen.layout, chosen.to = chosen.to, None
    layout = chosen.layout or "heads"
    chosen.to = Path(chosen.to) if chosen.to else None
    run, target = chosen.run.absolute(), _target(chosen, f"_{layout}")
    if layout == "heads":
        from sniffer.runs.export import export

        line(f"{export(run, target):,} files in {target}")
        return 0
    from sniffer.runs.exports.formats import export_moments

    for told in [f"{layout} in {target}", *export_moments(run, target, layout)]:
        line(told)
    return 0


def _publish(chosen: argparse.Namespace) -> int:
    from sniffer.runs.publish import assemble, push

    if chosen.dry_run:
        target = _target(chosen, "_published")
        assemble(chosen.run.absolute(), target, chosen.repo, chosen.text_licence, tokens=chosen.with_tokens)
        line(f"what would be pushed to {chosen.repo} is in {target}")
    else:
        told = {"private": chosen.private, "text_licence": chosen.text_licence, "tokens": chosen.with_tokens}
        line(push(chosen.run.absolute(), chosen.repo, **told))
    return 0


VERBS = {
    "list": _list,
    "inspect": _inspect,
    "verify": _verify,
    "resume": _resume,
    "reproduce": _reproduce,
    "compare": _compare,
    "export": _export,
    "publish": _publish,
}


def _target(chosen: argparse.Namespace, what: str) -> Path:
    """The folder to write to: the one named, or one beside the run."""
    run: Path = chosen.run.absolute()
    named: Path | None = chosen.to
    return named.absolute() if named else run.with_name(f"{run.name}{what}")


def _print(*tables: RenderableType) -> None:
    """Tables for people; wide where nobody's terminal would break them."""
    console = rich.get_console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(*tables)


@contextmanager
def logging_to(run: Path | None) -> Iterator[None]:
    """Log lines on the screen, and in the log of a run that goes on."""
    handlers: list[logging.Handler] = [console_handler()]
    if run is not None and (is_run(run) or never_began(run)) and not (run / LOG).is_symlink():
        handlers.append(LogFile(run / LOG, encoding="utf-8", delay=True))
        handlers[-1].setFormatter(LineFormatter("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
    with ExitStack() as given_back:
        for ours in ("", "sniffer", "models"):
            logger = logging.getLogger(ours)
            given_back.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.INFO if ours else logging.WARNING)
        given_back.enter_context(patched(logging.root, "handlers", handlers))
        for handler in handlers:
            given_back.callback(handler.close)
        yield


if __name__ == "__main__":
    sys.exit(main())
