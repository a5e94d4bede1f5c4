"""What a session has on disk decides what goes through the model again, by the law."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sniffer.errors import RunError
from sniffer.forward.accumulator import Accumulator
from sniffer.runs.verify import verify
from sniffer.sampler import All, Picker, Uniform
from sniffer.storage.documents import refuse_repeated, repeated
from sniffer.storage.manifest import Manifest
from sniffer.storage.on_disk import OnDisk, look
from sniffer.storage.part_writer import PartWriter
from sniffer.storage.schema import Example
from sniffer.types import MOMENTS, Document, TokenBatch, by_number
from tests.helpers_store import DOCUMENTS, OUTPUTS, SAMPLER, SELECTION, Engine, repeat, resume, run, vectors

PAIRS = [(0, "q"), (0, "k"), (0, "q_pre")]


def batch_of(*ids: int, n_tokens: int = 10) -> TokenBatch:
    return TokenBatch(tuple(Document(i, str(i), np.zeros(n_tokens, np.int32), False) for i in ids), pad_id=0)


def picks(batch: TokenBatch, sampler=All()):  # noqa: B008 - frozen
    picker = Picker(sampler, 0)
    return {(0, side): picker.pick(batch, 0, side) for side in ("q", "k")}


def committed(*ids: int) -> dict[int, Example]:
    return {document.example_id: Example.of(document) for document in batch_of(*ids).documents}


def test_a_fresh_run_lacks_everything():
    batch = batch_of(1, 2)
    assert OnDisk().lacks(batch, picks(batch), PAIRS)
    assert OnDisk().done(batch, PAIRS) == {}


def test_committed_documents_lack_nothing():
    batch = batch_of(1, 2)
    found = OnDisk(committed(1, 2, 3))
    assert not found.lacks(batch, picks(batch), PAIRS)
    assert found.lacks(batch_of(1, 4), picks(batch_of(1, 4)), PAIRS)


def test_a_pair_that_is_not_there_is_lacked():
    batch = batch_of(1, 2)
    everywhere = dict.fromkeys(PAIRS, frozenset({1, 2}))
    assert not OnDisk(pending=everywhere).lacks(batch, picks(batch), PAIRS)
    for pair in PAIRS:
        some = everywhere | {pair: frozenset({1})}
        assert OnDisk(pending=some).lacks(batch, picks(batch), PAIRS)
        assert OnDisk(pending=some).done(batch, PAIRS)[pair] == {1}


def test_a_document_of_which_nothing_is_kept_is_not_lacked():
    batch = batch_of(1, 2)
    nothing = picks(batch, Uniform(base_rate=0.0))
    assert not OnDisk(pending={(0, "q"): frozenset({9})}).lacks(batch, nothing, PAIRS)


def test_what_is_done_includes_committed_documents():
    found = OnDisk(committed(1), {(0, "q"): frozenset({2})})
    done = found.done(batch_of(1, 2, 3), PAIRS)
    assert done == {(0, "q"): {1, 2}, (0, "k"): {1}, (0, "q_pre"): {1}}
    only_moments = OnDisk(moments=frozenset({2})).done(batch_of(1, 2, 3), PAIRS)
    assert only_moments == {**dict.fromkeys(PAIRS, frozenset()), MOMENTS: {2}}


def test_a_changed_document_is_named():
    found, changed = OnDisk(committed(1)), batch_of(1, n_tokens=11)
    with pytest.raises(RunError, match="'1' has changed: 10 tokens when it was captured, 11 now"):
        found.lacks(changed, picks(changed), PAIRS)
    assert not OnDisk(committed(1), strict=False).lacks(changed, picks(changed), PAIRS)


@pytest.mark.parametrize("outputs", ["plain", "checkpoints"])
@pytest.mark.parametrize("number", [0, -1])
def test_rows_that_are_there_twice_are_found_and_left_out(tmp_path: Path, outputs: str, number: int):
    run(tmp_path, OUTPUTS[outputs])
    whole = Manifest.load(tmp_path)
    again = repeat(tmp_path, number)
    assert any("there twice: resume" in problem for problem in verify(tmp_path)[1])
    with pytest.raises(RunError, match=r"has rows that .* has too: `python -m sniffer.runs resume"):
        refuse_repeated(tmp_path, Manifest.load(tmp_path).parts)
    engine = Engine()
    resume(tmp_path, OUTPUTS[outputs], engine)
    manifest, problems = verify(tmp_path)
    assert (problems, manifest.digest, manifest.rows) == ([], whole.digest, whole.rows)
    assert not engine.seen and not (tmp_path / again.path).exists()  # the model had nothing to do
    refuse_repeated(tmp_path, manifest.parts)


def test_of_two_parts_with_common_rows_the_one_with_more_is_kept(tmp_path: Path):
    """As a failed save left it: what was written first was written again, with what had come since."""
    run(tmp_path, OUTPUTS["checkpoints"])
    manifest = Manifest.load(tmp_path)
    parts = manifest.parts_of(0, "q")
    picks = Picker(SAMPLER, 7)
    held = Accumulator(SELECTION)
    for document in DOCUMENTS[:4]:
        batch = TokenBatch((document,), 0)
        drawn = {pair: picks.pick(batch, *pair) for pair in SELECTION.draws}
        held.add(batch, drawn, vectors(document, drawn))
    writer = PartWriter(tmp_path, by_number(manifest.geometry), picks, "float32")
    both = replace(writer.write(held, (0, "q"), 9), commit=parts[1].commit)
    assert {part.path for part, other in repeated(tmp_path, [*parts, both])} == {part.path for part in parts[:2]}
    assert {other.path for part, other in repeated(tmp_path, [*parts, both])} == {both.path}
    replace(manifest, parts=(*manifest.parts, both)).save(tmp_path)
    resume(tmp_path, OUTPUTS["checkpoints"])
    mended, problems = verify(tmp_path)
    assert (problems, mended.digest) == ([], manifest.digest)


def test_parts_without_a_document_in_common_are_left_alone(tmp_path: Path):
    run(tmp_path, OUTPUTS["pending to the end"])
    manifest = Manifest.load(tmp_path)
    assert len(manifest.parts) > len(SELECTION.heads) and not list(repeated(tmp_path, manifest.parts))
    assert look(tmp_path, manifest)[0].parts == manifest.parts


def test_a_part_that_cannot_be_read_is_named(tmp_path: Path):
    run(tmp_path, OUTPUTS["checkpoints"])
    parts = Manifest.load(tmp_path).parts
    (tmp_path / parts[0].path).write_bytes(b"no part")
    with pytest.raises(RunError, match=r"could not read .*part-00000.*verify"):
        list(repeated(tmp_path, parts))


@pytest.mark.parametrize("change", ["rows", "type"])
def test_a_part_that_stands_for_more_than_the_manifest_says_is_not_read(tmp_path: Path, monkeypatch, change: str):
    run(tmp_path, OUTPUTS["checkpoints"])
    first, *others = Manifest.load(tmp_path).parts_of(0, "q")
    table = pq.read_table(tmp_path / first.path)
    if change == "rows":
        table, wanted = pa.concat_tables([table] * 2), "rows, the manifest says"
    else:
        table, wanted = table.set_column(4, "example_id", table["example_id"].cast(pa.string())), "of the type string"
    pq.write_table(table, tmp_path / first.path)
    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(RunError, match=wanted):
        list(repeated(tmp_path, [first, *others]))
