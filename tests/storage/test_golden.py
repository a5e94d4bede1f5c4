"""Run folders that the first release wrote: they open, verify, and mean what they meant, for ever.

tests/golden/whole is a finished run of a tiny float32 model, tests/golden/interrupted one that was stopped after two of
eight documents. What is expected of them was written down when they were made.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from sniffer.config.trust import Trust, build, needed_config, read_rerun
from sniffer.reader import Run, open_run
from sniffer.runs.verify import verify
from sniffer.sampler import describe
from sniffer.storage.manifest import Manifest
from sniffer.storage.on_disk import look

GOLDEN = Path(__file__).parents[1] / "golden"
DIGESTS = {"whole": "1a037ef84dda40b7e1b7cb3eb6c63268", "interrupted": "15969ca9f7936eca1ceefa85f7edfeb5"}
VECTORS = {
    "q": "3d83da1aa7c9b558ad05180f8d5526bbb1cd8723ee4cc53d6416d57e9f3e75c8",
    "k": "f0925a1a36fbb2b521566ff701ebde87dbce416198f547ea8da0e77c5a925316",
}
"""SHA-256 of the float32 vectors of head 0 in the finished run, in the order of documents and positions."""


@pytest.fixture(params=DIGESTS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, since who verifies leaves a lock."""
    return shutil.copytree(GOLDEN / request.param, tmp_path / request.param)


def test_every_row_is_there_and_right(golden: Path):
    manifest, problems = verify(golden)
    assert problems == []
    assert manifest.digest == DIGESTS[golden.name]
    assert manifest.status == {"whole": "complete", "interrupted": "interrupted"}[golden.name]


def test_vectors_are_those_in_the_files():
    run = open_run(GOLDEN / "whole")
    assert isinstance(run, Run) and run.layers == (1,)
    for kind, digest in VECTORS.items():
        (part,) = (GOLDEN / "whole").glob(f"captures/layer=01/kind={kind}/*.parquet")
        rows = pl.DataFrame(pq.ParquetFile(part).read()).filter(pl.col("head") == 0).sort("example_id", "position")
        expected = np.stack(rows["vector"].to_list()).astype(np.float32)
        assert hashlib.sha256(expected.tobytes()).hexdigest() == digest
        found = run.vectors(layer=1, head=0, kind=kind)
        order = np.lexsort((found.positions, found.example_ids))
        assert np.array_equal(found.vectors[order], expected)
        assert found.positions[order].tolist() == rows["position"].to_list()


def test_what_is_on_disk_is_not_captured_again(tmp_path: Path):
    folder = shutil.copytree(GOLDEN / "interrupted", tmp_path / "run")
    manifest, kept = look(folder, Manifest.load(folder))
    assert manifest.parts == Manifest.load(folder).parts and not kept.pending
    assert sorted(example.source_id for example in kept.committed.values()) == ["doc-1", "doc-4"]  # of about one length


def test_the_names_in_a_saved_configuration_are_for_good(golden: Path):
    plain, texts = needed_config(golden), golden / "texts.jsonl"
    texts.write_text('{"id": "doc-0", "text": "some"}')
    plain["dataset"]["path"] = str(texts)
    config = build(plain, Trust(), golden / "config.yaml")
    names = {
        "model": "models.backbone.Checkpoint",
        "dataset": "sniffer.tables.JsonLines",
        "sampler": {"whole": "sniffer.sampler.Uniform", "interrupted": "sniffer.sampler.LogUniform"}[golden.name],
    }
    for key, name in names.items():
        assert plain[key]["_target_"] == name and type(getattr(config, key)).__name__ == name.rpartition(".")[2]
    # A run of today writes the same names, or resuming would take it for another.
    then = Manifest.load(golden)
    assert config.dataset.describe()["_target_"] == then.dataset["_target_"] == names["dataset"]
    assert describe(config.sampler)["_target_"] == then.sampler["_target_"] == names["sampler"]
    assert read_rerun(golden, []).sampler._target_ == names["sampler"]
