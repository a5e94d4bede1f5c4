"""What may be typed behind `python -m sniffer.runs`: the verbs and their options."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from sniffer.storage.remote import named

LAYOUTS = ("heads", "kvpress", "qfilters", "triattention", "kv_scales", "safetensors")
"""Of exports, all but the first of moments (exports/formats.py)."""


ABOUT = """Verbs on runs: what a run folder is for. list, inspect, verify, compare and export take the URL of one too,
such as s3://bucket/run or hf://datasets/owner/name (docs/remote.md)."""


def parser() -> argparse.ArgumentParser:
    """The verbs and their options."""
    top = argparse.ArgumentParser(prog="python -m sniffer.runs", description=ABOUT)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(verb: str, explained: str, run: str = "a run folder", **options: Any) -> argparse.ArgumentParser:
        made = verbs.add_parser(verb, help=explained, description=explained)
        made.add_argument("run", type=named, metavar="RUN", help=run, **options)
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
    _add_mirror(resume)

    reproduce = add("reproduce", "run the saved configuration again and compare every row")
    reproduce.add_argument("--to", type=Path, metavar="FOLDER", help="of the new run (RUN_reproduced)")
    _add_trust(reproduce)

    compare = add("compare", "how far apart two runs are, where they have the same text, position and head")
    compare.add_argument("other", type=named, metavar="OTHER", help="the run to compare it with")
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

    taken = add("import", "make a run of files in the layout of one folder per layer, head and kind", "their folder")
    taken.add_argument("--to", type=Path, metavar="RUN", help="the run to write (FOLDER_run)")
    taken.add_argument(
        "--heads", type=_heads, metavar="QUERY/KEY", help="of the model, such as 32/8; all that there are if not said"
    )
    taken.add_argument(
        "--sampler",
        nargs="+",
        metavar="WORD",
        help="that drew the positions: log_uniform, uniform or all, then key=number, such as uniform base_rate=10 "
        "bucket_size=2048; FOLDER comes before it",
    )
    taken.add_argument("--model", default="unknown", metavar="NAME", help="of the model, which the run then says")
    taken.add_argument("--pre", action="store_true", help="q and k there are from before RoPE: q_pre and k_pre")

    mirror = add("mirror", "copy a run to a URL, or bring its copy there up to date; open_run and most verbs read it")
    mirror.add_argument(
        "url", metavar="URL", help="of a folder for this run alone: s3://bucket/run, gs://..., hf://..."
    )

    publish = add("publish", "push a run to the Hugging Face hub, with a dataset card")
    publish.add_argument("repo", metavar="REPO", help="owner/name")
    publish.add_argument("--dry-run", action="store_true", help="only write the folder that would be pushed")
    publish.add_argument("--to", type=Path, metavar="FOLDER", help="of the dry run (RUN_published)")
    publish.add_argument(
        "--branch", metavar="NAME", help="of the repository, made if it is not there; main if not said"
    )
    publish.add_argument(
        "--layout",
        choices=("run", "heads"),
        default="run",
        help="a run folder (the default), or l00h00q/data.parquet, ...",
    )
    publish.add_argument("--private", action="store_true", help="make the repository private")
    publish.add_argument("--text-licence", metavar="ID", help="the licence of the captured text, such as cc-by-4.0")
    publish.add_argument("--with-tokens", action="store_true", help="the token ids of the texts too; left out if not")
    return top


def _add_trust(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--trust", action="append", default=[], metavar="PREFIX", help="packages the config may name")
    verb.add_argument("--trust-remote-code", action="store_true", help="let the checkpoint run code of its own")
    verb.add_argument("--engine-address", metavar="ADDRESS", help="join this Ray cluster, not the one that was saved")


def _add_mirror(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--mirror", metavar="URL", help="copy to this URL, not the one that was saved; none for no copy")


def _more(typed: str) -> int:
    """A number of documents, as it is given to --extend."""
    if (found := re.fullmatch(r"dataset\.max_examples=([1-9][0-9]*)", typed)) is None:
        raise argparse.ArgumentTypeError(f"{typed!r} is not dataset.max_examples=N (RUN comes before --extend)")
    return int(found[1])


def _heads(typed: str) -> tuple[int, int]:
    """Numbers of query and key heads, as they are given to --heads."""
    if (found := re.fullmatch(r"([1-9][0-9]{0,4})/([1-9][0-9]{0,4})", typed)) is None:
        raise argparse.ArgumentTypeError(f"{typed!r} is not QUERY/KEY, such as 32/8")
    return int(found[1]), int(found[2])
