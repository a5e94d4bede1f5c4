"""The token ids of documents reach the disk once, with the commit that counts the documents, whatever happens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sniffer.runs.verify import verify
from sniffer.storage import tokens as module
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.on_disk import look
from sniffer.storage.schema import Example, FileRecord
from sniffer.storage.tokens import Kept, example_ids, read_tokens, write_tokens
from sniffer.types import Document
from tests.helpers_store import DOCUMENTS, LENGTHS, OUTPUTS, Engine, Killed, killed, resume, run

IDS = {7: [5, 6, 7], 2: [1], 9: list(range(40)), 4: [2**31 - 1, 0]}
ARRAYS = {example: np.array(ids, dtype=np.int32) for example, ids in IDS.items()}


def documents(*ids: int) -> list[Document]:
    return [Document(example, str(example), ARRAYS[example], False) for example in ids]


def examples(*ids: int) -> dict[int, Example]:
    return {one: Example(one, str(one), len(IDS.get(one, [])), False) for one in ids}


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP", 3)
    record = write_tokens(tmp_path, RunFolder.tokens(0), ARRAYS)
    assert pq.ParquetFile(tmp_path / record.path).num_row_groups == 3
    plain = pq.read_table(tmp_path / record.path).to_pydict()
    assert dict(zip(plain["example_id"], plain["token_ids"], strict=True)) == IDS
    table = read_tokens(tmp_path, [record])
    assert {example: table.of(example).tolist() for example in IDS} == IDS and table.of(3) is None
    for example, ids in IDS.items():
        one = read_tokens(tmp_path, [record], example)
        assert one.token_ids.tolist() == ids and one.token_ids.dtype == np.int32 and len(one) == 1
    assert len(read_tokens(tmp_path, [record], 3)) == 0 and len(read_tokens(tmp_path, [])) == 0
    assert example_ids(tmp_path, record) == IDS.keys()


def test_rows_are_compared_with_their_document(tmp_path: Path) -> None:
    table = read_tokens(tmp_path, [write_tokens(tmp_path, RunFolder.tokens(0), ARRAYS)])
    rows = [(7, 0, 5), (7, 2, 7), (9, 39, 39), (7, 1, 7), (2, 1, 1), (2, -1, 1), (3, 0, 1), (10, 0, 1)]
    ids, positions, found = (np.array(column) for column in zip(*rows, strict=True))
    expected = [example in IDS and not (0 <= p < len(IDS[example]) and IDS[example][p] == t) for example, p, t in rows]
    assert table.disagree(ids, positions, found).tolist() == expected
    assert not read_tokens(tmp_path, []).disagree(ids, positions, found).any()


def test_each_document_is_written_once_and_when_it_counts(tmp_path: Path) -> None:
    kept = Kept(on_disk={4})
    kept.add(documents(7, 2, 4))
    assert kept.write(tmp_path, examples(9), ()) == ()
    (first,) = kept.write(tmp_path, examples(7, 4), ())
    assert example_ids(tmp_path, first) == {7}
    kept.add(documents(7, 9))
    one, two = kept.write(tmp_path, examples(7, 2, 9, 4), (first,))
    assert one == first and two.path != first.path and example_ids(tmp_path, two) == {2, 9}
    assert kept.write(tmp_path, examples(*IDS), (one, two)) == (one, two)
    unwanted = Kept(keep=False)
    unwanted.add(documents(7))
    assert unwanted.write(tmp_path, examples(7), ()) == ()


@pytest.mark.long
@pytest.mark.parametrize("outputs", OUTPUTS.values(), ids=list(OUTPUTS))
@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_killed_and_resumed_run_has_the_tokens_of_a_whole_one(tmp_path: Path, outputs, after: int) -> None:
    folder = killed(tmp_path / "run", outputs, after)
    resume(folder, outputs)
    manifest, problems = verify(folder)
    assert not problems and manifest.status == "complete"
    table = read_tokens(folder, manifest.tokens)
    for document in DOCUMENTS:
        assert np.array_equal(table.of(document.example_id), document.token_ids)


def test_what_is_committed_is_not_written_again(tmp_path: Path) -> None:
    folder = killed(tmp_path / "run", OUTPUTS["checkpoints"], 5)
    before = Manifest.load(folder).tokens
    assert before and sum(record.rows for record in before) == 4
    resume(folder, OUTPUTS["checkpoints"])
    after = Manifest.load(folder).tokens
    assert after[: len(before)] == before and sum(record.rows for record in after) == len(DOCUMENTS)


def test_a_damaged_file_is_made_good_without_a_forward(tmp_path: Path) -> None:
    run(tmp_path, OUTPUTS["checkpoints"])
    digest = Manifest.load(tmp_path).digest
    first = Manifest.load(tmp_path).tokens[0]
    (tmp_path / first.path).write_bytes(b"x" * first.bytes)
    assert any(first.path in problem for problem in verify(tmp_path)[1])
    engine = Engine()
    resume(tmp_path, OUTPUTS["checkpoints"], engine)
    manifest, problems = verify(tmp_path)
    assert not problems and not engine.seen and manifest.digest == digest
    assert read_tokens(tmp_path, manifest.tokens).lengths == LENGTHS


def test_documents_that_no_longer_count_are_written_with_the_rows_that_do(tmp_path: Path) -> None:
    run(tmp_path, OUTPUTS["checkpoints"])
    part = Manifest.load(tmp_path).parts[0]
    (tmp_path / part.path).unlink()
    _, on_disk = look(tmp_path, Manifest.load(tmp_path, parts_must_exist=False))
    assert on_disk.tokens == on_disk.committed.keys() < LENGTHS.keys()
    resume(tmp_path, OUTPUTS["checkpoints"])
    manifest, problems = verify(tmp_path)
    assert not problems and read_tokens(tmp_path, manifest.tokens).lengths == LENGTHS


def test_a_run_of_an_early_release_gets_what_it_lacks(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(Killed):
        run(folder, OUTPUTS["checkpoints"], Engine(stop_after=3, by=Killed))
    manifest = Manifest.load(folder)
    for record in manifest.tokens:
        (folder / record.path).unlink()
    replace(manifest, tokens=()).save(folder)
    resume(folder, OUTPUTS["checkpoints"])
    manifest, problems = verify(folder)
    assert not problems and read_tokens(folder, manifest.tokens).lengths == LENGTHS


def test_verify_finds_what_is_wrong_with_tokens(tmp_path: Path) -> None:
    run(tmp_path, OUTPUTS["plain"])
    manifest = Manifest.load(tmp_path)

    def told(ids: dict[int, np.ndarray]) -> str:
        for record in manifest.tokens:
            (tmp_path / record.path).unlink(missing_ok=True)
        record = write_tokens(tmp_path, manifest.tokens[0].path, ids)
        replace(manifest, tokens=(record,)).save(tmp_path)
        return "; ".join(verify(tmp_path)[1])

    right = {document.example_id: document.token_ids for document in DOCUMENTS}
    assert told(right) == ""
    first, longest = DOCUMENTS[0].example_id, DOCUMENTS[1].example_id
    assert "rows say another token than their document has" in told({**right, longest: right[longest] + 1})
    assert "10 token ids of document" in told({**right, first: np.arange(10, dtype=np.int32)})
    assert "which examples.parquet does not list" in told({**right, 5: np.zeros(1, np.int32)})
    replace(manifest, tokens=(*manifest.tokens, replace(manifest.tokens[0], path="tokens/part-00001.parquet"))).save(
        tmp_path
    )
    assert any("is missing" in problem for problem in verify(tmp_path)[1])


def test_files_that_are_not_ours_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens").mkdir()

    def record(table: pa.Table, rows: int) -> FileRecord:
        path = tmp_path / "tokens" / "part-00000.parquet"
        pq.write_table(table, path)
        return FileRecord("tokens/part-00000.parquet", rows, path.stat().st_size, "")

    with pytest.raises(ValueError, match="does not have the columns example_id, token_ids"):
        read_tokens(tmp_path, [record(pa.table({"example_id": [1]}), 1)])
    ours = pa.table({"example_id": [1, 1], "token_ids": [[1], [2]]}, schema=module.SCHEMA)
    with pytest.raises(ValueError, match="has 2 documents, the manifest says 3"):
        read_tokens(tmp_path, [record(ours, 3)])
    with pytest.raises(ValueError, match="a document twice"):
        read_tokens(tmp_path, [record(ours, 2)])


def test_more_than_memory_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = write_tokens(tmp_path, RunFolder.tokens(0), {1: np.zeros(1000, np.int32)})
    monkeypatch.setattr(module, "WORTH_ASKING", 10)
    monkeypatch.setattr(module, "available_memory", lambda: 5000)
    with pytest.raises(ValueError, match="stands for 1,000 tokens"):
        read_tokens(tmp_path, [record])
