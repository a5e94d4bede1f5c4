"""Errors of a head's output are those of loops written from the definition, and of cases where they are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sniffer.experiments.common import entry
from sniffer.experiments.output_error import OutputError
from sniffer.experiments.output_error.core import heavy, recent, sums_before, weighted_median
from sniffer.experiments.output_error.grids import levels, uneven

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.sampler import All
from sniffer.types import Rope, ScoreFacts, Sections
from tests.experiments.planted import DIM, HEADS, SPEEDS, noise, planted_run, rope

KINDS = ("q", "k", "v")
SHORT = {"lengths": [40, 31], "sampler": All(bucket_size=16)}
FACTS = ScoreFacts(softcap=3.0, sinks=(0.5, -1.0, 0.0, 2.0), alibi=(0.1, 0.05, 0.0, 0.02))


def even(numbers: list[float], bits: int) -> list[float]:
    low, high = min(numbers), max(numbers)
    step = (high - low) / (2**bits - 1)
    return [low + step * round((one - low) / step) if step else one for one in numbers]


def by_loops(run: Run, layer: int, head: int, bits: int, group: int, window: int) -> dict[str, float]:
    """Medians over all queries: scale 0.5, soft cap, ALiBi, window and sink of FACTS, written out."""
    assert FACTS.softcap and FACTS.sinks and FACTS.alibi
    q, k, v = (run.vectors(layer=layer, head=head if kind == "q" else head // 2, kind=kind) for kind in KINDS)
    found: dict[str, list[float]] = {"error": [], "error_keys": [], "error_values": [], "logit_error": []}
    for example in (100, 101):
        vectors = []
        for rows in (q, k, v):
            mine = np.flatnonzero(rows.example_ids == example)
            vectors.append(rows.vectors[mine[np.argsort(rows.positions[mine])]].astype(float))
        queries, keys, values = vectors
        n = len(keys)
        changed_keys, changed_values = keys.copy(), values.copy()
        for start in range(0, n, group):
            for channel in range(DIM):
                changed_keys[start : start + group, channel] = even(keys[start : start + group, channel].tolist(), bits)
        for token in range(n):
            for start in range(0, DIM, group):
                changed_values[token, start : start + group] = even(values[token, start : start + group].tolist(), bits)

        def logits(t: int, some: np.ndarray, queries: np.ndarray = queries) -> dict[int, float]:
            return {
                j: FACTS.softcap * math.tanh(0.5 * float(queries[t] @ some[j]) / FACTS.softcap) + FACTS.alibi[head] * j
                for j in range(max(0, t - window + 1), t + 1)
            }

        def output(logit: dict[int, float], some: np.ndarray) -> np.ndarray:
            total = sum(math.exp(one) for one in logit.values()) + math.exp(FACTS.sinks[head])
            return sum(math.exp(one) / total * some[j] for j, one in logit.items())  # type: ignore[return-value]

        for t in range(n):
            true, other = logits(t, keys), logits(t, changed_keys)
            exact = output(true, values)
            for name, one in (
                ("error", output(other, changed_values)),
                ("error_keys", output(other, values)),
                ("error_values", output(true, changed_values)),
            ):
                found[name].append(float(np.linalg.norm(one - exact) / np.linalg.norm(exact)))
            found["logit_error"].append(math.sqrt(sum((other[j] - true[j]) ** 2 for j in true) / len(true)))
    return {name: sorted(values)[(len(values) - 1) // 2] for name, values in found.items()}


def test_even_grids_by_loops(tmp_path: Path):
    run = planted_run(tmp_path / "run", kinds=KINDS, facts=FACTS, window=9, **SHORT)
    result = OutputError(queries=99, bits=[3], group=5).measure(run)
    errors = result.tables["errors"].filter(method="kivi")
    assert set(errors["queries"]) == {71}
    for layer, head in ((0, 0), (1, 3)):
        row = errors.filter(layer=layer, head=head).row(0, named=True)
        for name, value in by_loops(run, layer, head, 3, 5, 9).items():
            assert row[name] == pytest.approx(value, rel=1e-5), name
        assert result.tables["heads"].filter(layer=layer, head=head)["kivi_3bit"][0] == row["error"]


def test_dropped_keys_by_loops(tmp_path: Path):
    """Half of the keys: the latest ones, with the first two or with those of most weight over earlier queries."""
    run = planted_run(tmp_path / "run", kinds=KINDS, lengths=[30], sampler=All(bucket_size=16))
    errors = OutputError(queries=99, keep=[0.5], sinks=2).measure(run).tables["errors"]
    q, k, v = (run.vectors(layer=1, head=2 if kind == "q" else 1, kind=kind) for kind in KINDS)
    q, k, v = (rows.vectors[np.argsort(rows.positions)].astype(float) for rows in (q, k, v))
    logits = np.where(np.tri(30) > 0, 0.5 * q @ k.T, -np.inf)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found: dict[str, list[float]] = {"recent": [], "heavy": []}
    for t in range(30):
        room = math.ceil((t + 1) / 2)
        first = [j for j in (0, 1) if j <= t]
        latest = list(range(t, -1, -1))
        near = latest[: room - room // 2]
        mass = {j: -sum(shares[s, j] for s in range(t)) for j in range(t + 1) if j not in near}
        kept = {
            "recent": {*first, *latest[: max(1, room - len(first))]},
            "heavy": {*near, *sorted(mass, key=lambda j: (mass[j], j))[: room // 2]},
        }
        exact = shares[t] @ v
        for name, keys in kept.items():
            some = sorted(keys)
            part = shares[t, some] / shares[t, some].sum()
            found[name].append(float(np.linalg.norm(part @ v[some] - exact) / np.linalg.norm(exact)))
    for name, values in found.items():
        row = errors.filter(method=name, layer=1, head=2).row(0, named=True)
        assert row["error"] == pytest.approx(sorted(values)[14], rel=1e-9) and row["logit_error"] is None


def test_a_key_that_all_queries_want_is_a_heavy_hitter(tmp_path: Path):
    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        x = noise(layer, kind, positions, rng)
        x[..., 0] = 8.0 if kind == "q" else np.where(positions == 9, 8.0, 0.0)[:, None] if kind == "k" else x[..., 0]
        return x

    run = planted_run(tmp_path / "run", formula, kinds=KINDS, lengths=[300], sampler=All(bucket_size=64))
    heads = OutputError(keep=[0.1]).measure(run).tables["heads"]
    assert (heads["heavy_10"] < 1e-3).all() and (heads["recent_10"] > 0.5).all()


def test_values_that_are_all_alike_make_dropping_harmless_and_sinks_do_not(tmp_path: Path):
    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return np.ones((len(positions), HEADS[kind], DIM)) if kind == "v" else noise(layer, kind, positions, rng)

    heads = OutputError().measure(planted_run(tmp_path / "run", formula, kinds=KINDS, **SHORT)).tables["heads"]
    assert all(heads[f"{method}_{share}"].max() < 1e-12 for method in ("recent", "heavy") for share in (50, 25, 10))
    with_sinks = planted_run(tmp_path / "sinks", formula, kinds=KINDS, facts=FACTS, **SHORT)
    assert (OutputError().measure(with_sinks).tables["heads"]["recent_10"] > 0.01).all()


def test_uneven_grids_are_of_keys_before_rope_where_these_are_there(tmp_path: Path):
    """Each channel has two values before RoPE, which one bit holds; after it, it has many."""

    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if kind in ("q", "v"):
            return noise(layer, kind, positions, rng)
        two = np.random.default_rng(layer).choice([-1.0, 2.0], size=(len(positions), HEADS["k"], DIM))
        return two if kind == "k_pre" else rope(two.swapaxes(0, 1), positions, "half").swapaxes(0, 1)

    turns = Rope(tuple(SPEEDS))
    run = planted_run(tmp_path / "run", formula, kinds=(*KINDS, "k_pre"), turns=turns, **SHORT)
    asked = OutputError(bits=[1], outliers=0.0, first=0)
    result = asked.measure(run)
    errors = result.tables["errors"].filter(method="kvquant")
    assert errors["error_keys"].max() < 1e-6 and errors["logit_error"].max() < 1e-5
    assert not any("after RoPE" in line for line in result.findings)
    for told, why in ((None, "did not tell of RoPE"), (replace(turns, until=30), "more than 30 tokens turn otherwise")):
        other = planted_run(tmp_path / why[:3], formula, kinds=(*KINDS, "k_pre"), turns=told, **SHORT)
        result = asked.measure(other)
        assert result.tables["errors"].filter(method="kvquant")["error_keys"].min() > 0.01
        assert any("after RoPE in 2 of 2 layers" in line and why in line for line in result.findings)
    wrong = replace(turns, inv_freq=tuple(1.1 * SPEEDS))
    with pytest.raises(RunError, match="turned as the manifest tells, is not k"):
        asked.measure(planted_run(tmp_path / "x", formula, kinds=(*KINDS, "k_pre"), turns=wrong, **SHORT))


def test_more_bits_lose_less(tmp_path: Path):
    heads = OutputError().measure(planted_run(tmp_path / "run", kinds=KINDS, **SHORT)).tables["heads"]
    for method in ("kivi", "kvquant"):
        by_bits = [heads[f"{method}_{bits}bit"].median() for bits in (2, 3, 4, 8)]
        assert by_bits == sorted(by_bits, reverse=True) and by_bits[-1] < 0.02


def test_first_tokens_stay_on_uneven_grids(tmp_path: Path):
    run = planted_run(tmp_path / "run", kinds=KINDS, **SHORT)
    none, one, every = (OutputError(bits=[2], first=n).measure(run).tables["heads"] for n in (0, 1, 40))
    assert every["kvquant_2bit"].max() < 1e-12 < one["kvquant_2bit"].min()
    assert (one["kvquant_2bit"] != none["kvquant_2bit"]).any()
    assert (every["kivi_2bit"] == none["kivi_2bit"]).all()


def test_outliers_stay_and_the_rest_goes_to_the_nearest_level():
    x = np.random.default_rng(0).normal(size=(5, 1000)).astype(np.float32)
    x[3] *= 70
    (found,) = uneven(x, [3], 0.02)
    order = np.argsort(x, axis=1)
    for line in range(5):
        ends = [*order[line, :10], *order[line, -10:]]
        assert (found[line, ends] == x[line, ends]).all()
        inner = order[line, 10:-10]
        points = np.unique(found[line, inner])
        assert len(points) <= 8
        nearest = points[np.abs(x[line, inner][:, None] - points).argmin(1)]
        span = np.ptp(x[line, inner])
        assert (np.abs(found[line, inner] - x[line, inner]) <= np.abs(nearest - x[line, inner]) + 2e-4 * span).all()


def test_levels_are_the_means_of_what_is_nearest_to_them():
    numbers = np.concatenate([np.random.default_rng(0).normal(size=3000), np.full(50, 6.0)])
    found = levels(numbers, 3)
    nearest = np.abs(numbers[:, None] - found).argmin(1)
    assert (np.diff(found) > 0).all()
    assert found == pytest.approx([numbers[nearest == one].mean() for one in range(8)], abs=5e-3)
    four = np.repeat([-1.0, -0.2, 0.3, 1.0], 25)
    assert levels(four, 2) == pytest.approx([-1.0, -0.2, 0.3, 1.0])


def test_few_numbers_come_back_exactly():
    few = np.random.default_rng(0).choice(np.array([-2.0, 0.0, 1.0, 4.0], dtype=np.float32), size=(3, 200))
    (found,) = uneven(few, [2], 0.0)
    assert np.allclose(found, few, atol=1e-3)
    (still,) = uneven(np.full((2, 9), 0.7, dtype=np.float32), [2], 0.01)
    assert (still == np.float32(0.7)).all()


def test_kept_keys_lie_within_the_window():
    seen = np.tri(20, dtype=bool) & ~np.tri(20, k=-6, dtype=bool)
    for share in (0.2, 0.5, 1.0):
        for kept in (recent(seen, share, 2), heavy(seen, share, np.random.default_rng(0).uniform(size=(20, 20)))):
            assert not (kept & ~seen).any() and kept.diagonal().all()
            assert (kept.sum(1) <= np.ceil(share * seen.sum(1)) + 2).all()
    assert (heavy(seen, 1.0, np.zeros((20, 20))) == seen).all()


def test_sums_are_over_queries_before():
    history = np.arange(12.0).reshape(1, 3, 4)
    found = sums_before(np.array([1, 5, 6]), history, np.array([1, 4, 5]), np.array([1.0, 2.0, 1.0]))
    assert found[0].tolist() == [[0] * 4, [8, 11, 14, 17], [16, 20, 24, 28]]


def test_a_median_by_weights_is_that_of_rows_as_often():
    values, counts = np.random.default_rng(0).normal(size=(3, 9)), np.array([1, 2, 1, 3, 1, 1, 4, 1, 1.0])
    often = np.repeat(values, counts.astype(int), axis=1)
    assert np.allclose(weighted_median(values, counts), np.median(often, axis=1))


def test_queries_of_a_section_over_all_keys(tmp_path: Path):
    def halves(n: int) -> Sections:
        return Sections.spread([(0, n // 2, "early"), (n // 2, n, "late")], n)

    run = planted_run(tmp_path / "run", kinds=KINDS, sections=halves, **SHORT)
    out = tmp_path / "out"
    assert entry.main("output_error", [f"run={run.folder}", f"out={out}", "sections=[late]", "queries=99"]) == 0
    assert (out / "findings.txt").read_text().startswith("Of the rows of these sections only: late.\n")
    late = OutputError(sections=["late"], queries=99).measure(run).tables["errors"]
    assert set(late["queries"]) == {20 + 16}


def test_few_queries_and_all_keys_are_enough(run: Callable, tmp_path: Path):
    captured: Run = run("sampler=per_side", "sampler.q.base_rate=20", "capture.kinds=[q,k,v,k_pre]")
    result = OutputError().measure(captured)
    assert result.tables["errors"]["error"].null_count() == 0
    assert not any("after RoPE" in line for line in result.findings)
    assert set(result.figures) == {"bits", "even_map", "keep", "heavy_map", "by_layer"}
    assert len(OutputError(keep=[]).measure(planted_run(tmp_path / "o", kinds=KINDS, **SHORT)).figures) == 3


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        ({"kinds": KINDS}, "has a sample of the keys.*sampler=per_side"),
        ({"kinds": ("q", "k"), **SHORT}, "this needs q, k, v: capture with"),
        (
            {"kinds": KINDS, "facts": ScoreFacts(missing="it is odd"), **SHORT},
            "cannot be had from its q and k: it is odd",
        ),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, planted: dict, told: str):
    with pytest.raises(RunError, match=told):
        OutputError().measure(planted_run(tmp_path / "run", **planted))


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": []},
        {"bits": [0]},
        {"bits": [9]},
        {"first": -1},
        {"keep": [0.0]},
        {"outliers": 1.0},
        {"queries": 0},
        {"group": 1},
        {"weights": "x"},
    ],
)
def test_settings_that_cannot_be_used_are_refused(wrong: dict):
    with pytest.raises(ConfigError):
        OutputError(**wrong)


def test_a_real_run_by_its_own_statistics(run: Callable):
    """All keys kept: outputs with all of them are those that `capture.attention` has of the model itself."""
    from sniffer.experiments.output_error.core import weights
    from sniffer.experiments.output_error.layer import Layer

    captured: Run = run("sampler=all", "dataset.max_tokens=64", "capture.kinds=[q,k,v]", "capture.attention=[out]")
    lengths = dict(captured.examples().select("example_id", "n_tokens").iter_rows())
    here = Layer.of(captured, captured, 1, "rows")
    for text in here.texts(lengths, 99, 9):
        outputs = here.outputs(weights(text.logits, here.sinks), text.keys, here.values.vectors)
        example = here.queries.example_ids[text.queries][0]
        for head in range(4):
            rows = captured.attention(layer=1, q_head=head).filter(example_id=example).sort("position")
            assert np.allclose(outputs[head], rows["out"].to_numpy(), atol=1e-5)
