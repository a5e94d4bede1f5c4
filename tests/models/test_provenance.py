"""What a run's vectors depend on besides weights and text is recorded: code, packages, tokenizer, adapters."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from sniffer.models import finder, locate, provenance
from sniffer.models.backbone import Checkpoint
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from tokenizers import AddedToken
from torch import nn
from transformers import AutoTokenizer

from sniffer.errors import CheckpointError
from tests.tiny_copies import LLAMA, imported, llama_source, model_of, write_copy
from tests.tiny_families import tiny_config, tiny_model
from tests.tiny_run import save_checkpoint

finder.install()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_modelling_files_in_use_are_told_with_their_digests():
    backbone = LoadedBackbone(find_backbone(tiny_model(tiny_config("mistral", num_hidden_layers=1))))
    name = "transformers.models.mistral.modeling_mistral"
    assert backbone.describe()["code"] == {name: f"sha256:{sha256(Path(str(sys.modules[name].__file__)))}"}


def test_code_that_a_file_has_from_another_counts(tmp_path: Path):
    borrowed = "from transformers.models.mistral.modeling_mistral import rotate_half as turned\n"
    write_copy(tmp_path, llama_source() + borrowed)
    with imported(tmp_path) as module:
        code = provenance.code_of(model_of(module))
    assert set(code) == {LLAMA, "transformers.models.mistral.modeling_mistral"}


def test_a_copy_is_told_as_it_was_when_it_was_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = write_copy(tmp_path, llama_source() + "\n# mine\n")
    told = f"local copy, sha256:{sha256(path)}"
    with imported(tmp_path) as module, caplog.at_level("INFO"):
        path.write_text("nothing of it any more")
        backbone = LoadedBackbone(model_of(module))
    assert backbone.describe()["code"][LLAMA] == told
    assert f"the local copy {path} takes the place of {LLAMA} ({told})" in caplog.text


def test_what_a_module_would_be_made_from_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    upstream = Path(str(sys.modules[LLAMA].__file__))
    monkeypatch.setattr(finder, "COPIES", tmp_path)
    names = [LLAMA, "transformers.models.llama.modeling_no_such", "os"]
    checkpoint = Checkpoint("a/b")
    assert checkpoint.sources(names) == {LLAMA: f"sha256:{sha256(upstream)}"}
    copy = write_copy(tmp_path, "mine")
    assert checkpoint.sources(names) == {LLAMA: f"local copy, sha256:{sha256(copy)}"}


def package(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module, known = ModuleType(name.replace("-", "_")), provenance.metadata.version
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(provenance.metadata, "version", lambda asked: version if asked == name else known(asked))
    return module


def test_packages_count_once_they_are_imported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "peft", raising=False)  # of another test
    assert provenance.packages_in_use(nn.Linear(2, 2)) == {}
    package("flash-attn", "2.8", monkeypatch)
    assert provenance.packages_in_use(nn.Linear(2, 2)) == {"flash-attn": "2.8"}


def test_kernels_count_once_one_is_loaded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "peft", raising=False)  # of another test
    module = package("kernels", "0.17", monkeypatch)
    loaded: list[Any] = []
    monkeypatch.setattr(module, "get_loaded_kernels", lambda: loaded, raising=False)
    assert provenance.packages_in_use(nn.Linear(2, 2)) == {}
    loaded.append(SimpleNamespace(repo_info=SimpleNamespace(repo_id="owner/scan", revision="abc")))
    assert provenance.packages_in_use(nn.Linear(2, 2)) == {"kernels": "0.17", "kernel owner/scan": "abc"}


def described(folder: Path) -> dict[str, str]:
    tokenize, _ = Checkpoint(str(folder)).load_tokenizer()
    return tokenize.describe()  # type: ignore[attr-defined, no-any-return]


def test_a_tokenizer_is_known_by_what_it_does_and_not_by_where_it_lies(checkpoint: Path, tmp_path: Path):
    first = described(checkpoint)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "again" / name).write_bytes((checkpoint / name).read_bytes())
    assert described(tmp_path / "again") == first
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer("a text", truncation=True, max_length=2)
    tokenizer.save_pretrained(tmp_path / "again")
    assert described(tmp_path / "again") == first
    tokenizer.add_tokens(AddedToken("the cat"))
    tokenizer.save_pretrained(tmp_path / "again")
    assert described(tmp_path / "again") != first


class Slow:
    """A tokenizer written in Python."""

    def __init__(self, vocabulary: dict[str, int], file: Path, **settings: Any) -> None:
        self.vocabulary, self.init_kwargs = vocabulary, {**settings, "vocab_file": str(file)}
        self.vocab_files_names, self.vocab_file = {"vocab_file": "vocab.txt"}, str(file)

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def test_of_a_tokenizer_in_python_vocabulary_settings_and_files_count(tmp_path: Path):
    from sniffer.models.tokenizer import Tokenizer

    here, there = tmp_path / "here", tmp_path / "there"
    here.write_text("merges")
    there.write_text("merges")

    def told(*arguments: Any, **settings: Any) -> dict[str, str]:
        return Tokenizer(Slow(*arguments, **settings)).describe()

    first = told({"a": 0, "b": 1}, here, lower=True)
    assert told({"b": 1, "a": 0}, there, lower=True) == first
    there.write_text("others")
    assert first not in (told({"a": 0}, here, lower=True), told({"a": 0, "b": 1}, here), told({"a": 0, "b": 1}, there))
    assert told({"a": 0, "b": 1}, there, lower=True) != first


def test_an_adapter_that_would_be_left_out_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "adapted"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert "adapter" not in Checkpoint(str(folder)).describe()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    monkeypatch.setattr(locate, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"has an adapter \(adapter_config.json\).*pip install peft"):
        Checkpoint(str(folder)).check()
    monkeypatch.setattr(locate, "find_spec", lambda name: object())
    Checkpoint(str(folder)).check()
    told = Checkpoint(str(folder)).describe()
    assert told["adapter"] == "adapter_config.json" and "adapter_config.json" in told["files"]


def test_an_adapter_on_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import HfApi, constants

    files = [SimpleNamespace(rfilename="adapter_config.json"), SimpleNamespace(rfilename="config.json")]
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    monkeypatch.setattr(HfApi, "auth_check", lambda *_, **__: None)
    with pytest.raises(CheckpointError, match="owner/adapted has an adapter"):
        Checkpoint("owner/adapted").check()
    files.pop(0)
    locate.ask_hub.cache_clear()
    Checkpoint("owner/adapted").check()
    locate.ask_hub.cache_clear()


def test_a_checkpoint_that_changes_while_it_is_loaded_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    honest, tokenizer = Checkpoint._proven, checkpoint / "tokenizer.json"

    def slow(self: Checkpoint) -> LoadedBackbone:
        tokenizer.write_bytes(tokenizer.read_bytes())
        return honest(self)

    monkeypatch.setattr(Checkpoint, "_proven", slow)
    with pytest.raises(CheckpointError, match=r"was changed while it was loaded \(tokenizer.json\)"):
        Checkpoint(str(checkpoint), device="cpu").load()
