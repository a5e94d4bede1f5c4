"""How many tokens share a forward where a GPU has so much memory free: simulated, for none is at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniffer.config.saving import as_chosen, saved_config
from sniffer.config.trust import Trust, read_rerun
from sniffer.dataset.batching import batches
from sniffer.forward.budget import BUDGETS, DEVICE_SHARE, fitting
from sniffer.runs.reproduce import reproduce
from sniffer.runs.resume import resume
from sniffer.storage.manifest import Manifest
from sniffer.types import Document, WorkingMemory

PER_TOKEN, ROW = 1000, 10
"""Bytes that a forward takes for each padded token, and bytes of captured rows."""


def needs(rows: int, tokens: int) -> WorkingMemory:
    return WorkingMemory(rows, tokens, PER_TOKEN * rows * tokens, 0)


def rows_bytes(tokens: int) -> float:
    return ROW * tokens


@given(st.lists(st.integers(1, 20_000), min_size=1, max_size=60), st.integers(10**6, 10**8))
def test_no_batch_that_is_made_needs_more_than_there_is(lengths: list[int], free: int):
    """Of the batches themselves, each is looked at: the chosen budget's fit, unless the smallest has to do."""
    chosen = fitting(lengths, needs, rows_bytes, free, 1e12)
    assert chosen is not None and chosen in BUDGETS
    documents = [Document(n, str(n), np.zeros(length, np.int32), False) for n, length in enumerate(lengths)]
    largest = max(batch.padded_tokens for batch in batches(documents, chosen, 0))
    fits = PER_TOKEN * largest + ROW * chosen <= DEVICE_SHARE * free
    assert fits or chosen == BUDGETS[-1]


def test_it_is_the_largest_that_fits():
    lengths = [1024] * 64
    for budget, larger in zip(BUDGETS[1:], BUDGETS[:-1], strict=True):
        enough = (PER_TOKEN + ROW) * budget / DEVICE_SHARE
        assert fitting(lengths, needs, rows_bytes, int(enough) + 1, 1e12) == budget
        assert fitting(lengths, needs, rows_bytes, int((PER_TOKEN + ROW) * larger / DEVICE_SHARE) + 1, 1e12) == larger


def test_rows_on_their_way_fit_into_the_host_too():
    assert fitting([1024] * 64, needs, rows_bytes, 10**12, 1e12) == BUDGETS[0]
    assert fitting([1024] * 64, needs, rows_bytes, 10**12, 4 * 8 * ROW * 8192) == 8192


def test_what_nobody_knows_stays_what_it_was():
    assert fitting([1024] * 64, lambda rows, tokens: None, rows_bytes, 10**12, 1e12) is None


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int | None], None]]:
    """Sets what the device, whatever it is, has free."""
    yield lambda n: monkeypatch.setattr("sniffer.engine.worker.free_memory", lambda device: n)


def chosen(folder: Path) -> int | None:
    """As all say that tell it."""
    found = {saved_config(folder)["batch"]["max_tokens"], Manifest.load(folder).config["batch"]["max_tokens"]}
    found.add(read_rerun(folder, []).batch.max_tokens)
    (tokens,) = found
    return tokens  # type: ignore[no-any-return]


def test_what_was_chosen_is_saved_and_taken_again(run: Callable, free: Callable, tmp_path: Path):
    free(1 << 40)
    first = run("sampler=all")
    assert chosen(first.folder) == BUDGETS[0]
    free(1)
    assert chosen(run("sampler=all").folder) == BUDGETS[-1]
    same, told = reproduce(first.folder, tmp_path / "again", Trust())
    assert same, told
    assert chosen(tmp_path / "again") == BUDGETS[0]


def test_a_processor_and_who_says_how_many_choose_nothing(run: Callable, free: Callable):
    free(None)
    assert chosen(run().folder) is None
    free(1 << 40)
    assert chosen(run("batch.max_tokens=77").folder) == 77


def test_a_run_that_was_begun_without_a_choice_goes_on_as_it_began(run: Callable, free: Callable):
    free(None)
    folder = run("sampler=all").folder
    before = Manifest.load(folder)
    (folder / before.parts[0].path).unlink()
    free(1)
    assert resume(folder, Trust())
    assert chosen(folder) is None and Manifest.load(folder).digest == before.digest


def test_a_sweep_that_is_run_again_knows_its_jobs():
    """What a job has chosen is no other configuration; what somebody says is."""
    saved = {"seed": 0, "batch": {"max_tokens": 16384}}
    assert as_chosen({"seed": 0, "batch": {"max_tokens": None}}, saved) == saved
    assert as_chosen({"seed": 1, "batch": {"max_tokens": 77}}, saved) == {"seed": 1, "batch": {"max_tokens": 77}}
