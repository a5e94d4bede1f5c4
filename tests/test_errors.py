"""What other people's code raises is told in one line, also where it says nothing."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from sniffer.experiments.common.rows import load
from sniffer.models.embedded import _convert

from sniffer.config import saving
from sniffer.errors import AT_START, IN_A_FORWARD, ConfigError, SnifferError, device_trouble, first_line, reason
from sniffer.reader import index as jobs
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs.rows import check_part
from tests.helpers_storage import make_run


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError(""), "ValueError"),
        (ValueError("\n \n"), "ValueError"),
        (ValueError("\n  first \nsecond"), "first"),
        (gzip.BadGzipFile("no gzip"), "no gzip"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, said: str) -> None:
    assert first_line(error) == said


def test_why_the_system_refused() -> None:
    assert reason(OSError(28, "No space left on device", "x")) == "No space left on device"
    assert reason(OSError("words of a library")) == "words of a library"
    assert reason(OSError()) == "OSError"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), r"out of memory there \(MemoryError\): free some memory"),
        (
            RuntimeError("CUDA out of memory.\nTried to allocate 3 GiB"),
            r"Tried .* with model.device_map=auto, .*cuda:1",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "out of memory there .*model.device_map=auto"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), "out of memory there .*narrower model.dtype"),
        (
            RuntimeError("CUDA error: device-side assert triggered\nCompile with"),
            "the device failed there .*run the comm",
        ),
        (RuntimeError("CUDA error: no kernel image is available for execution"), "failed there .*model.device=cpu"),
        (RuntimeError("The NVIDIA driver on your system is too old"), "the device failed there .*too old"),
    ],
)
def test_what_a_device_refuses_is_told_with_what_helps_there(error: Exception, said: str) -> None:
    told = device_trouble(error, "there", AT_START)
    assert told is not None and re.search(said, str(told)) and "\n" not in str(told)
    assert told.__cause__ is error


def test_other_errors_are_no_trouble_with_a_device() -> None:
    assert device_trouble(ValueError("shapes differ"), "there", AT_START) is None
    assert device_trouble(ConfigError("CUDA out of memory"), "there", AT_START) is None
    assert "batch.max_tokens" in IN_A_FORWARD["cuda"] and "batch.max_tokens" in IN_A_FORWARD["cpu"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = open_run(make_run(tmp_path / "run").folder)
    assert isinstance(made, Run)
    (made.folder / ".hydra").mkdir()
    (made.folder / ".hydra" / "overrides.yaml").write_text("[]")
    (made.folder / "sweep.parquet").write_bytes(b"")
    return made


READERS: dict[str, tuple[Callable[[Run], Any], Any, str, Exception]] = {
    "config.yaml": (lambda run: run.config, yaml, "load", yaml.YAMLError()),
    "config.yaml of a rerun": (lambda run: saving.saved_config(run.folder), yaml, "load", yaml.YAMLError()),
    "overrides": (lambda run: jobs.overrides_of(run.folder), yaml, "load", yaml.YAMLError()),
    "an index": (lambda run: jobs.errors(run.folder), pq, "ParquetFile", pa.ArrowInvalid("")),
    "a head": (lambda run: run.vectors(layer=0, head=0), pq, "ParquetFile", pa.ArrowInvalid("")),
    "a layer": (lambda run: load(run, 0, "q"), pl.LazyFrame, "collect", pl.exceptions.ComputeError("")),
    "a model": (lambda run: _convert(run.folder, run.folder), pl, "nothing", ValueError()),
}


@pytest.mark.parametrize("what", READERS)
def test_a_library_that_says_nothing_is_told_of_by_name(run: Run, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    read, owner, name, error = READERS[what]
    if what == "a model":
        import transformers

        owner, name = transformers.AutoTokenizer, "from_pretrained"
    monkeypatch.setattr(owner, name, raising(error))
    with pytest.raises(SnifferError, match=type(error).__name__) as caught:
        read(run)
    assert len(str(caught.value).splitlines()) == 1


def test_a_part_that_cannot_be_read_is_a_problem(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pq, "ParquetFile", raising(pa.ArrowInvalid("")))
    part = run.manifest.parts[0]
    assert check_part(run.folder, run.manifest, part)[1] == [f"{part.path}: cannot be read (ArrowInvalid)"]


def raising(error: Exception) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> Any:
        raise error

    return call
