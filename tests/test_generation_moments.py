"""Moments while a model writes are what NumPy makes of every vector that decoding attends with."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from sniffer.config.trust import Trust
from sniffer.errors import ConfigError
from sniffer.forward.generation import moments
from sniffer.forward.generation.columns import Columns
from sniffer.forward.generation.moments import StepMoments, require_told
from sniffer.forward.moments.counting import MomentsPlan
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs.resume import resume
from sniffer.runs.verify import verify
from sniffer.sampler import Picker, Uniform
from sniffer.storage.manifest import Manifest
from sniffer.types import Answer, Document, MomentsLayout, Sections, TokenBatch
from tests.helpers_runs import Runs
from tests.test_generation import examples
from tests.test_moments import ALL, WANTED, assert_equal_moments, assert_same, each, opened, start
from tests.tiny_run import save_checkpoint, save_texts

TEXTS = {f"doc-{n}": f"the cat number {n} sat on the mat. " * (1 + n % 3) for n in range(6)}
GREEDY = ("generate=greedy", "generate.max_new_tokens=11")
EACH = (*ALL, "sampler.bucket_size=16")
APART = "capture.moments.sections=[prompt,generated]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("moments")
    return Runs(save_checkpoint(place / "checkpoint"), save_texts(place / "texts.jsonl", TEXTS), place)


@pytest.fixture(autouse=True)
def _few_steps_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "HELD", 4)


@pytest.fixture(scope="module")
def ended(runs: Runs) -> str:
    """A token at which some of the texts end, and others do not, or later."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(moments, "HELD", 4)
        texts = [ids for ids, _ in examples(start(runs, "ends", *GREEDY, "sampler.base_rate=0")).values()]
    lengths = {token: {ids.index(token) if token in ids else 99 for ids in texts} for ids in texts for token in ids}
    return f"generate.eos={max(lengths, key=lambda token: len(lengths[token]))}"


def test_they_are_those_of_every_vector_that_is_captured_live(runs: Runs, ended: str):
    whole = opened(start(runs, "whole", *EACH, *GREEDY, WANTED, APART, ended))
    lengths = [len(ids) for ids, _ in examples(whole.folder).values()]
    assert min(lengths) < 11 and len({*lengths}) > 1
    for layer, kind, head in each(whole):
        rows = whole.vectors(layer=layer, head=head, kind=kind)
        assert_same(whole.moments(layer=layer, head=head, kind=kind), rows.vectors)
        for section in ("prompt", "generated"):
            x = whole.only([section]).vectors(layer=layer, head=head, kind=kind).vectors
            found = whole.moments(layer=layer, head=head, kind=kind, section=section)
            assert found.n == len(x)
            assert_same(found, x)
        bucket = int(rows.rows.bucket.max()) - 1
        x = rows.vectors[rows.rows.bucket == bucket]
        assert_same(whole.moments(layer=layer, head=head, kind=kind, bucket=bucket), x)
    assert whole.moments(layer=0, head=0, kind="q").n == whole.manifest.counts["tokens"]
    assert verify(whole.folder)[1] == []
    later = opened(start(runs, "later", *EACH, *GREEDY, WANTED, APART, ended, "generate.live=false"))
    assert later.manifest.digest != whole.manifest.digest
    assert_equal_moments(whole, later, rtol=1e-5, atol=2e-4)


def counted(
    documents: list[tuple[int, int]], states: dict[int, torch.Tensor], every: int, chunk: int | None = None
) -> dict:
    """The sums of documents of (prompt, written) tokens side by side, each step of which is shown once."""
    layout = MomentsLayout(("k",), "full", sections=("generated",))
    plan = MomentsPlan(layout, {(0, "k"): (0, 1)}, Picker(Uniform(bucket_size=5), 0))
    made = [
        (
            Document(n, str(n), np.zeros(n, np.int32), False, sections=Sections.one("prompt", n)),
            Sections.joined([Sections.one("prompt", n), Sections.one("generated", every)]),
            more,
        )
        for n, more in documents
    ]
    prompts = TokenBatch(tuple(one for one, *_ in made), 0)
    longest = [Document(one.n_tokens, "", np.zeros(len(s), np.int32), False, sections=s) for one, s, _ in made]
    counting, seq = StepMoments(plan, prompts, longest, ()), prompts.seq_len
    for step in range(max(more for *_, more in made) + 1):
        new = torch.full((len(made), 2, seq if step == 0 else 1, 3), torch.nan)
        for row, (one, _, more) in enumerate(made):
            n = one.n_tokens
            if step == 0:
                new[row, :, seq - n :] = states[n][:, :n]
            elif step <= more:
                new[row, :, 0] = states[n][:, n + step - 1]
        pieces = range(0, new.shape[2], chunk or seq)
        for begin in pieces:
            piece = new[:, :, begin : begin + (chunk or seq)]
            counting.see(0, "k", piece, None, Columns(begin if step == 0 else seq + step - 1, piece.shape[2]))
        counting.written = [min(step, more) for *_, more in made]
    ended = [Document(one.n_tokens, "", np.zeros(one.n_tokens + more, np.int32), False) for one, _, more in made]
    return counting.end(TokenBatch(tuple(ended), 0)).sums[0, "k"]


def test_sums_of_a_document_do_not_depend_on_its_batch():
    documents = [(7, 13), (3, 2), (12, 8), (4, 0)]
    states = {n: torch.randn(2, n + more, 3, generator=torch.Generator().manual_seed(n)) for n, more in documents}
    together = counted(documents, states, 13)
    for sums in together.values():
        assert sums.n and all(bool(one.isfinite().all()) for one in sums.tensors())
    parts = [counted([one], states, 13) for one in documents]
    for key, sums in together.items():
        first, *others = [part[key] for part in parts if key in part]
        for other in others:
            first.add(other)
        assert first.n == sums.n
        for mine, theirs in zip(first.tensors(), sums.tensors(), strict=True):
            assert torch.allclose(mine.double(), theirs.double(), rtol=1e-12, atol=1e-12)
    assert sum(sums.n for sums in together.values()) == sum(n + more for n, more in documents)


@pytest.mark.parametrize("chunk", [1, 3, 5, 12, 20])
def test_sums_of_prompts_in_chunks_are_those_of_whole_ones(chunk: int):
    documents = [(7, 13), (3, 2), (12, 8), (4, 0)]
    states = {n: torch.randn(2, n + more, 3, generator=torch.Generator().manual_seed(n)) for n, more in documents}
    whole, found = counted(documents, states, 13), counted(documents, states, 13, chunk)
    assert found.keys() == whole.keys()
    for key, sums in found.items():
        assert sums.n == whole[key].n
        for mine, theirs in zip(sums.tensors(), whole[key].tensors(), strict=True):
            assert torch.allclose(mine.double(), theirs.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("cache", [("static", None, 7), (None, None, 1), (None, None, 5), ("quantized", "fp8", 5)])
def test_with_each_cache_they_are_those_of_every_vector_too(runs: Runs, ended: str, cache: tuple):
    keys = zip(("cache", "cache_backend", "prefill_chunk_size"), cache, strict=True)
    words = [f"generate.{key}={value}" for key, value in keys if value is not None]
    found = opened(start(runs, f"cache-{cache[0]}-{cache[2]}", *EACH, *GREEDY, WANTED, ended, *words))
    for layer, kind, head in each(found):
        x = found.vectors(layer=layer, head=head, kind=kind).vectors
        assert len(x) == found.manifest.counts["tokens"]
        assert_same(found.moments(layer=layer, head=head, kind=kind), x)


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("output.checkpoint_every=2",)])
def test_a_stopped_run_that_goes_on_and_shards_have_them_all(runs: Runs, ended: str, more: tuple[str, ...]):
    words = (*EACH, *GREEDY, WANTED, APART, ended, "batch.max_tokens=100", *more)
    whole = opened(start(runs, f"uninterrupted-{len(more)}", *words))
    folder = start(runs, f"stopped-{len(more)}", *words, stop_after=3)
    assert 0 < Manifest.load(folder).counts["examples"] < len(TEXTS) and verify(folder)[1] == []
    resume(folder, Trust())
    found = opened(folder)
    assert found.manifest.digest == whole.manifest.digest and verify(folder)[1] == []
    assert_equal_moments(found, whole)
    (runs.place / f"shard-{len(more)}").mkdir()
    for index in range(2):
        start(runs, f"shard-{len(more)}/{index}", *words, "dataset.shard.count=2", f"dataset.shard.index={index}")
    sweep = open_run(runs.place / f"shard-{len(more)}")
    for layer, kind, head in each(whole):
        one, other = (run.moments(layer=layer, head=head, kind=kind) for run in (whole, sweep))
        assert one.n == other.n and np.allclose(one.covariance, other.covariance, rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_rows_that_are_lost_are_counted_no_second_time_and_sums_that_are_lost_are_made_anew(runs: Runs):
    folder = start(runs, "lost", *EACH, *GREEDY, WANTED)
    whole = opened(start(runs, "not-lost", *EACH, *GREEDY, WANTED))
    (folder / Manifest.load(folder).moment_files[0].path).write_bytes(b"nothing of the kind")
    resume(folder, Trust())
    assert verify(folder)[1] == [] and isinstance(found := opened(folder), Run)
    assert_equal_moments(found, whole)
    (folder / Manifest.load(folder).parts[3].path).unlink()
    resume(folder, Trust())
    assert verify(folder)[1] == []
    assert_equal_moments(opened(folder), whole)


def test_sections_that_are_known_at_the_end_are_refused():
    require_told(MomentsLayout(("q",), "full", ("user", "answer")), Answer("answer"))
    told = "capture.moments.sections names ['thinking'], and which tokens are of these is known when a text has ended"
    with pytest.raises(ConfigError, match=re.escape(told)):
        require_told(MomentsLayout(("q",), "full", ("thinking", "user")), Answer("assistant", (90, 91)))
