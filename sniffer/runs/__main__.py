"""The command line of verbs on runs: `python -m sniffer.runs VERB RUN`; an error is one line.

Exit codes: 0 done, 1 refused, failed or found wrong, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sniffer.__main__ import one_line
from sniffer.logs import console_handler


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb."""
    chosen = parser().parse_args(arguments)
    _log_to(chosen.run if chosen.verb == "resume" else None)
    try:
        return int(VERBS[chosen.verb](chosen))
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return 128 + getattr(error, "signum", signal.SIGINT)
    except (HydraException, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(one_line(error), file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    top = argparse.ArgumentParser(prog="python -m sniffer.runs", description="Runs as things one can handle.")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    resume = verbs.add_parser("resume", help="go on where a run was stopped, and mend what is damaged")
    resume.add_argument("run", type=Path, metavar="RUN")
    resume.add_argument("--force", action="store_true", help="although something changed; the manifest records it")
    resume.add_argument("--restore", action="store_true", help="put config.yaml back to what the run was made with")
    _add_trust(resume)

    verify = verbs.add_parser("verify", help="check every file and row against the manifest and the sampling law")
    verify.add_argument("run", type=Path, metavar="RUN", help="a run, or a sweep of runs")
    verify.add_argument("--trust", action="append", default=[], metavar="PREFIX", help="packages of the sampler")
    return top


def _add_trust(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--trust", action="append", default=[], metavar="PREFIX", help="packages the config may name")
    verb.add_argument("--trust-remote-code", action="store_true", help="let the checkpoint run code of its own")


def _resume(chosen: argparse.Namespace) -> int:
    from sniffer.runs.resume import resume
    from sniffer.runs.saved import Trust

    trust = Trust(chosen.trust, chosen.trust_remote_code)
    if not resume(chosen.run.absolute(), trust, force=chosen.force, restore=chosen.restore):
        print(f"{chosen.run} is complete and whole: nothing to do")
    return 0


def _verify(chosen: argparse.Namespace) -> int:
    from sniffer.runs.verify import verify_all

    return verify_all(chosen.run.absolute(), chosen.trust)


VERBS = {"resume": _resume, "verify": _verify}


def _log_to(run: Path | None) -> None:
    """Log lines on the screen, and in the log of a run that goes on."""
    handlers: list[logging.Handler] = [console_handler()]
    if run is not None and run.is_dir():
        handlers.append(logging.FileHandler(run / "sniffer.log", encoding="utf-8", delay=True))
        handlers[-1].setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)


if __name__ == "__main__":
    sys.exit(main())
