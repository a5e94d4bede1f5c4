"""A stopped and resumed run is the run that was never stopped; what is damaged comes back; changes are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sniffer.engine import shift as shift_module
from sniffer.engine.shift import Shift
from sniffer.errors import CaptureError, RunError
from sniffer.runs.verify import verify
from sniffer.storage import on_disk as kept_module
from sniffer.storage import part_writer as parts_module
from sniffer.storage.documents import examples_by_pair
from sniffer.storage.lock import hold
from sniffer.storage.manifest import Manifest
from sniffer.storage.on_disk import look
from tests.helpers_runs import TEXTS, Runs, counting_forwards, must_be_whole, rows, stopping_after, take_up
from tests.helpers_store import repeat
from tests.tiny_copies import LLAMA, imported, llama_source, write_copy
from tests.tiny_run import save_checkpoint, save_texts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    save_checkpoint(place / "checkpoint")
    return place


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    return Runs(place / "checkpoint", save_texts(place / "texts.jsonl", TEXTS), place).start("whole")


@pytest.fixture
def runs(place: Path, tmp_path: Path, whole: Path) -> Runs:
    return Runs(place / "checkpoint", place / "texts.jsonl", tmp_path)


OUTPUTS = [(), ("output.checkpoint_every=3",), ("output.memory_limit=30kB",), ("output.memory_limit=1B",)]


@pytest.mark.parametrize("output", OUTPUTS)
def test_parts_and_commits_change_no_row(runs: Runs, whole: Path, output: tuple[str, ...]):
    folder = runs.start("run", *output)
    must_be_whole(folder, whole)
    assert rows(folder).equals(rows(whole))


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("batches", [0, 1, 4])
def test_a_stopped_run_is_completed_exactly(runs: Runs, whole: Path, output: tuple[str, ...], batches: int):
    folder = runs.start("run", *output, stop_after=batches)
    manifest, problems = verify(folder)
    assert not problems and not manifest.pending
    assert (manifest.status, manifest.reason) == ("interrupted", "Interrupted: enough")
    there = set(kept_module.read_examples(folder / "examples.parquet"))
    assert (len(there) > 0) == (batches > 0)
    seen, noting = counting_forwards()
    with noting:
        assert take_up(folder)
    assert not there & set(seen)  # nothing that was on disk went through the model again
    must_be_whole(folder, whole)
    assert Manifest.load(folder).resumes[0]["stopped_by"] == "Interrupted: enough"
    assert not take_up(folder)


def test_a_run_can_be_stopped_many_times(runs: Runs, whole: Path):
    folder = runs.start("run", stop_after=1)
    for _ in range(3):
        with stopping_after(1):
            take_up(folder)
    take_up(folder)
    must_be_whole(folder, whole)
    assert len(Manifest.load(folder).resumes) == 4


def test_readers_see_whole_documents_only(runs: Runs, whole: Path, monkeypatch: pytest.MonkeyPatch):
    """A run killed under a memory limit: some pairs are ahead of others on disk, and readers do not see it."""
    monkeypatch.setattr(shift_module, "COMMIT_AFTER", 1e9)
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Shift, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        runs.start("run", "output.memory_limit=20kB")
    folder = runs.place / "run"
    manifest, problems = verify(folder)
    assert not problems and not manifest.parts and manifest.pending and manifest.status == "running"
    assert rows(folder).is_empty()
    seen, noting = counting_forwards()
    with noting:
        take_up(folder)
    must_be_whole(folder, whole)
    assert len(seen) <= len(TEXTS)


def test_leftovers_are_removed_and_foreign_files_are_not(runs: Runs, whole: Path):
    folder = runs.start("run", stop_after=2)
    pair = folder / "captures/layer=00/kind=q"
    for name in ("part-00007.parquet", ".part-00008.parquet.123.tmp"):
        (pair / name).write_bytes(b"half")
    (pair / "notes.txt").write_text("mine")
    assert verify(folder)[1] == ["captures/layer=00/kind=q/notes.txt: no file of this run; remove it"]
    take_up(folder)
    assert {path.name for path in pair.iterdir()} == {"part-00000.parquet", "part-00001.parquet", "notes.txt"}


def test_a_resume_says_that_a_kill_stopped_the_run(runs: Runs, whole: Path):
    folder = runs.start("run", stop_after=2)
    replace(Manifest.load(folder), status="running", reason=None).save(folder)
    take_up(folder)
    assert Manifest.load(folder).resumes[0]["stopped_by"] == "a kill"


@pytest.mark.parametrize("path", ["captures", "captures/layer=00/kind=q", "config.yaml", ".manifest.json"])
def test_nothing_is_written_through_a_link_out_of_the_folder(runs: Runs, whole: Path, tmp_path: Path, path: str):
    folder = runs.start("run", stop_after=2)
    outside = tmp_path / "outside"
    (folder / path).rename(outside)
    (folder / path).symlink_to(outside)
    before = {file: file.read_bytes() for file in [outside, *outside.rglob("*")] if file.is_file()}
    with pytest.raises(RunError, match="is a link that leaves the run folder"):
        take_up(folder, restore=True)
    assert {file: file.read_bytes() for file in [outside, *outside.rglob("*")] if file.is_file()} == before


def test_a_damaged_part_alone_is_captured_again(runs: Runs, whole: Path):
    folder = runs.start("run", "output.checkpoint_every=4")
    manifest = Manifest.load(folder)
    lost = manifest.parts[-1]
    (folder / lost.path).unlink()
    seen, noting = counting_forwards()
    with noting:
        take_up(folder)
    must_be_whole(folder, whole)
    assert 0 < len(set(seen)) < len(TEXTS) / 2  # the batches of one commit
    kept = {part.path for part in manifest.parts} - {lost.path}
    assert kept < {part.path for part in Manifest.load(folder).parts}


def test_a_run_with_rows_twice_is_not_complete_and_is_mended(runs: Runs, whole: Path):
    folder = runs.start("run", "output.checkpoint_every=4")
    repeat(folder, 2)
    assert Manifest.load(folder).status == "complete" and any("twice" in problem for problem in verify(folder)[1])
    seen, noting = counting_forwards()
    with noting:
        assert take_up(folder)
    must_be_whole(folder, whole)
    assert not seen and rows(folder).equals(rows(whole))


def test_no_row_is_lost_when_a_repair_is_stopped(runs: Runs, whole: Path):
    folder = runs.start("run", "output.checkpoint_every=4")
    for path in ("captures/layer=00/kind=q/part-00000.parquet", "captures/layer=01/kind=k/part-00002.parquet"):
        (folder / path).write_bytes(b"")
    with stopping_after(5):
        take_up(folder)
    assert verify(folder)[1] == []
    take_up(folder)
    must_be_whole(folder, whole)


def test_damaged_examples_are_written_again_without_the_model(runs: Runs, whole: Path):
    folder = runs.start("run", "output.checkpoint_every=4")
    for name in ("examples.parquet", ".examples.parquet"):
        (folder / name).write_bytes(b"")
    seen, noting = counting_forwards()
    with noting:
        take_up(folder)
    must_be_whole(folder, whole)
    assert not seen


@pytest.mark.long
@settings(max_examples=8)
@given(damaged=st.sets(st.integers(0, 7), min_size=1), twin=st.booleans())
def test_looking_never_promises_what_is_not_there(
    tmp_path_factory: pytest.TempPathFactory, place: Path, whole: Path, damaged: set[int], twin: bool
):
    runs = Runs(place / "checkpoint", place / "texts.jsonl", tmp_path_factory.mktemp("look"))
    folder = runs.start("run", "output.checkpoint_every=5", stop_after=5)
    manifest = Manifest.load(folder)
    for number in damaged & set(range(len(manifest.parts))):
        (folder / manifest.parts[number].path).write_bytes(b"x")
    if twin:
        (folder / "examples.parquet").unlink()
    found, kept = look(folder, manifest)
    broken = {part.commit for part in manifest.parts} - {part.commit for part in found.parts}
    assert all((folder / part.path).stat().st_size == part.bytes for part in (*found.parts, *found.pending))
    assert not broken & {part.commit for part in found.parts}
    in_committed = examples_by_pair(folder, found.parts)
    assert set().union(*in_committed.values()) <= kept.committed.keys()
    assert not kept.committed.keys() & kept.waiting


@pytest.mark.long
@pytest.mark.parametrize(
    ("key", "value"), [("seed", 1), ("sampler.base_rate", 3.0), ("batch.max_tokens", 299), ("capture.layers", [0])]
)
def test_a_changed_configuration_is_named(runs: Runs, whole: Path, key: str, value: object):
    folder = runs.start("run", stop_after=2)
    plain = yaml.safe_load((folder / "config.yaml").read_text())
    node = plain
    for name in key.split(".")[:-1]:
        node = node[name]
    node[key.split(".")[-1]] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(RunError, match=f"config.{key}") as caught:
        take_up(folder)
    assert "\n" not in str(caught.value) and "--force" in str(caught.value)
    take_up(folder, restore=True)
    must_be_whole(folder, whole)


def test_how_often_to_commit_may_change(runs: Runs, whole: Path):
    folder = runs.start("run", stop_after=2)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("checkpoint_every: null", "checkpoint_every: 2"))
    take_up(folder)
    assert Manifest.load(folder).digest == Manifest.load(whole).digest


def test_changed_data_are_named(runs: Runs, whole: Path, tmp_path: Path):
    runs.texts = save_texts(tmp_path / "mine.jsonl", TEXTS)
    folder = runs.start("run", stop_after=4)
    save_texts(runs.texts, {name: text.replace("cat", "dog") for name, text in TEXTS.items()})
    with pytest.raises(RunError, match="dataset"):
        take_up(folder)


def test_a_changed_checkpoint_is_named(runs: Runs, whole: Path, tmp_path: Path):
    runs.checkpoint = save_checkpoint(tmp_path / "checkpoint")
    folder = runs.start("run", stop_after=2)
    weights = runs.checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(RunError, match="model.safetensors"):
        take_up(folder)


def test_other_versions_are_refused_and_recorded_when_forced(runs: Runs, whole: Path, monkeypatch: pytest.MonkeyPatch):
    folder = runs.start("run", stop_after=2)
    text = json.loads((folder / "manifest.json").read_text())
    del text["checksum"]
    text["versions"]["torch"] = "1.0"
    (folder / "manifest.json").write_text(json.dumps(text))
    with pytest.raises(RunError, match="versions.torch: 1.0 then"):
        take_up(folder)
    take_up(folder, force=True)
    manifest = Manifest.load(folder)
    assert manifest.digest == Manifest.load(whole).digest
    assert any("versions.torch" in line for line in manifest.resumes[-1]["differences"])


@pytest.mark.parametrize("status", ["complete", "interrupted"])
def test_a_kill_between_the_last_manifest_and_its_twin_is_no_damage(runs: Runs, whole: Path, status: str):
    folder = runs.start("run", stop_after=None if status == "complete" else 3)
    manifest, text = Manifest.load(folder), (folder / "manifest.json").read_bytes()
    replace(manifest, status="running", reason=None, finished=None).save(folder)
    (folder / "manifest.json").write_bytes(text)
    (folder / "..manifest.json.123.tmp").write_bytes(text[:9])
    assert verify(folder)[1] == []
    take_up(folder)
    must_be_whole(folder, whole)
    assert (folder / "manifest.json").read_bytes() == (folder / ".manifest.json").read_bytes()
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))


def test_a_folder_has_one_writer(runs: Runs, whole: Path):
    folder = runs.start("run", stop_after=2)
    with hold(folder):
        for act in (take_up, verify):
            with pytest.raises(RunError, match="written to"):
                act(folder)


def test_a_run_that_never_began_is_begun(runs: Runs, whole: Path):
    folder = runs.start("run", stop_after=0)
    for path in ("manifest.json", ".manifest.json"):
        (folder / path).unlink()
    for file in folder.glob("captures/*/*/*"):
        file.unlink()
    for name in ("captures/layer=00/kind=q", "captures/layer=00/kind=k"):
        (folder / name).rmdir()
    take_up(folder)
    must_be_whole(folder, whole)


def test_a_run_without_a_whole_configuration_is_begun_by_its_command(runs: Runs, whole: Path, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "rerun.yaml").write_bytes((whole / "rerun.yaml").read_bytes())
    with pytest.raises(RunError, match="before it had written its configuration: run its command again"):
        take_up(folder)


def test_no_run_folder(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RunError, match="not a"):
            take_up(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sampler": {"_target_": "os.system", "command": "true"}}, "sampler._target_=os.system"),
        ({"seed": "${oc.env:HOME}"}, "interpolation"),
        ({"model": {"_target_": "models.backbone.Checkpoint", "checkpoint": "x", "trust_remote_code": True}}, "remote"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_saved_configuration_cannot_run_code_of_its_choosing(
    runs: Runs, whole: Path, change: dict[str, object], message: str
):
    folder = runs.start("run", stop_after=0)
    plain = yaml.safe_load((folder / "config.yaml").read_text()) | change
    (folder / "config.yaml").write_text(yaml.safe_dump(plain))
    with pytest.raises(Exception, match=message):
        take_up(folder, force=True)


def test_rows_that_cannot_be_written_stay_in_memory(runs: Runs, whole: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that is full for a moment: the run stops, and what is written later is what was captured."""
    honest, calls = parts_module.write_part, []

    def fail_once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise CaptureError("could not write: No space left on device")
        return honest(*arguments)

    monkeypatch.setattr(parts_module, "write_part", fail_once)
    with pytest.raises(CaptureError, match="No space left"):
        runs.start("run", "output.checkpoint_every=4")
    folder = runs.place / "run"
    manifest, problems = verify(folder)
    assert not problems and manifest.status == "interrupted" and manifest.rows > 0
    take_up(folder)
    must_be_whole(folder, whole)


def test_memory_stays_within_its_limit(runs: Runs, whole: Path, monkeypatch: pytest.MonkeyPatch):
    held, honest = [], Shift.relieve

    def relieve(shift):
        (member,) = shift.crew.members
        before = member.worker.accumulator.nbytes
        honest(shift)
        held.append((before, member.worker.accumulator.nbytes))

    monkeypatch.setattr(Shift, "relieve", relieve)
    runs.start("run", "output.memory_limit=20kB")
    assert any(before > 20_000 for before, _ in held)
    assert all(after <= 20_000 for _, after in held)


def test_the_largest_pairs_leave_memory_first(runs: Runs, whole: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shift_module, "COMMIT_AFTER", 1e9)
    folder = runs.start("run", "output.memory_limit=40kB")
    parts = Manifest.load(folder).parts
    numbers = {kind: sum(part.kind == kind for part in parts) for kind in ("q", "k")}
    assert numbers["q"] > numbers["k"]  # twice as many query heads


def forget_or_change(folder: Path, section: str, change) -> None:
    """Has the manifest say something else of what the run was made with."""
    text = json.loads((folder / "manifest.json").read_text())
    text.pop("checksum", None)
    *path, last = section.split(".")
    place = text
    for name in path:
        place = place[name]
    change(place, last)
    for name in ("manifest.json", ".manifest.json"):
        (folder / name).write_text(json.dumps(text))


MADE_WITH = {
    "model.tokenizer": {"class": "PreTrainedTokenizerFast", "sha256": "0"},
    "backbone.code": {"transformers.models.llama.modeling_llama": "local copy, sha256:0"},
    "backbone.packages": {"peft": "0.1"},
    "backbone.attn_implementation": "eager",
}


@pytest.mark.parametrize("section", list(MADE_WITH))
def test_what_a_run_was_made_with_is_compared(runs: Runs, whole: Path, section: str):
    folder = runs.start("run", stop_after=2)
    forget_or_change(folder, section, lambda place, name: place.__setitem__(name, MADE_WITH[section]))
    with pytest.raises(RunError, match=f"the run cannot go on as it began: {section}"):
        take_up(folder)
    take_up(folder, force=True)
    assert any(line.startswith(section) for line in Manifest.load(folder).resumes[-1]["differences"])


def test_what_early_releases_did_not_record_is_no_difference(runs: Runs, whole: Path):
    folder = runs.start("run", stop_after=2)
    for section in ("model.tokenizer", "backbone.code", "backbone.packages"):
        assert Manifest.load(folder).as_json()[section.partition(".")[0]][section.partition(".")[2]] is not None
        forget_or_change(folder, section, lambda place, name: place.pop(name))
    take_up(folder)
    must_be_whole(folder, whole)


def test_an_edited_copy_is_named(runs: Runs, whole: Path, tmp_path: Path):
    """Runs of one copy and of another, or of none, are not one run."""
    write_copy(tmp_path, llama_source())
    with imported(tmp_path):
        folder = runs.start("run", stop_after=2)
    copied = Manifest.load(folder).backbone["code"][LLAMA]
    assert copied.startswith("local copy, sha256:")
    with pytest.raises(RunError, match=r"backbone.code.transformers.models.llama.modeling_llama: local copy, .* then"):
        take_up(folder)
    write_copy(tmp_path, llama_source() + "\n")
    with imported(tmp_path), pytest.raises(RunError, match="local copy, .* then, local copy, .* now"):
        take_up(folder)
    write_copy(tmp_path, llama_source())
    with imported(tmp_path):
        take_up(folder)
    assert Manifest.load(folder).digest == Manifest.load(whole).digest


SCALED = {
    "longrope": {"factor": 4.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
    "dynamic": {"factor": 4.0},
}


@pytest.mark.parametrize("kind", list(SCALED))
def test_runs_of_models_that_treat_lengths_differently_go_on(runs: Runs, tmp_path: Path, kind: str):
    """Early releases had documents of either side of longrope in one batch, whose rows were then others."""
    rope = {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 64, **SCALED[kind]}
    model = f"model.checkpoint={save_checkpoint(tmp_path / kind, rope_parameters=rope)}"
    whole, folder = runs.start("whole", model), runs.start("run", model, stop_after=2)
    earlier = copytree(folder, tmp_path / "earlier")
    take_up(folder)
    must_be_whole(folder, whole)
    forget_or_change(earlier, "backbone.lengths", lambda place, name: place.pop(name))
    if kind == "longrope":
        with pytest.raises(RunError, match=r"backbone.lengths.breaks: absent then, \[65\] now"):
            take_up(earlier)
    else:
        take_up(earlier)
        must_be_whole(earlier, whole)
