"""The page is one file that needs nothing else, and holds what the analyses found."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pytest
from sniffer.experiments.attention_plasticity import AttentionPlasticity
from sniffer.experiments.common import entry
from sniffer.experiments.common.documents import Portion, Source, deal
from sniffer.experiments.common.results import PAGE
from sniffer.experiments.compare import compare
from sniffer.experiments.report import Report, assemble, write
from sniffer.experiments.report.collect import NOT_STATISTICS, collect, coverage
from sniffer.experiments.report.comparison import comparison
from sniffer.experiments.report.glossary import ABOUT, ORDER
from sniffer.experiments.report.sure import _analysis

from sniffer import open_run
from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.sampler import All
from sniffer.types import Rope, Sections
from tests.experiments.planted import HEADS, SPEEDS, planted_run, roped
from tests.helpers_remote import copy_to
from tests.helpers_runs import Runs
from tests.tiny_run import save_texts

KINDS = ("q", "k", "v", "q_pre", "k_pre")


def analysed(folder: Path, *names: str, **options) -> Path:
    """A planted run with the results of some analyses."""
    planted_run(folder, **options)
    for name in names:
        assert entry.main(name, [f"run={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    return analysed(folder, "position_geometry", "attention_plasticity")


@pytest.fixture(scope="module")
def run_with_all(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny model's run of every position, with statistics of attention and moments."""
    place = tmp_path_factory.mktemp("all")
    runs = Runs(checkpoint, save_texts(place / "texts.jsonl"), place)
    words = ("sampler.base_rate=1000000", "dataset.max_tokens=48", "dataset.max_examples=2", "capture.attention=all")
    return open_one(runs.start("run", *words, "capture.moments.kinds=[k]"))


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return dict(json.loads(found[1]))


def open_one(folder: Path) -> Run:
    found = open_run(folder)
    assert isinstance(found, Run)
    return found


class Links(HTMLParser):
    """Whatever a browser might fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]


def test_the_page_fetches_nothing(run: Path):
    page = Report().page(str(run))
    links = Links()
    links.feed(page)
    assert all(link.startswith(("data:", "#")) for link in links.found)
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(|\bfetch\(|XMLHttpRequest|\bimport\b[ (]", page.split('id="data"')[0])


def test_every_number_of_every_head_is_in_it(run: Path):
    job = data_of(Report().page(str(run)))["jobs"][0]
    for analysis in ("position_geometry", "attention_plasticity"):
        table = pl.read_parquet(run / "experiments" / analysis / "heads.parquet")
        for name in set(table.columns) - set(NOT_STATISTICS):
            if not table.schema[name].is_numeric():
                continue
            (shown,) = (one for one in job["maps"] if (one["analysis"], one["name"]) == (analysis, name))
            for layer, head, value in table.select("layer", "head", name).iter_rows():
                got = shown["values"][shown["layers"].index(layer)][shown["heads"].index(head)]
                assert got is None if value is None else got == pytest.approx(value, rel=1e-3)


def test_tables_come_out_as_they_went_in(run: Path):
    job = data_of(Report().page(str(run)))["jobs"][0]
    (heads,) = (table for table in job["tables"] if table["name"] == "position_geometry_heads")
    true = pl.read_parquet(run / "experiments" / "position_geometry" / "heads.parquet")
    raw = {kind: base64.b64decode(heads[kind].partition(",")[2]) for kind in ("csv", "parquet")}
    assert pl.read_parquet(io.BytesIO(raw["parquet"])).equals(true)
    assert pl.read_csv(io.BytesIO(raw["csv"])).shape == true.shape


def test_large_tables_are_named_only(run: Path):
    job = collect(open_one(run), {}, table_limit=0)
    assert job["tables"] and all(table["csv"] is None and table["parquet"] is None for table in job["tables"])


def test_coverage_counts_every_row(run: Path):
    opened = open_one(run)
    found = coverage(opened)
    for kind, matrix in found["kinds"].items():
        assert sum(map(sum, matrix)) * HEADS[kind] == pytest.approx(opened.manifest.rows_by_kind[kind])


def test_sections_are_counted_where_there_are_some(run: Path, tmp_path: Path):
    lengths = (300, 200, 256)

    def parts(n_tokens: int) -> Sections:
        return Sections.spread([(0, 20, "question"), (50, n_tokens, "<b>answer</b>")], n_tokens)

    folder = analysed(tmp_path / "run", "key_rank", sections=parts, lengths=lengths)
    page = Report().page(str(folder))
    shown = data_of(page)["jobs"][0]["sections"]
    assert shown["titles"] == ["section", "tokens", "q", "k"] and "<b>answer" not in page
    rows = open_one(folder).scan().collect()
    tokens = {"<b>answer</b>": sum(n - 50 for n in lengths), "question": 3 * 20, "(none)": 3 * 30}
    assert [line[0] for line in shown["lines"]] == list(tokens)
    for name, *numbers in shown["lines"]:
        mine = rows.filter(section="" if name == "(none)" else name)
        assert numbers == [tokens[name], *(len(mine.filter(kind=kind)) for kind in ("q", "k"))]
    assert data_of(Report().page(str(run)))["jobs"][0]["sections"] is None


@pytest.mark.long
def test_all_analyses_of_vectors_fit_on_one_page(tmp_path: Path):
    """That of attention is in tests/experiments/test_attention.py."""
    of_vectors = [name for name in ORDER if name != "attention"]
    planted = {"formula": roped(), "kinds": KINDS, "turns": Rope(tuple(SPEEDS))}
    folder = analysed(tmp_path / "run", *of_vectors, **planted, sampler=All(bucket_size=64), lengths=[128, 100])
    job = data_of(Report().page(str(folder)))["jobs"][0]
    assert [one["analysis"] for one in job["findings"]] == of_vectors
    assert job["plane"]["0"]["0"].keys() == {"q", "k"}
    assert job["profile"]["1"]["3"] and job["sampling"]
    kinds = {(one["name"], one["kind"], one["of_queries"]) for one in job["maps"] if one["analysis"] == "key_rank"}
    assert kinds == {(name, kind, False) for name in ("rank", "effective_rank") for kind in ("k", "k_pre")}
    known = {f"{one['analysis']}.{one['name']}" for one in job["maps"]}
    assert {name for name in ABOUT if not name.startswith("attention.")} <= known


@pytest.mark.long
def test_a_sweep_has_a_job_each(tmp_path: Path):
    for number in "01":
        job = analysed(tmp_path / "sweep" / number, "position_geometry")
        (job / ".hydra").mkdir()
        (job / ".hydra" / "overrides.yaml").write_text(f"- sampler.base_rate={number}\n")
    write("report", [f"run={tmp_path / 'sweep'}"])
    page = (tmp_path / "sweep" / "experiments" / "report" / "report.html").read_text()
    jobs = data_of(page)["jobs"]
    assert [one["overrides"] for one in jobs] == [{"sampler.base_rate": "0"}, {"sampler.base_rate": "1"}]


def test_medians_and_heads_have_intervals_of_groups(run: Path):
    """About each number of the whole, from groups that numpy measures; an analysis' own intervals come first."""
    job = collect(open_one(run), {}, 0, groups=3)
    by_name = {(one["analysis"], one["name"]): one for one in job["maps"]}
    shown, own = by_name["attention_plasticity", "plasticity"], by_name["position_geometry", "bias_strength"]
    dealt = deal(open_one(run), 3, 0)
    assert dealt is not None
    portions = [Portion(Source(open_one(run)), ids) for ids in dealt.groups]
    groups = [
        AttentionPlasticity(count=256 // 3).measure(one).tables["heads"]["plasticity"].to_numpy() for one in portions
    ]
    whole = pl.read_parquet(run / "experiments" / "attention_plasticity" / "heads.parquet")["plasticity"].to_numpy()
    t2 = 4.302653  # Student's 97.5% point of 2 degrees of freedom, from a printed table
    reach = t2 * np.sqrt(((np.stack(groups) - whole) ** 2).sum(0) / 6)
    assert np.ravel(shown["low"]) == pytest.approx(whole - reach, rel=1e-3, abs=1e-3)
    middle = np.median(whole)
    far = t2 * np.sqrt(((np.median(groups, axis=1) - middle) ** 2).sum() / 6)
    assert shown["median"] == pytest.approx(middle, rel=1e-3)
    assert shown["median_from"] == pytest.approx([middle - far, middle + far], rel=1e-3)
    left = pl.read_parquet(run / "experiments" / "position_geometry" / "intervals.parquet")
    left = left.filter(statistic="bias_strength").sort("layer", "head")
    assert np.ravel(own["high"]) == pytest.approx(left["high"].to_numpy(), rel=1e-3)
    assert "low" not in collect(open_one(run), {}, 0)["maps"][-1]
    (found,) = (one for one in job["findings"] if one["analysis"] == "attention_plasticity")
    assert found["basis"].startswith("8 heads of 2 layers; ") and "3 documents in 3 groups" in found["basis"]
    assert found["main"] == ["plasticity|", "drop|"] or found["main"] == ["plasticity|"]


def test_settings_of_a_result_run_nothing_of_their_own(run: Path, tmp_path: Path):
    """What a strange folder says of an analysis are settings of ours alone."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    path = folder / "experiments" / "attention_plasticity" / "provenance.json"
    told = json.loads(path.read_text())
    told["settings"] = {**told["settings"], "_target_": "os.system", "count": 3, "other": 1}
    path.write_text(json.dumps(told))
    found = _analysis(path.parent, open_one(folder))
    assert isinstance(found, AttentionPlasticity) and found.count == 3
    told["settings"]["count"] = -1
    path.write_text(json.dumps(told))
    assert _analysis(path.parent, open_one(folder)) is None


def test_every_map_says_what_it_is_and_pairs_have_no_median(tmp_path: Path):
    planted = {"formula": roped(), "kinds": KINDS, "turns": Rope(tuple(SPEEDS))}
    folder = analysed(tmp_path / "run", "rope_frequencies", "quantisation", **planted, lengths=[128, 100])
    found = collect(open_one(folder), {}, 0)["maps"]
    assert all(one["about"] for one in found)
    for one in found:
        assert (one["median"] is None) == (one["name"] in ("most_fixed_pair", "strongest_pair"))


def test_what_a_run_has_beside_vectors_is_mapped(run_with_all: Run):
    """Means of attention's statistics and numbers of moments, each from the reader head by head."""
    maps = {(one["analysis"], one["name"], one["kind"]): one for one in collect(run_with_all, {}, 0)["maps"]}
    shown = maps["attention of all sampled queries", "entropy", None]
    rows = run_with_all.attention(layer=1, q_head=2)
    assert shown["values"][1][2] == pytest.approx(rows["entropy"].mean(), rel=1e-3)  # every position was sampled
    found = run_with_all.moments(layer=0, head=1, kind="k")
    vectors = run_with_all.vectors(layer=0, head=1, kind="k").vectors.astype(float)
    of = "moments over all positions"
    assert maps[of, "length", "k"]["values"][0][1] == pytest.approx(np.linalg.norm(vectors, axis=1).mean(), rel=1e-3)
    mean = np.linalg.norm(vectors.mean(0))
    assert maps[of, "length_of_mean", "k"]["values"][0][1] == pytest.approx(mean, rel=1e-3)
    spread = np.sqrt(vectors.var(0).sum())
    assert maps[of, "spread", "k"]["values"][0][1] == pytest.approx(spread, rel=1e-3)
    assert maps[of, "largest", "k"]["values"][0][1] == pytest.approx(np.abs(vectors).max(), rel=1e-3)
    assert found.n == len(vectors)


def test_a_comparison_is_on_the_page_of_its_folder(tmp_path: Path):
    for number in "01":
        planted_run(tmp_path / "runs" / number, lengths=[200] * 3)
    assert data_of_new(tmp_path / "runs") is None
    words = [f"runs={tmp_path / 'runs'}", "analysis=key_rank", "statistic=[rank,effective_rank]", "groups=3"]
    assert entry.main("compare", words, compare) == 0
    shown = data_of_new(tmp_path / "runs")
    assert shown is not None and not shown["stale"] and shown["sentences"][0].startswith("2 runs compared with 0")
    place = tmp_path / "runs" / "experiments" / "compare"
    runs, heads = (pl.read_parquet(place / f"{name}.parquet") for name in ("runs", "differences"))
    (one,) = (some for some in shown["statistics"] if some["name"] == "effective_rank")
    assert one["about"] and one["kind"] == "k"
    mine = runs.filter(statistic="effective_rank")
    assert [run["value"] for run in one["runs"]] == pytest.approx(mine["value"].to_list(), rel=1e-3)
    assert one["runs"][1]["difference_low"] == pytest.approx(mine["difference_low"][1], rel=1e-3, abs=1e-3)
    expected = heads.filter(statistic="effective_rank").sort("layer", "head")
    assert np.ravel(one["maps"]["1"]["values"]) == pytest.approx(expected["difference"].to_numpy(), rel=1e-3, abs=1e-3)
    other = planted_run(tmp_path / "other", lengths=[100] * 3).folder
    shutil.rmtree(tmp_path / "runs" / "1")
    other.rename(tmp_path / "runs" / "1")
    again = data_of_new(tmp_path / "runs")
    assert again is not None and again["stale"]


def data_of_new(folder: Path) -> dict | None:
    """The comparison on a page of runs that nothing else was measured of."""
    runs = [open_one(folder / number) for number in "01"]
    return comparison(folder, runs, lambda analysis, name: ABOUT.get(f"{analysis}.{name}", ""))


@pytest.mark.long
def test_results_of_other_rows_are_marked(tmp_path: Path):
    folder = analysed(tmp_path / "run", "position_geometry")
    other = planted_run(tmp_path / "other", lengths=[200]).folder
    assert collect(open_one(folder), {}, 0)["findings"][0]["source"] is None
    out = folder / "experiments" / "position_geometry"
    assert entry.main("position_geometry", [f"run={other}", f"out={out}"]) == 0
    assert collect(open_one(folder), {}, 0)["findings"][0]["source"] == "other"


def test_text_in_the_data_cannot_end_the_script():
    page = assemble({"title": "</script><script>alert(1)</script>", "jobs": []})
    assert data_of(page)["title"] == "</script><script>alert(1)</script>"
    assert page.count("<script>") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no run is given"),
        (["run={new}"], "has no results to report"),
        (["run={run}", "out={run}/captures"], "among the run's own files"),
        (["run={run}", "table_limit=-1"], "must be 0 bytes or more"),
        (["run={broken}"], "could not read"),
    ],
)
def test_a_refusal_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
):
    new = planted_run(tmp_path / "new").folder
    broken = analysed(tmp_path / "broken", "position_geometry")
    (broken / "experiments" / "position_geometry" / "heads.parquet").write_bytes(b"no table")
    capsys.readouterr()
    asked = [word.format(run=run, new=new, broken=broken) for word in words]
    assert entry.main("report", asked, act=write) == 1
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said


def test_of_a_run_at_a_url_results_are_where_they_are_said_to_be(run: Path, tmp_path: Path):
    left, url = tmp_path / "left", "memory://report/run"
    shutil.copytree(run / "experiments" / "position_geometry", left / "position_geometry")
    copy_to(run, url)
    said = f"has no results to report: .* run={url} out=FOLDER/position_geometry`, and give results=FOLDER$"
    fsspec.filesystem("memory").rm(f"{url}/experiments", recursive=True)
    with pytest.raises(RunError, match=said):
        Report().page(url)
    write("report", [f"run={url}", f"results={left}"])
    there, here = (data_of(page) for page in ((left / "report" / PAGE).read_text(), Report().page(str(run))))
    (one,) = there["jobs"][0]["findings"]
    assert one in here["jobs"][0]["findings"] and there["jobs"][0]["facts"] == here["jobs"][0]["facts"]
