"""Run folders that someone has tampered with, through every verb: each ends soon, with one line, and none is harmed.

Each case changes a run of the tiny model and puts checksums right, as whoever means it would.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sniffer.experiments.common import entry

from sniffer import open_run
from sniffer.errors import CaptureError, RunError, SnifferError
from sniffer.runs import __main__ as verbs
from sniffer.runs.verify import missing_shards
from sniffer.storage.manifest import Manifest
from tests.helpers_runs import TEXTS, Runs
from tests.tiny_run import save_checkpoint, save_texts

PART = "captures/layer=00/kind=q/part-00000.parquet"
HUGE = 10**30


class Tampered:
    """A run folder and its manifest, to be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.values: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        del self.values["checksum"]

    def save(self) -> None:
        text = json.dumps(self.values, sort_keys=True, separators=(",", ":"))
        checksum = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
        for name in ("manifest.json", ".manifest.json"):
            (self.folder / name).write_text(json.dumps(self.values | {"checksum": checksum}))

    def set(self, path: str, value: Any) -> None:
        *keys, last = (int(key) if key.isdecimal() else key for key in path.split("."))
        node: Any = self.values
        for key in keys:
            node = node[key] if isinstance(node, list) else node[str(key)]
        node[last if isinstance(node, list) else str(last)] = value

    def agree(self, record: dict[str, Any]) -> None:
        """Has the manifest say of a file what it is."""
        content = (self.folder / record["path"]).read_bytes()
        record |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def replace_examples(self, table: pa.Table) -> None:
        for name in ("examples.parquet", ".examples.parquet"):
            pq.write_table(table, self.folder / name)
        self.agree(self.values["examples"])

    def replace_part(self, table: pa.Table, **options: Any) -> None:
        pq.write_table(table, self.folder / PART, **options)
        self.values["parts"][0]["rows"] = len(table)
        self.agree(self.values["parts"][0])

    def configure(self, pattern: str, replacement: str) -> None:
        for name in ("config.yaml", "rerun.yaml"):
            text = (self.folder / name).read_text()
            changed = re.sub(pattern, replacement, text)
            assert changed != text
            (self.folder / name).write_text(changed)

    def overwrite(self, text: str) -> None:
        """Another config.yaml and rerun.yaml."""
        (self.folder / "config.yaml").write_text(text)
        (self.folder / "rerun.yaml").write_text("defaults: [schema, common, _self_]\n" + text)


def long_document(run: Tampered) -> None:
    rows = pq.read_table(run.folder / "examples.parquet")
    lengths = [2**31 - 1, *rows["n_tokens"].to_pylist()[1:]]
    run.replace_examples(rows.set_column(2, rows.schema.field(2), pa.array(lengths, pa.int32())))
    run.set("counts.tokens", sum(lengths))


def large_part(run: Tampered, rows: int, **options: Any) -> None:
    schema = pq.read_schema(run.folder / PART)
    columns = [pa.array(np.zeros(rows, field.type.to_pandas_dtype())) for field in list(schema)[:-1]]
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(np.zeros(8 * rows, np.float32)), type=schema.field("vector").type
    )
    run.replace_part(pa.Table.from_arrays([*columns, vectors], schema=schema), compression="zstd", **options)


def link_to(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


def link(run: Tampered) -> None:
    link_to(run.folder / PART, "/etc/passwd")
    run.agree(run.values["parts"][0])


def fifo(name: str) -> Callable[[Tampered], None]:
    def make(run: Tampered) -> None:
        (run.folder / name).unlink(missing_ok=True)
        os.mkfifo(run.folder / name)

    return make


def changed(**values: Any) -> Callable[[Tampered], None]:
    def change(run: Tampered) -> None:
        for path, value in values.items():
            run.set(path.replace("__", "."), value)

    return change


LAUGHS = "a0: &a0 [x,x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20))
DEEP = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"

REFUSED: dict[str, Callable[[Tampered], Any]] = {
    "dim": changed(geometry__0__dims__q=2**40),
    "heads": changed(geometry__0__heads__q=0),
    "head": changed(selection__0__q=[10**9]),
    "head twice": changed(selection__0__q=[0, 0, 1, 2]),
    "layer": changed(geometry__0__layer=999_999_999_999),
    "threads": changed(threads=1500),
    "no threads": changed(threads=-5),
    "rows": changed(parts__0__rows=-5),
    "bytes": changed(parts__0__bytes=HUGE),
    "not finite": changed(parts__0__rows_with_nan=HUGE),
    "less than finite": changed(parts__0__rows_with_infinity=-1),
    "bucket": changed(parts__0__buckets={str(HUGE): 1}),
    "law": changed(sampler__probability_by_bucket={str(HUGE): 0.5}),
    "probability": changed(sampler__probability_by_bucket={"7": 1e300}),
    "timings": changed(timings={"load": float("nan"), "inference": float("inf")}),
    "counts": changed(counts={"tokens": HUGE}),
    "path": changed(parts__0__path="captures/layer=00/kind=q/../kind=k/part-00000.parquet"),
    "resumes": changed(resumes=[{"differences": 3}]),
    "text": changed(model__checkpoint="\ud800x"),
    "manifest": lambda run: run.values["config"].update(deep=json.loads("[" * 90 + "]" * 90)),
}
"""What no manifest of ours says: every verb refuses it."""

FOUND: dict[str, Callable[[Tampered], Any]] = {
    "document": long_document,
    "examples": lambda run: run.replace_examples(pa.table({"a": [1, 2]})),
    "sampler": changed(sampler={"_target_": "sniffer.dataset.Pydoc"}),
    "a row group": lambda run: large_part(run, 300_000, row_group_size=300_000),
    "rows of nothing": lambda run: large_part(run, 500_000, row_group_size=250_000),
    "footer": lambda run: run.replace_part(
        pq.read_table(run.folder / PART).replace_schema_metadata({b"sniffer": DEEP.encode()})
    ),
    "link": link,
    "a part that waits": fifo(PART),
    "a twin that waits": fifo("manifest.json"),
}
"""What verify finds, and no verb stumbles over."""

CONFIGURED: dict[str, Callable[[Tampered], Any]] = {
    "laughs": lambda run: run.overwrite(LAUGHS),
    "circle": lambda run: run.overwrite("seed: 0\nmodel: &a\n  b: *a\n"),
    "deep": lambda run: run.overwrite("model: " + "[" * 300),
    "long": lambda run: run.overwrite("seed: 0 #" + "x" * 300_000),
    "device": lambda run: [link_to(run.folder / name, "/dev/zero") for name in ("config.yaml", "rerun.yaml")],
    "role": lambda run: run.configure(r"sampler:\n(  .*\n)+", "sampler:\n  _target_: sniffer.engine.ray.RayEngine\n"),
    "layers": lambda run: run.configure("config_overrides: .*", "config_overrides: {num_hidden_layers: 1000000000}"),
    "cluster": lambda run: run.configure("name: local\n  address: null", "name: ray\n  address: 10.0.0.5:6379"),
    "workers": lambda run: run.configure(
        r"name: local\n  address: null\n  workers: null", f"name: ray\n  address: null\n  workers: {HUGE}"
    ),
    "date": lambda run: run.configure("seed: 0", "seed: 2001-01-01"),
}
"""Configurations that are no bombs, calls or circles once they are read."""

HARMLESS: dict[str, Callable[[Tampered], Any]] = {
    "no zone": changed(created="2020-01-01T00:00:00"),
    "a bare resume": changed(resumes=[{"x": 1}]),
    "code": changed(backbone__code={"transformers.models..modeling_x": [3], "\x1b[2J": "local copy, sha256:[/x]"}),
    "no code": changed(backbone={"code": 3, "packages": {"[/x]": {}}}, model={}, dataset={"shard": {"count": 2}}),
    "no counts": changed(counts={}),
    "markup": changed(model__checkpoint="evil[/x]\x1b[2J"),
    "a lock that waits": fifo(".lock"),
    "a log that waits": fifo("sniffer.log"),
}
"""Odd, but nobody has to mind."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("poisoned")
    runs = Runs(save_checkpoint(place / "checkpoint"), save_texts(place / "texts.jsonl", TEXTS), place)
    return runs.start("whole")


@pytest.fixture
def tampered(whole: Path, tmp_path: Path) -> Callable[[Callable], Path]:
    def make(change: Callable[[Tampered], Any]) -> Path:
        run = Tampered(Path(shutil.copytree(whole, tmp_path / "run")))
        change(run)
        if not (run.folder / "manifest.json").is_fifo():
            run.save()
        return run.folder

    return make


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No model runs here; whatever waits, or counts without end, is ended."""

    def run(*_: object, **__: object) -> None:
        raise CaptureError("this is as far as the test goes")

    monkeypatch.setitem(sys.modules, "sniffer.capture", SimpleNamespace(run=run))

    def end(*_: object) -> None:
        raise TimeoutError("it did not end")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def read(folder: Path) -> int:
    """What a reader of a run does."""
    try:
        run: Any = open_run(folder)
        run.vectors(layer=0, head=0, kind="q")
        run.examples()
    except SnifferError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def outcomes(folder: Path, capsys: pytest.CaptureFixture, *only: str) -> dict[str, int]:
    """The exit code of every verb, or of some; each has said one line if it refused."""
    beside = folder.parent
    commands: dict[str, Callable[[], int]] = {
        "list": lambda: verbs.main(["list", str(beside)]),
        "inspect": lambda: verbs.main(["inspect", str(folder)]),
        "verify": lambda: verbs.main(["verify", str(folder)]),
        "publish": lambda: verbs.main(["publish", str(folder), "a/b", "--dry-run", "--to", str(beside / "published")]),
        "export": lambda: verbs.main(["export", str(folder), "--to", str(beside / "heads")]),
        "read": lambda: read(folder),
        "analyse": lambda: entry.main("key_rank", [f"run={folder}", f"out={beside / 'results'}"]),
        "reproduce": lambda: verbs.main(["reproduce", str(folder), "--to", str(beside / "again")]),
        "resume": lambda: verbs.main(["resume", str(folder)]),
    }
    codes = {}
    for name, command in commands.items():
        if only and name not in only:
            continue
        codes[name] = command()
        told = capsys.readouterr()
        lines = [line for line in told.err.splitlines() if line.strip()]
        assert len(lines) <= 1 and "Traceback" not in told.out + told.err, (name, told)
        assert codes[name] == 0 or lines or name == "verify", (name, told)
        assert "\x1b" not in told.out + told.err
    return codes


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_manifest_says_is_refused_by_all(tampered, capsys: pytest.CaptureFixture, case: str):
    folder = tampered(REFUSED[case])
    with pytest.raises(RunError):
        Manifest.load(folder)
    codes = outcomes(folder, capsys)
    assert codes.pop("list") == 0 and set(codes.values()) == {1}, codes


@pytest.mark.long
@pytest.mark.parametrize("case", FOUND)
def test_what_lies_in_the_files_is_found(tampered, capsys: pytest.CaptureFixture, case: str):
    codes = outcomes(tampered(FOUND[case]), capsys)
    assert codes["list"] == 0 and codes["verify"] == 1, codes


@pytest.mark.parametrize("case", CONFIGURED)
def test_no_configuration_is_more_than_its_values(
    tampered, capsys: pytest.CaptureFixture, invoke: Callable[..., int], ran: list, case: str
):
    folder = tampered(lambda run: (CONFIGURED[case](run), run.set("status", "interrupted")))
    codes = outcomes(folder, capsys, "verify", "resume")
    assert codes["verify"] == codes["resume"] == 1, codes
    assert verbs.main(["resume", str(folder), "--force"]) == 1
    assert "as far as the test goes" not in capsys.readouterr().err
    assert invoke("-cd", str(folder), "-cn", "rerun") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and ran == [], lines


@pytest.mark.long
@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_odd_is_no_traceback(tampered, capsys: pytest.CaptureFixture, case: str):
    codes = outcomes(tampered(HARMLESS[case]), capsys)
    assert codes["list"] == codes["inspect"] == codes["read"] == 0, codes


@pytest.mark.parametrize("of_a_sweep", [False, True])
@pytest.mark.parametrize("record", ["{}", "fifo", "device"])
def test_records_of_jobs_are_read_within_bounds_too(tampered, capsys: pytest.CaptureFixture, of_a_sweep, record):
    folder = tampered(lambda _: None)
    again = Path(shutil.copytree(folder, folder.with_name("run_reproduced")))
    for run in (folder, again):
        (run / ".hydra").mkdir()
        (run / ".hydra" / "overrides.yaml").write_text("[]")
        for name in (".reproduces", ".hydra/hydra.yaml"):
            match record:
                case "fifo":
                    os.mkfifo(run / name)
                case "device":
                    (run / name).symlink_to("/dev/zero")
                case _:
                    (run / name).write_text(record)
    if of_a_sweep:
        (folder.parent / "multirun.yaml").touch()
    assert verbs.main(["list", str(folder.parent)]) == 0
    assert verbs.main(["verify", str(folder.parent)]) == int(record != "{}")
    assert len(open_run(folder.parent).jobs()) >= 1
    assert not capsys.readouterr().err


def test_a_hundred_thousand_million_shards_are_not_counted_out(whole: Path):
    manifest = Manifest.load(whole)
    for count, lines in ((10**11, 21), (3, 2)):
        shard = replace(manifest, dataset={"shard": {"index": 0, "count": count}})
        found = missing_shards([shard])
        assert len(found) == lines and found[0] == f"shard 1 of {count} is missing"
    assert found[-1] == "shard 2 of 3 is missing"
