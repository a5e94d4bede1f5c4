"""What all tests share: one thread, so that workers side by side do not starve each other; no deadlines.

Shapes and dtypes in the signatures of the modules below are checked at every call.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tests show what must stay true, never how fast; benchmarks/ does that.
settings.register_profile("sniffer", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("sniffer")

CHECKED = (
    "sampler",
    "hashing",
    "forward.gather",
    "forward.observer",
    "forward.columns",
    "forward.accumulator",
    "forward.transfer",
    "notebook.call",
    "notebook.batch",
    "notebook.history",
    "storage.sort",
    "storage.digest",
    "storage.finite",
    "storage.schema",
    "storage.writer",
)
install_import_hook([f"sniffer.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture(autouse=True, scope="module")
def little_to_look_through() -> None:
    """What is there before a module's tests, most of it torch and transformers, is none of their garbage: collecting
    that, as the end of each job of a sweep does, would otherwise look through millions of objects.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_device_is_guessed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that means the processor says so, or it would mean something else on a machine with a GPU."""
    if request.node.get_closest_marker("any_device") is None:
        from sniffer.models import devices

        monkeypatch.setattr(devices, "_best", lambda: pytest.fail("this test leaves the device open: model.device=cpu"))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama."""
    from tests.tiny_run import save_checkpoint

    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Three documents as JSON lines."""
    from tests.tiny_run import save_texts

    return save_texts(tmp_path / "texts.jsonl")


@pytest.fixture
def run(checkpoint: Path, texts: Path, tmp_path: Path) -> Callable:
    """Runs the tiny model with more overrides, each time into a new folder, and opens the result."""
    from hydra import compose, initialize_config_dir

    from sniffer import capture, open_run
    from sniffer.config.resolve import conf_folder, register, resolve
    from tests.helpers_config import save_config
    from tests.tiny_run import overrides

    numbers = iter(range(100))

    def run(*more: str):
        folder = tmp_path / f"run-{next(numbers)}"
        folder.mkdir()
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            cfg = compose("config", overrides(checkpoint, texts, *more))
        save_config(folder, cfg)
        capture.run(resolve(cfg), folder)
        return open_run(folder)

    register()
    return run


@pytest.fixture
def ran() -> list:
    """The configurations that the stand-in for sniffer.capture.run of `invoke` was called with."""
    return []


@pytest.fixture
def stand_in(ran: list) -> Callable[..., None]:
    """What `invoke` runs instead of sniffer.capture.run: a capture that only notes."""
    from sniffer.storage.manifest import Manifest

    def run(config: object, folder: Path, **_: object) -> None:
        logging.getLogger("sniffer").info("captured")
        ran.append(config)
        Manifest("complete", config.seed, {}, {}, {}, geometry=(), selection={}).save(folder)

    return run


@pytest.fixture
def invoke(
    stand_in: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., int]]:
    """`python -m sniffer ARGUMENTS` in this process and an empty folder, with a stand-in for the capture."""
    from hydra.core.global_hydra import GlobalHydra

    from sniffer.__main__ import main

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["sniffer", *arguments])
        return main()

    monkeypatch.setitem(sys.modules, "sniffer.capture", types.SimpleNamespace(run=stand_in))
    monkeypatch.chdir(tmp_path)
    handlers, level = logging.root.handlers[:], logging.root.level
    yield call
    logging.root.handlers[:], logging.root.level = handlers, level
    GlobalHydra.instance().clear()
