"""model_config.json: written with a run, held to its digest, published without places, and no need of early runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sniffer import open_run
from sniffer.errors import RunError
from sniffer.runs.publish import assemble
from sniffer.runs.verify import verify
from sniffer.storage.integrity import foreign
from sniffer.storage.manifest import Manifest
from sniffer.storage.model_config import with_model_config
from sniffer.storage.ownership import strangers
from tests.helpers_runs import take_up
from tests.helpers_storage import make_run

NAME = "model_config.json"


def test_it_is_the_config_of_the_model_that_ran(run: Callable, checkpoint: Path):
    from transformers import AutoConfig

    captured = run("model.config_overrides={rope_parameters: {rope_theta: 777.0}}", "model.dtype=bfloat16")
    found = captured.model_config
    wanted = json.loads(AutoConfig.from_pretrained(checkpoint).to_json_string(use_diff=False))
    differs = {name for name in found.keys() | wanted.keys() if found.get(name, 0) != wanted.get(name, 0)}
    assert differs <= {"rope_parameters", "dtype", "_name_or_path", "architectures", "torch_dtype"}
    assert found["rope_parameters"]["rope_theta"] == 777.0 and found["dtype"] == "bfloat16"
    assert str(checkpoint) not in (captured.folder / NAME).read_text()
    assert AutoConfig.for_model(**found).rope_parameters["rope_theta"] == 777.0
    assert verify(captured.folder)[1] == []


@pytest.mark.parametrize("harm", ["missing", "changed"])
def test_a_damaged_one_is_named_and_written_again(run: Callable, harm: str):
    folder: Path = run().folder
    whole = (folder / NAME).read_text()
    if harm == "missing":
        (folder / NAME).unlink()
    else:
        (folder / NAME).write_text(whole.replace('"llama"', '"gemma"'))
    damaged = open_run(folder)
    assert damaged.vectors(layer=0, head=0, kind="q").vectors.size
    with pytest.raises(RunError, match=f"{NAME} (is missing|has changed|has [0-9,]+ bytes)"):
        _ = damaged.model_config
    assert [problem.split(":")[0] for problem in verify(folder)[1]] == [NAME]
    digest = Manifest.load(folder).digest
    assert take_up(folder) and verify(folder)[1] == []
    assert (folder / NAME).read_text() == whole and Manifest.load(folder).digest == digest
    assert not take_up(folder)


def test_early_runs_have_none_and_are_resumed_into_having_one(run: Callable):
    folder: Path = run().folder
    (folder / NAME).unlink()
    for name in ("manifest.json", ".manifest.json"):
        values = json.loads((folder / name).read_text())
        for key in ("model_config", "rope", "checksum"):
            del values[key]
        (folder / name).write_text(json.dumps(values | {"status": "interrupted"}))
    early = open_run(folder)
    assert early.manifest.rope == () and early.manifest.model_config is None
    with pytest.raises(RunError, match="did not keep the model's config: capture it anew"):
        _ = early.model_config
    assert verify(folder)[1] == []
    assert take_up(folder) and verify(folder)[1] == []
    assert open_run(folder).model_config["model_type"] == "llama" and open_run(folder).rope(0).rotary == 8


def test_no_place_of_this_machine_is_published(tmp_path: Path):
    folder = make_run(tmp_path / "run").folder
    values = {"vision": {"path": f"{tmp_path}/weights"}, "numbers": [1, 2.5, None]}
    with_model_config(folder, Manifest.load(folder), values).save(folder)
    assemble(folder, tmp_path / "shown", "owner/name")
    assert open_run(tmp_path / "shown").model_config == {**values, "vision": {"path": "weights"}}
    assert str(tmp_path) not in (tmp_path / "shown" / NAME).read_text()


def test_it_is_a_runs_own_file(tmp_path: Path):
    """Of a run that was killed before it had a manifest, too; and by no other name."""
    folder = make_run(tmp_path / "run").folder
    manifest = with_model_config(folder, Manifest.load(folder), {})
    assert foreign(folder, manifest) == []
    (folder / "config.json").write_text("{}")
    assert foreign(folder, manifest) == ["config.json"]
    values = json.loads((folder / "manifest.json").read_text())
    del values["checksum"]
    values["model_config"] = {"path": "../secret.json", "rows": 0, "bytes": 1, "sha256": ""}
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"'\.\./secret\.json'"):
        Manifest.load(folder)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / f".{NAME}.7.tmp").write_text("{")
    assert strangers(killed) == []
