"""What is published explains itself, loads, tells no local path, and arrives at the hub byte for byte."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import yaml
from markdown_it import MarkdownIt

from sniffer.errors import RunError
from sniffer.reader.run import Run
from sniffer.reader.sweep import open_run
from sniffer.runs import publish as publish_module
from sniffer.runs.__main__ import main
from sniffer.runs.card import Place, card, config_name
from sniffer.runs.export import export
from sniffer.runs.private import without_paths
from sniffer.runs.publish import assemble
from sniffer.runs.verify import verify
from sniffer.sampler import Uniform
from sniffer.storage.manifest import Manifest
from sniffer.types import Sections
from tests.experiments.planted import planted_run
from tests.helpers_hub import Hub, serving
from tests.helpers_storage import make_run
from tests.helpers_store import repeat


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run", parts=2).folder
    manifest = Manifest.load(folder)
    secret = {"dataset": {"_target_": "sniffer.tables.JsonLines", "path": "/home/someone/secret/texts.jsonl"}}
    replace(manifest, model={"checkpoint": "/home/someone/models/mine"}, **secret, config=secret).save(folder)
    return folder


def publish(address: str, token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "sniffer.runs", "publish", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_card_tells_the_law_of_our_own_samplers_only(folder: Path):
    """Someone else's class may have the name of one of ours."""
    manifest = Manifest.load(folder)
    theirs = replace(manifest, sampler={**manifest.sampler, "_target_": "mine.LogUniform"})
    assert "floor(log2(p + 1))" in card(manifest, Place("some/one"), None)
    assert "floor(log2(p + 1))" not in card(theirs, Place("some/one"), None)
    assert "that of mine.LogUniform" in card(theirs, Place("some/one"), None)


def test_a_dry_run_is_a_run_folder_with_a_card(folder: Path, tmp_path: Path):
    target = tmp_path / "published"
    assemble(folder, target, "some/one", "cc-by-4.0")
    original, published = open_run(folder), open_run(target)
    assert isinstance(original, Run) and isinstance(published, Run)
    assert published.scan().collect().equals(original.scan().collect())
    assert verify(target)[1] == []
    text = (target / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["license"] == "cc-by-4.0"
    assert {config["config_name"] for config in head["configs"]} == {
        config_name(layer, kind) for layer in (0, 2) for kind in ("q", "k")
    }
    for config in head["configs"]:
        assert len(list(target.glob(config["data_files"][0]["path"]))) == 2
    for told in (
        "numbers that are not finite | of ",
        "base_rate 4.0",
        "floor(log2(p + 1))",
        "mine",
        "cc-by-4.0",
        'load_dataset("some/one"',
        "digest",
    ):
        assert told in text


def test_no_local_path_is_told(folder: Path, tmp_path: Path):
    target = tmp_path / "published"
    assemble(folder, target, "some/one")
    for file in target.rglob("*"):
        if file.is_file():
            assert b"someone" not in file.read_bytes(), file
    assert without_paths({"a": ["C:\\Users\\me\\x", "hub/name", 3]}) == {"a": ["x", "hub/name", 3]}


SECRETS = (
    "/home/someone/secret/texts.jsonl",
    "~someone/texts",
    "file:///home/someone/a b.txt",
    "https://someone:token@example.org/data",
    "C:\\Users\\someone\\x",
    "reads (/home/someone/x), then '/home/someone/y'",
)


@pytest.mark.parametrize("secret", SECRETS)
def test_no_local_path_is_told_wherever_it_stands(folder: Path, tmp_path: Path, secret: str):
    manifest = Manifest.load(folder)
    resume = {
        "at": manifest.created,
        "stopped_by": f"DatasetError: {secret} is gone",
        "examples": 2,
        "differences": [f"config.dataset.path: {secret} then, absent now"],
    }
    config = {"dataset": {"path": secret, "globs": [secret]}, "engine": {"name": "ray", "address": "someone.lan:6379"}}
    everywhere = {name: {"x": secret, secret: 1} for name in ("model", "dataset", "device", "backbone")}
    replace(manifest, reason=secret, resumes=(resume,), config=config, **everywhere).save(folder)
    assemble(folder, tmp_path / "published", "some/one")
    for file in (tmp_path / "published").rglob("*"):
        assert not file.is_file() or b"someone" not in file.read_bytes(), file
    shown = Manifest.load(tmp_path / "published")
    assert shown.resumes[0] == resume | {"stopped_by": "DatasetError", "differences": ["config.dataset.path"]}
    assert verify(tmp_path / "published")[1] == []


def test_what_names_no_local_path_stays():
    for text in (
        "owner/name",
        "a / b",
        "1/2",
        "hf://datasets/owner/name",
        "https://x.org/a/b",
        "models.backbone.Checkpoint",
    ):
        assert without_paths(text) == text


def test_a_path_that_is_known_and_would_be_told_is_refused(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sniffer.runs.private.PLACE", re.compile("(?!)"))
    manifest = Manifest.load(folder)
    replace(manifest, backbone={"note": f"of {folder.parent}/weights"}).save(folder)
    with pytest.raises(RunError, match="would tell the local path"):
        assemble(folder, tmp_path / "published", "some/one")


def test_only_whole_runs_are_published(folder: Path, tmp_path: Path):
    part = folder / Manifest.load(folder).parts[0].path
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="SHA-256"):
        assemble(folder, tmp_path / "one", "some/one")
    replace(Manifest.load(folder), status="interrupted").save(folder)
    with pytest.raises(RunError, match="resume"):
        assemble(folder, tmp_path / "two", "some/one")


def test_rows_that_are_there_twice_are_not_handed_on(folder: Path, tmp_path: Path):
    repeat(folder, 0)
    told = r"part-0000\d\.parquet has rows that .* has too: .*resume"
    with pytest.raises(RunError, match=told):
        assemble(folder, tmp_path / "published", "some/one")
    with pytest.raises(RunError, match=told):
        export(folder, tmp_path / "heads")


def test_what_cannot_be_published_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    for target in (tmp_path / "a" / "b", mine):
        with monkeypatch.context() as broken:
            broken.setattr(publish_module, "card", lambda *_: {}[0])
            with pytest.raises(KeyError):
                assemble(folder, target, "some/one")
    assert sorted(tmp_path.iterdir()) == [mine, folder] and not list(mine.iterdir())
    assemble(folder, tmp_path / "a" / "b", "some/one")
    with pytest.raises(RunError, match="holds something already"):
        assemble(folder, tmp_path / "a" / "b", "some/one")
    assert verify(tmp_path / "a" / "b")[1] == []


def test_load_dataset_reads_it(folder: Path, tmp_path: Path):
    target = tmp_path / "published"
    assemble(folder, target, "some/one")
    from datasets import load_dataset

    rows = load_dataset(str(target), config_name(2, "k"), split="train", cache_dir=str(tmp_path / "cache"))
    run = open_run(folder)
    assert isinstance(run, Run)
    assert len(rows) == len(run.scan([2], ["k"]).collect())
    assert len(rows[0]["vector"]) == 8


def test_what_is_pushed_arrives(folder: Path, tmp_path: Path, hub: Hub):
    assemble(folder, tmp_path / "published", "some/one")
    done = publish(hub.address, "hf_good", str(folder), "some/one", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/datasets/some/one"
    assert hub.created[0]["type"] == "dataset" and hub.created[0].get("visibility", "private") == "private"
    wanted = {
        file.relative_to(tmp_path / "published").as_posix(): file.read_bytes()
        for file in (tmp_path / "published").rglob("*")
        if file.is_file()
    }
    assert hub.files.keys() == wanted.keys()
    assert all(hub.files[name] == content for name, content in wanted.items() if not name.endswith("manifest.json"))
    assert not list(folder.parent.glob(".publishing-*"))


def test_a_run_that_is_published_again_replaces_the_earlier_one(folder: Path, tmp_path: Path, hub: Hub):
    """In one commit: whoever reads finds one run or the other, never rows of both."""
    owners = {"notes.md": b"mine", "captures/notes.md": b"mine", "captures/layer=00/kind=q/mine.parquet": b"mine"}
    hub.files.update(owners | {".gitattributes": b"hub"})
    assert publish(hub.address, "hf_good", str(folder), "some/one").returncode == 0
    smaller = make_run(tmp_path / "smaller", layers=(2,), kinds=("k", "v")).folder
    done = publish(hub.address, "hf_good", str(smaller), "some/one")
    assert done.returncode == 0 and len(hub.commits) == 2, done.stderr
    for name, content in hub.files.items():
        (tmp_path / "snapshot" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "snapshot" / name).write_bytes(content)
    kept = {name: content for name, content in hub.files.items() if name in (*owners, ".gitattributes")}
    assert kept == owners | {".gitattributes": b"hub"}
    snapshot = open_run(tmp_path / "snapshot")
    assert snapshot.manifest.digest == open_run(smaller).manifest.digest
    parts = {part.path for part in snapshot.manifest.parts}
    assert {name for name in hub.files if "/part-" in name} == parts


def test_a_branch_is_made_replaced_and_pointed_at(
    folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """As one branch per model and text has it; what lies on others stays."""
    for name, value in (("ENDPOINT", hub.address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    command, heads_of = ["publish", str(folder), "some/one", "--branch", "tiny/texts-2"], ["--layout", "heads"]
    hub.files["README.md"] = b"which branches there are"
    assert main(command + heads_of) == 0
    assert capsys.readouterr().out.strip() == f"{hub.address}/datasets/some/one/tree/tiny/texts-2"
    heads = {
        f"l{layer:02d}h{head:02d}{kind}" for layer in (0, 2) for kind, n in (("q", 4), ("k", 2)) for head in range(n)
    }
    there = hub.branches["tiny/texts-2"]
    assert there.keys() == {"README.md", "examples.parquet", *(f"{name}/data.parquet" for name in heads)}
    told = there["README.md"].decode()
    assert 'data_files="l00h00q/data.parquet", split="train", revision="tiny/texts-2")' in told
    assert 'repo_type="dataset", revision="tiny/texts-2")' in told and "the branch `tiny/texts-2`" in told
    assert "import FOLDER --to RUN --heads 4/2 --sampler log_uniform base_rate=4.0 min_bucket_size=8" in told
    # A run in the place of these files, and they in its place again: nothing of the other stays.
    there |= {"config.yaml": b"mine", "l00h00q/mine.txt": b"mine"}
    assert main(command) == 0
    assert not any(name.endswith("data.parquet") for name in there) and there["config.yaml"] != b"mine"
    assert 'load_dataset("some/one", "l00q", split="train", revision="tiny/texts-2")' in there["README.md"].decode()
    assert main(command + heads_of) == 0
    assert there.keys() == {"README.md", "examples.parquet", "l00h00q/mine.txt", *(f"{h}/data.parquet" for h in heads)}
    assert hub.files == {"README.md": b"which branches there are"} and len(hub.commits) == 3


def test_published_heads_become_the_run_again(folder: Path, tmp_path: Path):
    """By the command that the card names."""
    assemble(folder, tmp_path / "heads", "some/one", layout="heads")
    command = (tmp_path / "heads/README.md").read_text().split("python -m sniffer.runs ")[1].splitlines()[0]
    words = command.replace("FOLDER", str(tmp_path / "heads")).replace("RUN", str(tmp_path / "back")).split()
    assert main(words) == 0
    original, back = open_run(folder), open_run(tmp_path / "back")
    assert isinstance(original, Run) and isinstance(back, Run)
    one, other = (run.vectors(layer=2, head=1, kind="k") for run in (original, back))
    assert one.vectors.tobytes() == other.vectors.tobytes()
    assert np.array_equal(one.inclusion_probability, other.inclusion_probability)
    from datasets import load_dataset

    file, cache = "l02h01k/data.parquet", str(tmp_path / "cache")
    rows = load_dataset(str(tmp_path / "heads"), data_files=file, split="train", cache_dir=cache)
    assert rows["position"] == one.positions.tolist()


def test_a_branch_that_is_no_name_is_refused(folder: Path, tmp_path: Path):
    for branch in ("", "a b", "a..b", "a/", "-x", "refs/heads/x", "a.lock", 'a"b', "a/.b", "a\n"):
        with pytest.raises(RunError, match="no name for a branch"):
            assemble(folder, tmp_path / "published", "some/one", branch=branch)
    with pytest.raises(RunError, match="no place for token ids"):
        assemble(folder, tmp_path / "published", "some/one", tokens=True, layout="heads")
    assert not (tmp_path / "published").exists()


def test_the_card_has_the_law_and_the_sections(tmp_path: Path):
    parts = [Sections.one("question", 30), Sections.one("a|b", 34)]
    law = Uniform(base_rate=32.0, bucket_size=64, keep_sections=["a|b"])
    run = planted_run(
        tmp_path / "run", lengths=(64, 64), layers=(0,), sections=lambda _: Sections.joined(parts), sampler=law
    )
    assemble(run.folder, tmp_path / "published", "some/one")
    text = (tmp_path / "published/README.md").read_text()
    rows = {kind: len(run.scan(kind=kind).collect()) for kind in ("q", "k")}
    assert (
        f"| bucket | probability | rows of q | rows of k |\n| --- | ---: | ---: | ---: |\n| 0 | 0.5 | {rows['q']} |"
        in text
    )
    assert r"Positions of these sections are all kept: a\|b." in text
    of = {kind: len(run.only(["question"]).scan(kind=kind).collect()) for kind in ("q", "k")}
    assert f"| question | 60 | {of['q']} | {of['k']} |" in text
    assert rf"| a\|b | 68 | {68 * 4} | {68 * 2} |" in text


HOSTILE = "<img src=x onerror=alert(1)> | [a](javascript:b) `c` **d** __e__ $f$ https://g.org\n# h &lt; ~~i~~ --- k_v"


def test_names_are_text_wherever_they_land(folder: Path, tmp_path: Path):
    """In the head, which is YAML, and in the page, which is Markdown and HTML."""
    manifest = Manifest.load(folder)
    model = {"checkpoint": HOSTILE, "revision": HOSTILE, "config_overrides": {HOSTILE: [HOSTILE]}, "quantization": {}}
    data = {"name": HOSTILE, "split": HOSTILE}
    sampler = {**manifest.sampler, "_target_": f"x.{HOSTILE}", "seed_by": [HOSTILE]}
    hostile = replace(manifest, model=model, dataset=data, sampler=sampler, device={HOSTILE: HOSTILE})
    text = card(hostile, Place("some/one"), HOSTILE)
    head, page = text.split("---\n", 2)[1:]
    assert yaml.safe_load(head)["pretty_name"] == f"q and k vectors of {HOSTILE}"
    assert yaml.safe_load(head)["license"] == HOSTILE
    other = {"model": {"config_overrides": {"x": 1}}, "dataset": {}, "sampler": manifest.sampler, "device": {}}
    plain = card(replace(hostile, **other), Place("some/one"), "x")
    assert "| model as it was changed | config_overrides {'x': 1} |" in plain and "quantization" not in page
    assert len(page.splitlines()) == len(plain.split("---\n", 2)[2].splitlines())
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(page)
    for markup in ("<img", 'javascript:b"', "<strong", "<em>", "<s>", "<code>c", "https:", "<h1>h", "<a "):
        assert markup not in html, markup
    assert html.count("<h1>") == 1 and html.count("<table>") == 2
    shown = re.sub("<[^>]*>", "", unescape(html.replace("<!-- -->", "")))
    assert shown.count(HOSTILE.replace("\n", " ")[28:]) >= 8
    facts = [line for line in page.splitlines() if line.startswith("| model")]
    assert len(re.findall(r"(?<!\\)\|", facts[0])) == 3


def test_two_who_publish_at_once_do_not_mix(folder: Path, hub: Hub):
    hub.files["theirs"], hub.busy = b"", True
    done = publish(hub.address, "hf_good", str(folder), "some/one")
    assert done.returncode == 1 and "publish it again" in done.stderr and len(done.stderr.splitlines()) == 1
    assert hub.files == {"theirs": b""}


@pytest.mark.parametrize(
    ("token", "repo", "told"), [("hf_bad", "some/one", "401"), ("hf_good", "not a name", "owner/name")]
)
def test_a_refusal_is_one_line(folder: Path, hub: Hub, token: str, repo: str, told: str):
    done = publish(hub.address, token, str(folder), repo)
    assert done.returncode == 1 and told in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not hub.files


def test_no_hub_is_one_line(folder: Path):
    done = publish("http://127.0.0.1:9", "hf_good", str(folder), "some/one")
    assert done.returncode == 1 and "--dry-run" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
