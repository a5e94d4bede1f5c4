"""What every analysis rests on: rows as they were captured, moments as numpy has them, one-line errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sniffer.experiments.common import entry
from sniffer.experiments.common.moments import moments, pool
from sniffer.experiments.common.rows import align, chosen_layers, load

from sniffer.config.resolve import conf_folder
from sniffer.errors import ConfigError, RunError
from sniffer.sampler import LogUniform
from sniffer.storage.integrity import foreign
from sniffer.storage.manifest import Manifest
from sniffer.storage.remote import RemotePath
from tests.experiments.planted import HEADS, noise, planted_run

OF_Q_AND_K = ("attention_plasticity", "key_rank", "position_geometry", "quantisation", "query_key_gap")
NAMES = sorted(file.stem for file in (conf_folder() / "analysis").glob("*.yaml"))


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 50, 4)) + 5


def test_rows_are_those_the_reader_gives_head_by_head(tmp_path: Path):
    run = planted_run(tmp_path / "run")
    rows = load(run, 1, "q")
    for place, head in enumerate(rows.heads):
        alone = run.vectors(layer=1, head=head, kind="q")
        assert np.array_equal(rows.vectors[place], alone.vectors)
        assert np.array_equal(rows.positions, alone.positions)
        assert np.array_equal(rows.example_ids, alone.example_ids)
        assert np.array_equal(rows.weights, 1 / alone.inclusion_probability)


def test_each_query_head_meets_the_key_head_it_attends_with(tmp_path: Path):
    run = planted_run(tmp_path / "run")
    queries, keys = align(run, load(run, 0, "q"), load(run, 0, "k"))
    for place, head in enumerate(queries.heads):
        pairs = run.pairs(layer=0, q_head=head)
        assert keys.heads[place] == pairs.k_head
        assert np.array_equal(keys.vectors[place], pairs.k)


def test_weights_by_position_undo_the_sampling(tmp_path: Path):
    """Under log-uniform sampling late positions are rare; weighted, they count like the rest."""
    sampler = LogUniform(base_rate=64.0, min_bucket_size=64, seed_by=["example"])
    run = planted_run(tmp_path / "run", lengths=[1000] * 30, layers=[0], sampler=sampler)
    by_position, by_row = load(run, 0, "q", "positions"), load(run, 0, "q", "rows")
    assert abs(np.average(by_position.positions, weights=by_position.weights) - 499.5) < 15
    assert np.average(by_row.positions, weights=by_row.weights) < 400


def test_moments_are_numpys(x: np.ndarray):
    weights, t = np.random.default_rng(1).uniform(0.5, 2, size=50), np.arange(50) ** 2
    found = moments(x, t, weights)
    assert found.weight == pytest.approx(weights.sum())
    for head in range(3):
        both = np.cov(np.column_stack([x[head], t]).T, aweights=weights, ddof=0)
        assert np.allclose(found.covariance[head], both[:4, :4])
        assert np.allclose(found.covariance_t[head], both[:4, 4])
        assert np.isclose(found.variance_t, both[4, 4])
        assert np.allclose(found.mean[head], np.average(x[head], axis=0, weights=weights))
        assert np.allclose(found.correlation_t()[head], both[:4, 4] / np.sqrt(np.diag(both)[:4] * both[4, 4]))


def test_a_whole_weight_is_that_many_rows(x: np.ndarray):
    t, repeats = np.arange(50), np.random.default_rng(2).integers(1, 4, size=50)
    weighted = moments(x, t, repeats.astype(float))
    repeated = moments(np.repeat(x, repeats, axis=1), np.repeat(t, repeats), np.ones(repeats.sum()))
    assert np.allclose(weighted.covariance, repeated.covariance)
    assert np.allclose(weighted.slope_t(), repeated.slope_t())


def test_pooled_moments_are_those_of_the_union(x: np.ndarray):
    t, w = np.arange(50) * 3.0, np.linspace(0.5, 1.5, 50)
    pooled = pool(moments(x[:, :20], t[:20], w[:20]), moments(x[:, 20:], t[20:], w[20:]))
    whole = moments(x, t, w)
    assert np.allclose(pooled.mean, whole.mean)
    assert np.allclose(pooled.covariance, whole.covariance)
    assert np.allclose(pooled.covariance_t, whole.covariance_t)
    assert np.isclose(pooled.variance_t, whole.variance_t)


def test_a_coordinate_that_does_not_vary_has_no_correlation():
    found = moments(np.ones((1, 20, 2)), np.arange(20), np.ones(20))
    assert not found.correlation_t().any()


def test_too_few_rows_and_broken_numbers_are_one_line(tmp_path: Path):
    few = planted_run(tmp_path / "few", lengths=[12])
    with pytest.raises(RunError, match="rows per head, too few"):
        load(few, 0, "q")

    def broken(*args):
        vectors = noise(*args)
        vectors[3, 0, 0] = np.nan
        return vectors

    with pytest.raises(RunError, match="infinite or undefined"):
        load(planted_run(tmp_path / "nan", broken), 0, "q")


@pytest.mark.parametrize("name", OF_Q_AND_K)
def test_analyses_name_what_is_not_finite_before_they_begin(tmp_path: Path, name: str, capsys):
    """And so in one line, with what to do, however far into the run it is."""

    def broken(layer: int, kind: str, *args):
        vectors = noise(layer, kind, *args)
        if layer == 1 and kind == "k":
            vectors[3, 0, 0], vectors[4:6, 1, 2] = np.nan, np.inf
        return vectors

    run = planted_run(tmp_path / "run", broken, layers=(0, 1, 2))
    assert entry.main(name, [f"run={run.folder}"]) == 1
    told = capsys.readouterr().err.strip()
    assert "layer 1 k (1 with NaN, 2 with infinity): leave them out with 'layers=[0,2]'" in told and "\n" not in told
    assert not (run.folder / "experiments").exists()
    assert chosen_layers(run, [0, 2], "k") == [0, 2] and chosen_layers(run, None, "q") == [0, 1, 2]


def test_a_part_that_cannot_be_read_is_one_line(tmp_path: Path):
    run = planted_run(tmp_path / "run")
    (part,) = (run.folder / "captures").glob("layer=*1/kind=k/*.parquet")
    part.write_bytes(b"no table")
    with pytest.raises(RunError, match=r"layer 1, kind k of .* cannot be read \(.*\): .*sniffer.runs verify") as caught:
        load(run, 1, "k")
    assert "\n" not in str(caught.value)
    assert len(load(run, 0, "k"))


def test_a_missing_kind_says_how_to_capture_it(tmp_path: Path):
    run = planted_run(tmp_path / "run")
    with pytest.raises(RunError, match=r"capture.kinds=\[q,k,q_pre\]"):
        chosen_layers(run, None, "q", "q_pre")
    with pytest.raises(RunError, match="layer 7 was not captured"):
        chosen_layers(run, [7], "q")
    assert chosen_layers(run, "0-1", "q") == [0, 1]


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_builds_its_analysis(name: str):
    made = entry.make(name, {})
    assert type(made).__module__ == f"sniffer.experiments.{name}"
    assert (Path(entry.__file__).parents[1] / name / "README.md").is_file()
    assert "Settings" in entry.usage(name)
    with pytest.raises(ConfigError, match="is not a key"):
        entry.make(name, {"laiers": 3})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no run is given"),
        (["run"], "is not key=value"),
        (["run=a", "run=b"], "given twice"),
        (["run=/nowhere/at/all"], "is not a run folder"),
        (["run={run}", "points=many"], "position_geometry.points"),
        (["run={run}", "points=0"], "must be 1 or more"),
        (["run={run}", "weights=none"], "must be one of positions, rows"),
        (["run={run}", "layers=5"], "layer 5 was not captured"),
        (["run={run}", "out={run}/captures/x"], "among the run's own files"),
        (["run={run}", "out={run}"], "among the run's own files"),
    ],
)
def test_a_refusal_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str):
    folder = planted_run(tmp_path / "run").folder
    assert entry.main("position_geometry", [word.replace("{run}", str(folder)) for word in words]) == 1
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device", "/results/x.png"), "/results/x.png: No space left on device"),
        (MemoryError(), "not enough memory for key_rank"),
    ],
)
def test_what_the_system_refuses_is_one_line(error: Exception, told: str, capsys: pytest.CaptureFixture[str]):
    def act(*_: object) -> None:
        raise error

    assert entry.main("key_rank", ["run=x"], act) == 1
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said


@pytest.mark.parametrize("name", ["matplotlib", "scipy", "some_other_module_of_ours"])
def test_a_package_that_is_missing_is_named(name: str, tmp_path: Path):
    """Python runs sitecustomize before anything else; there the package is made one that cannot be found."""
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{name!r}] = None\n")
    done = subprocess.run(
        [sys.executable, "-m", "sniffer.experiments", "attention_plasticity", "run=x"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    told = f"analyses need {name}, which is not installed: pip install 'qk-sniffer[experiments]'"
    missing = name in ("matplotlib", "scipy")
    assert done.returncode == 1 and (done.stderr.strip() == told) is missing and "Traceback" not in done.stderr


def test_results_lie_beside_the_run_and_change_nothing_in_it(tmp_path: Path):
    folder = planted_run(tmp_path / "run").folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert entry.main("position_geometry", [f"run={folder}"]) == 0
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    new = {path.relative_to(folder).parts[:2] for path in after.keys() - before.keys()}
    assert new == {("experiments", "position_geometry")}
    assert foreign(folder, Manifest.load(folder)) == []
    out = folder / "experiments" / "position_geometry"
    for figure in out.glob("*.png"):
        assert figure.with_suffix(".svg").is_file()
    assert len(list(out.glob("*.png"))) > 0 and (out / "findings.txt").read_text().count(".") > 2
    assert json.loads((out / "provenance.json").read_text())["run_digest"].strip()


@pytest.mark.long
def test_a_sweep_is_analysed_job_by_job(tmp_path: Path):
    for job in "01":
        planted_run(tmp_path / "sweep" / job)
    assert entry.main("position_geometry", [f"run={tmp_path / 'sweep'}"]) == 0
    assert len(list(tmp_path.glob("sweep/*/experiments/position_geometry/heads.parquet"))) == 2
    assert entry.main("position_geometry", [f"run={tmp_path / 'sweep'}", f"out={tmp_path / 'mixed'}"]) == 1


@pytest.mark.long
def test_the_same_run_gives_the_same_tables_and_figures(tmp_path: Path):
    folder = planted_run(tmp_path / "run").folder
    for out in ("a", "b"):
        assert entry.main("position_geometry", [f"run={folder}", f"out={tmp_path / out}"]) == 0
    for path in (tmp_path / "a").iterdir():
        if path.name != "provenance.json":
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(("called", "threads"), [("-m", "1"), ("-c", "None")])
def test_only_a_command_chooses_the_threads_of_linear_algebra(called: str, threads: str):
    code = f"import os, sys; sys.argv[0] = {called!r}; import sniffer.experiments"
    code += "; print(os.environ.get('OPENBLAS_NUM_THREADS'))"
    plain = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    told = subprocess.run([sys.executable, "-c", code], env=plain, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == threads


def test_results_of_a_run_at_a_url_are_written_to_this_machine(tmp_path: Path):
    run = RemotePath("memory://bucket/run")
    with pytest.raises(
        ConfigError, match="memory://bucket/run is a URL, .*: give a folder of this machine with out=FOL"
    ):
        entry.destination(None, run, "key_rank")
    assert entry.destination(str(tmp_path / "out"), run, "key_rank") == tmp_path / "out"


def test_analyses_need_no_torch():
    check = "import sys, sniffer.experiments.position_geometry; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert HEADS["q"] % HEADS["k"] == 0
