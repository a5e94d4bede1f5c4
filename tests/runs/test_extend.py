"""A complete run takes in what its dataset has more of; what it has stays, and a fresh run has the same rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sniffer.config.trust import Trust, build, needed_config
from sniffer.errors import ConfigError, RunError
from sniffer.forward import passes
from sniffer.reader import open_run
from sniffer.runs.__main__ import main
from sniffer.runs.extend import extend
from sniffer.runs.reproduce import reproduce
from sniffer.runs.verify import verify
from sniffer.storage.lock import hold
from sniffer.storage.manifest import Manifest
from tests.helpers_runs import Runs, counting_forwards, rows, stopping_after, take_up
from tests.tiny_run import save_checkpoint, save_texts

OLD = {f"doc-{n}": f"the cat number {n} sat on the mat. " * (1 + n * 5 % 4) for n in range(7)}
NEW = {f"more-{n}": f"a dog ran over hill {n}, and came back. " * (1 + n * 3 % 4) for n in range(5)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def runs(checkpoint: Path, tmp_path: Path) -> Runs:
    return Runs(checkpoint, save_texts(tmp_path / "texts.jsonl", OLD), tmp_path)


def grow(runs: Runs, texts: dict[str, str] = NEW) -> None:
    """Adds documents at the end of the file."""
    runs.texts.write_text(runs.texts.read_text() + save_texts(runs.place / "new.jsonl", texts).read_text())


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything that holds rows or token ids."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.glob("[ct]*/**/*.parquet")}


def everything(folder: Path) -> dict[Path, bytes]:
    """All files but the log and the lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".log" and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


def forwards() -> tuple[list[frozenset[int]], type[passes.Observer]]:
    """The documents of each batch that goes through the model."""
    seen: list[frozenset[int]] = []

    class Noting(passes.Observer):
        def __init__(self, batch, *rest) -> None:
            seen.append(frozenset(document.example_id for document in batch.documents))
            super().__init__(batch, *rest)

    return seen, Noting


def test_a_grown_file_adds_its_documents_and_touches_no_part(runs: Runs, tmp_path: Path):
    folder = runs.start("run", "output.checkpoint_every=3")
    before, captured = files_of(folder), rows(folder)
    grow(runs)
    seen, noting = counting_forwards()
    with noting:
        assert extend(folder, Trust()) == 12
    assert verify(folder)[1] == []
    manifest, run = Manifest.load(folder), open_run(folder)
    assert manifest.status == "complete" and manifest.resumes[0]["examples"] == 7
    ids = dict(run.examples().select("source_id", "example_id").iter_rows())
    assert ids.keys() == OLD.keys() | NEW.keys() and set(seen) == {ids[name] for name in NEW}
    after = files_of(folder)
    assert before.items() < after.items()
    assert {path.split("/")[0] for path in after.keys() - before.keys()} == {"captures", "tokens"}
    # The rows are those that one run over everything has; beyond the same batches, up to rounding.
    whole = rows(runs.start("whole"))
    found = rows(folder)
    assert found.drop("vector").equals(whole.drop("vector"))
    assert np.allclose(found["vector"].to_numpy(), whole["vector"].to_numpy(), atol=1e-5)
    assert found.filter(pl.col("example_id").is_in([ids[name] for name in OLD])).equals(captured)
    assert {len(run.tokens(ids[name])) for name in NEW} == {len(text.encode()) for text in NEW.values()}


def test_an_extended_run_is_reproduced_and_run_again_to_the_bit(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    """Twice extended, so that the batches of one run over everything are others, as its forwards show."""
    folder = runs.start("run", "dataset.max_examples=3")
    for most in (7, 12):
        if most == 12:
            grow(runs)
        assert extend(folder, Trust(), most) == most
    assert needed_config(folder)["batch"]["breaks"] == [3, 7]
    assert verify(folder)[1] == []
    seen, noting = forwards()
    monkeypatch.setattr(passes, "Observer", noting)
    same, told = reproduce(folder, runs.place / "again", Trust())
    assert same and told[0].startswith("identical")
    ids = dict(open_run(folder).examples().select("source_id", "example_id").iter_rows())
    sessions = [{ids[name] for name in [*OLD, *NEW][slice(*part)]} for part in ((0, 3), (3, 7), (7, 12))]
    assert all(any(batch <= session for session in sessions) for batch in seen)
    piecewise = set(seen)
    seen.clear()
    runs.start("whole")
    assert set(seen) != piecewise


def test_the_command_line(runs: Runs, capsys: pytest.CaptureFixture[str]):
    folder = runs.start("run", "dataset.max_examples=4")
    before = everything(folder)
    capsys.readouterr()
    assert main(["resume", str(folder), "--extend"]) == 0
    assert capsys.readouterr().out.strip() == f"{folder} has all documents that its dataset gives: nothing to add"
    assert everything(folder) == before
    assert main(["resume", str(folder), "--extend", "dataset.max_examples=6"]) == 0
    assert Manifest.load(folder).counts["examples"] == 6
    capsys.readouterr()
    assert main(["inspect", str(folder)]) == 0
    assert "beyond 4 documents" in capsys.readouterr().out
    assert main(["resume", str(folder), "--extend", "dataset.max_examples=5"]) == 1
    assert "was made with 6" in capsys.readouterr().err
    assert main(["resume", str(folder), "--extend", "--force"]) == 1
    with pytest.raises(SystemExit):
        main(["resume", "--extend", str(folder)])
    assert "RUN comes before --extend" in capsys.readouterr().err


def test_a_stopped_extension_is_resumed(runs: Runs):
    folder = runs.start("run", "output.checkpoint_every=2")
    before = files_of(folder)
    grow(runs)
    with stopping_after(1):
        extend(folder, Trust())
    manifest, problems = verify(folder)
    assert manifest.status == "interrupted" and not problems and 7 < manifest.counts["examples"] < 12
    with pytest.raises(RunError, match=r"is interrupted: .* resume .* completes it"):
        extend(folder, Trust())
    assert take_up(folder)
    assert verify(folder)[1] == [] and before.items() < files_of(folder).items()
    assert Manifest.load(folder).counts["examples"] == 12
    assert reproduce(folder, runs.place / "again", Trust())[0]


def test_an_extension_that_cannot_begin_leaves_the_run_as_it_was(runs: Runs, monkeypatch: pytest.MonkeyPatch):
    folder = runs.start("run")
    grow(runs)
    before = everything(folder)

    def no_memory(self, *arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("sniffer.engine.local.LocalEngine.open", no_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        extend(folder, Trust())
    assert everything(folder) == before and verify(folder)[1] == []


def refused(folder: Path, match: str, most: int | None = None) -> None:
    """No model is loaded, and nothing changes."""
    before = everything(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sniffer.capture.run", None)
        with pytest.raises(RunError, match=match):
            extend(folder, Trust(), most)
    assert everything(folder) == before


def test_documents_that_are_not_what_they_were_are_refused(runs: Runs):
    folder = runs.start("run")
    grow(runs)
    grown = runs.texts.read_text()
    runs.texts.write_text(grown.replace("number 3 sat", "number 9 sat"))  # as long as before
    refused(folder, "'doc-3' is not what it was when it was captured")
    runs.texts.write_text("\n".join(grown.splitlines()[1:]) + "\n")
    refused(folder, "'more-0' is new and does not come after all that the run has, such as 'doc-0'")
    runs.texts.write_text("\n".join(grown.splitlines()[:4]) + "\n")
    refused(folder, "3 documents of the run, such as 'doc-.', are not in its dataset any more")
    lines = grown.splitlines()
    runs.texts.write_text("\n".join([lines[-1], *lines[:-1]]) + "\n")
    refused(folder, "'more-4' is new and does not come after")
    runs.texts.write_text(grown)
    assert extend(folder, Trust()) == 12


def test_what_else_has_changed_is_refused_by_name(runs: Runs):
    folder = runs.start("run")
    grow(runs)
    config = folder / "config.yaml"
    honest = config.read_text()
    config.write_text(honest.replace("base_rate: 20", "base_rate: 10"))
    refused(folder, r"config.sampler.base_rate: 20.* then, 10.* now")
    config.write_text(honest)
    with hold(folder):
        refused(folder, "is being written to by another process")
    part = next(folder.glob("captures/*/*/*.parquet"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    refused(folder, r"is damaged: .* resume .* completes it")
    part.write_bytes(whole)
    assert extend(folder, Trust()) == 12


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["dataset.pack_to=200"], r"dataset.pack_to=200 cannot be extended: .* its last document"),
        (["dataset.shuffle_seed=1", "dataset.max_examples=4"], r"dataset.shuffle_seed=1 cannot be extended"),
    ],
)
def test_what_more_texts_would_reorder_is_refused(runs: Runs, words: list[str], match: str):
    folder = runs.start("run", *words, "dataset.pack_separator=none")
    grow(runs)
    refused(folder, match, 12 if "shuffle" in words[0] else None)


def test_without_token_ids_unchanged_data_are_believed_and_grown_ones_are_not(runs: Runs):
    folder = runs.start("run", "output.tokens=false", "dataset.max_examples=4")
    assert extend(folder, Trust(), 6) == 6
    grow(runs)
    refused(folder, "keeps no token ids", 9)


def test_windows_and_sections_are_held_to_their_texts(runs: Runs, tmp_path: Path):
    """A book that grows has another last window; a new book has windows of its own."""
    books = tmp_path / "books"
    books.mkdir()
    (books / "a.txt").write_text("the cat sat on the mat. " * 4)
    words = ["dataset=text", f"dataset.path={books}", "~dataset.text_column", "~dataset.id_column"]
    folder = Runs.start(OnText(runs, words), "run", "dataset.window=40")
    (books / "b.txt").write_text("a dog ran. " * 9)
    assert extend(folder, Trust()) == 6
    assert reproduce(folder, runs.place / "again", Trust())[0]
    (books / "b.txt").write_text("a dog ran. " * 10)
    refused(folder, "'b.txt@80' is not what it was")
    (books / "b.txt").write_text("a dog ran. " * 9)
    (books / "aa.txt").write_text("comes between")
    refused(folder, "'aa.txt' is new and does not come after all")


class OnText(Runs):
    """Runs with a command line of their own."""

    def __init__(self, runs: Runs, dataset: list[str]) -> None:
        super().__init__(runs.checkpoint, runs.texts, runs.place)
        self.dataset = dataset

    def words(self) -> list[str]:
        kept = [word for word in super().words() if not word.startswith("dataset")]
        return [*kept, *(word for word in self.dataset if not word.startswith("~"))]


def test_moments_come_to_be_of_all_documents(runs: Runs):
    moments = ("capture.moments.kinds=[k]", "capture.moments.second=diagonal")
    folder = runs.start("run", *moments)
    before = {path: path.read_bytes() for path in folder.glob("moments/*.parquet")}
    grow(runs)
    assert extend(folder, Trust()) == 12 and verify(folder)[1] == []
    after = {path: path.read_bytes() for path in folder.glob("moments/*.parquet")}
    assert len(before) == 1 and before.items() < after.items()
    found, whole = (open_run(place).moments(layer=1, head=0, kind="k") for place in (folder, runs.start("w", *moments)))
    tokens = sum(len(text.encode()) for text in [*OLD.values(), *NEW.values()])
    assert found.n == whole.n == tokens
    assert np.allclose(found.mean, whole.mean, atol=1e-6)
    assert reproduce(folder, runs.place / "again", Trust())[0]


def test_a_shard_takes_its_part_of_what_is_new(runs: Runs):
    folders = [runs.start(f"run-{n}", "dataset.shard.count=2", f"dataset.shard.index={n}") for n in range(2)]
    grow(runs)
    assert [extend(folder, Trust()) for folder in folders] == [6, 6]
    whole = rows(runs.start("whole"))
    both = pl.concat(map(rows, folders)).sort("layer", "kind", "head", "example_id", "position")
    assert both.drop("vector").equals(whole.drop("vector"))
    assert all(verify(folder)[1] == [] for folder in folders)


def test_breaks_are_a_key_of_the_configuration(runs: Runs):
    """What an extension writes down, a fresh run may ask for; numbers that do not ascend are refused."""
    grow(runs)
    folder = runs.start("run", "batch.breaks=[7]")
    plain = needed_config(folder)
    assert json.dumps(plain["batch"]) == '{"max_tokens": 300, "breaks": [7]}'
    for wrong in ([3, 3], [0], [5, 2]):
        with pytest.raises(ConfigError, match="batch.breaks=.* must be numbers of documents, ascending from 1"):
            build({**plain, "batch": {"max_tokens": 300, "breaks": wrong}}, Trust(), folder)
