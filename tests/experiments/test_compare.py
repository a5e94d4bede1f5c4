"""Comparisons: each number against numpy from its definition, differences where they were planted, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import pearsonr, spearmanr
from sniffer.experiments.common import entry
from sniffer.experiments.common.documents import Portion, Source, deal
from sniffer.experiments.compare import Compare, compare
from sniffer.experiments.compare.intervals import pearson, spearman, spread_of, spread_of_difference
from sniffer.experiments.compare.members import course, members, paths
from sniffer.experiments.key_rank import KeyRank

from sniffer import open_run
from sniffer.errors import ConfigError, RunError
from sniffer.reader.run import Run
from tests.experiments.planted import DIM, HEADS, noise, planted_run

T5, T9 = 2.570582, 2.262157
"""Of Student's t, the 97.5% points with 5 and 9 degrees of freedom, from a printed table."""
LENGTHS = (300, 280, 260, 310, 290, 270, 305, 295)


def drifting(slope: float, moved: tuple[int, int] | None = None):
    """Keys drift along dimension 0, where queries have a mean; `moved`: a layer and key head that drift twice."""

    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        vectors = noise(layer, kind, positions, rng)
        if kind == "q":
            vectors[..., 0] += 2
        else:
            rate = np.full(HEADS["k"], slope)
            if moved is not None and moved[0] == layer:
                rate[moved[1]] *= 2
            vectors[..., 0] += positions[:, None] / 100 * rate
        return vectors

    return formula


def named(run: Run, checkpoint: str, revision: str | None = None) -> Run:
    """The same run, of a model of that name."""
    replace(run.manifest, model={"checkpoint": checkpoint, "revision": revision}).save(run.folder)
    found = open_run(run.folder)
    assert isinstance(found, Run)
    return found


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three revisions over the same texts, of which the last has a head that changed; a fourth with too few rows."""
    folder = tmp_path_factory.mktemp("compare") / "training"
    slopes = {"step-1000": (0.5, None), "step-3000": (1.0, None), "step-2000": (0.5, (1, 1))}
    for place, (revision, (slope, moved)) in enumerate(slopes.items()):
        named(planted_run(folder / str(place), drifting(slope, moved), lengths=LENGTHS), "lab/model", revision)
    named(planted_run(folder / "few", lengths=[12]), "lab/model", "step-4000")
    return folder


@pytest.fixture(scope="module")
def tables(training: Path) -> dict[str, pl.DataFrame]:
    assert entry.main("compare", [f"runs={training}", "statistic=bias_strength"], compare) == 0
    place = training / "experiments" / "compare"
    return {path.stem: pl.read_parquet(path) for path in place.glob("*.parquet")}


def bias(run: Run, layer: int, head: int, documents: frozenset[int] | None = None) -> float:
    """Bias strength of a query head from its rows: the mean of queries on the drift axis times the slope of keys."""
    sides = []
    for kind, number in (("q", head), ("k", head * HEADS["k"] // HEADS["q"])):
        found = run.vectors(layer=layer, head=number, kind=kind)
        mine = np.ones(len(found.positions), bool) if documents is None else np.isin(found.example_ids, list(documents))
        sides.append((found.vectors[mine].astype(float), found.positions[mine], 1 / found.inclusion_probability[mine]))
    x, t, w = (np.concatenate(both) for both in zip(*sides, strict=True))
    joint = np.cov(np.column_stack([x, t]).T, aweights=w, ddof=0)
    axis = joint[:DIM, DIM] / np.linalg.norm(joint[:DIM, DIM])
    (q, _, of_q), (k, positions, of_k) = sides
    slope = np.polyfit(positions, k @ axis, 1, w=np.sqrt(of_k))[0]
    return float(np.average(q @ axis, weights=of_q) * slope)


def test_differences_and_their_intervals_are_numpys(training: Path, tables: dict[str, pl.DataFrame]):
    one, other = (open_run(training / job) for job in "01")
    assert isinstance(one, Run) and isinstance(other, Run)
    dealt = deal(one, 6, 0)
    assert dealt is not None and dealt == deal(other, 6, 0)
    found = tables["differences"].filter(run="step-3000", statistic="bias_strength")
    assert len(found) == 2 * HEADS["q"]
    for layer, head in ((0, 0), (1, 3)):
        (row,) = found.filter(layer=layer, head=head).iter_rows(named=True)
        apart = bias(other, layer, head) - bias(one, layer, head)
        groups = [bias(other, layer, head, ids) - bias(one, layer, head, ids) for ids in dealt.groups]
        error = np.sqrt(sum((group - apart) ** 2 for group in groups) / (6 * 5))
        assert row["difference"] == pytest.approx(apart, rel=1e-6)
        assert (row["low"], row["high"]) == pytest.approx((apart - T5 * error, apart + T5 * error), rel=1e-5)
        assert row["differs"] == (apart - T5 * error > 0)


def test_a_planted_difference_is_found_where_it_is(tables: dict[str, pl.DataFrame]):
    found = tables["differences"].filter(run="step-2000", statistic="bias_strength")
    changed = found.filter(pl.col("differs"))
    assert {(layer, head) for layer, head in changed.select("layer", "head").iter_rows()} == {(1, 2), (1, 3)}
    # All else is the same to the last digit: the same noise.
    rest = found.filter(~pl.col("differs"))
    assert (rest["difference"] == 0).all() and len(rest) == 6


def test_averages_are_means_over_heads(training: Path, tables: dict[str, pl.DataFrame]):
    runs = tables["runs"].filter(statistic="bias_strength")
    assert runs["run"].to_list() == ["step-1000", "step-3000", "step-2000"] and (runs["heads"] == 8).all()
    (row,) = runs.filter(run="step-3000").iter_rows(named=True)
    one, other = (open_run(training / job) for job in "01")
    assert isinstance(one, Run) and isinstance(other, Run)
    dealt = deal(other, 6, 0)
    assert dealt is not None
    every = [(layer, head) for layer in (0, 1) for head in range(HEADS["q"])]
    mean = np.mean([bias(other, *place) for place in every])
    groups = [np.mean([bias(other, *place, ids) for place in every]) for ids in dealt.groups]
    reach = T5 * np.sqrt(sum((group - mean) ** 2 for group in groups) / 30)
    assert (row["value"], row["low"], row["high"]) == pytest.approx((mean, mean - reach, mean + reach), rel=1e-5)
    assert row["difference"] == pytest.approx(mean - np.mean([bias(one, *place) for place in every]), rel=1e-6)


def test_names_histograms_and_depths_count_every_head(tables: dict[str, pl.DataFrame]):
    names = tables["names"].filter(statistic="taxonomy", run="step-3000")
    assert names["heads"].sum() == 8 and names["share"].sum() == pytest.approx(1)
    counted = tables["histograms"].filter(statistic="bias_strength").group_by("run").agg(pl.col("heads").sum())
    assert counted["heads"].to_list() == [8, 8, 8]
    edges = tables["histograms"].filter(statistic="bias_strength").group_by("low", "high").len()
    assert (edges["len"] == 3).all() and len(edges) == 40
    depths = tables["depths"].filter(statistic="bias_strength", run="step-3000")
    assert depths.select("bin", "depth", "heads").rows() == [(0, 0.0, 4), (19, 1.0, 4)]


def test_the_sentences_say_what_was_left_out_and_how_sure_the_rest_is(training: Path, tables: dict[str, pl.DataFrame]):
    assert tables
    place = training / "experiments" / "compare"
    said = (place / "findings.txt").read_text().splitlines()
    assert said[0] == "3 runs compared with step-1000: step-1000, step-3000, step-2000."
    assert said[1].startswith("step-4000 is left out: ") and "6 rows per head, too few" in said[1]
    assert "8 documents in 6 groups" in said[2]
    assert any("differs from that of step-1000 in 8 of 8 heads of step-3000, in 2 of 8 heads" in one for one in said)
    assert any(one.startswith("Over training, bias strength (mean over heads) goes from step-1000 (") for one in said)
    drawn = {path.stem for path in place.glob("*.png")}
    wanted = {
        f"{kind}_position_geometry_bias_strength" for kind in ("runs", "differences", "depth", "histogram", "training")
    }
    assert wanted | {"names_position_geometry_taxonomy"} <= drawn


def test_an_analysis_of_keys_is_compared_kind_by_kind(training: Path):
    found = members([str(training / job) for job in "02"])
    (member, _) = found
    result = Compare(
        analysis=["key_rank", "attention_plasticity"], groups=3, statistic=["effective_rank", "plasticity"]
    )
    tables = result.measure(found).tables
    assert set(tables["runs"].select("analysis", "kind").iter_rows()) == {
        ("key_rank", "k"),
        ("attention_plasticity", ""),
    }
    rank = tables["differences"].filter(analysis="key_rank")
    assert len(rank) == 2 * HEADS["k"]
    # Rows of a group, and a rank from its definition.
    dealt = deal(member.run, 3, 0)
    assert dealt is not None
    source = Source(member.run)
    for ids in dealt.groups:
        alone = member.run.vectors(layer=1, head=0, kind="k")
        mine = np.isin(alone.example_ids, list(ids))
        values = np.linalg.eigvalsh(np.cov(alone.vectors[mine].T.astype(float), ddof=0))
        share = values / values.sum()
        table = KeyRank(layers=[1]).measure(Portion(source, ids)).tables["heads"].filter(head=0)
        assert table["rows"].item() == mine.sum()
        assert table["effective_rank"].item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["position_geometry", "attention_plasticity"])
def test_what_is_measured_quickly_is_what_is_measured(training: Path, name: str):
    run = open_run(training / "1")
    assert isinstance(run, Run)
    settings = {"attention_plasticity": ["variant=thesis", "variant=near"]}.get(name, ["resamples=0"])
    for setting in settings:
        analysis = entry.make(name, entry.overrides([setting]))
        assert isinstance(analysis, entry.Quick)
        quick, whole = analysis.quick(run), analysis.measure(run).tables["heads"]
        assert len(quick.columns) >= 6 and quick.equals(whole.select(quick.columns))


def test_documents_are_dealt_evenly_and_a_portion_has_no_other_rows(training: Path):
    run = open_run(training / "0")
    assert isinstance(run, Run)
    ids = set(run.examples()["example_id"].to_list())
    dealt = deal(run, 3, 1)
    assert dealt is not None and dealt.documents == ids and sorted(map(len, dealt.groups)) == [2, 3, 3]
    assert deal(run, 1, 0) is None
    every = deal(run, 99, 0)
    assert every is not None and len(every.groups) == len(ids)
    portion = Portion(Source(run), dealt.groups[0])
    whole = run.scan([1], ["q"]).collect()
    mine = whole.filter(pl.col("example_id").is_in(sorted(dealt.groups[0])))
    assert portion.scan([1], ["q"]).collect().equals(mine) and 0 < len(mine) < len(whole)
    with pytest.raises(RunError, match="portion"):
        portion.moments(layer=0, head=0, kind="q")


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    groups = rng.normal(3, 2, size=(20_000, 6))
    value = groups.mean(1)
    reach = spread_of(value, groups).reach(0.95)
    assert np.mean(np.abs(value - 3) <= reach) == pytest.approx(0.95, abs=0.005)
    other = rng.normal(1, 5, size=(20_000, 5))
    apart = other.mean(1) - value
    welch = spread_of_difference((value, groups), (other.mean(1), other), paired=False).reach(0.95)
    assert np.mean(np.abs(apart + 2) <= welch) == pytest.approx(0.95, abs=0.01)
    # What both have in common cancels where documents are the same.
    shared = rng.normal(0, 50, size=groups.shape)
    pair = (value + shared.mean(1), groups + shared), (value + 1 + shared.mean(1), groups + 1 + shared)
    assert np.allclose(spread_of_difference(*pair, paired=True).reach(0.95), 0, atol=1e-9)
    ten = rng.normal(size=(1, 10))
    assert spread_of(ten.mean(1), ten).reach(0.95) == pytest.approx(T9 * ten.std(ddof=1) / np.sqrt(10), rel=1e-5)
    assert np.isnan(spread_of(np.ones(1), np.empty((1, 0))).reach(0.95)).all()


def test_correlations_are_the_published_one_and_scipys():
    """The drop of plasticity of seven models against LongBench-Pro: published as r = -0.67 (thesis, chapter 6)."""
    drop = np.array([0.068, 0.083, 0.161, 0.177, 0.187, 0.072, 0.230])
    score = np.array([40.14, 37.80, 37.11, 33.41, 31.26, 30.18, 15.71])
    found = pearson(drop, score, 0.95)
    assert found.r == pytest.approx(-0.67, abs=0.006)  # of drops with three digits
    true = pearsonr(drop, score).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((true.low, true.high))
    tied = np.round(drop, 2)
    assert spearman(tied, score, 0.95).r == pytest.approx(spearmanr(tied, score).statistic)
    three = pearson(drop[:3], score[:3], 0.95)
    assert np.isfinite(three.r) and np.isnan(three.low)
    assert np.isnan(pearson(np.ones(5), score[:5], 0.95).r)


def test_scores_of_ones_own_are_joined_by_any_name(training: Path, tmp_path: Path):
    (tmp_path / "scores.csv").write_text(
        "run,RULER,note\nstep-1000,10,a\n1,30,b\nlab/model@step-2000,12,c\nother,5,d\n"
    )
    found = members([str(training)])
    result = Compare(scores=str(tmp_path / "scores.csv"), statistic="bias_strength", groups=0).measure(found)
    assert result.tables["scores"].rows() == [
        ("step-1000", "RULER", 10.0),
        ("step-3000", "RULER", 30.0),
        ("step-2000", "RULER", 12.0),
    ]
    (row,) = result.tables["correlations"].iter_rows(named=True)
    values = result.tables["runs"]["value"].to_numpy()
    assert row["pearson"] == pytest.approx(np.corrcoef(values, [10, 30, 12])[0, 1]) and row["runs"] == 3
    told = " ".join(result.findings)
    assert (
        "name no run here: other" in told and "have no score: step-4000" in told and "too few for an interval" in told
    )
    assert "scores_RULER_position_geometry_bias_strength" in result.figures


def test_models_of_other_shapes_are_compared_by_depth(tmp_path: Path):
    shallow = named(planted_run(tmp_path / "a", drifting(0.5)), "lab/shallow")
    deep = named(planted_run(tmp_path / "b", drifting(0.5), layers=(0, 1, 2, 3, 4), lengths=[200] * 3), "lab/deep")
    found = members([str(shallow.folder), str(deep.folder)])
    assert [member.label for member in found] == ["shallow", "deep"]
    result = Compare(statistic="r_k", depths=5).measure(found)
    assert not len(result.tables["differences"])
    assert result.tables["depths"].filter(run="deep")["depth"].to_list() == [0, 0.25, 0.5, 0.75, 1]
    told = " ".join(result.findings)
    assert "deep has other layers or heads than shallow" in told
    assert not any(name.startswith("differences") for name in result.figures)


@pytest.mark.parametrize(
    ("revisions", "x", "steps"),
    [
        (["step3000", "step1000", "step143000"], (1000, 3000, 143000), True),
        (["stage1-step-40000", "stage1-step-1200000", "stage2-step-4200000"], (40000, 1.2e6, 4.2e6), True),
        (["stage3-step-4720000", "lc-4k-to-32k-step-4000", "lc-4k-to-32k-step-20000"], (0, 1, 2), False),
        (["main", "step1000", "final"], (0, 1, 2), False),
    ],
)
def test_a_training_is_ordered_by_its_steps(training: Path, revisions: list[str], x: tuple[float, ...], steps: bool):
    (member, *_) = members([str(training)])
    found = course([replace(member, label=revision, revision=revision) for revision in revisions])
    assert found is not None and (found.x, found.steps) == (x, steps)
    if not steps:
        assert [one.label for one in found.members] == revisions
    assert course([member, replace(member, checkpoint="lab/other", revision="step-2")]) is None


def test_what_an_earlier_comparison_left_goes_and_nothing_else(training: Path, tmp_path: Path):
    out, runs = tmp_path / "out", f"runs=[{training / '0'},{training / '1'}]"
    words = [runs, f"out={out}", "groups=0"]
    assert entry.main("compare", [*words, "statistic=r_k"], compare) == 0
    mine = [out / "notes.txt", out / "mine.png", tmp_path / "above.png"]
    for file in mine:
        file.write_text("mine")
    told = json.loads((out / "provenance.json").read_text())
    told["files"] += ["../above.png", "notes.txt"]
    (out / "provenance.json").write_text(json.dumps(told))
    assert (out / "depth_position_geometry_r_k.png").is_file()
    assert entry.main("compare", [*words, "statistic=r_q"], compare) == 0
    assert not list(out.glob("*r_k*")) and (out / "depth_position_geometry_r_q.svg").is_file()
    assert all(file.read_text() == "mine" for file in mine)


def test_lists_of_runs_are_text():
    assert paths("[2026-11-28, 'b/c']") == ["2026-11-28", "b/c"] and paths("12") == ["12"]
    with pytest.raises(ConfigError, match="is no list"):
        paths("[a,b")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no runs are given"),
        (["run={all}"], "takes runs=, not run="),
        (["runs=[]"], "names nothing"),
        (["runs={all}/0"], "needs two runs or more"),
        (["runs=[{all}/0,{all}/0]"], "needs two runs or more"),
        (["runs=/nowhere/at/all"], "is not a run folder"),
        (["runs=[{all}/0,{all}/few]"], "1 of 2 runs could be measured"),
        (["runs={all}", "analysis=ranks"], "must name some of attention, "),
        (["runs={all}", "analysis=report"], "must name some of attention, "),
        (["runs={all}", "groups=0", "statistic=biass"], "there is no statistic biass: choose from alpha_k"),
        (["runs={all}", "baseline=5"], "is none of the runs: step-1000, "),
        (["runs={all}", "average=mode"], "must be mean or median"),
        (["runs={all}", "settings={ring: 7}"], "position_geometry.ring=7"),
        (["runs={all}", "scores={all}/none.csv"], "cannot be read as CSV"),
        (["runs={all}", "scores={new}/columns.csv"], "it wants `run`, and one or more of numbers"),
        (["runs={all}", "scores={new}/strangers.csv"], "names none of the runs"),
        (["runs={all}", "scores={new}/twice.csv"], "two rows for step-1000"),
        (["runs={all}", "scores={new}/both.csv"], "which could be step-1000, step-3000"),
    ],
)
def test_a_refusal_is_one_line(
    training: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
):
    for name, text in {
        "columns": "model,RULER\na,1\n",
        "strangers": "run,RULER\na,1\n",
        "twice": "run,RULER\nstep-1000,1\n0,2\n",
        "both": "run,RULER\nlab/model,1\n",
    }.items():
        (tmp_path / f"{name}.csv").write_text(text)
    asked = [word.format(all=training, new=tmp_path) if "{all}" in word or "{new}" in word else word for word in words]
    assert entry.main("compare", asked, compare) == 1
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said
