"""Batches give each row once an epoch, in an order that can be had again: on ranks, in workers, from any batch on."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from sniffer import open_run, torch_dataset
from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.reader.sweep import Sweep
from sniffer.reader.training.batches import Batch, Batches
from sniffer.sampler import LogUniform
from sniffer.storage.manifest import Manifest
from sniffer.storage.writer import write_part
from sniffer.types import Names
from tests import helpers_storage
from tests.helpers_storage import SAMPLER, make_footer, make_run

Key = tuple[int, int, int, bytes]
SMALL = 40_000
"""Bytes that few of the row groups of these runs fit into."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = make_run(tmp_path_factory.mktemp("batches") / "run", layers=(2,), parts=6).folder
    found = open_run(folder)
    assert isinstance(found, Run)
    return found


def stored(folder: Path, kind: str = "k", heads: tuple[int, ...] = (0, 1)) -> Counter[Key]:
    """By pyarrow alone: head, document, position and the vector's bytes of all rows of layer 2."""
    found: Counter[Key] = Counter()
    for path in sorted(folder.glob(f"**/layer=02/kind={kind}/*.parquet")):
        table = pq.read_table(path, partitioning=None)
        vectors = np.array(table["vector"].to_pylist(), dtype=np.float32)
        places = zip(*(table[name].to_pylist() for name in ("head", "example_id", "position")), strict=True)
        for place, vector in zip(places, vectors, strict=True):
            if place[0] in heads:
                found[(*place, plain(vector))] += 1
    return found


def plain(vector: np.ndarray) -> bytes:
    """Its bytes; lists of Python do not keep which NaN it was."""
    return np.where(np.isnan(vector), np.float32("nan"), vector).tobytes()


def keys(batch: Batch) -> list[Key]:
    places = zip(batch.heads.tolist(), batch.example_ids.tolist(), batch.positions.tolist(), strict=True)
    return [(*place, plain(vector)) for place, vector in zip(places, batch.vectors, strict=True)]


def order(batches: Batches) -> list[list[Key]]:
    return [keys(batch) for batch in batches]


def flat(batches: list[list[Key]]) -> list[Key]:
    return [key for batch in batches for key in batch]


@pytest.mark.parametrize("shuffle", [None, 0])
@pytest.mark.parametrize(("kind", "heads", "memory"), [("k", None, SMALL), ("q", [3, 1], 1 << 28)])
def test_each_row_comes_once_an_epoch(run: Run, shuffle: int | None, kind: str, heads: Any, memory: int):
    batches = run.batches(layer=2, kind=kind, heads=heads, size=64, shuffle=shuffle, epochs=2, memory=memory)
    found = order(batches)
    assert len(found) == len(batches)
    wanted = stored(run.folder, kind, tuple(heads or (0, 1)))
    first, second = found[: batches.per_epoch], found[batches.per_epoch :]
    assert Counter(flat(first)) == Counter(flat(second)) == wanted
    assert {len(batch) for batch in first[:-1]} == {64} and 1 <= len(first[-1]) <= 64
    assert (first == second) == (shuffle is None)


def test_without_shuffle_rows_come_as_files_have_them(run: Run):
    found = flat(order(run.batches(layer=2, size=50, memory=SMALL)))
    assert [key[:3] for key in found] == [key[:3] for key in stored(run.folder)]


def test_shuffled_batches_mix_documents_positions_heads_and_parts(run: Run):
    parts = {}
    for number, path in enumerate(sorted(run.folder.glob("**/layer=02/kind=k/*.parquet"))):
        table = pl.read_parquet(path, hive_partitioning=False)
        parts |= dict.fromkeys(table.select("example_id", "position").iter_rows(), number)
    for batch in list(run.batches(layer=2, size=100, shuffle=1))[:-1]:
        assert len({parts[key[1], key[2]] for key in keys(batch)}) == 6
        assert set(batch.heads.tolist()) == {0, 1}
        assert len(set(batch.example_ids.tolist())) >= 3
    places = [batch.positions for batch in run.batches(layer=2, size=100, shuffle=1)]
    assert abs(np.corrcoef(np.arange(sum(map(len, places))), np.concatenate(places))[0, 1]) < 0.2


def test_another_process_gives_the_same(run: Run):
    code = (
        "import sys, hashlib; from sniffer import open_run\n"
        f"batches = open_run(sys.argv[1]).batches(layer=2, size=33, shuffle=5, rank=1, world=2, memory={SMALL})\n"
        "told = [(b.vectors.tobytes(), b.positions.tobytes(), b.example_ids.tobytes()) for b in batches]\n"
        "print(hashlib.sha256(repr(told).encode()).hexdigest(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.folder)], capture_output=True, text=True, check=True)
    batches = run.batches(layer=2, size=33, shuffle=5, rank=1, world=2, memory=SMALL)
    told = [(b.vectors.tobytes(), b.positions.tobytes(), b.example_ids.tobytes()) for b in batches]
    assert done.stdout.split() == [hashlib.sha256(repr(told).encode()).hexdigest(), "False"]
    other = order(run.batches(layer=2, size=33, shuffle=6, rank=1, world=2, memory=SMALL))
    assert other != order(run.batches(layer=2, size=33, shuffle=5, rank=1, world=2, memory=SMALL))


@pytest.mark.parametrize("shuffle", [None, 3])
def test_a_state_goes_on_with_the_same_remainder(run: Run, shuffle: int | None):
    def begun() -> Batches:
        return run.batches(layer=2, size=30, shuffle=shuffle, epochs=3, memory=SMALL, rank=1, world=2)

    whole = order(begun())
    for stop in (0, 1, begun().per_epoch - 1, begun().per_epoch, begun().per_epoch + 2, len(whole)):
        broken = begun()
        loop = iter(broken)
        seen = [keys(next(loop)) for _ in range(stop)]
        state = json.loads(json.dumps(broken.state_dict()))
        resumed = begun()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert seen + order(resumed) == whole
        assert order(resumed) == whole  # the loop after that is a new one


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_share_all_rows_in_equally_many_batches(run: Run, world: int):
    for shuffle, size in ((None, 2), (4, 25)):
        ranks = [
            run.batches(layer=2, size=size, shuffle=shuffle, rank=rank, world=world, memory=SMALL)
            for rank in range(world)
        ]
        found = [order(rank) for rank in ranks]
        assert {len(batches) for batches in found} == {len(ranks[0])}
        assert all(batch and len(batch) <= size for batches in found for batch in batches)
        shares = [len(flat(batches)) for batches in found]
        assert shares == [rank.rows for rank in ranks] and max(shares) - min(shares) <= 1
        assert Counter(key for batches in found for key in flat(batches)) == stored(run.folder)


def test_weights_are_those_of_the_law(run: Run):
    for batch in run.batches(layer=2, size=100, shuffle=0, weights=True):
        assert batch.weights is not None
        np.testing.assert_allclose(batch.weights, 1 / SAMPLER.probability(batch.positions.astype(np.int64)))
    assert next(iter(run.batches(layer=2))).weights is None


def test_the_page_trains_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The example of docs/training.md, beside NumPy's covariance and the best that one centre a piece could do."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(
        helpers_storage, "random_floats", lambda shape, *_, **__: torch.randn(shape, generator=generator)
    )
    run = open_run(
        make_run(tmp_path / "run", layers=(2,), sampler=LogUniform(base_rate=40.0, min_bucket_size=8)).folder
    )
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 40
    names: dict[str, Any] = {}
    exec(code.replace('"outputs/RUN"', repr(str(run.folder))).replace("layer=3", "layer=2"), names)

    keys = run.vectors(layer=2, head=0, kind="k")
    weights = 1 / keys.inclusion_probability
    assert weights.max() > weights.min()
    covariance = np.cov(keys.vectors.astype(np.float64).T, aweights=weights, ddof=0)
    np.testing.assert_allclose(names["variances"], np.linalg.eigvalsh(covariance), rtol=1e-6)
    np.testing.assert_allclose(names["axes"] @ np.diag(names["variances"]) @ names["axes"].T, covariance, atol=1e-6)

    centres = names["centres"]
    split = keys.vectors.reshape(len(keys), 4, 2)
    distance = ((split[:, :, None] - centres[None]) ** 2).sum(3).min(2).sum()
    assert distance < 0.35 * ((split - split.mean(0)) ** 2).sum()


def test_memory_is_held(tmp_path: Path):
    """Arrays of NumPy and of pyarrow, of which a run of several times that is read."""
    run = open_run(make_run(tmp_path / "run", layers=(2,), parts=24, dims={"k": 4096}).folder)
    assert isinstance(run, Run)
    with pytest.raises(RunError, match="memory=1,000 bytes is too small") as refused:
        run.batches(layer=2, memory=1000)
    memory = int(str(refused.value).split("take memory=")[1].split()[0])
    batches = run.batches(layer=2, size=2, shuffle=0, memory=memory)
    n_bytes = batches.rows * 4 * 4096
    assert n_bytes > 3 * memory
    honest, watched = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(watched)
    tracemalloc.start()
    try:
        assert sum(len(batch) for batch in batches) == batches.rows
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(honest)
    assert peak + watched.max_memory() < 1.2 * memory + 200_000


def test_bad_arguments_are_refused_at_the_call(run: Run):
    refusals: dict[str, dict[str, Any]] = {
        "head 9 was not captured: layer 2, kind k has heads 0, 1": {"heads": [0, 9]},
        "layer 1 was not captured": {"layer": 1},
        "kind v was not captured": {"kind": "v"},
        "heads is empty": {"heads": []},
        "heads=0 cannot be": {"heads": 0},
        "heads=.1.5. cannot be": {"heads": [1.5]},
        "heads='01' cannot be": {"heads": "01"},
        "size=0 cannot be": {"size": 0},
        "size=2.5 cannot be": {"size": 2.5},
        "rank=2 cannot be": {"rank": 2, "world": 2},
        "rank=-1 cannot be": {"rank": -1},
        "world=0 cannot be": {"world": 0},
        "epochs=0 cannot be": {"epochs": 0},
        "shuffle=True cannot be": {"shuffle": True},
        "shuffle=-1 cannot be": {"shuffle": -1},
        "cannot be shared among world=100000 ranks": {"world": 100_000},
        "take size=2 or more": {"size": 1, "world": 7},
    }
    for said, arguments in refusals.items():
        with pytest.raises(RunError, match=said) as refused:
            run.batches(**{"layer": 2, **arguments})
        assert "\n" not in str(refused.value)


def test_a_state_of_something_else_is_refused(run: Run, tmp_path: Path):
    state = run.batches(layer=2, size=10, shuffle=1).state_dict()
    for name, value in (("size", 11), ("shuffle", 2), ("heads", [0]), ("memory", SMALL), ("kind", "q")):
        with pytest.raises(RunError, match=f"the state is of batches with {name}=|of another run"):
            run.batches(**{"layer": 2, "size": 10, "shuffle": 1, name: value}).load_state_dict(state)
    run.batches(layer=2, size=10, shuffle=1, epochs=3, weights=True).load_state_dict(state)
    other = open_run(make_run(tmp_path / "other", layers=(2,), parts=2).folder)
    with pytest.raises(RunError, match="of another run"):
        other.batches(layer=2, size=10, shuffle=1).load_state_dict(state)
    with pytest.raises(RunError, match="no state of batches"):
        run.batches(layer=2).load_state_dict({"batches": 1})
    for given in (-1, 10_000, "1", None):
        with pytest.raises(RunError, match="the state is after"):
            run.batches(layer=2, size=10, shuffle=1).load_state_dict({**state, "batches": given})


def test_damage_is_one_line(tmp_path: Path):
    run = open_run(make_run(tmp_path / "run", layers=(2,), parts=2).folder)
    batches = run.batches(layer=2)
    part = next(run.folder.glob("**/kind=k/*.parquet"))
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="another file than it was"):
        list(batches)
    with pytest.raises(RunError, match="could not read"):
        run.batches(layer=2)
    part.unlink()
    with pytest.raises(RunError, match="could not read"):
        run.batches(layer=2)


def test_jobs_of_other_documents_are_read_as_one(tmp_path: Path, run: Run):
    """Shards, say; where two jobs have the same documents, a row would come twice."""
    for name, first in (("0", 0), ("1", 10)):
        folder = make_run(tmp_path / name, layers=(2,), kinds=("k",), parts=2, first=first).folder
        (folder / ".hydra").mkdir()
        (folder / ".hydra" / "overrides.yaml").write_text("[]")
    sweep = open_run(tmp_path)
    assert isinstance(sweep, Sweep)
    found = order(sweep.batches(layer=2, size=40, shuffle=2, memory=SMALL))
    assert Counter(flat(found)) == stored(tmp_path)
    assert len({key[1] for key in flat(found)}) == 8
    with pytest.raises(RunError, match="captured by no job"):
        sweep.batches(layer=2, kind="q")
    make_run(tmp_path / "2", layers=(2,), kinds=("k",))
    with pytest.raises(RunError, match="documents that another job has"):
        open_run(tmp_path).batches(layer=2)


def test_a_run_opened_for_some_sections_gives_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    small = make_run(tmp_path / "run", layers=(2,), kinds=("k",))
    columns = small.captured[2, "k"]
    labels = ["", "answer", "question"]
    codes = np.arange(len(columns)) % 3
    placed = replace(columns, rows=replace(columns.rows, section=Names.of(labels, codes)))
    manifest = Manifest.load(small.folder)
    part = write_part(small.folder, manifest.parts[0].path, placed, make_footer(2, "k", 8), sections=True)
    manifest = replace(manifest, parts=(part,))
    monkeypatch.setattr(Manifest, "has_sections", True)
    want = {
        label: Counter(
            (int(e), int(p))
            for e, p, c in zip(columns.rows.example_id, columns.rows.position, codes, strict=True)
            if labels[c] == label
        )
        for label in labels
    }
    for only in (("answer",), ("answer", "question"), None):
        batches = Run(small.folder, manifest, only).batches(layer=2, size=20, shuffle=1, heads=[1])
        wanted = sum((want[label] for label in only or labels), Counter())
        found: Counter[tuple[int, int]] = Counter()
        for batch in batches:
            assert batch.sections is not None and set(batch.heads.tolist()) == {1}
            found.update(zip(batch.example_ids.tolist(), batch.positions.tolist(), strict=True))
            assert set(batch.sections.tolist()) <= set(only or labels)
        assert found == wanted and batches.rows == wanted.total()


def of_tensors(found: dict[str, Any]) -> list[Key]:
    places = zip(*(found[name].tolist() for name in ("head", "example_id", "position")), strict=True)
    return [(*place, plain(vector)) for place, vector in zip(places, found["vectors"].numpy(), strict=True)]


def test_workers_share_the_work(run: Run):
    choices: dict[str, Any] = {"layer": 2, "size": 30, "shuffle": 3, "epochs": 2, "memory": SMALL, "weights": True}
    alone = [of_tensors(one) for one in DataLoader(torch_dataset(run, **choices), batch_size=None)]
    assert alone == order(run.batches(**choices))

    dataset = torch_dataset(run, rank=0, world=1, **choices)
    loaded = list(DataLoader(dataset, batch_size=None, num_workers=2))
    assert loaded[0]["weight"].dtype == torch.float64 and loaded[0]["vectors"].dtype == torch.float32
    found = [of_tensors(one) for one in loaded]
    assert len(found) == dataset.count(workers=2)
    half = len(found) // 2
    assert Counter(flat(found[:half])) == Counter(flat(found[half:])) == stored(run.folder)

    state = json.loads(json.dumps(dataset.state_dict(given=5, workers=2)))
    resumed = torch_dataset(run, **choices)
    resumed.load_state_dict(state)
    assert [of_tensors(one) for one in DataLoader(resumed, batch_size=None, num_workers=2)] == found[5:]
    resumed.load_state_dict(state)
    with pytest.raises(RunError, match="state is of num_workers=2, this DataLoader has num_workers=0"):
        list(DataLoader(resumed, batch_size=None))


def test_states_of_a_dataset(run: Run):
    choices: dict[str, Any] = {"layer": 2, "size": 30, "shuffle": 3}
    dataset = torch_dataset(run, **choices)
    whole = [of_tensors(one) for one in dataset]
    loop = iter(dataset)
    seen = [of_tensors(next(loop)) for _ in range(2)]
    resumed = torch_dataset(run, **choices)
    resumed.load_state_dict(dataset.state_dict())
    assert seen + [of_tensors(one) for one in resumed] == whole
    with pytest.raises(RunError, match="workers read ahead"):
        dataset.state_dict(workers=2)
    with pytest.raises(RunError, match="cannot have been given"):
        dataset.state_dict(given=1000, workers=2)
    with pytest.raises(RunError, match="no state of a torch_dataset"):
        dataset.load_state_dict(run.batches(**choices).state_dict())
    with pytest.raises(RunError, match="both rank and world"):
        torch_dataset(run, rank=0, **choices)
