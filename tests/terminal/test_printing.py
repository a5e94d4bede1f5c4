"""Whatever a name holds, a terminal gets neither codes nor markup from it, and every command still says its line."""

from __future__ import annotations

import ast
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import rich
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sniffer.experiments.common import entry

from sniffer.cli.job import tell_rerun
from sniffer.reader.index import update
from sniffer.runs import __main__ as verbs
from sniffer.runs.code import COPY
from sniffer.sampler import Picker
from sniffer.storage.manifest import Manifest
from sniffer.sweep.figure import draw_sweep
from sniffer.sweep.job import finish
from sniffer.terminal.logs import LineFormatter, console_handler
from sniffer.terminal.printing import Grid, line, say
from sniffer.terminal.summary import show_summary
from sniffer.words import CODES, printable
from tests.helpers_storage import SAMPLER, make_run

POISON = "\x1b]0;pwned\x07\x1b[2J\x1b[1;1Hverified[/red][bold] :smile: \u202egpj\n\r\x9b31m $\\frac$"
FOLDER = "o[/red]\x1b[2J"
ROOT = Path(__file__).resolve().parents[2]


@given(st.text(st.characters(codec=None)))
def test_a_text_without_codes_is_what_it_was(text: str):
    shown = printable(text)
    assert not CODES.search(shown) and printable(shown) == shown
    assert shown == text or CODES.search(text)
    shown.encode()


def test_a_text_of_megabytes_is_cut():
    assert printable("x" * 10_000_000).endswith("xx... (10,000,000 characters)")


def poisoned(value: Any) -> Any:
    """The same values with every text in the place of another, but what names a class."""
    if isinstance(value, dict):
        return {key if key.startswith("_") else POISON + key: poisoned(one) for key, one in value.items()}
    return [poisoned(one) for one in value] if isinstance(value, list) else POISON if isinstance(value, str) else value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run in which every text of the manifest that is free is poison, and its own name too."""
    folder = make_run(tmp_path / FOLDER / "run").folder
    values = json.loads((folder / "manifest.json").read_text())
    values.pop("checksum")
    for name in ("versions", "device", "backbone", "config", "generation"):
        values[name] = {POISON: POISON}
    values["backbone"] |= {"code": {POISON: COPY + POISON}, "packages": {POISON: POISON}}
    values |= {"parts_at": POISON, "reason": POISON, "commit": POISON, "timings": {POISON: 1.0}, "counts": {POISON: 1}}
    values["model"] = poisoned({"checkpoint": "x"}) | dict.fromkeys(("checkpoint", "architecture", "revision"), POISON)
    values["dataset"] |= dict.fromkeys(("path", "name", "split", "package"), POISON)
    values["resumes"] = [{"at": POISON, "stopped_by": POISON, "differences": [POISON]}]
    rope = {"layers": [0, 2], "inv_freq": [], "layout": POISON, "first": 0, "attention_factor": 1.0, "until": None}
    values["rope"] = [rope | {"parameters": {"rope_type": POISON}, "layer_type": POISON, "missing": POISON}]
    for layer in values["geometry"]:
        layer["module"] = POISON
    text = json.dumps(values)
    for name in ("manifest.json", ".manifest.json"):
        (folder / name).write_text(text)
    (folder / "config.yaml").write_text(json.dumps({POISON: POISON}))
    return folder


@pytest.fixture(params=["a file", "a terminal"])
def shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys) -> Iterator[Any]:
    """What was printed so far, styles left out."""
    stream = StringIO()
    console = Console(file=stream, force_terminal=request.param == "a terminal", width=400, color_system="standard")
    monkeypatch.setattr(rich, "_console", console)
    monkeypatch.setattr("sniffer.runs.__main__.Console", lambda **_: console)
    handlers = logging.root.handlers[:]

    def so_far() -> str:
        output = capsys.readouterr()
        # What rich itself writes: styles, and the bar that it draws again and takes away.
        return re.sub(r"\x1b\[[0-9;]*[mKA]|\x1b\[\?25[lh]|\r", "", stream.getvalue()) + output.out + output.err

    yield so_far
    logging.root.handlers[:] = handlers


def must_be_harmless(text: str) -> None:
    assert text.strip()
    assert not [code for code in CODES.findall(text) if code != "\n"], text
    assert "Traceback" not in text


@pytest.mark.parametrize("verb", ["list", "inspect", "verify", "resume", "export", "publish", "reproduce"])
def test_every_verb_says_poison_harmlessly(folder: Path, tmp_path: Path, shown, verb: str):
    more = {"publish": ["owner/name", "--dry-run"]}.get(verb, [])
    verbs.main([verb, str(folder.parent if verb == "list" else folder), *more])
    must_be_harmless(text := shown())
    assert "[bold]" in text or "[/red]" in text


def test_a_run_whose_parts_are_at_such_a_place(folder: Path, shown):
    (folder / Manifest.load(folder).parts[0].path).unlink()
    for verb in ("list", "inspect", "verify", "resume", "export"):
        verbs.main([verb, str(folder)])
        must_be_harmless(text := shown())
        assert "[bold]" in text or "[/red]" in text


def test_an_analysis_does_too(folder: Path, shown):
    assert entry.main("key_rank", [f"run={folder}"]) == 1
    must_be_harmless(shown())


def test_a_run_in_such_a_folder_ends_well(folder: Path, shown):
    manifest = replace(
        Manifest.load(make_run(folder.parent / "other").folder),
        counts=dict.fromkeys(("examples", "truncated", "skipped_empty", "tokens"), 1),
        timings={"inference": 1.0, POISON: 2.0},
    )
    picker = Picker(SAMPLER, 7)
    picker.expected([200])
    show_summary(folder, manifest, picker)
    must_be_harmless(text := shown())
    assert text.splitlines()[-1].endswith(r"o[/red]\x1b[2J/run")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:constrained_layout")
def test_a_sweep_over_such_values_ends_well(tmp_path: Path, shown):
    sweep = tmp_path / FOLDER
    for job in range(2):
        folder = make_run(sweep / str(job)).folder
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text(json.dumps([f"{POISON}={POISON}{job}", f"a=${job}_$"]))
    draw_sweep(update(sweep, "0", POISON), sweep)
    assert finish(sweep, frozenset()) == 1
    must_be_harmless(shown())


def test_log_lines_hold_no_codes(shown):
    handler = console_handler()
    log = logging.getLogger("sniffer.test")
    log.handlers, log.propagate = [handler], False
    try:
        raise ValueError(POISON)
    except ValueError:
        log.exception("failed: %s", POISON)
    text = shown()
    assert not [code for code in CODES.findall(text) if code != "\n"] and "pwned" in text
    record = logging.LogRecord("other", logging.INFO, "", 0, "two\nlines\x1b[2J", (), None)
    assert LineFormatter("%(message)s").format(record) == "two\nlines\\x1b[2J"


def test_a_rerun_says_harmlessly_what_is_not_as_it_was(folder: Path, tmp_path: Path, shown):
    logger = logging.getLogger("sniffer")
    logger.handlers, logger.propagate = [console_handler()], False
    try:
        tell_rerun(folder, make_run(tmp_path / "again").folder)
    finally:
        logger.handlers, logger.propagate = [], True
    must_be_harmless(text := shown())
    assert "made with something else" in text and "[/red]" in text


def test_a_line_a_sentence_and_a_grid(shown):
    line(POISON)
    line(POISON, error=True)
    say(POISON, style="bold")
    grid = Grid(title=POISON)
    grid.add_column(POISON, POISON)
    grid.add_row(POISON)
    rich.get_console().print(grid)
    must_be_harmless(text := shown())
    assert text.count("[/red][bold] :smile:") == 6


def _calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_there_is_one_place_that_prints():
    """Elsewhere only what stands in our own code is printed as it is, and no table is rich's own.

    A module that is run has another name, under which its log lines would not be known for ours.
    """
    for package in ("sniffer", "experiments"):
        for file in (ROOT / package).rglob("*.py"):
            if file.name == "printing.py":
                continue
            for name, call in _calls(file):
                if name == "print":
                    own = all(isinstance(a, ast.Constant) or ast.unparse(a).startswith("usage(") for a in call.args)
                    assert own, f"{file}: {ast.unparse(call)}"
                assert name not in ("Table", "rich.print"), f"{file}: {ast.unparse(call)}"
                if name == "logging.getLogger" and file.name == "__main__.py":
                    assert ast.unparse(call.args[0]) != "__name__", f"{file}: {ast.unparse(call)}"
                if name.endswith("console.print"):
                    assert ast.unparse(call.args[0]).split("(")[0].endswith(("table", "tables")), ast.unparse(call)


def test_fields_of_the_manifest_that_are_poisoned_are_all_that_are_free():
    """A new field has to be poisoned above, or to be one of those that are checked."""
    checked = {"status", "seed", "geometry", "selection", "sampler", "created", "finished", "parts", "pending"}
    checked |= {"threads", "examples", "schema_version", "attention", "scores", "tokens", "model_config"}
    checked |= {"moments", "moment_files", "differences"}
    free = {
        "reason",
        "versions",
        "commit",
        "device",
        "backbone",
        "model",
        "dataset",
        "counts",
        "timings",
        "config",
        "generation",
        "rope",
        "parts_at",
    }
    assert {field.name for field in fields(Manifest)} == checked | free | {"resumes"}
