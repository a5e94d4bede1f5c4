"""Every published figure is drawn, and shows the numbers that a reader would compute from the tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sniffer.experiments.attention_plasticity import AttentionPlasticity
from sniffer.experiments.common import entry
from sniffer.experiments.compare.members import members
from sniffer.experiments.published import Published, publish
from sniffer.experiments.published.catalogue import CATALOGUE, Asked, files, named
from sniffer.experiments.published.gallery import write
from sniffer.experiments.published.of_models import DEPTHS
from sniffer.experiments.published.studied import Studied

from sniffer.errors import ConfigError
from sniffer.sampler import Uniform
from sniffer.types import Rope
from tests.experiments.planted import SPEEDS, noise, planted_run

SAMPLER = Uniform(base_rate=16.0, bucket_size=32, seed_by=["example", "layer"])
LAYERS = (0, 1, 2)


def drifting(rate: float) -> Callable[..., np.ndarray]:
    def formula(layer: int, kind: str, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        vectors = noise(layer, kind, positions, rng)
        vectors[:, :, 0] += 2 + rate * (1 + layer) * positions[:, None]
        return vectors

    return formula


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two jobs that drift at rates of their own, and one of too few rows."""
    folder = tmp_path_factory.mktemp("published") / "sweep"
    for job, (rate, lengths) in enumerate(((0.01, (260, 200)), (0.03, (260, 200)), (0.01, (12,)))):
        at = folder / str(job)
        planted_run(at, drifting(rate), layers=LAYERS, lengths=lengths, sampler=SAMPLER, turns=Rope(tuple(SPEEDS)))
        (at / ".hydra").mkdir()
        (at / ".hydra" / "overrides.yaml").write_text(f"- sampler.rate={rate}\n- dataset.max_tokens={lengths[0]}\n")
    (folder / "scores.csv").write_text("run,made_up\n0,50\n1,40\n")
    return folder


@pytest.fixture(scope="module")
def runs(sweep: Path) -> list[Studied]:
    return [Studied(one, None, "positions", None) for one in members([str(sweep / "0"), str(sweep / "1")])]


def draw(name: str, runs: list[Studied]) -> Figure:
    ((_, drawing),) = named(name).items()
    return drawing.draw(runs, Asked(None, 3))


def heights(axes: Axes) -> list[float]:
    return [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]


def test_all_of_a_sweep_are_drawn_and_what_cannot_be_measured_is_named(sweep: Path):
    found = Published(scores=str(sweep / "scores.csv")).measure(members([str(sweep)]))
    said = " ".join(found.findings)
    assert "32 of the 32 published figures" in said and "Left out is" in said and "too few" in said
    told = found.tables["figures"]
    assert told["published"].to_list() == list(CATALOGUE) and told["not_drawn"].is_null().all()
    assert set(found.figures) == set(told["file"]) == set(files()) and len(files()) == 27


def test_of_one_run_those_are_drawn_that_it_suffices_for(runs: list[Studied]):
    found = Published().measure([runs[0].member])
    told = found.tables["figures"]
    assert len(found.figures) == told["file"].n_unique() - 1 == 17
    refused = told.filter(pl.col("file").is_null())
    assert len(refused) == 10 and refused["not_drawn"].str.contains("there is 1: give runs=").all()
    assert "22 of the 32" in found.findings[0] and len(found.findings) == 2


def test_a_figure_lies_beside_its_run(sweep: Path):
    assert entry.main("published", [f"run={sweep / '0'}", "figure=05_explained"], act=publish) == 0
    out = sweep / "0" / "experiments" / "published"
    assert {path.name for path in out.glob("qk*")} == {f"qk-pca_05_explained_variance.{end}" for end in ("png", "svg")}


def test_the_gallery_shows_every_name_once(tmp_path: Path):
    """Collages are of the run, what has a part for each run is of the sweep."""
    picture = Figure(figsize=(8, 2))
    for file in files():
        for place in ("run", "sweep"):
            at = tmp_path / place / "experiments" / "published" / f"{file}.png"
            at.parent.mkdir(parents=True, exist_ok=True)
            picture.set_facecolor("blue" if place == "run" else "orange")
            picture.savefig(at)
    write(tmp_path / "run", tmp_path / "sweep", tmp_path / "docs")
    page = (tmp_path / "docs" / "gallery.md").read_text()
    assert all(page.count(f"`{name}`") == 1 for name in CATALOGUE)
    for file in files():
        image = Image.open(tmp_path / "docs" / "gallery" / f"{file}.png").convert("RGB")
        assert image.width == 720 and f"gallery/{file}.png" in page
        blue = image.getpixel((5, 5)) == (0, 0, 255)
        assert blue if "collage" in file else not (blue and "smollm" in file)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["run={0}", "figure=qk-rotation/10"],
            "qk-rotation/10_smollm_bias_decomposition: it sets runs beside one another",
        ),
        (["run={0}", "figure=nothing"], "no published figure is called nothing: choose all or some of"),
        (["run={sweep}"], "has several runs: write runs="),
        (["runs={0}"], "a comparison needs two runs or more"),
        (["run={0}", "runs={sweep}"], "give run=outputs/RUN, or runs="),
        (["runs={sweep}", "figure=ap_drop"], "10_ap_drop_vs_lbp: it takes scores=FILE.csv"),
        (["run={2}"], "too few"),
    ],
)
def test_a_refusal_is_one_line(sweep: Path, words: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    asked = [word.format(*(sweep / job for job in "012"), sweep=sweep) for word in words]
    assert entry.main("published", asked, act=publish) == 1
    said = capsys.readouterr().err.strip()
    assert told in said and "\n" not in said


def test_documents_too_short_for_plasticity_leave_the_rest(tmp_path: Path):
    for job, lengths in enumerate(((260, 200), (30, 30, 30))):
        planted_run(tmp_path / "runs" / str(job), drifting(0.01), layers=[0], lengths=lengths, sampler=SAMPLER)
    both = members([str(tmp_path / "runs")])
    found = Published(figure="attention-plasticity").measure(both)
    assert sum("Figures of plasticity leave out 1:" in one for one in found.findings) == 1
    assert "8 of the 32" in " ".join(found.findings)
    with pytest.raises(ConfigError, match="no bucket of 8 queries"):
        Published(figure="profile").measure(both[1:])


def test_a_training_is_drawn_in_the_order_of_its_steps(runs: list[Studied]):
    """However its checkpoints were given, with a line where a phase ends."""
    revisions = ("stage1-step-2000", "stage1-step-40", "lc-step-4000")
    given = [replace(runs[0].member, label=one, revision=one) for one in revisions]
    (figure,) = Published(figure="position_signal").measure(given).figures.values()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == [revisions[1], revisions[0], revisions[2]]
    assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [1.5]
    (figure,) = Published(figure="02_rq_rk_drift_bars").measure(given).figures.values()
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list(revisions)


def test_parts_of_names_mean_figures():
    assert len(named("all")) == len(CATALOGUE) == 32 and len(named("bucket_heatmap")) == 4
    assert list(named("qk-pca/01")) == list(named("pc_roles")) == ["qk-pca/01_pc_roles"]


def test_bars_are_what_the_tables_say(runs: list[Studied]):
    heads = [run.geometry["heads"] for run in runs]
    (axes,) = draw("rq_rk_drift_bars", runs).axes
    true = [np.abs(one[name].to_numpy()).mean() for name in ("r_q", "r_k") for one in heads]
    assert heights(axes) == pytest.approx(true)
    (axes,) = draw("slope_ratio", runs).axes
    assert heights(axes) == pytest.approx([np.median(np.abs(one["alpha_k"] / one["alpha_q"])) for one in heads])
    (axes,) = draw("01_pc_roles", runs).axes
    parts = pl.concat([run.geometry["components"] for run in runs])
    means = {
        name: parts.group_by("component", maintain_order=True).agg(pl.col(name).mean())[name] for name in ("r_q", "r_k")
    }
    assert heights(axes) == pytest.approx([*means["r_q"], *means["r_k"]])
    (axes,) = draw("variance_decomposition", runs).axes
    whole = np.array(heights(axes)).reshape(3, 2)
    assert np.allclose(whole.sum(0), 1) and np.allclose(whole[0], [one["variance_a"].mean() for one in heads])
    (axes,) = draw("bias_strength", runs).axes
    every = np.concatenate([one["bias_strength"].to_numpy() for one in heads])
    assert sum(heights(axes)) == len(every) and f"{(every > 0).mean():.1%} of {len(every)}" in axes.get_title()
    (axes,) = draw("taxonomy_evolution", runs).axes
    assert np.allclose(np.array(heights(axes)).reshape(-1, 2).sum(0), 1)
    factors = draw("bias_decomposition", runs).axes
    assert heights(factors[1]) == pytest.approx([1000 * one["alpha_k"].mean() for one in heads])
    # The second run was planted to drift three times as fast.
    assert 2 < heights(factors[1])[1] / heights(factors[1])[0] < 4


def test_maps_by_depth_are_means_over_the_heads_there(runs: list[Studied]):
    figure = draw("03_layer_heatmap_rq", runs)
    matrix = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    for row, run in enumerate(runs):
        found = defaultdict(list)
        for layer, value in run.geometry["heads"].select("layer", "pc1_r_q").iter_rows():
            found[min(DEPTHS - 1, DEPTHS * layer // 2)].append(value)
        for place in range(DEPTHS):
            assert (
                np.isnan(matrix[row, place])
                if place not in found
                else matrix[row, place] == pytest.approx(np.mean(found[place]))
            )


def test_the_map_of_distances_holds_every_pair(runs: list[Studied]):
    """Its mean over pairs is that of the table of distances, which sorts them otherwise."""
    run = runs[0]
    matrix, longest = run.cells
    assert longest == 260
    table = AttentionPlasticity().measure(run.run).tables["distances"]
    assert np.nanmin(matrix) >= 0 and np.nanmax(matrix) <= 1
    # The middle of a pair is before the query by half their distance at least.
    away, apart = np.where(np.isfinite(matrix))
    assert (away + 1 > apart / 2 - 1).all()
    whole, counts = 0.0, 0
    for layer in LAYERS:
        found = AttentionPlasticity().prefixes(run.run, layer)
        whole += sum(values.sum() for values in found.values)
        counts += sum(values.size for values in found.values)
    pairs = table["key_pairs"] * 1.0
    assert whole / counts == pytest.approx((table["plasticity"] * pairs).sum() / pairs.sum())


def test_weights_scores_and_collages(runs: list[Studied], sweep: Path):
    axes = draw("component_weights", runs).axes
    for one, run in zip(axes, runs, strict=True):
        some = run.geometry["dimensions"].filter(kind="q")
        assert sum(heights(one)) == pytest.approx(1) and heights(one)[0] > 0.5
        assert max(heights(one)) == pytest.approx(some.filter(dimension=0)["weight"].mean())
    ((_, scores),) = named("ap_drop").items()
    (axes_of_scores,) = scores.draw(runs, Asked(str(sweep / "scores.csv"), 0)).axes
    drawn = axes_of_scores.collections[0].get_offsets()
    assert np.allclose(
        drawn, [[run.plasticity["heads"]["drop"].mean(), score] for run, score in zip(runs, (50, 40), strict=True)]
    )
    collage = draw("06_collage", runs).axes
    assert len(collage) == 4 and collage[0].get_title().startswith("layer")
    for one in collage:
        layer, head = (int(word.strip(",")) for word in one.get_title().split()[1::2])
        counts = {len(points.get_offsets()) for points in one.collections}
        assert counts == {len(runs[0].run.vectors(layer=layer, head=head, kind="q"))}
    assert len(draw("08_complement_collage", runs).axes) == (8 - 2) // 2


def test_what_analyses_left_is_used_where_it_is_of_these_rows_and_settings(sweep: Path, tmp_path: Path):
    folder = planted_run(tmp_path / "run", drifting(0.01), layers=[0], lengths=(260, 200), sampler=SAMPLER).folder
    (other,) = [one for one in members([str(folder), str(sweep / "0")]) if one.run.folder == folder]
    assert entry.main("position_geometry", [f"run={folder}", "resamples=0"]) == 0
    path = folder / "experiments" / "position_geometry" / "heads.parquet"
    marked = pl.read_parquet(path).with_columns(pc1_r_q=pl.lit(0.123))
    marked.write_parquet(path)
    assert (Studied(other, None, "positions", None).geometry["heads"]["pc1_r_q"] == 0.123).all()
    assert not (Studied(other, None, "rows", None).geometry["heads"]["pc1_r_q"] == 0.123).any()
