from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch

from sniffer import open_run
from sniffer.errors import RunError
from sniffer.forward.columns import Columns
from sniffer.reader import scan
from sniffer.reader.run import Run
from sniffer.sampler import LogUniform
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from tests.helpers_storage import HEADS, LENGTHS, make_documents, make_manifest, make_run

COLUMNS = ["layer", "kind", "head", "bucket", "position", "token_id", "example_id", "vector"]


def opened(folder: Path) -> Run:
    run = open_run(folder)
    assert isinstance(run, Run)
    return run


def bits(vectors: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(vectors, dtype=np.float32).view(np.uint32)


def expected(columns: Columns, head: int) -> dict[tuple[int, int], bytes]:
    """The widened vector's bytes at each (example_id, position)."""
    vectors = torch.cat(columns.vectors).float().view(len(columns), len(columns.heads), -1).numpy()
    places = zip(columns.rows.example_id.tolist(), columns.rows.position.tolist(), strict=True)
    return {place: vector.tobytes() for place, vector in zip(places, vectors[:, head], strict=True)}


def got(vectors: np.ndarray, example_ids: np.ndarray, positions: np.ndarray) -> dict[tuple[int, int], bytes]:
    places = zip(example_ids.tolist(), positions.tolist(), strict=True)
    return {place: vector.tobytes() for place, vector in zip(places, vectors, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [1, 3])
def test_vectors_are_what_was_captured(tmp_path: Path, dtype: torch.dtype, parts: int):
    small = make_run(tmp_path / "run", dtype=dtype, parts=parts)
    run = opened(small.folder)
    for (layer, kind), columns in small.captured.items():
        for head in range(HEADS[kind]):
            found = run.vectors(layer=layer, head=head, kind=kind)
            assert len(found) == len(columns) > 10
            assert found.vectors.dtype == np.float32
            assert got(found.vectors, found.example_ids, found.positions) == expected(columns, head)
            keys = list(zip(found.buckets, found.example_ids, found.positions, strict=True))
            assert keys == sorted(keys)


def test_vectors_of_some_buckets_and_positions(tmp_path: Path):
    run = opened(make_run(tmp_path / "run").folder)
    whole = run.vectors(layer=0, head=1)
    last = int(np.median(whole.positions[whole.buckets == 5]))
    some = run.vectors(layer=0, head=1, buckets=[3, 5], max_position=last)
    keep = np.isin(whole.buckets, [3, 5]) & (whole.positions <= last)
    assert last in whole.positions
    assert 0 < keep.sum() < len(whole)
    assert (some.positions == whole.positions[keep]).all()
    assert (bits(some.vectors) == bits(whole.vectors[keep])).all()


def test_one_head_reads_only_its_own_row_groups(tmp_path: Path):
    small = make_run(tmp_path / "run", kinds=("q",), layers=(0,))
    run = opened(small.folder)
    [part] = run.manifest.parts
    path = small.folder / part.path
    metadata = pq.ParquetFile(path).metadata
    content = bytearray(path.read_bytes())
    for number in (0, 1, 3):  # spoil every head but 2
        for column in map(metadata.row_group(number).column, range(6)):
            begin = column.dictionary_page_offset or column.data_page_offset
            content[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    found = run.vectors(layer=0, head=2)
    assert got(found.vectors, found.example_ids, found.positions) == expected(small.captured[0, "q"], 2)
    with pytest.raises(RunError, match="could not read.*runs verify"):
        run.vectors(layer=0, head=1)


def test_a_footer_is_read_once_for_all_heads(tmp_path: Path):
    run = opened(make_run(tmp_path / "run").folder)
    before = scan._contents.cache_info()
    for head in range(HEADS["q"]):
        run.vectors(layer=0, head=head)
    after = scan._contents.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, HEADS["q"] - 1)


def test_a_file_that_takes_a_parts_place_is_read_anew(tmp_path: Path):
    small = make_run(tmp_path / "run")
    run = opened(small.folder)
    ours, other = (small.folder / RunFolder.part(layer, "q", 0, 3) for layer in (0, 2))
    assert len(run.vectors(layer=0, head=1)) == len(small.captured[0, "q"]) != len(small.captured[2, "q"])
    other.replace(ours)
    assert len(run.vectors(layer=0, head=1)) == len(small.captured[2, "q"])


def test_scan_has_every_row_once(tmp_path: Path):
    small = make_run(tmp_path / "run", parts=2)
    table = opened(small.folder).scan().collect()
    assert table.columns == COLUMNS
    assert table.schema["vector"] == pl.Array(pl.Float32, 8)
    for (layer, kind), columns in small.captured.items():
        for head in range(HEADS[kind]):
            rows = table.filter(layer=layer, kind=kind, head=head)
            found = got(*(rows[name].to_numpy() for name in ("vector", "example_id", "position")))
            assert found == expected(columns, head)
    assert table.height == sum(len(columns) * len(columns.heads) for columns in small.captured.values())


def test_scan_of_some_layers_and_kinds(tmp_path: Path):
    run = opened(make_run(tmp_path / "run", kinds=("q", "k", "v")).folder)
    whole = run.scan().select(pl.exclude("vector")).collect()
    some = run.scan(layers=[2], kinds=["k", "v"]).select(pl.exclude("vector")).collect()
    assert some.sort(pl.all()).equals(whole.filter(layer=2).filter(pl.col("kind") != "q").sort(pl.all()))
    assert run.scan(layers=[]).collect().height == 0


def test_a_filter_on_layer_and_kind_opens_no_other_file(tmp_path: Path):
    run = opened(make_run(tmp_path / "run").folder)
    for part in run.manifest.parts:
        if (part.layer, part.kind) != (2, "k"):
            (run.folder / part.path).write_bytes(b"spoilt")
    rows = run.scan().filter(layer=2, kind="k").collect()
    assert rows.height == sum(part.rows for part in run.manifest.parts_of(2, "k"))


def test_a_projection_reads_no_vectors(tmp_path: Path):
    run = opened(make_run(tmp_path / "run").folder)
    assert "PROJECT 1/8 COLUMNS" in run.scan().select("position").explain()


def test_vectors_of_different_lengths_become_lists(tmp_path: Path):
    small = make_run(tmp_path / "run", kinds=("q", "v"), dims={"v": 3})
    run = opened(small.folder)
    table = run.scan().collect()
    assert table.schema["vector"] == pl.List(pl.Float32)
    lengths = table.group_by("kind").agg(pl.col("vector").list.len().unique()).sort("kind")
    assert lengths["vector"].to_list() == [[8], [3]]
    assert run.scan(kinds=["v"]).collect_schema()["vector"] == pl.Array(pl.Float32, 3)
    found = run.vectors(layer=0, head=1, kind="v")
    assert got(found.vectors, found.example_ids, found.positions) == expected(small.captured[0, "v"], 1)


@pytest.mark.parametrize("parent", ["seed=3", "layer=9", "kind=x", "a=1,b=[0]", "[x] *?"])
def test_the_folder_may_have_any_name(tmp_path: Path, parent: str):
    plain = opened(make_run(tmp_path / "run").folder)
    odd = opened(make_run(tmp_path / parent / "run").folder)
    tables = [run.scan().select(pl.exclude("vector")).collect() for run in (plain, odd)]
    assert tables[0].equals(tables[1])
    assert odd.scan().collect_schema() == plain.scan().collect_schema()
    assert len(odd.vectors(layer=2, head=1, kind="k")) == len(plain.vectors(layer=2, head=1, kind="k"))
    assert odd.examples().equals(plain.examples())


def test_foreign_files_are_not_read(tmp_path: Path):
    run = opened(make_run(tmp_path / "run").folder)
    first = run.folder / run.manifest.parts[0].path
    (first.parent / "part-00009.parquet").write_bytes(first.read_bytes())
    (first.parent / ".part-00010.parquet.1.tmp").write_bytes(b"leftover")
    assert run.scan().collect().height == run.manifest.rows
    assert len(run.vectors(layer=0, head=0)) == run.manifest.parts[0].rows // 4


def test_inclusion_probability_is_the_samplers(tmp_path: Path):
    sampler = LogUniform(base_rate=4.0, min_bucket_size=8)
    run = opened(make_run(tmp_path / "run", sampler=sampler).folder)
    table = run.scan(inclusion_probability=True).collect()
    law = sampler.probability(table["position"].to_numpy().astype(np.int64))
    assert table["inclusion_probability"].to_numpy().tolist() == law.tolist()
    assert len(set(law.tolist())) > 2
    found = run.vectors(layer=0, head=0)
    assert (found.inclusion_probability == sampler.probability(found.positions.astype(np.int64))).all()


def test_inverse_probabilities_estimate_the_number_of_tokens(tmp_path: Path):
    table = opened(make_run(tmp_path / "run").folder).scan(inclusion_probability=True)
    estimate = table.filter(head=0).select((1 / pl.col("inclusion_probability")).sum()).collect().item()
    assert 0.5 < estimate / (4 * sum(LENGTHS)) < 2  # 4 draws


def test_pairs_have_the_right_heads_at_the_same_place(tmp_path: Path):
    small = make_run(tmp_path / "run", kinds=("q", "k", "v"), parts=2)
    run = opened(small.folder)
    for q_head in range(4):
        pairs = run.pairs(layer=2, q_head=q_head)
        assert (pairs.q_head, pairs.k_head) == (q_head, q_head // 2)
        queries = expected(small.captured[2, "q"], q_head)
        keys = expected(small.captured[2, "k"], q_head // 2)
        common = queries.keys() & keys.keys()
        assert 0 < len(pairs) == len(common) < min(len(queries), len(keys))
        assert got(pairs.q, pairs.example_ids, pairs.positions) == {place: queries[place] for place in common}
        assert got(pairs.k, pairs.example_ids, pairs.positions) == {place: keys[place] for place in common}
    values = run.pairs(layer=2, q_head=3, key_kind="v")
    assert (values.positions == pairs.positions).all()
    assert not (bits(values.k) == bits(pairs.k)).all()


@pytest.mark.parametrize(("seed_by", "power"), [(["example", "layer", "kind"], 2), (["example", "layer"], 1)])
def test_pairs_of_one_draw_are_likelier(tmp_path: Path, seed_by: list[str], power: int):
    sampler = LogUniform(seed_by=seed_by, base_rate=4.0, min_bucket_size=8)
    small = make_run(tmp_path / "run", sampler=sampler)
    pairs = opened(small.folder).pairs(layer=0, q_head=0)
    assert (pairs.inclusion_probability == sampler.probability(pairs.positions.astype(np.int64)) ** power).all()
    if power == 1:
        assert len(pairs) == len(small.captured[0, "q"])


def test_what_was_not_captured_is_said(tmp_path: Path):
    run = opened(make_run(tmp_path / "run", layers=(0, 1, 2), kinds=("q", "k")).folder)
    for ask, message in (
        (lambda: run.vectors(layer=7, head=0), "layer 7 was not captured: this run has layers 0-2"),
        (lambda: run.vectors(layer=1, head=2, kind="k"), "head 2 .* layer 1, kind k has heads 0, 1"),
        (lambda: run.vectors(layer=1, head=0, kind="v"), "kind v .* layer 1 has kinds q, k"),
        (lambda: run.scan(layers=[0, 9]), "layer 9"),
        (lambda: run.scan(kinds=["w"]), "kind w .* q, k"),
        (lambda: run.pairs(layer=0, q_head=4), "head 4 .* heads 0-3"),
        (lambda: run.pairs(layer=0, q_head=0, key_kind="v"), "kind v"),
        (lambda: run.pairs(layer=0, q_head=0, key_kind="q"), "make no sense"),
        (lambda: run.pairs(layer=0, q_head=0, query_kind="x"), "kind x"),
    ):
        with pytest.raises(RunError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_law_that_lacks_a_bucket_is_an_error(tmp_path: Path):
    folder = make_run(tmp_path / "run").folder
    manifest = Manifest.load(folder)
    replace(manifest, sampler={"_target_": "x"}).save(folder)
    with pytest.raises(RunError, match="probability for buckets 3-"):
        opened(folder).scan(inclusion_probability=True)
    assert opened(folder).scan().collect().height == manifest.rows


def test_a_samplers_own_bucket_numbers_may_be_large(tmp_path: Path):
    run = opened(make_run(tmp_path / "run").folder)
    law = {**run.manifest.sampler["probability_by_bucket"], 2**31 - 1: 0.25}
    run = Run(run.folder, replace(run.manifest, sampler={**run.manifest.sampler, "probability_by_bucket": law}))
    found = run.vectors(layer=0, head=0)
    assert found.inclusion_probability.tolist() == [law[bucket] for bucket in found.buckets.tolist()]


def test_examples_and_config(tmp_path: Path):
    run = opened(make_run(tmp_path / "run").folder)
    assert run.examples()["source_id"].to_list() == [document.source_id for document in make_documents()]
    assert run.config["capture"]["kinds"] == ["q", "k"]
    joined = run.scan().join(run.examples().lazy(), on="example_id").collect()
    assert joined.height == run.manifest.rows
    assert (joined["position"] < joined["n_tokens"]).all()
    for text in ("", "[", "3"):
        (run.folder / "config.yaml").write_text(text)
        with pytest.raises(RunError, match=r"config\.yaml"):
            opened(run.folder).config  # noqa: B018


def test_a_run_without_rows_is_valid(tmp_path: Path):
    run = opened(make_run(tmp_path / "run", sampler=LogUniform(base_rate=0.0)).folder)
    assert run.complete
    assert run.manifest.rows == 0
    assert run.scan(inclusion_probability=True).collect().shape == (0, 9)
    assert run.scan().collect_schema()["vector"] == pl.Array(pl.Float32, 8)
    assert run.vectors(layer=0, head=0).vectors.shape == (0, 8)
    assert run.pairs(layer=0, q_head=0).k.shape == (0, 8)


def test_an_unfinished_run_is_readable(tmp_path: Path):
    assert not opened(make_run(tmp_path / "run", status="interrupted").folder).complete
    (tmp_path / "begun").mkdir()
    make_manifest().save(tmp_path / "begun")
    begun = opened(tmp_path / "begun")
    assert not begun.complete
    assert begun.scan().collect().height == 0
    assert begun.vectors(layer=0, head=0).vectors.shape == (0, 8)
    with pytest.raises(RunError, match="no examples yet"):
        begun.examples()


def test_any_spelling_of_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    run = opened(Path("run"))
    monkeypatch.chdir(tmp_path.parent)
    assert run.scan().collect().height == run.manifest.rows
    with pytest.raises(RunError, match="not a run folder"):
        open_run("nowhere")


def test_reading_needs_no_torch(tmp_path: Path):
    folder = make_run(tmp_path / "run").folder
    program = (
        "import sys; from sniffer import open_run; run = open_run(sys.argv[1]);"
        "run.scan().collect(); run.pairs(layer=0, q_head=0); run.examples();"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


class TestOtherTools:
    """What the README shows, on a real run folder."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Run:
        return opened(make_run(tmp_path / "run").folder)

    def test_polars(self, run: Run):
        rows = pl.scan_parquet(run.folder / "captures", hive_partitioning=True)
        assert rows.filter(pl.col("layer") == 2, pl.col("kind") == "q").collect().height == sum(
            part.rows for part in run.manifest.parts_of(2, "q")
        )

    def test_duckdb(self, run: Run):
        query = f"""
            select layer::int as layer, kind, count(*) as rows, any_value(len(vector)) as dim
            from read_parquet('{run.folder}/captures/**/*.parquet', hive_partitioning = true)
            group by all
        """
        found = {(layer, kind): rows for layer, kind, rows, dim in duckdb.sql(query).fetchall() if dim == 8}
        assert found == {(part.layer, part.kind): part.rows for part in run.manifest.parts}

    def test_pandas(self, run: Run):
        table = pd.read_parquet(run.folder / run.manifest.parts[0].path)
        vectors = np.stack(table["vector"])
        head = run.vectors(layer=0, head=1).vectors
        assert (bits(vectors[table["head"] == 1]) == bits(head)).all()

    def test_datasets(self, run: Run, tmp_path: Path):
        files = str(run.folder / "captures" / "layer=00" / "kind=q" / "*.parquet")
        table = datasets.load_dataset(
            "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
        ).with_format("numpy")
        assert table.num_rows == run.manifest.parts_of(0, "q")[0].rows
        rows = table.filter(lambda head: head == 1, input_columns="head")
        assert (bits(rows["vector"][:]) == bits(run.vectors(layer=0, head=1).vectors)).all()


def test_draws_differ_between_layers_and_kinds(tmp_path: Path):
    """The other tests would prove little if all pairs had kept the same positions."""
    captured = make_run(tmp_path / "run").captured
    places = [set(expected(columns, 0)) for columns in captured.values()]
    assert all(one != other for one, other in combinations(places, 2))
