from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sniffer.errors import CaptureError
from sniffer.forward.estimate import stored_bytes
from sniffer.storage.digest import combine
from sniffer.storage.durable import HashedFile
from sniffer.storage.layout import RunFolder
from sniffer.storage.schema import METADATA_COLUMNS, Example, Footer, row_schema
from sniffer.storage.writer import write_part
from sniffer.types import Column
from tests.helpers_storage import make_columns, make_documents, make_footer, take, write_examples

PATH = RunFolder.part(3, "q", 0, 4)


def read(folder: Path) -> dict[str, np.ndarray]:
    table = pq.ParquetFile(folder / PATH).read()
    columns = {name: table[name].to_numpy() for name in METADATA_COLUMNS}
    flat = table["vector"].combine_chunks().flatten().to_numpy()
    return columns | {"vector": flat.reshape(table.num_rows, -1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_bit_comes_back_widened_and_sorted(tmp_path: Path, dtype: torch.dtype):
    columns = make_columns(rows=500, heads=(1, 2, 8), dim=6, dtype=dtype)
    write_part(tmp_path, PATH, columns, make_footer(dim=6))
    rows = read(tmp_path)
    keys = list(zip(*(rows[name].tolist() for name in ("head", "bucket", "example_id", "position")), strict=True))
    assert keys == sorted(keys)
    assert set(rows["head"].tolist()) == {1, 2, 8}
    widened = torch.cat(columns.vectors).float().view(500, 3, 6).numpy()
    for place, head in enumerate(columns.heads):
        mine = {name: column[rows["head"] == head] for name, column in rows.items()}
        order = np.argsort(mine["position"])  # positions are unique here
        source = np.argsort(columns.rows.position)
        assert (mine["vector"][order].view(np.uint32) == widened[source, place].view(np.uint32)).all()
        for name, column in (
            ("position", columns.rows.position),
            ("bucket", columns.rows.bucket),
            ("token_id", columns.rows.token_id),
            ("example_id", columns.rows.example_id),
        ):
            assert (mine[name][order] == column[source]).all()


def test_the_part_describes_the_file(tmp_path: Path):
    columns = make_columns(rows=50, heads=(0, 2))
    part = write_part(tmp_path, PATH, columns, make_footer())
    content = (tmp_path / PATH).read_bytes()
    assert (part.path, part.layer, part.kind, part.rows) == (PATH, 3, "q", 100)
    assert (part.bytes, part.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    buckets, counts = np.unique(read(tmp_path)["bucket"], return_counts=True)
    assert part.buckets == dict(zip(buckets.tolist(), counts.tolist(), strict=True))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=40, max_size=40), st.integers(1, 5))
def test_digests_of_parts_add_up(tmp_path_factory: pytest.TempPathFactory, owners: list[int], chunks: int):
    folder = tmp_path_factory.mktemp("parts")
    columns = make_columns(rows=40, chunks=chunks)
    whole = write_part(folder, PATH, columns, make_footer())
    split = [
        write_part(folder, PATH, take(columns, np.flatnonzero(np.array(owners) == owner)), make_footer())
        for owner in range(3)
    ]
    assert combine(part.digest for part in split) == whole.digest


def test_the_same_rows_in_other_chunks_and_order_give_the_same_file(tmp_path: Path):
    columns = make_columns(rows=60, chunks=4)
    shuffled = take(columns, np.random.default_rng(1).permutation(60))
    assert write_part(tmp_path, PATH, columns, make_footer()) == write_part(tmp_path, PATH, shuffled, make_footer())


@pytest.mark.parametrize(
    ("compression", "dtype", "codec", "encoding"),
    [
        ("auto", "float32", "UNCOMPRESSED", "PLAIN"),
        ("auto", "bfloat16", "ZSTD", "BYTE_STREAM_SPLIT"),
        ("auto", "float16", "ZSTD", "BYTE_STREAM_SPLIT"),
        ("zstd", "float32", "ZSTD", "BYTE_STREAM_SPLIT"),
        ("none", "bfloat16", "UNCOMPRESSED", "PLAIN"),
    ],
)
def test_encodings_land_where_meant(tmp_path: Path, compression: str, dtype: str, codec: str, encoding: str):
    write_part(tmp_path, PATH, make_columns(), make_footer(source_dtype=dtype), compression)
    group = pq.ParquetFile(tmp_path / PATH).metadata.row_group(0)
    chunks = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert set(chunks) == {*METADATA_COLUMNS, "vector.list.element"}
    vector = chunks.pop("vector.list.element")
    assert set(vector.encodings) == {"RLE", encoding}  # RLE: where each list begins
    assert vector.compression == codec
    assert not vector.has_dictionary_page
    assert not vector.is_stats_set
    for name, chunk in chunks.items():
        assert chunk.is_stats_set
        assert chunk.compression == "UNCOMPRESSED"
        assert chunk.has_dictionary_page == (name != "position")
        assert ("DELTA_BINARY_PACKED" in chunk.encodings) == (name == "position")


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_are_about_as_large_as_estimated(tmp_path: Path, compression: str, dtype: torch.dtype):
    name = str(dtype).removeprefix("torch.")
    columns = make_columns(rows=900, heads=(0, 1), dim=64, dtype=dtype)
    columns.vectors[:] = [torch.randn(chunk.shape).to(dtype) for chunk in columns.vectors]
    part = write_part(tmp_path, PATH, columns, make_footer(dim=64, source_dtype=name), compression)
    assert part.bytes / (part.rows * 64) == pytest.approx(stored_bytes(compression, name), rel=0.15)


def test_heads_and_large_buckets_have_row_groups_of_their_own(tmp_path: Path):
    columns = make_columns(rows=900, heads=(3, 4), dim=1024, chunks=2)
    metadata = pq.ParquetFile(tmp_path / write_part(tmp_path, PATH, columns, make_footer(dim=1024)).path).metadata
    ranges = [
        tuple((stats.min, stats.max) for stats in (group.column(0).statistics, group.column(1).statistics))
        for group in map(metadata.row_group, range(metadata.num_row_groups))
    ]
    assert len(ranges) > 4  # 8 buckets of about 115 rows, 128 rows at least in a group
    assert all(low == high for (low, high), _ in ranges)
    for (one, (_, last)), (other, (first, _)) in zip(ranges[:-1], ranges[1:], strict=True):
        assert one != other or last < first


def test_no_rows_make_a_readable_part(tmp_path: Path):
    for chunks in (0, 2):
        columns = make_columns(rows=0, chunks=max(chunks, 1))
        part = write_part(tmp_path, PATH, columns if chunks else take_none(columns), make_footer())
        assert (part.rows, part.digest, part.buckets) == (0, "0" * 32, {})
        assert pq.read_schema(tmp_path / PATH).equals(row_schema([Column("vector", 4)]))


def take_none(columns: Any) -> Any:
    columns.vectors.clear()
    return columns


def test_a_lone_file_explains_itself(tmp_path: Path):
    write_part(tmp_path, PATH, make_columns(), make_footer())
    assert Footer.decode(pq.read_schema(tmp_path / PATH).metadata) == make_footer()


def test_columns_are_left_as_they_are(tmp_path: Path):
    columns, same = make_columns(), make_columns()
    write_part(tmp_path, PATH, columns, make_footer())
    assert (columns.rows.position == same.rows.position).all()
    assert all(
        (one.view(torch.int32) == other.view(torch.int32)).all()
        for one, other in zip(columns.vectors, same.vectors, strict=True)
    )


@pytest.mark.parametrize("write", [0, 1, 5, -1])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, write: int, monkeypatch: pytest.MonkeyPatch):
    written: dict[HashedFile, list[int]] = {}
    honest = HashedFile.write

    def count(file: HashedFile, data: bytes) -> int:
        written.setdefault(file, []).append(len(data))
        return honest(file, data)

    monkeypatch.setattr(HashedFile, "write", count)
    monkeypatch.setattr("sniffer.storage.writer.WRITE_BYTES", 64)
    part = write_part(tmp_path, PATH, make_columns(), make_footer())
    (tmp_path / PATH).unlink()
    # A writer that failed in an earlier test may be collected, and write its end, only now.
    sizes = next(sizes for sizes in written.values() if sum(sizes) == part.bytes)
    fatal = sum(sizes[: write % len(sizes)])

    def fail(file: HashedFile, data: bytes) -> int:
        if file.bytes >= fatal:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(file, data)

    monkeypatch.setattr(HashedFile, "write", fail)
    with pytest.raises(CaptureError, match="No space left on device") as caught:
        write_part(tmp_path, PATH, make_columns(), make_footer())
    assert PATH in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / PATH).parent.iterdir()) == []


def test_pyarrow_reaches_the_file_in_few_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sizes: list[int] = []
    honest = HashedFile.write

    def count(file: HashedFile, data: bytes) -> int:
        sizes.append(len(data))
        return honest(file, data)

    monkeypatch.setattr(HashedFile, "write", count)
    part = write_part(tmp_path, PATH, make_columns(rows=1000, heads=range(16), dim=64), make_footer(dim=64))
    assert sum(sizes) == part.bytes > 3_000_000
    # Never less than a page short of a mebibyte, but for the last.
    assert len(sizes) <= 1 + part.bytes // 2**19


def test_examples(tmp_path: Path):
    documents = make_documents()
    record = write_examples(tmp_path, map(Example.of, reversed(documents)))
    rows = pq.ParquetFile(tmp_path / record.path).read().to_pylist()
    assert rows == [
        {"example_id": d.example_id, "source_id": d.source_id, "n_tokens": d.n_tokens, "truncated": d.truncated}
        for d in documents
    ]
    assert record.rows == len(documents)
    assert record.sha256 == hashlib.sha256((tmp_path / record.path).read_bytes()).hexdigest()


def test_no_examples(tmp_path: Path):
    assert write_examples(tmp_path, []).rows == 0
