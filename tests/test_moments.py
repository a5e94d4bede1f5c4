"""Sums over all positions are what NumPy makes of all vectors, however they came to be summed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sniffer.config.trust import Trust
from sniffer.engine import worker
from sniffer.errors import ConfigError, RunError
from sniffer.forward.moments.counting import Counting, MomentsPlan, Totals
from sniffer.forward.moments.request import MomentsConfig
from sniffer.forward.moments.sums import Span, Stack, Sums, piece_of
from sniffer.reader.run import Run
from sniffer.reader.sweep import Sweep, open_run
from sniffer.runs.reproduce import reproduce
from sniffer.runs.resume import resume
from sniffer.runs.verify import verify
from sniffer.sampler import LogUniform, Picker, Uniform
from sniffer.storage.manifest import Manifest
from sniffer.types import Document, Moments, MomentsLayout, Rope, Sections, TokenBatch
from tests.helpers_runs import Runs
from tests.helpers_store import Killed
from tests.tiny_run import save_checkpoint, save_texts

KINDS = ("q", "k", "v", "q_pre", "k_pre")
ALL = ("sampler=all", "sampler.bucket_size=64", f"capture.kinds=[{','.join(KINDS)}]")
WANTED = f"capture.moments.kinds=[{','.join(KINDS)}]"
TEXTS = {f"doc-{n}": f"the cat number {n} sat on the mat. " * (1 + n * 5 % 7) for n in range(9)}


def by_definition(x: np.ndarray) -> dict[str, np.ndarray]:
    """Of vectors (n, dim), in float64, with pairs of halves."""
    x = x.astype(np.float64)
    half = x.shape[1] // 2
    return {
        "n": np.array(len(x)),
        "mean": x.mean(0),
        "minimum": x.min(0),
        "maximum": x.max(0),
        "absmax": np.abs(x).max(0),
        "std": x.std(0),
        "covariance": np.cov(x, rowvar=False, bias=True),
        "norm": np.linalg.norm(x, axis=1).mean(),
        "pairs": np.hypot(x[:, :half], x[:, half:]).mean(0),
    }


def assert_same(found: Moments, x: np.ndarray, rtol: float = 1e-5) -> None:
    spread = x.astype(np.float64).std() + 1e-12
    for name, value in by_definition(x).items():
        if name == "pairs" and found.pairs is None:
            continue
        unit = spread**2 if name == "covariance" else spread
        assert np.allclose(getattr(found, name), value, rtol=rtol, atol=rtol * unit), name


def moments_of(sums: Sums, head: int) -> Moments:
    products = None if sums.second is None else sums.second[head].numpy()
    lengths = sums.lengths[head].numpy() / sums.n
    arrays = (one[head].double().numpy() for one in (sums.mean, sums.minimum, sums.maximum))
    assert products is not None
    return Moments(sums.n, *arrays, lengths[0], lengths[1:], products.diagonal(), products)


FULL = MomentsLayout(("q",), "full")
HALVES = slice(0, 3), slice(3, 6)


DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@given(st.integers(1, 700), st.integers(1, 3), st.sampled_from([0.0, 30.0, -1000.0]), DTYPES)
def test_a_stretch_is_summed_as_numpy_does(n: int, documents: int, away: float, dtype: torch.dtype):
    """Also far from zero, where sums of squares about zero would have lost the spread."""
    states = (torch.randn(documents, 2, n, 6, generator=torch.Generator().manual_seed(n)) + away).to(dtype)
    for sizes in ((n,), (n // 3 + 1, n - n // 3 - 1)[: 1 if n < 2 else 2]):
        span = Span(0, sizes)
        stack = Stack(states, [span], "full", HALVES)
        stack.put(slice(0, 2), [piece_of(states[:, :, : span.end], span, "full", HALVES)])
        starts = np.cumsum((0, *sizes))
        for place, (start, end) in enumerate(pairwise(starts.tolist())):
            for head in range(2):
                vectors = states[:, head, start:end].float().numpy().reshape(-1, 6)
                assert_same(moments_of(stack[place], head), vectors)


def test_what_is_far_from_zero_needs_the_shift():
    """The witness would notice: sums about zero in float32 are off by more than is allowed above."""
    x = torch.randn(700, 6, generator=torch.Generator().manual_seed(0)) - 1000
    about_zero = (x.T @ x / len(x) - torch.outer(x.mean(0), x.mean(0))).numpy()
    assert not np.allclose(about_zero, by_definition(x.numpy())["covariance"], atol=1e-3)


def test_sums_of_documents_do_not_depend_on_the_batch():
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randn(1, 2, n, 8, generator=generator) for n in (40, 300, 300, 7, 64)]
    picker = Picker(Uniform(bucket_size=32), 0)
    plan = MomentsPlan(FULL, {(0, "q"): (0, 1)}, picker)

    def counted(*batches: tuple[int, ...]) -> Totals:
        totals = Totals(plan)
        for batch in batches:
            longest = max(documents[row].shape[2] for row in batch)
            states = torch.full((len(batch), 2, longest, 8), torch.nan)
            for place, row in enumerate(batch):
                states[place, :, : documents[row].shape[2]] = documents[row][0]
            lengths = [(row, documents[row].shape[2]) for row in batch]
            members = tuple(Document(row, str(row), np.zeros(n, np.int32), False) for row, n in lengths)
            counting = Counting(plan, TokenBatch(members, 0))
            counting.see(0, "q", states, None)
            totals.take(counting)
        return totals

    alone, together = counted((0,), (1,), (2,), (3,), (4,)), counted((4, 3, 0), (2, 1))
    assert sorted(alone.documents) == sorted(together.documents) == [0, 1, 2, 3, 4]
    assert alone.sums[0, "q"].keys() == together.sums[0, "q"].keys()
    for key, one in alone.sums[0, "q"].items():
        other = together.sums[0, "q"][key]
        assert one.n == other.n
        for mine, theirs in zip(one.tensors(), other.tensors(), strict=True):
            assert torch.allclose(mine.double(), theirs.double(), rtol=1e-12, atol=1e-12)
    for again in counted((0,), (1,), (2,), (3,), (4,)).sums[0, "q"].items():
        assert all(map(torch.equal, again[1].tensors(), alone.sums[0, "q"][again[0]].tensors()))
    stretches = list(plan.stretches(Document(0, "", np.zeros(40, np.int32), False), "q"))
    assert stretches == [(0, 32, (0, "")), (32, 40, (1, ""))]


def test_documents_together_are_documents_one_by_one(monkeypatch: pytest.MonkeyPatch):
    """As on a device where each step is dear."""
    from sniffer.forward.moments import counting, sums

    states = torch.randn(5, 2, 90, 8, generator=torch.Generator().manual_seed(2))
    members = tuple(Document(row, str(row), np.zeros(n, np.int32), False) for row, n in enumerate((90, 90, 70, 90, 90)))
    plan = MomentsPlan(FULL, {(0, "q"): (0, 1)}, Picker(LogUniform(min_bucket_size=16), 0))
    found = []
    for together, short, chunk in ((1, 256, 147456), (16, 256, 10**6), (2, 20, 8)):
        monkeypatch.setattr(counting, "TOGETHER", {"cpu": together})
        monkeypatch.setattr(counting, "SHORT", short)
        monkeypatch.setattr(sums, "SHORT", short)
        monkeypatch.setattr(sums, "CHUNK", {"cpu": chunk})
        one = Counting(plan, TokenBatch(members, 0))
        one.see(0, "q", states, None)
        found.append(one.sums[0, "q"])
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for key, sums_of_key in found[0].items():
            assert sums_of_key.n == other[key].n
            for mine, theirs in zip(sums_of_key.tensors(), other[key].tensors(), strict=True):
                assert torch.allclose(mine.double(), theirs.double(), rtol=1e-5, atol=2e-4)


def test_heads_on_several_cores_are_those_on_one():
    states = torch.randn(2, 5, 90, 8, generator=torch.Generator().manual_seed(6))
    members = tuple(Document(row, str(row), np.zeros(n, np.int32), False) for row, n in enumerate((90, 60)))
    plan = MomentsPlan(FULL, {(0, "q"): tuple(range(5))}, Picker(LogUniform(min_bucket_size=16), 0), {0: Rope((1.0,))})
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            counting = Counting(plan, TokenBatch(members, 0))
            counting.see(0, "q", states, None)
            assert torch.get_num_threads() == threads
            found.append(counting.sums[0, "q"])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for key, one in found[0].items():
            for mine, theirs in zip(one.tensors(), other[key].tensors(), strict=True):
                assert torch.allclose(mine.double(), theirs.double(), rtol=1e-6, atol=1e-5)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 99))
def test_moments_of_pieces_are_those_of_the_whole(lengths: list[int], seed: int):
    random = np.random.default_rng(seed)
    pieces = [random.normal(random.normal() * 5, 1, (n, 4)) for n in lengths]

    def moments(x: np.ndarray) -> Moments:
        about = x - x.mean(0)
        told = by_definition(x)
        extremes, products = (told["minimum"], told["maximum"]), about.T @ about
        return Moments(len(x), x.mean(0), *extremes, float(told["norm"]), told["pairs"], products.diagonal(), products)

    whole = np.concatenate(pieces)
    merged = Moments.merged(map(moments, pieces))
    for name, value in by_definition(whole).items() if len(whole) > 1 else ():
        assert np.allclose(getattr(merged, name), value, rtol=1e-9, atol=1e-9), name
    assert np.allclose(merged.second, whole.T @ whole / len(whole))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("moments")
    return Runs(save_checkpoint(place / "checkpoint"), save_texts(place / "texts.jsonl", TEXTS), place)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Run:
    """Every position of every vector, and the moments beside them."""
    return opened(start(runs, "whole", *ALL, WANTED))


def start(runs: Runs, name: str, *more: str, stop_after: int | None = None) -> Path:
    kept = [word for word in more if word.startswith("sampler=")]
    words = [word for word in runs.words() if not (kept and word.startswith("sampler.base_rate"))]
    one = Runs(runs.checkpoint, runs.texts, runs.place)
    one.words = lambda: words  # type: ignore[method-assign]
    return one.start(name, *more, stop_after=stop_after)


def opened(folder: Path) -> Run:
    run = open_run(folder)
    assert isinstance(run, Run)
    return run


def each(run: Run) -> list[tuple[int, str, int]]:
    layout = run.manifest.moments_layout
    assert layout is not None
    return [
        (layer, kind, head) for layer in run.layers for kind in layout.kinds for head in run.counted_heads(layer, kind)
    ]


def test_they_are_those_of_every_vector_of_a_run(whole: Run):
    assert len(each(whole)) == 2 * (4 + 2 + 2 + 4 + 2)
    for layer, kind, head in each(whole):
        vectors = whole.vectors(layer=layer, head=head, kind=kind)
        assert_same(whole.moments(layer=layer, head=head, kind=kind), vectors.vectors)
        for bucket in np.unique(vectors.rows.bucket):
            x = vectors.vectors[vectors.rows.bucket == bucket]
            if len(x) > 1:
                assert_same(whole.moments(layer=layer, head=head, kind=kind, bucket=int(bucket)), x)
    assert verify(whole.folder) == (whole.manifest, [])


def test_without_them_a_run_is_what_it_was(runs: Runs, whole: Run):
    plain = opened(start(runs, "plain", *ALL))
    assert plain.manifest.digest == whole.manifest.digest
    assert plain.manifest.moment_files == () and not (plain.folder / "moments").exists()
    with pytest.raises(RunError, match=r"has no moments: capture with capture.moments.kinds=\[q\]"):
        plain.moments(layer=0, head=0, kind="q")


def assert_equal_moments(one: Run, other: Run, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    assert each(one) == each(other)
    for layer, kind, head in each(one):
        mine, theirs = (run.moments(layer=layer, head=head, kind=kind) for run in (one, other))
        assert (mine.pairs is None) == (theirs.pairs is None) == (kind == "v")
        for name in ("n", "mean", "minimum", "maximum", "norm", "squares", "products", *["pairs"] * (kind != "v")):
            assert np.allclose(getattr(mine, name), getattr(theirs, name), rtol=rtol, atol=atol), (layer, kind, name)


def test_only_moments_are_kept_at_rate_zero(runs: Runs, whole: Run):
    found = opened(start(runs, "only", "sampler.base_rate=0", WANTED))
    assert found.manifest.rows == 0 and verify(found.folder)[1] == []
    assert_equal_moments(found, whole, rtol=1e-5, atol=1e-4)  # the law's stretches are others


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("output.checkpoint_every=2",), ("output.memory_limit=20000B",)])
def test_a_stopped_run_that_goes_on_has_them_all(runs: Runs, whole: Run, more: tuple[str, ...]):
    folder = start(runs, f"stopped-{len(more)}{''.join(more)[:12]}", *ALL, WANTED, *more, stop_after=3)
    stopped = Manifest.load(folder)
    assert stopped.status == "interrupted" and 0 < stopped.counts["examples"] < len(TEXTS)
    assert verify(folder)[1] == []
    resume(folder, Trust())
    found = opened(folder)
    assert found.manifest.digest == whole.manifest.digest and verify(folder)[1] == []
    assert_equal_moments(found, whole)
    named = {record.path for record in found.manifest.moment_files}
    assert {f"moments/{path.name}" for path in (folder / "moments").iterdir()} == named
    assert len(named) == 2


def test_what_a_killed_run_has_is_not_written_over(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """Of moments alone no part has a number that says which are taken."""
    words = ("sampler.base_rate=0", WANTED, "output.checkpoint_every=2", "batch.max_tokens=200")
    whole = opened(start(runs, "undisturbed", *words))
    honest, left = worker.draw, [4]

    def draw(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return honest(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(worker, "draw", draw)
        start(runs, "killed", *words)
    folder = whole.folder.with_name("killed")
    killed = Manifest.load(folder)
    assert killed.status == "running" and len(killed.moment_files) == 1 and killed.counts["examples"] > 2
    resume(folder, Trust())
    assert verify(folder)[1] == []
    assert_equal_moments(opened(folder), whole)


def test_a_damaged_file_is_counted_again(runs: Runs, whole: Run):
    folder = start(runs, "damaged", *ALL, WANTED)
    (record,) = Manifest.load(folder).moment_files
    parts = {part.path: (folder / part.path).read_bytes() for part in Manifest.load(folder).parts}
    (folder / record.path).write_bytes(b"nothing of the kind")
    assert any("moments/part-" in line for line in verify(folder)[1])
    with pytest.raises(RunError, match="resume"):
        opened(folder).moments(layer=0, head=0, kind="q")
    resume(folder, Trust())
    assert verify(folder)[1] == []
    assert {path: (folder / path).read_bytes() for path in parts} == parts
    assert_equal_moments(opened(folder), whole)


def test_rows_that_are_captured_again_are_not_counted_again(runs: Runs, whole: Run):
    folder = start(runs, "lost-rows", *ALL, WANTED)
    part = Manifest.load(folder).parts[3]
    (folder / part.path).unlink()
    resume(folder, Trust())
    assert verify(folder)[1] == [] and opened(folder).manifest.digest == whole.manifest.digest
    assert_equal_moments(opened(folder), whole, rtol=0.0, atol=0.0)


def test_verify_finds_a_document_that_was_not_counted(runs: Runs):
    """Or counted twice, or a file of another run: what it says it is of, and how often, is compared with the texts."""
    folder = start(runs, "short", *ALL, WANTED, "capture.layers=[0]")
    other = start(runs, "other", *ALL, WANTED, "capture.layers=[0]", "dataset.max_examples=8")
    manifest, fewer = Manifest.load(folder), Manifest.load(other)
    path = fewer.moment_files[0].path
    (folder / path).write_bytes((other / path).read_bytes())
    forged = manifest.as_json() | {"moment_files": fewer.as_json()["moment_files"]}
    for name in ("manifest.json", ".manifest.json"):
        (folder / name).write_text(json.dumps(forged))
    assert any("has not been counted (1 such)" in line for line in verify(folder)[1])
    table = pq.read_table(folder / path)
    footer = pq.read_schema(start(runs, "whole-again", *ALL, WANTED, "capture.layers=[0]") / path).metadata
    pq.write_table(table.replace_schema_metadata(footer), folder / path)
    record = forged["moment_files"][0]
    from hashlib import sha256

    raw = (folder / path).read_bytes()
    record |= {"bytes": len(raw), "sha256": sha256(raw).hexdigest()}
    for name in ("manifest.json", ".manifest.json"):
        (folder / name).write_text(json.dumps(forged))
    told = [line for line in verify(folder)[1] if line.startswith("moments")]
    assert len(told) == len(KINDS) and all("not of as many positions" in line for line in told)


def test_shards_merge_to_the_whole(runs: Runs, whole: Run):
    (runs.place / "shard").mkdir()
    for index in range(3):
        start(runs, f"shard/{index}", *ALL, WANTED, "dataset.shard.count=3", f"dataset.shard.index={index}")
    sweep = open_run(runs.place / "shard")
    assert isinstance(sweep, Sweep)
    for layer, kind, head in each(whole):
        one, other = (run.moments(layer=layer, head=head, kind=kind) for run in (whole, sweep))
        # Batches are others, and vectors equal to rounding in float32.
        assert one.n == other.n and np.allclose(one.covariance, other.covariance, rtol=1e-4, atol=1e-6)
    start(runs, "shard/twice", *ALL, WANTED, "dataset.shard.count=3", "dataset.shard.index=0")
    with pytest.raises(RunError, match="has documents that another job has"):
        open_run(runs.place / "shard").moments(layer=0, head=0, kind="q")


def test_it_is_reproduced(runs: Runs):
    folder = start(runs, "first", WANTED, "dataset.max_examples=3")
    same, told = reproduce(folder, runs.place / "second", Trust())
    assert same and "moments differ by at most 0 of their size" in told[0]


def test_heads_layers_and_seconds_are_those_asked_for(runs: Runs, whole: Run):
    some = "capture.heads=[3]", "capture.layers=[1]", "capture.moments.second=diagonal"
    found = opened(start(runs, "some", *ALL, "capture.moments.kinds=[q,k]", *some))
    assert each(found) == [(1, "q", 3), (1, "k", 1)]
    for _, kind, head in each(found):
        one, other = (run.moments(layer=1, head=head, kind=kind) for run in (found, whole))
        assert np.allclose(one.std, other.std, rtol=1e-5) and one.covariance is None
    none = opened(start(runs, "none", *ALL, "capture.moments.kinds=k", "capture.moments.second=none"))
    assert none.moments(layer=0, head=0, kind="k").std is None
    for asked, told in (
        ({"layer": 0, "head": 0, "kind": "q"}, "layer 0 was not captured"),
        ({"layer": 1, "head": 0, "kind": "q"}, "head 0 was not counted: layer 1, kind q has heads 3"),
        ({"layer": 1, "head": 1, "kind": "v"}, "kind v was not captured"),
        ({"layer": 1, "head": 1, "kind": "k", "bucket": 99}, "bucket 99 has no positions"),
        ({"layer": 1, "head": 1, "kind": "k", "section": "user"}, "section 'user' was not counted apart"),
    ):
        with pytest.raises(RunError, match=told):
            found.moments(**asked)


def test_sections_are_counted_apart():
    states = torch.randn(1, 1, 50, 4, generator=torch.Generator().manual_seed(3))
    sections = Sections.spread([(0, 9, "user"), (9, 20, "tool"), (30, 41, "user")], 50)
    document = Document(1, "1", np.zeros(50, np.int32), False, sections=sections)
    layout = MomentsLayout(("q",), "full", sections=("user",))
    plan = MomentsPlan(layout, {(0, "q"): (0,)}, Picker(Uniform(bucket_size=25), 0), {0: Rope((1.0, 0.1))})
    counting = Counting(plan, TokenBatch((document,), 0))
    counting.see(0, "q", states, None)
    inside = np.r_[0:9, 30:41]
    wanted = {
        (bucket, name): np.intersect1d(np.arange(25) + 25 * bucket, places)
        for bucket in (0, 1)
        for name, places in (("user", inside), ("", np.setdiff1d(np.arange(50), inside)))
    }
    assert counting.sums[0, "q"].keys() == wanted.keys()
    for key, places in wanted.items():
        assert_same(moments_of(counting.sums[0, "q"][key], 0), states[0, 0, places].numpy())


@pytest.mark.parametrize(
    ("rope", "kind", "columns"),
    [
        (Rope((1.0, 0.5, 0.2, 0.1)), "q", ([0, 1, 2, 3], [4, 5, 6, 7])),
        (Rope((1.0, 0.5), first=2), "k", ([2, 3], [4, 5])),
        (Rope((1.0, 0.5), "interleaved"), "q_pre", ([0, 2], [1, 3])),
        (Rope((1.0, 0.5), "interleaved", first=4), "k", ([4, 6], [5, 7])),
        (Rope((1.0, 0.5), "interleaved_to_half"), "q_pre", ([0, 2], [1, 3])),
        (Rope((1.0, 0.5), "interleaved_to_half"), "q", ([0, 1], [2, 3])),
        (Rope((1.0, 0.5)), "v", None),
        (Rope(missing="unknown"), "q", None),
    ],
)
def test_pairs_are_those_that_rope_turns(rope: Rope, kind: str, columns: tuple[list[int], list[int]] | None):
    states = torch.randn(1, 1, 30, 8, generator=torch.Generator().manual_seed(4))
    x = states[0, 0].double().numpy()
    plan = MomentsPlan(MomentsLayout((kind,), "none"), {(0, kind): (0,)}, Picker(Uniform(), 0), {0: rope})
    counting = Counting(plan, TokenBatch((Document(1, "1", np.zeros(30, np.int32), False),), 0))
    counting.see(0, kind, states, None)
    (sums,) = counting.sums[0, kind].values()
    wanted = [np.linalg.norm(x, axis=1).sum()]
    if columns is not None:
        wanted += np.hypot(x[:, columns[0]], x[:, columns[1]]).sum(0).tolist()
    assert np.allclose(sums.lengths[0], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"kinds": ["x"]}, "capture.moments.kinds names"),
        ({"kinds": ["q", "q"]}, "each once"),
        ({"kinds": "q", "second": "third"}, "must be one of none, diagonal, full"),
        ({"sections": ["user"]}, "without capture.moments.kinds"),
    ],
)
def test_bad_settings_are_one_line(wanted: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        MomentsConfig(**wanted)


def test_what_the_texts_lack_is_told_before_a_run(runs: Runs):
    with pytest.raises(ConfigError, match="documents here have no sections"):
        start(runs, "refused", "capture.moments.kinds=[q]", "capture.moments.sections=[user]")
