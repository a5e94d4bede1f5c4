"""Virtual distances against their definition, pair by pair, and against what was planted."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sniffer.experiments.virtual_distance import VirtualDistance
from sniffer.experiments.virtual_distance.core import (
    Side,
    add_up,
    apart,
    at_distances,
    in_several,
    ranges_of,
    shares,
    sinks,
)
from sniffer.experiments.virtual_distance.preferences import draw_triples, preferences

from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from sniffer.sampler import All
from sniffer.types import Rope, first_key
from tests.experiments.planted import DIM, HEADS, SPEEDS, planted_run, rope

KEY_OF = [0, 0, 1]
"""Of three query heads, two attend with key head 0."""

TURNS = Rope(tuple(SPEEDS.tolist()))
KINDS = ("q", "k", "q_pre", "k_pre")


def side(heads: int, seed: int, turns: Rope, texts: tuple[int, ...] = (40, 30, 40)) -> tuple[Side, np.ndarray]:
    """Random vectors of three texts, with positions in no order, and as real numbers."""
    rng = np.random.default_rng(seed)
    places = [rng.permutation(n)[: n // 2] for n in texts]
    positions = np.concatenate(places)
    documents = np.repeat([7, 3, 9], [len(one) for one in places])
    vectors = rng.normal(size=(heads, len(positions), DIM)) + rng.normal(size=(heads, 1, DIM))
    made = Side(turns.planes(vectors), positions, documents, positions // 10, rng.uniform(0.5, 2, len(positions)))
    return made, vectors


def turned(vector: np.ndarray, position: float, turns: Rope) -> np.ndarray:
    """One vector after RoPE, written out, of half of its dimensions paired with the others."""
    pairs, out = len(turns.inv_freq), vector.copy()
    for f, speed in enumerate(turns.inv_freq):
        i, j = turns.first + f, turns.first + f + pairs
        c, s = np.cos(speed * position), np.sin(speed * position)
        out[i], out[j] = vector[i] * c - vector[j] * s, vector[i] * s + vector[j] * c
        out[[i, j]] *= turns.attention_factor
    return out


@pytest.mark.parametrize(
    ("turns", "window"),
    [(TURNS, None), (Rope((0.7, 0.02), first=2, attention_factor=1.3), 12)],
    ids=["whole", "partial"],
)
def test_curves_are_those_of_all_pairs(turns: Rope, window: int | None):
    """By loops over pairs: in one document for what is observed, in two for what is average at their positions."""
    (q, x), (k, y) = side(3, 0, turns), side(2, 1, turns)
    speeds, edges = turns.speeds(DIM), ranges_of(39)
    sums = add_up(q, k, KEY_OF, speeds, edges, lambda at: first_key(at, window))
    found = shares(sums, *apart(q, k, KEY_OF))
    pairs = [
        (i, j, q.positions[i] - k.positions[j], q.weights[i] * k.weights[j], q.documents[i] == k.documents[j])
        for i, j in product(range(len(q.positions)), range(len(k.positions)))
    ]
    seen = [one for one in pairs if one[4] and one[2] >= 1 and (window is None or one[2] < window)]

    def logit(head: int, i: int, j: int, distance: float) -> float:
        return float(turned(x[head, i], distance, turns) @ turned(y[KEY_OF[head], j], 0, turns))

    apart_by_cell: dict[tuple[int, int], list] = {}
    for i, j, _, weight, same in pairs:
        if not same:
            apart_by_cell.setdefault((q.cells[i], k.cells[j]), []).append((i, j, weight))
    for head in (0, 2):
        of_cells = {  # the mean of conj(q) k over pairs of two documents, as its products with both turns
            cells: sum(w * np.conj(q.planes[head, i]) * k.planes[KEY_OF[head], j] for i, j, w in some)
            / sum(w for *_, w in some)
            for cells, some in apart_by_cell.items()
        }
        average = sum(w * of_cells[q.cells[i], k.cells[j]] for i, j, _, w, _ in seen) / sum(one[3] for one in seen)
        assert np.allclose(found.average[head], average)
        for number, (low, high) in enumerate(zip(edges, edges[1:], strict=False)):
            inside = [one for one in seen if low <= one[2] < high]
            assert sums.pairs[number] == len(inside)
            if not inside:
                continue
            weight = sum(one[3] for one in inside)
            observed = sum(w * logit(head, i, j, d) for i, j, d, w, _ in inside) / weight
            alone = sum(w * (average * np.exp(-1j * speeds * d)).sum().real for *_, d, w, _ in inside) / weight
            placed = (
                sum(
                    w * (of_cells[q.cells[i], k.cells[j]] * np.exp(-1j * speeds * d)).sum().real
                    for i, j, d, w, _ in inside
                )
                / weight
            )
            assert found.observed[head, number] == pytest.approx(observed)
            assert found.rope[head, number] == pytest.approx(alone)
            assert found.drift[head, number] == pytest.approx(placed - alone, abs=1e-9)
            assert found.content[head, number] == pytest.approx(observed - placed, abs=1e-9)
            # At a distance that none of them has.
            virtual = sum(w * logit(head, i, j, 1000) for i, j, _, w, _ in inside) / weight
            content = sums.content[head, number] / sums.weight[number]
            assert at_distances(content, speeds, np.array([1000])) == pytest.approx(virtual)
    assert sums.weight.sum() == pytest.approx(sum(one[3] for one in seen))


def test_preferences_are_those_of_turned_vectors():
    (q, x), (k, y) = side(3, 2, TURNS), side(2, 3, TURNS)
    distances, speeds = np.array([1, 64]), TURNS.speeds(DIM)
    triples = draw_triples(q, k, 300, lambda at: first_key(at, 15), [0, 1])
    at, one, other = q.positions[triples.query], k.positions[triples.one], k.positions[triples.other]
    assert len(at) > 100 and (triples.one != triples.other).all()
    for place, rows in ((one, triples.one), (other, triples.other)):
        assert (k.documents[rows] == q.documents[triples.query]).all() and ((at - place > 0) & (at - place < 15)).all()
    found = preferences(q, k, KEY_OF, speeds, triples, distances)
    for head in range(3):
        same = np.zeros((5, len(at)))
        for n, (i, a, b) in enumerate(zip(triples.query, triples.one, triples.other, strict=True)):

            def margin(first: float, second: float, i=i, a=a, b=b, head=head) -> bool:
                ends = [y[KEY_OF[head], a], y[KEY_OF[head], b]]
                logits = [turned(x[head, i], d, TURNS) @ key for d, key in zip((first, second), ends, strict=True)]
                return bool(logits[0] > logits[1])

            d1, d2 = at[n] - one[n], at[n] - other[n]
            now = margin(d1, d2)
            further = [margin(d1 + d, d2 + d) for d in distances]
            same[:, n] = [
                margin(d2, d1) == now,
                *(margin(d, d) == now for d in distances),
                *(w == now for w in further),
            ]
        shown = [found.changed[head], *found.together[head], *found.further[head]]
        assert shown == pytest.approx(same.mean(1).tolist())


def test_triples_are_drawn_by_weights():
    """Three keys before one query: each pair by the product of its weights, those of one key left out."""
    planes, zeros = np.zeros((1, 4, 1), dtype=complex), np.zeros(4, dtype=int)
    rows = Side(planes, np.arange(4), zeros, zeros, np.array([1.0, 2.0, 5.0, 1.0]))
    triples = draw_triples(rows.take(np.array([3])), rows, 40_000, np.zeros_like, [0])
    weights = np.array([1, 2, 5]) / 8
    assert len(triples.one) / 40_000 == pytest.approx(1 - (weights**2).sum(), abs=0.01)
    share = np.mean((triples.one == 2) & (triples.other == 0)) / (1 / (1 - (weights**2).sum()))
    assert share == pytest.approx(weights[2] * weights[0], abs=0.01)


def test_a_key_that_all_queries_favour_is_a_sink():
    (q, x), (k, _) = side(3, 4, TURNS), side(2, 5, TURNS)
    asked = np.flatnonzero(k.positions < 15)[:2]
    y = np.random.default_rng(6).normal(size=(2, len(k.positions), DIM)) * 0.1
    # Along the mean of the queries that come after it, as they are turned there.
    for place in asked:
        later = np.flatnonzero((q.documents == k.documents[place]) & (q.positions > k.positions[place]))
        for head, of in ((0, [0, 1]), (1, [2])):
            wanted = np.mean(
                [turned(x[h, i], q.positions[i] - k.positions[place], TURNS) for h in of for i in later], 0
            )
            y[head, place] = 20 * wanted / np.linalg.norm(wanted)
    k = Side(TURNS.planes(y), k.positions, k.documents, k.cells, k.weights)
    found = sinks(q, k, KEY_OF, TURNS.speeds(DIM), np.zeros_like, 8.0)
    assert set(np.flatnonzero(found)) == set(asked)
    assert not sinks(q, k, KEY_OF, TURNS.speeds(DIM), np.zeros_like, 1e6).any()


def test_rows_that_one_document_alone_reaches_are_known():
    zeros = np.zeros((1, 5, 1), dtype=complex)
    cells, texts = np.array([0, 0, 1, 1, 2]), np.array([1, 2, 1, 1, 2])
    assert in_several(Side(zeros, cells, texts, cells, np.ones(5))).tolist() == [True, True, False, False, False]


def formula(change: dict[str, np.ndarray | float], noise: float = 0.0):
    """q_pre and k_pre as told by their first letter, and q and k as RoPE makes them."""

    def made(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        rng = np.random.default_rng([layer, ord(kind[0])])
        x = np.broadcast_to(change[kind[0]], (len(positions), HEADS[kind], DIM))
        x = x + noise * rng.normal(size=x.shape)
        return x if kind.endswith("pre") else rope(x.swapaxes(0, 1), positions, "half").swapaxes(0, 1)

    return made


U = np.array([1.0, 2.0, 0.0, 0.5, 0.0, 1.0, 3.0, 0.5])


@pytest.fixture(scope="module")
def constant(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All queries are alike, and all keys."""
    folder = tmp_path_factory.mktemp("virtual") / "run"
    return planted_run(folder, formula({"q": U, "k": U}), kinds=KINDS, lengths=(200, 200), turns=TURNS)


def test_where_all_contents_are_alike_there_is_rope_alone(constant: Run):
    """The kernel of one content, |u_f|^2 cos(w_f d) summed over pairs, times the scaling; no drift and no content."""
    tables = VirtualDistance(distances=[0, 5, 100_000], near=8).measure(constant).tables
    energy = U[:4] ** 2 + U[4:] ** 2
    for distance in (0, 5, 100_000):
        wanted = 0.5 * (energy * np.cos(SPEEDS * distance)).sum()
        some = tables["virtual"].filter(virtual_distance=distance)
        assert np.allclose(some["logit"], wanted, atol=1e-4) and some["distance"].n_unique() == 8
        assert np.allclose(tables["preferences"].filter(distance=distance)["rope"], wanted, atol=1e-4)
    curves = tables["curves"]
    assert np.allclose(curves["drift"], 0, atol=1e-4) and np.allclose(curves["content"], 0, atol=1e-4)
    assert np.allclose(curves["observed"], curves["rope"], atol=1e-4) and (curves["pairs"] > 0).all()
    # A preference for a place goes with the place.
    heads = tables["heads"]
    assert (heads["content_wins"] < 0.02).all() and heads["head"].to_list() == [0, 1, 2, 3] * 2
    assert np.allclose(heads["fall"], heads["fall_rope"], atol=1e-4)
    near, far = curves.filter(pl.col("distance") < 8), curves.filter(distance=128)
    of_head = near.filter(layer=0, head=1)
    mean = (of_head["observed"] * of_head["pairs"]).sum() / of_head["pairs"].sum()
    assert heads.filter(layer=0, head=1)["fall"][0] == pytest.approx(mean - far.filter(layer=0, head=1)["observed"][0])


def test_q_and_k_alone_are_turned_back(constant: Run, tmp_path: Path):
    after = planted_run(tmp_path / "run", formula({"q": U, "k": U}), kinds=("q", "k"), lengths=(200, 200), turns=TURNS)
    one, other = (VirtualDistance().measure(run).tables for run in (constant, after))
    for name in ("curves", "virtual"):
        value = one[name].columns[-1]
        assert np.allclose(one[name][value], other[name][value], atol=1e-4), name


def test_what_a_text_has_in_common_is_content_and_what_a_position_has_is_drift(tmp_path: Path):
    still = np.zeros(DIM)
    lengths = (256, 256, 256, 256)

    def texts(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """In layer 0 each text has a vector of its own in the slowest pair, in layer 1 each quarter of positions."""
        number = np.cumsum(np.concatenate([[0], np.diff(positions) < 0]))
        x = np.tile(still, (len(positions), HEADS[kind], 1))
        signs = np.array([2.0, -2.0, 2.0, -2.0])
        x[..., 3] = (signs[number] if layer == 0 else signs[positions // 64])[:, None]
        return x if kind.endswith("pre") else rope(x.swapaxes(0, 1), positions, "half").swapaxes(0, 1)

    run = planted_run(tmp_path / "run", texts, kinds=KINDS, lengths=lengths, turns=TURNS)
    curves = VirtualDistance().measure(run).tables["curves"]
    middle = {layer: curves.filter(layer=layer, head=0).sort("distance") for layer in (0, 1)}
    # The product of two texts is -1/3 of that of one: of twelve pairs of two, four are of one sign.
    assert np.allclose(middle[0]["observed"], 2.0, atol=0.01) and np.allclose(middle[0]["content"], 8 / 3, atol=0.01)
    assert np.allclose(middle[0]["drift"], 0, atol=0.01)
    near, far = middle[1].row(0, named=True), middle[1].row(-1, named=True)
    assert np.allclose(middle[1]["content"], 0, atol=0.01)
    assert near["drift"] > 1 and far["drift"] < 0 and near["observed"] == pytest.approx(2, abs=0.1)


def test_keys_at_the_first_positions_and_sinks_are_left_out(tmp_path: Path):
    def first_is_huge(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        x = formula({"q": 2 * U, "k": U}, noise=0.1)(layer, "q_pre" if kind[0] == "q" else "k_pre", positions, rng)
        if kind[0] == "k":
            x = np.where((positions == 0)[:, None, None], 30 * U, x)
        return x if kind.endswith("pre") else rope(x.swapaxes(0, 1), positions, "half").swapaxes(0, 1)

    slow = Rope((1e-5,) * 4)
    run = planted_run(
        tmp_path / "run",
        first_is_huge,
        kinds=("q_pre", "k_pre"),
        lengths=(64, 64),
        layers=(0,),
        turns=slow,
        sampler=All(),
    )
    whole, first, sink = (VirtualDistance(**kept).measure(run) for kept in ({}, {"drop_first": 1}, {"drop_sinks": 8.0}))
    curves = [result.tables["curves"].filter(head=0).sort("distance") for result in (whole, first, sink)]
    assert curves[0]["observed"][-1] > 1.5 * curves[1]["observed"][-1]
    assert curves[1].equals(curves[2])
    assert any("first positions: 2 positions" in said for said in first.findings)
    assert any("as sinks: 2 positions" in said for said in sink.findings)
    assert not any("Left out" in said for said in whole.findings)


def test_one_text_alone_tells_no_drift_from_content(tmp_path: Path):
    run = planted_run(tmp_path / "run", formula({"q": U, "k": U}, 1.0), kinds=KINDS, lengths=(250,), turns=TURNS)
    result = VirtualDistance().measure(run)
    curves = result.tables["curves"]
    assert curves["rope"].is_nan().all() and curves["observed"].is_not_nan().all()
    assert any("takes two documents" in said for said in result.findings)
    near = VirtualDistance(near=1000, layers=0).measure(run)
    assert near.tables["heads"]["fall"].is_nan().all() and any("No pairs are told" in said for said in near.findings)
    assert set(result.figures) == {"curves", "virtual", "preferences", "content_wins", "fall"}


def test_what_cannot_be_turned_is_refused_by_name(tmp_path: Path):
    for given in ({"distances": []}, {"distances": [-1]}, {"near": 0}, {"drop_sinks": 0.0}):
        with pytest.raises(ConfigError, match="virtual_distance"):
            VirtualDistance(**given)
    told = {"kinds": KINDS, "lengths": (200, 200), "layers": (0,)}
    for name, turns, said in (
        ("untold", None, "did not tell of RoPE"),
        ("missing", Rope(missing="several fit"), "not known: several fit"),
        ("other", Rope((1.0, 0.1, 0.01, 0.1)), "q_pre of layer 0, head 0 .* is not q .off by"),
        ("still", Rope(), "is not q .off by"),
        ("longer", Rope(TURNS.inv_freq, until=150), "text of 200 tokens, and layer 0 turns by other frequencies"),
    ):
        run = planted_run(tmp_path / name, formula({"q": U, "k": U}), turns=turns, **told)
        with pytest.raises(RunError, match=said):
            VirtualDistance().measure(run)
    plain = planted_run(tmp_path / "plain", kinds=("q", "k"), lengths=(200, 200), turns=Rope())
    with pytest.raises(RunError, match="turns by position"):
        VirtualDistance().measure(plain)
    limited = planted_run(
        tmp_path / "limited", formula({"q": U, "k": U}), turns=Rope(TURNS.inv_freq, until=300), **told
    )
    assert VirtualDistance().measure(limited).tables["preferences"]["distance"].max() == 256
    with pytest.raises(RunError, match="position 300 is in none shorter"):
        VirtualDistance(distances=[300]).measure(limited)
    with pytest.raises(RunError, match="position -1 is none"):
        limited.rotary(0).turned(np.ones((1, DIM)), np.array([-1]))


def test_every_layout_is_turned_and_turned_back(constant: Run):
    """Against turns written out, wherever the pairs lie; and their planes give the product at a distance."""
    rng = np.random.default_rng(0)
    x, at, speeds = rng.normal(size=(2, 5, 12)), np.array([0, 3, 50, 7, 100]), (0.5, 0.01)
    half, beside = [(4, 6), (5, 7)], [(4, 5), (6, 7)]
    for layout, pairs, places in (
        ("half", half, half),
        ("interleaved", beside, beside),
        ("interleaved_to_half", beside, half),
    ):
        turns, wanted = Rope(speeds, layout, first=4, attention_factor=1.5), x.copy()
        for (a, b), (i, j), speed in zip(pairs, places, speeds, strict=True):
            c, s = 1.5 * np.cos(speed * at), 1.5 * np.sin(speed * at)
            wanted[..., i], wanted[..., j] = x[..., a] * c - x[..., b] * s, x[..., a] * s + x[..., b] * c
        assert np.allclose(turns.turned(x, at), wanted)
        assert np.allclose(turns.before(wanted, at), x)
        q, k = turns.planes(x)[0], turns.planes(x)[1]
        products = (np.conj(q[:, None]) * k * np.exp(-1j * turns.speeds(12) * (at[:, None] - at)[..., None])).sum(-1)
        assert np.allclose(products.real, wanted[0] @ wanted[1].T)
    rotary = constant.rotary(1)
    assert rotary.proven == ("q", "k") and rotary.turns
    after, before = (constant.vectors(layer=1, head=0, kind=kind) for kind in ("q", "q_pre"))
    assert np.allclose(rotary.turned(before.vectors, before.positions), after.vectors, atol=1e-5)
    moved = rope(before.vectors.astype(float), before.positions + 999, "half")
    assert np.allclose(rotary.turned(before.vectors, before.positions + 999), moved)
