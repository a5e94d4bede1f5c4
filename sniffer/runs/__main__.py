"""The command line of verbs on runs: `python -m sniffer.runs VERB RUN`; an error is one line.

Exit codes: 0 done, 1 refused, failed or found wrong, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import rich
from rich.console import Console, RenderableType

from sniffer.config.resolve import register
from sniffer.config.trust import NO_MIRROR, Trust
from sniffer.errors import RunError
from sniffer.process.patched import patched
from sniffer.reader.job_folders import REPRODUCED
from sniffer.runs.options import LAYOUTS, parser
from sniffer.storage.layout import RunFolder
from sniffer.storage.ownership import is_run, never_began
from sniffer.storage.remote import RemotePath, folder_at
from sniffer.terminal.command import exit_code, output_is_lost
from sniffer.terminal.logs import LineFormatter, LogFile, console_handler
from sniffer.terminal.printing import line

LOG = RunFolder.LOG
WIDTH = 180
"""Of tables that go to a file or a pipe."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb."""
    return exit_code(partial(run, arguments))


def run(arguments: Sequence[str] | None) -> int:
    chosen = parser().parse_args(arguments)
    register()
    chosen.run = _opened(chosen.verb, chosen.run)
    with logging_to(chosen.run if chosen.verb == "resume" else None):
        code = VERBS[chosen.verb](chosen)
    # These do nothing but tell.
    return code or int(chosen.verb in ("list", "inspect", "verify", "compare") and output_is_lost())


AT_URLS = ("list", "inspect", "verify", "compare", "export")


def _opened(verb: str, run: Path) -> Path:
    """The folder, its files listed where it is at a URL; raises RunError where a verb needs one of this machine."""
    if isinstance(run, RemotePath) and verb not in AT_URLS:
        raise RunError(
            f"{run} is a URL, and {verb} needs a run of this machine: copy it first ({', '.join(AT_URLS)} take URLs)"
        )
    return run.listed() if isinstance(run, RemotePath) else run


def _trust(chosen: argparse.Namespace) -> Trust:
    # What is made to be compared has no copy of its own.
    mirror = chosen.mirror if chosen.verb == "resume" else NO_MIRROR
    return Trust(chosen.trust, chosen.trust_remote_code, chosen.engine_address, mirror)


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
    table, lines = told(chosen.run.absolute(), folder_at(chosen.other), target)
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


def _import(chosen: argparse.Namespace) -> int:
    from sniffer.runs.imports.law import told_sampler
    from sniffer.runs.imports.making import Said, import_heads

    sampler = told_sampler(chosen.sampler) if chosen.sampler else None
    said = Said(sampler, chosen.heads, chosen.model, chosen.pre)
    for told in import_heads(chosen.run.absolute(), _target(chosen, "_run"), said):
        line(told)
    return 0


def _publish(chosen: argparse.Namespace) -> int:
    from sniffer.runs.publish import assemble, push

    told = {"text_licence": chosen.text_licence, "tokens": chosen.with_tokens}
    told |= {"branch": chosen.branch, "layout": chosen.layout}
    if chosen.dry_run:
        target = _target(chosen, "_published")
        assemble(chosen.run.absolute(), target, chosen.repo, **told)
        line(f"what would be pushed to {chosen.repo} is in {target}")
    else:
        line(push(chosen.run.absolute(), chosen.repo, private=chosen.private, **told))
    return 0


def _mirror(chosen: argparse.Namespace) -> int:
    from sniffer.runs.mirror import mirror

    line(mirror(chosen.run.absolute(), chosen.url))
    return 0


VERBS = {
    "list": _list,
    "inspect": _inspect,
    "verify": _verify,
    "resume": _resume,
    "reproduce": _reproduce,
    "compare": _compare,
    "export": _export,
    "import": _import,
    "publish": _publish,
    "mirror": _mirror,
}


def _target(chosen: argparse.Namespace, what: str) -> Path:
    """The folder to write to: the one named, or one beside the run."""
    run: Path = chosen.run.absolute()
    named: Path | None = chosen.to
    if named is None and isinstance(run, RemotePath):
        raise RunError(
            f"{run} is a URL, and is written to by no export: give a folder of this machine with --to FOLDER"
        )
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
