"""Sections on disk: in parts, in digests, in examples.parquet, and found to be wrong where someone changed them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sniffer.errors import RunError
from sniffer.forward.columns import Columns
from sniffer.hashing import key_of, mix64_int
from sniffer.reader.run import Run
from sniffer.reader.scan import read_rows, scan_parts
from sniffer.reader.sweep import open_run
from sniffer.runs.verify import verify
from sniffer.storage.digest import digest_rows, sum_rows
from sniffer.storage.examples import examples_table, read_examples
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.schema import MOST_SECTIONS, SECTIONS, Example, Footer, Part
from sniffer.storage.sort import MIN_ROW_GROUP_BYTES
from sniffer.storage.writer import Listing, write_part
from sniffer.types import NONE, Column, Names, Rows, Sections
from tests.helpers_runs import ORDER, Runs
from tests.helpers_storage import make_columns, make_footer
from tests.tiny_run import save_checkpoint

LABELS = st.lists(st.sampled_from(["", "a", "b", "naïve", "東"]), max_size=40)


def sections(labels: list[str]) -> Sections:
    known = sorted(set(labels))
    return Sections.of(Names.of(known, np.array([known.index(one) for one in labels], dtype=np.int64)))


def plain(names: Names) -> list[str]:
    return list(names.array)


@given(LABELS, LABELS)
def test_sections_are_lists_of_labels(one: list[str], other: list[str]):
    found = sections(one)
    assert plain(found.names) == one and len(found) == len(one)
    assert plain(found.at(np.arange(len(one)))) == one
    assert (found == sections(other)) == (one == other)
    assert plain(Sections.joined([found, sections(other)]).names) == one + other
    assert Sections.joined([found, sections(other)]) == sections(one + other)
    spans = found.spans()
    spelled = [NONE] * len(one)
    for start, end, name in spans:
        assert name and start < end
        spelled[start:end] = [name] * (end - start)
    assert spelled == one and Sections.spread(spans, len(one)) == found
    assert all(a[1] < b[0] or a[2] != b[2] for a, b in zip(spans, spans[1:], strict=False))


@given(LABELS, st.data())
def test_a_cut_has_the_labels_between(labels: list[str], data: st.DataObject):
    start = data.draw(st.integers(0, len(labels)))
    end = data.draw(st.integers(start, len(labels)))
    assert sections(labels).cut(start, end) == sections(labels[start:end])


@given(st.lists(LABELS, max_size=5), st.randoms())
def test_names_join_count_and_choose_as_lists_do(pieces: list[list[str]], random: Any):
    names = Names.joined([sections(piece).names for piece in pieces])
    whole = [label for piece in pieces for label in piece]
    assert plain(names) == whole and list(names.known) == sorted(set(names.known))
    assert names.counts() == {label: whole.count(label) for label in sorted(set(whole))}
    order = random.sample(range(len(whole)), len(whole))
    assert plain(names[np.array(order, dtype=np.int64)]) == [whole[at] for at in order]
    assert names.among(["a", "x"]).tolist() == [label == "a" for label in whole]
    for column in (pa.array(whole, pa.string()), pl.Series(whole, dtype=pl.String)):
        assert Names.from_column(column).same(names)
    chunks = pa.chunked_array([pa.array(piece, pa.string()).dictionary_encode() for piece in pieces] or [[]])
    if len(chunks):
        assert Names.from_column(chunks).same(names)


def make_rows(labels: list[str], seed: int = 0) -> tuple[Rows, np.ndarray]:
    rng, n = np.random.default_rng(seed), len(labels)
    columns = (rng.integers(0, 9, n, dtype=np.int32) for _ in range(3))
    rows = Rows(*columns, rng.integers(0, 2**63, n, dtype=np.int64), sections(labels).names)
    return rows, rng.standard_normal((n, 3)).astype(np.float32)


def test_the_digest_is_what_plain_python_makes_of_the_definition():
    labels = ["a", "", "naïve", "a"]
    rows, vectors = make_rows(labels)
    total = 0
    for row, label in enumerate(labels):
        example_id = int(rows.example_id[row])
        places = [int(column[row]) for column in (rows.bucket, rows.position, rows.token_id)]
        words = [*places, example_id % 2**32, example_id >> 32, *vectors[row].view(np.uint32).tolist()]
        weights = [mix64_int(0x9E3779B97F4A7C15 * (word + 1)) | 1 for word in range(len(words))]
        value = key_of("row", 1, "q", 2) + sum(w * weight for w, weight in zip(words, weights, strict=True))
        total += mix64_int(value + (key_of("section", label) if label else 0))
    assert digest_rows(1, "q", 2, sum_rows(rows), vectors).first == total % 2**64


@given(st.lists(st.sampled_from(["", "a", "b"]), min_size=6, max_size=6))
def test_any_other_section_is_another_digest(labels: list[str]):
    rows, vectors = make_rows(["a", "b", "", "a", "b", ""])
    changed = replace(rows, section=sections(labels).names)
    alike = labels == ["a", "b", "", "a", "b", ""]
    assert (
        digest_rows(1, "q", 2, sum_rows(rows), vectors) == digest_rows(1, "q", 2, sum_rows(changed), vectors)
    ) == alike
    nowhere = replace(rows, section=Names.none(6))
    bare = replace(rows, section=None)
    assert (sum_rows(nowhere) == sum_rows(bare)).all() and (sum_rows(rows) != sum_rows(bare)).tolist() == [
        1,
        1,
        0,
        1,
        1,
        0,
    ]


def part_with(folder: Path, labels: list[str], dim: int = 4, rows: int | None = None) -> tuple[Part, Rows]:
    columns = make_columns(rows=rows or len(labels), heads=(0, 2), dim=dim)
    placed = replace(columns, rows=replace(columns.rows, section=sections(labels).names))
    path = RunFolder.part(3, "q", 0, 4)
    return write_part(folder, path, placed, make_footer(dim=dim), sections=True), placed.rows


def test_a_part_is_sorted_by_section_and_counts_them(tmp_path: Path):
    rng = np.random.default_rng(0)
    labels = rng.choice(["", "needle", "hay", "東"], size=50).tolist()
    part, rows = part_with(tmp_path, labels)
    assert part.sections == {name: 2 * labels.count(name) for name in set(labels)}
    table = pl.read_parquet(tmp_path / part.path)
    assert table.columns == ["head", "bucket", "position", "token_id", "example_id", "section", "vector"]
    assert table.schema["section"] == pl.String and table.null_count().sum_horizontal().item() == 0
    keys = table.select("head", "section", "bucket", "example_id", "position").rows()
    assert keys == sorted(keys)
    found = dict(table.filter(head=2)["position", "section"].rows())
    assert found == dict(zip(rows.position.tolist(), labels, strict=True))


def test_a_part_without_rows_has_the_column_too(tmp_path: Path):
    columns = make_columns(rows=0)
    part = write_part(tmp_path, RunFolder.part(3, "q", 0, 4), columns, make_footer(), sections=True)
    assert part.sections == {} and "section" in pq.read_schema(tmp_path / part.path).names


def test_a_row_group_holds_few_sections_where_they_are_large(tmp_path: Path):
    """So that whoever asks for one passes by the others."""
    each = 4 * MIN_ROW_GROUP_BYTES // (4 * 256)
    labels = ["b"] * 20 + ["a"] * each + ["c"] * each
    columns = make_columns(rows=1000, heads=(0,), dim=256)
    rows = np.arange(len(labels)) % 1000
    whole = replace(
        columns, vectors=[np_take(columns, rows)], rows=replace(columns.rows[rows], section=sections(labels).names)
    )
    part = write_part(tmp_path, RunFolder.part(3, "q", 0, 4), whole, make_footer(dim=256), sections=True)
    metadata = pq.read_metadata(tmp_path / part.path)
    place = pq.read_schema(tmp_path / part.path).names.index("section")
    spans = [metadata.row_group(n).column(place).statistics for n in range(metadata.num_row_groups)]
    holding = [(span.min, span.max) for span in spans]
    assert ("a", "a") in holding and ("c", "c") in holding
    assert sum(low <= "b" <= high for low, high in holding) < len(holding) / 2


def np_take(columns: Any, rows: np.ndarray) -> Any:
    return torch.cat(columns.vectors)[torch.from_numpy(rows)]


def test_too_many_sections_are_not_listed(tmp_path: Path):
    part, _ = part_with(tmp_path, [f"text-{n}" for n in range(MOST_SECTIONS + 1)])
    assert part.sections is None


@given(st.lists(LABELS, max_size=6), st.booleans())
def test_examples_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, texts: list[list[str]], cut: bool):
    folder = tmp_path_factory.mktemp("examples")
    examples = {
        n: Example(n, f"doc-{n}", len(labels), False, *(("x", n) if cut else (None, None)), sections(labels))
        for n, labels in enumerate(texts)
    }
    listing = Listing.of(examples.values())
    listing.write(folder)
    assert read_examples(folder / listing.record.path, listing.record) == examples


def spoiled(folder: Path, spans: list[list[tuple[int, int, str]]], n_tokens: int = 9) -> Path:
    """examples.parquet with these spans, whatever they are."""
    listing = Listing.of(
        Example(n, f"doc-{n}", n_tokens, False, sections=Sections.one("a", n_tokens)) for n in range(len(spans))
    )
    listing.write(folder)
    table = examples_table(folder / listing.record.path)
    column = [[dict(zip(("start", "end", "label"), span, strict=True)) for span in some] for some in spans]
    again = table.set_column(4, SECTIONS, pa.array(column, SECTIONS.type))
    pq.write_table(again, folder / "spoiled.parquet")
    return folder / "spoiled.parquet"


@pytest.mark.parametrize(
    "spans",
    [[(0, 3, "a"), (2, 4, "b")], [(3, 3, "a")], [(4, 2, "a")], [(-1, 2, "a")], [(0, 10, "a")], [(0, 2, "")]]
    + [[(4, 6, "a"), (0, 2, "b")], [(2**31 - 1, -(2**31), "a")]],
)
def test_sections_that_cannot_be_are_refused(tmp_path: Path, spans: list[tuple[int, int, str]]):
    assert read_examples(spoiled(tmp_path, [[(0, 2, "a"), (2, 4, "b")]]))[0].sections == sections([*"aabb", *[""] * 5])
    with pytest.raises(ValueError, match="sections that overlap|without a name"):
        read_examples(spoiled(tmp_path, [spans]))


def test_a_file_that_stands_for_more_than_it_weighs_is_refused(tmp_path: Path):
    path = spoiled(tmp_path, [[(0, 2, "a")] * 200_000])
    again = pq.read_table(path)
    pq.write_table(again, path, compression="zstd")
    assert path.stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"stand for 200,000 stretches"):
        read_examples(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = tmp_path_factory.mktemp("sections")
    span = {"start": 4, "end": 9, "label": "needle"}
    texts = [json.dumps({"id": n, "text": "hay stack " * (n + 3), "spans": [span]}) for n in range(6)]
    (place / "texts.jsonl").write_text("\n".join(texts))
    return Runs(save_checkpoint(place / "model"), place / "texts.jsonl", place)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    return runs.start("whole", "dataset.spans_column=spans", "sampler.base_rate=60")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def test_a_run_with_sections_is_whole(whole: Path):
    manifest, problems = verify(whole)
    assert problems == [] and manifest.has_sections
    run = open_run(whole)
    assert isinstance(run, Run) and run.sections == ("needle",)
    rows = run.scan().collect()
    inside = pl.col("position").is_between(4, 8)
    assert rows.select((pl.col("section") == pl.when(inside).then(pl.lit("needle")).otherwise(pl.lit(""))).all()).item()
    counted = manifest.rows_by_section
    assert counted is not None
    assert {(name, kind): n for name, kinds in counted.items() for kind, n in kinds.items()} == {
        (name, kind): n for name, kind, n in rows.group_by("section", pl.col("kind").cast(pl.String)).len().rows()
    }


def rewritten(folder: Path, part: Part, name: str) -> Part:
    """The part as it would be if "needle" had another name."""
    table = pl.read_parquet(folder / part.path, hive_partitioning=False)
    heads = tuple(table["head"].unique().sort().to_list())
    rows = Rows.from_columns(table.filter(head=heads[0]))
    assert rows.section is not None
    changed = Names.of([name if known == "needle" else known for known in rows.section.known], rows.section.codes)
    vectors = torch.from_numpy(table["vector"].to_numpy().reshape(len(heads), len(rows), -1).copy())
    flat = vectors.transpose(0, 1).reshape(len(rows), -1)
    columns = Columns(heads, [flat], replace(rows, section=changed), vectors.shape[2])
    footer = Footer.decode(pq.read_schema(folder / part.path).metadata)
    return write_part(folder, part.path, columns, footer, sections=True)


def test_a_changed_section_is_found(copy: Path):
    manifest = Manifest.load(copy)
    part, *others = manifest.parts
    assert replace(rewritten(copy, part, "needle"), commit=part.commit) == part and verify(copy)[1] == []
    changed = rewritten(copy, part, "other")
    assert [line for line in verify(copy)[1] if part.path in line and "has " in line]
    # Even where the manifest is made to agree with the file, the documents do not.
    replace(manifest, parts=(changed, *others)).save(copy)
    (problem,) = verify(copy)[1]
    assert "some rows do not have the section of their token" in problem
    replace(manifest, parts=(replace(changed, sections=part.sections), *others)).save(copy)
    assert any("its rows per section are not those of the manifest" in problem for problem in verify(copy)[1])


def test_documents_with_other_sections_are_found(copy: Path):
    manifest = Manifest.load(copy)
    examples = read_examples(copy / RunFolder.EXAMPLES)
    moved = [replace(one, sections=Sections.spread([(5, 10, "needle")], one.n_tokens)) for one in examples.values()]
    listing = Listing.of(moved)
    for name in RunFolder.DOCUMENTS:
        listing.write(copy, name)
    replace(manifest, examples=listing.record).save(copy)
    problems = verify(copy)[1]
    assert problems and all("do not have the section of their token" in problem for problem in problems)


def test_one_section_is_read_without_the_others(whole: Path):
    run = open_run(whole)
    assert isinstance(run, Run)
    only = run.only(["needle"])
    for layer, kind, head in ((0, "q", 3), (1, "k", 1)):
        every, some = (one.vectors(layer=layer, head=head, kind=kind) for one in (run, only))
        mine = every.sections == "needle"
        assert 0 < mine.sum() < len(every)
        assert np.array_equal(every.vectors[mine], some.vectors) and (some.sections == "needle").all()
        assert np.array_equal(every.positions[mine], some.positions)
        keys = list(zip(every.buckets, every.example_ids, every.positions, strict=True))
        assert keys == sorted(keys)
    assert only.scan().collect().sort(ORDER).equals(run.scan().filter(section="needle").collect().sort(ORDER))
    pairs = run.pairs(layer=0, q_head=0)
    chosen = only.pairs(layer=0, q_head=0)
    assert np.array_equal(pairs.q[pairs.sections == "needle"], chosen.q)
    with pytest.raises(RunError, match="section 'nedle' is in no document: .* has 'needle'"):
        run.only(["nedle"])


def test_a_filter_by_section_passes_by_the_row_groups_of_others(tmp_path: Path):
    """Whose bytes are spoiled here."""
    each = 4 * MIN_ROW_GROUP_BYTES // (4 * 256)
    labels = ["a"] * each + ["b"] * each
    columns = make_columns(rows=1000, heads=(0,), dim=256)
    rows = np.arange(len(labels)) % 1000
    placed = replace(columns.rows[rows], section=sections(labels).names)
    whole = replace(columns, vectors=[np_take(columns, rows)], rows=placed)
    path = RunFolder.part(0, "q", 0, 4)
    part = write_part(tmp_path, path, whole, make_footer(layer=0, dim=256), sections=True)
    metadata, content = pq.read_metadata(tmp_path / path), bytearray((tmp_path / path).read_bytes())
    place = pq.read_schema(tmp_path / path).names.index("section")
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        if group.column(place).statistics.max == "a":
            for column in map(group.column, range(metadata.num_columns)):
                begin = column.dictionary_page_offset or column.data_page_offset
                content[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    (tmp_path / path).write_bytes(content)
    some = (
        scan_parts(tmp_path, [part], [Column("vector", 256)], sections=True).filter(pl.col("section") == "b").collect()
    )
    assert len(some) == each and some["section"].unique().to_list() == ["b"]
    found, _ = read_rows(tmp_path, [part], 0, 256, has_sections=True, sections=["b"])
    assert len(found) == each
    with pytest.raises(RunError, match="could not read"):
        read_rows(tmp_path, [part], 0, 256, has_sections=True)


def test_a_run_without_sections_has_none(runs: Runs, whole: Path, tmp_path: Path):
    bare = open_run(runs.start("bare", "sampler.base_rate=60"))
    assert isinstance(bare, Run) and bare.sections == () and bare.vectors(layer=0, head=0).sections is None
    with pytest.raises(RunError, match="has no sections: capture with some"):
        bare.only(["needle"])
    rows, sectioned = (one.scan().collect().sort(ORDER) for one in (bare, open_run(whole)))
    assert "section" not in rows.columns and rows.equals(sectioned.drop("section"))
    manifest = Manifest.load(bare.folder).as_json()
    assert "by_section" not in manifest["rows"] and "sections" not in manifest["dataset"]
    assert not any("sections" in part for part in manifest["parts"]) and "keep_sections" not in manifest["sampler"]


def test_runs_with_and_without_sections_are_one_table(runs: Runs, whole: Path, tmp_path: Path):
    for name in ("a", "b"):
        (tmp_path / "both").mkdir(exist_ok=True)
        shutil.copytree(whole if name == "a" else runs.start("other"), tmp_path / "both" / name)
    found = open_run(tmp_path / "both").scan().collect()
    assert found.columns[-2:] == ["section", "vector"]
    assert found.filter(pl.col("job") == "b")["section"].unique().to_list() == [""]
