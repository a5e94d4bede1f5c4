"""Files of heads become a run that is read, verified and analysed as any other, or are refused in one line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sniffer.experiments.common.entry import make

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.reader.sweep import Sweep, open_run
from sniffer.runs.__main__ import main
from sniffer.runs.compare import compare
from sniffer.runs.compare import told as compared
from sniffer.runs.export import export
from sniffer.runs.imports.making import Said, import_heads
from sniffer.runs.verify import verify
from sniffer.sampler import LogUniform, Uniform
from sniffer.storage.manifest import Manifest
from sniffer.types import Sections
from tests.experiments.planted import planted_run
from tests.helpers_storage import SAMPLER, make_run

LAW = Uniform(base_rate=32.0, bucket_size=64)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random bits, its heads in files, and the run that these become."""
    place = tmp_path_factory.mktemp("import")
    original = make_run(place / "run", kinds=("q", "k", "v", "k_pre"), parts=2).folder
    manifest = Manifest.load(original)
    windows = [replace(one, sliding_window=16 if one.layer == 2 else None) for one in manifest.geometry]
    replace(manifest, geometry=tuple(windows)).save(original)
    export(original, place / "heads")
    import_heads(place / "heads", place / "back", Said(sampler=SAMPLER))
    return place


def opened(folder: Path) -> Run:
    run = open_run(folder)
    assert isinstance(run, Run)
    return run


def test_a_run_comes_back_to_the_bit(made: Path, tmp_path: Path):
    first, second = opened(made / "run"), opened(made / "back")
    assert verify(made / "back") == (second.manifest, []) and second.complete
    assert second.all_captured == first.all_captured
    for layer, kind in first.all_captured:
        assert second.heads(layer, kind) == first.heads(layer, kind)
        for head in first.heads(layer, kind):
            one, other = (run.vectors(layer=layer, head=head, kind=kind) for run in (first, second))
            assert one.vectors.tobytes() == other.vectors.tobytes()
            for name in ("positions", "buckets", "example_ids", "inclusion_probability"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), name
            assert set(other.token_ids) == {-1}
        assert second.manifest.layer(layer).sliding_window == first.manifest.layer(layer).sliding_window
        assert second.manifest.layer(layer).key_head(3) == first.manifest.layer(layer).key_head(3)
    export(made / "back", tmp_path / "again")
    files = sorted(one.relative_to(made / "heads") for one in (made / "heads").rglob("*.parquet"))
    assert len(files) == 2 * (4 + 2 + 2 + 2)
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (made / "heads" / file).read_bytes()
    # Documents are known up to the last position of them that was captured.
    last = first.scan().group_by("example_id").agg(n_tokens=(pl.col("position").max() + 1).cast(pl.Int32)).collect()
    assert second.examples().select("example_id", "n_tokens").sort("example_id").equals(last.sort("example_id"))


def test_sections_come_back(tmp_path: Path):
    named = planted_run(
        tmp_path / "run",
        layers=(0,),
        sections=lambda n: Sections.joined([Sections.one("a", 30), Sections.one("b", n - 30)]),
    )
    export(named.folder, tmp_path / "heads")
    import_heads(tmp_path / "heads", tmp_path / "back", Said(sampler=LAW))
    back = opened(tmp_path / "back")
    assert back.sections == ("a", "b") and verify(back.folder)[1] == []
    one, other = (run.only(["a"]).vectors(layer=0, head=1, kind="k") for run in (named, back))
    assert len(one) and one.vectors.tobytes() == other.vectors.tobytes()


def heads_apart(folder: Path, rate: float = 0.25) -> dict[str, pl.DataFrame]:
    """Files as github.com/viktor-shcherb/qk-sniffer writes them: each head draws anew; rows in no order."""
    found = {}
    for layer in (0, 3):
        for head, kind in [*((head, "q") for head in range(4)), *((head, "k") for head in range(2))]:
            rng = np.random.default_rng([layer, head, ord(kind)])
            places = np.argwhere(rng.random((3, 512)) < rate)
            rng.shuffle(places)
            n = len(places)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=6 * n).astype(np.float32)), 6)
            columns = {
                "bucket": pa.array(places[:, 1] // 64, type=pa.int32()),
                "example_id": pa.array(places[:, 0] * 5, type=pa.int32()),
                "position": pa.array(places[:, 1], type=pa.int32()),
                "vector": vectors,
                "sliding_window": pa.nulls(n),
                "token_str": pa.array(["x"] * n),
            }
            name = f"l{layer:02d}h{head:02d}{kind}"
            (folder / name).mkdir(parents=True)
            pq.write_table(pa.table(columns), folder / name / "data.parquet")
            found[name] = pl.from_arrow(pa.table(columns).drop_columns("sliding_window"))
    (folder / "README.md").write_text("a card")
    return found


def test_heads_that_were_drawn_apart_become_a_run_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = heads_apart(tmp_path / "heads")
    words = ["--sampler", "uniform", "base_rate=16", "bucket_size=64", "--model", "some/model"]
    assert main(["import", str(tmp_path / "heads"), *words]) == 0
    assert "a run for each query head" in capsys.readouterr().out
    sweep = open_run(tmp_path / "heads_run")
    assert isinstance(sweep, Sweep) and list(sweep.runs) == [f"head-{head:02d}" for head in range(4)]
    for name, run in sweep.runs.items():
        head = int(name[-2:])
        assert verify(run.folder)[1] == [] and run.manifest.model["checkpoint"] == "some/model"
        for layer in (0, 3):
            for kind, mine in (("q", head), ("k", head // 2)):
                wanted = files[f"l{layer:02d}h{mine:02d}{kind}"].sort("bucket", "example_id", "position")
                found = run.vectors(layer=layer, head=mine, kind=kind)
                assert run.heads(layer, kind) == (mine,)
                assert np.array_equal(found.vectors, wanted["vector"].to_numpy())
                assert found.positions.tolist() == wanted["position"].to_list()
                assert found.example_ids.tolist() == wanted["example_id"].to_list()
                assert set(found.inclusion_probability) == {0.25}
    # Key heads 0 and 1 serve two query heads each, and lie on the disk once.
    parts = [(sweep.folder / f"head-0{head}/captures/layer=03/kind=k/part-00000.parquet").stat() for head in range(4)]
    assert len({part.st_ino for part in parts}) == 2
    result = make("key_rank", {}).measure(sweep.runs["head-03"])
    assert result.tables["heads"]["head"].unique().to_list() == [1]
    # A key head of which no query head is there has a run of its own.
    shutil.rmtree(tmp_path / "heads/l00h02q")
    shutil.rmtree(tmp_path / "heads/l00h03q")
    with pytest.raises(RunError, match="--heads QUERY/KEY"):
        import_heads(tmp_path / "heads", tmp_path / "fewer", Said())
    import_heads(tmp_path / "heads", tmp_path / "fewer", Said(heads=(4, 2)))
    alone = opened(tmp_path / "fewer/key-head-01")
    assert alone.all_captured == {(0, "k")} and alone.heads(0, "k") == (1,)


@pytest.mark.long
def test_analyses_read_an_imported_run_as_its_original(tmp_path: Path):
    original = planted_run(tmp_path / "run", lengths=(300, 256))
    export(original.folder, tmp_path / "heads")
    import_heads(tmp_path / "heads", tmp_path / "told", Said(sampler=LAW))
    import_heads(tmp_path / "heads", tmp_path / "untold", Said())
    told, untold = opened(tmp_path / "told"), opened(tmp_path / "untold")
    pairs = [run.pairs(layer=1, q_head=3) for run in (original, told)]
    assert set(pairs[0].inclusion_probability) == set(pairs[1].inclusion_probability) == {0.5}
    for name in ("position_geometry", "attention_plasticity", "key_rank", "quantisation", "query_key_gap"):
        analysis = make(name, {"recall": False} if name == "query_key_gap" else {})
        assert heads(analysis, told).equals(heads(analysis, original)), name
        with pytest.raises(RunError, match="without its sampler.*weights=rows"):
            analysis.measure(untold)
        rows = replace(analysis, weights="rows")  # type: ignore[type-var]
        assert heads(rows, untold).equals(heads(rows, original)), name
    assert np.isnan(untold.vectors(layer=0, head=0, kind="q").inclusion_probability).all()
    # Of rows whose token nobody knows, too.
    table, (said,) = compared(original.folder, told.folder)
    assert table.row_count == 4 and "were" not in said and "is not known" in said and "by their ids alone" in said
    apart = compare(original, told)
    assert apart["rows"].sum() == original.manifest.rows
    assert (apart.select("only_first", "only_second", "other_token", "largest").to_numpy() == 0).all()
    with pytest.raises(RunError, match="imported from files that do not tell of RoPE"):
        told.rope(0)
    with pytest.raises(RunError, match="imported from files that do not tell what logits"):
        told.scores(layer=0, q_head=0, example_id=100)


def heads(analysis, run: Run) -> pl.DataFrame:
    """What is found of each head, apart from what is in logits, for which the scaling would have to be known."""
    found = analysis.measure(run).tables["heads"]
    if "bias_logits_per_1000" in found.columns:
        assert found["bias_logits_per_1000"].is_nan().all() == run.manifest.imported
    return found.drop("bias_logits_per_1000", strict=False)


@pytest.mark.parametrize(
    ("sampler", "told"),
    [
        (replace(LAW, base_rate=20.0), "have .* positions of bucket ., and Uniform as told keeps"),
        (replace(LAW, bucket_size=32), "have position .* in bucket .*, and Uniform as told puts it in"),
        (LogUniform(), "LogUniform as told puts it in 7"),
    ],
)
def test_a_sampler_that_cannot_have_drawn_the_rows_is_refused(tmp_path: Path, sampler, told: str):
    run = planted_run(tmp_path / "run", lengths=(400,) * 8, layers=(0,))
    export(run.folder, tmp_path / "heads")
    with pytest.raises(RunError, match=told):
        import_heads(tmp_path / "heads", tmp_path / "back", Said(sampler=sampler))
    assert not (tmp_path / "back").exists()


def rewrite(change: Callable[[pl.DataFrame], pl.DataFrame], name: str = "l02h01q") -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        path = folder / name / "data.parquet"
        change(pl.read_parquet(path)).write_parquet(path)

    return act


def first_vector(frame: pl.DataFrame, values: list[float | None]) -> pl.DataFrame:
    vectors = [values, *frame["vector"].to_list()[1:]]
    return frame.with_columns(vector=pl.Series(vectors, dtype=pl.List(pl.Float32)))


def shortened(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col("vector").list.head(4))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (lambda f: shutil.rmtree(f), "is not a folder"),
    "another layout": (lambda f: [shutil.rmtree(one) for one in f.iterdir()], "holds no folder such as l00h00q"),
    "further down": (lambda f: shutil.copytree(f, f.parent / "data/model") and [
        shutil.rmtree(one) for one in f.iterdir()
    ] and (f.parent / "data").rename(f / "data"), "data/model does: give that"),
    "no data": (lambda f: (f / "l02h01q/data.parquet").unlink(), "l02h01q has no data.parquet but nothing"),
    "an unknown kind": (lambda f: (f / "l00h00z").mkdir(), "l00h00z is no layer, head and kind"),
    "one head twice": (lambda f: shutil.copytree(f / "l02h01q", f / "l2h1q"), "of the same layer, head and kind"),
    "a head less": (lambda f: shutil.rmtree(f / "l02h01q"), "some query heads of the model"),
    "no Parquet": (lambda f: (f / "l02h01q/data.parquet").write_text("x"), "cannot be read"),
    "no column": (rewrite(lambda t: t.drop("bucket", "vector")), "has no column bucket, vector"),
    "other numbers": (rewrite(lambda t: t.with_columns(pl.col("position").cast(pl.Float32))), "not of integers"),
    "a null": (rewrite(lambda t: t.with_columns(position=pl.lit(None, pl.Int32))), "null in column position"),
    "before zero": (rewrite(lambda t: t.with_columns(pl.col("position") - 9)), "position that is not from 0"),
    "rows twice": (rewrite(lambda t: pl.concat([t, t[:2]])), "has 2 rows twice, first position"),
    "another bucket": (rewrite(lambda t: t.with_columns(pl.col("bucket") + 1)), "in another bucket than elsewhere"),
    "another window": (rewrite(lambda t: t.with_columns(sliding_window=pl.lit(8))), "other files of its layer have 16"),
    "two windows": (
        rewrite(lambda t: t.with_columns(sliding_window=pl.int_range(16, 16 + pl.len()))), "a layer has one, or null"
    ),
    "unequal vectors": (rewrite(lambda t: first_vector(t, [1.0])), "vectors of 1 and 8 numbers"),
    "a null in a vector": (rewrite(lambda t: first_vector(t, [None] * 8)), "vectors with a null"),
    "wide vectors": (rewrite(lambda t: t.with_columns(pl.col("vector").cast(pl.List(pl.Float64)))), "float32 or"),
    "a head of another dim": (rewrite(shortened), "vectors of 4 numbers, others of kind q in its layer 8"),
    "keys of another dim": (
        lambda f: [rewrite(shortened, f"l00h0{head}k")(f) for head in range(2)],
        "l00h00k/data.parquet has vectors of 4 numbers, others of kind q in its layer 8",
    ),
    "no rows": (lambda f: [rewrite(lambda t: t[:0], f"l00h0{head}v")(f) for head in range(2)], "has no rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    made: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(made / "heads", tmp_path / "heads")
    change, told = BAD[case]
    change(tmp_path / "heads")
    before = sorted(tmp_path.iterdir())
    assert main(["import", str(tmp_path / "heads"), "--to", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and told in error, error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--heads", "5/2"], "5 query heads cannot share 2 key heads evenly"),
        (["--heads", "2/1"], "is of head 2, and there are 2 of that side"),
        (["--pre"], "says itself that it is from before RoPE"),
        (["--sampler", "mine"], "none of log_uniform, uniform, all"),
        (["--sampler", "uniform", "base_rate"], "is not key=number"),
        (["--sampler", "uniform", "rate=3"], "rate"),
    ],
)
def test_what_cannot_be_said_is_refused(made: Path, tmp_path: Path, words, told: str, capsys):
    assert main(["import", str(made / "heads"), "--to", str(tmp_path / "run"), *words]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and told in error, error
    assert not list(tmp_path.iterdir())


def test_queries_and_keys_from_before_rope_are_called_so(made: Path, tmp_path: Path):
    for name in ("l00h00q", "l00h00k"):
        shutil.copytree(made / "heads" / name, tmp_path / "heads" / name)
    import_heads(tmp_path / "heads", tmp_path / "run", Said(pre=True))
    run = opened(tmp_path / "run")
    assert run.all_captured == {(0, "q_pre"), (0, "k_pre")} and run.manifest.layer(0).key_head(0, "k_pre") == 0
    assert len(run.pairs(layer=0, q_head=0, query_kind="q_pre", key_kind="k_pre")) > 0


def test_verbs_say_what_cannot_be_asked_of_it(made: Path, capsys: pytest.CaptureFixture[str]):
    run = str(made / "back")
    assert main(["verify", run]) == 0
    assert "imported: not to be checked are whether the draws were its sampler's" in capsys.readouterr().out
    assert main(["inspect", run]) == 0
    assert "imported" in capsys.readouterr().out
    for words in (["resume", run], ["resume", run, "--extend"], ["reproduce", run]):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and "was imported and has no configuration" in error, words
    assert not (made / "back/.lock").exists()


def test_a_damaged_import_is_found(made: Path, tmp_path: Path):
    """Rows are read and held against the manifest as in any run."""
    shutil.copytree(made / "back", tmp_path / "run")
    part = tmp_path / "run" / Manifest.load(tmp_path / "run").parts[0].path
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert any("SHA-256" in problem for problem in verify(tmp_path / "run")[1])
