"""Retrofitting: code that the import hook never saw is tapped in place, proven, and given back as it was."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from threading import Event, Thread, current_thread
from types import CodeType, ModuleType
from typing import Any

import pytest
import torch
from sniffer.models import finder
from sniffer.models.backbone import Checkpoint
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from sniffer.models.retrofit import attached, retrofit
from transformers import AutoConfig, PretrainedConfig

from sniffer.errors import CaptureError, UnsupportedModelError
from sniffer.tap import Seen, tap
from tests.tiny_families import tiny_config, tiny_ids, tiny_model

OLMO = "transformers.models.olmo2.modeling_olmo2"
LLAMA = "transformers.models.llama.modeling_llama"


@pytest.fixture
def olmo() -> Iterator[ModuleType]:
    """A family imported without the hook."""
    tapped = sys.modules.pop(OLMO, None)
    before = list(sys.meta_path)
    finder.uninstall()
    try:
        yield importlib.import_module(OLMO)
    finally:
        sys.meta_path[:] = before
        sys.modules.pop(OLMO)
        if tapped is not None:
            sys.modules[OLMO] = tapped


def untapped(olmo: ModuleType) -> Any:
    torch.manual_seed(0)
    return olmo.Olmo2ForCausalLM(tiny_config("olmo2")).eval()


def events(backbone: LoadedBackbone) -> list[Seen]:
    seen: list[Seen] = []
    with torch.inference_mode(), tap(seen.append, pre=True):
        backbone(tiny_ids())
    return seen


def test_a_loaded_model_shows_what_a_tapped_one_shows(olmo: ModuleType):
    model = untapped(olmo)
    assert not finder.is_tapped(OLMO)
    with torch.inference_mode():
        plain = model(tiny_ids()).logits
    with attached(model) as backbone:
        shown = events(backbone)
        with torch.inference_mode():
            assert torch.equal(model(tiny_ids()).logits, plain)
    sys.modules.pop(OLMO)
    with finder.installed():
        twin = importlib.import_module(OLMO).Olmo2ForCausalLM(model.config).eval()
        twin.load_state_dict(model.state_dict())
        expected = events(LoadedBackbone(find_backbone(twin)))
    assert len(shown) == len(expected) == 4
    for mine, theirs in zip(shown, expected, strict=True):
        assert all(
            torch.equal(getattr(mine, kind), getattr(theirs, kind)) for kind in ("q", "k", "v", "q_pre", "k_pre")
        )


def codes_of(cls: type) -> dict[str, CodeType | None]:
    """The code of each method of a class, below its decorators."""
    return {name: getattr(inspect.unwrap(value), "__code__", None) for name, value in vars(cls).items()}


def test_afterwards_everything_is_as_it_was(olmo: ModuleType):
    model = untapped(olmo).train()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    forward = olmo.Olmo2Attention.forward
    codes = codes_of(olmo.Olmo2Attention)
    names = set(vars(olmo))
    flags = [part.training for part in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(KeyError), attached(model):
        assert olmo.Olmo2Attention.forward is forward and codes_of(olmo.Olmo2Attention)["forward"] != codes["forward"]
        assert [part.training for part in model.modules()] == flags
        raise KeyError
    assert codes_of(olmo.Olmo2Attention) == codes
    assert set(vars(olmo)) == names and not finder.is_tapped(OLMO)
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients


def test_two_may_need_the_same_code_and_let_go_of_it_in_any_order(olmo: ModuleType):
    first, second = (untapped(olmo) for _ in range(2))
    codes, names, stance = codes_of(olmo.Olmo2Attention), set(vars(olmo)), stance_of_the_compiler()
    held = [attached(first), attached(second)]
    backbones = [one.__enter__() for one in held]
    assert stance_of_the_compiler() == "force_eager"
    held[0].__exit__(None, None, None)
    assert len(events(backbones[1])) == 4 and stance_of_the_compiler() == "force_eager"
    held[1].__exit__(None, None, None)
    assert codes_of(olmo.Olmo2Attention) == codes and set(vars(olmo)) == names and not finder.is_tapped(OLMO)
    assert stance_of_the_compiler() == stance


def stance_of_the_compiler() -> str:
    return str(torch._dynamo.eval_frame._stance.stance)


def test_threads_do_not_break_a_family(olmo: ModuleType):
    """Each has a model of its own; what they open and close crosses."""
    models = [untapped(olmo) for _ in range(2)]
    errors: list[BaseException] = []

    def work(model: Any) -> None:
        try:
            for _ in range(5):
                with attached(model) as backbone:
                    assert len(events(backbone)) == 4
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for model in models:
        model(tiny_ids())
    assert not finder.is_tapped(OLMO)


class Gate:
    """Holds a forward of another thread in the middle of its first attention, between RoPE and the tap."""

    def __init__(self, olmo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open, self.outcome = Event(), Event(), Queue[Any]()
        self.rotary = olmo.apply_rotary_pos_emb
        self.thread: Thread | None = None
        monkeypatch.setattr(olmo, "apply_rotary_pos_emb", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if current_thread() is self.thread and not self.reached.is_set():
            self.reached.set()
            assert self.open.wait(60)
        return self.rotary(*args, **kwargs)

    def start(self, model: Any) -> None:
        def forward() -> None:
            try:
                self.outcome.put(model(tiny_ids()).logits)
            except BaseException as error:
                self.outcome.put(error)

        self.thread = Thread(target=forward)
        self.thread.start()
        assert self.reached.wait(60)

    def finish(self) -> Any:
        self.open.set()
        return self.outcome.get(timeout=60)


@torch.no_grad()
def test_a_forward_that_is_under_way_when_code_is_put_back_goes_on(olmo: ModuleType, monkeypatch: pytest.MonkeyPatch):
    mine, theirs = (untapped(olmo) for _ in range(2))
    expected, gate = theirs(tiny_ids()).logits, Gate(olmo, monkeypatch)
    with attached(mine):
        gate.start(theirs)
    assert not finder.is_tapped(OLMO)
    assert torch.equal(gate.finish(), expected)


@torch.no_grad()
def test_a_forward_that_is_under_way_when_a_tap_opens_goes_on_without(
    olmo: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """It has not computed the pre kinds, since nobody wanted them when it could have."""
    mine, theirs = (untapped(olmo) for _ in range(2))
    expected, gate = theirs(tiny_ids()).logits, Gate(olmo, monkeypatch)
    seen: list[Seen] = []
    with attached(mine):
        gate.start(theirs)
        with tap(seen.append, pre=True):
            assert torch.equal(gate.finish(), expected)
    assert not seen


@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model], ids=["whole", "inside"])
def test_a_model_that_is_attached_to_already_is_refused_before_it_is_touched(olmo: ModuleType, part: Any):
    model = untapped(olmo).train()
    with attached(model) as backbone:
        model.register_forward_pre_hook(lambda *_: pytest.fail("it has been called"))
        with pytest.raises(CaptureError, match="is being sniffed already"), attached(part(model)):
            pass
        assert len(events(backbone)) == 4 and model.training
    with attached(part(model)):
        pass


TWO_CLASSES = """
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

class First(nn.Module):
    def forward(self, q, k, v):
        return scaled_dot_product_attention(q, k, v)

class Second(nn.Module):
    def forward(self, q, k, v):
        return scaled_dot_product_attention(q, k, v)
"""


def test_a_refusal_half_way_leaves_no_code_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first class is as in the file, the second is not."""
    (tmp_path / "modeling_two.py").write_text(TWO_CLASSES)
    monkeypatch.syspath_prepend(tmp_path)
    two: Any = importlib.import_module("modeling_two")
    monkeypatch.delitem(sys.modules, "modeling_two")
    monkeypatch.setitem(sys.modules, "modeling_two", two)
    two.Second.forward = lambda self, q, k, v: q
    code = two.First.forward.__code__
    with pytest.raises(UnsupportedModelError, match="Second.forward in .* is not what was loaded"):
        retrofit(torch.nn.ModuleList([two.First(), two.Second()]))
    assert two.First.forward.__code__ is code
    two.First()(*torch.ones(3, 1, 1, 2, 2))


def test_what_the_hook_has_tapped_is_left_alone():
    finder.install()
    model = tiny_model(tiny_config("llama"))
    code = sys.modules[LLAMA].LlamaAttention.forward.__code__  # type: ignore[attr-defined]
    retrofit(model)()
    assert sys.modules[LLAMA].LlamaAttention.forward.__code__ is code  # type: ignore[attr-defined]
    assert finder.is_tapped(LLAMA)


def own_code(folder: Path) -> Path:
    """Llama's file as somebody would ship it with a checkpoint."""
    text = Path(str(importlib.util.find_spec(LLAMA).origin)).read_text()  # type: ignore[union-attr]
    text = text.replace("from ...", "from transformers.")
    text = text.replace("from .configuration_llama", "from transformers.models.llama.configuration_llama")
    path = folder / "modeling_mine.py"
    path.write_text(text)
    return path


def test_a_source_that_has_changed_since_is_refused(tmp_path: Path):
    path = own_code(tmp_path)
    spec = importlib.util.spec_from_file_location("modeling_mine", path)
    assert spec is not None and spec.loader is not None
    mine = importlib.util.module_from_spec(spec)
    sys.modules["modeling_mine"] = mine
    try:
        spec.loader.exec_module(mine)
        model = mine.LlamaForCausalLM(tiny_config("llama")).eval()
        with attached(model) as backbone:
            assert len(backbone.geometry) == 4
        path.write_text(path.read_text().replace("attn_output.reshape(", "1 * attn_output.reshape("))
        with pytest.raises(UnsupportedModelError, match="LlamaAttention.forward in .* is not what was loaded"):
            retrofit(model)
    finally:
        del sys.modules["modeling_mine"]


def test_a_checkpoint_with_its_own_code_is_tapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    finder.install()
    model = tiny_model(tiny_config("llama"))
    folder = tmp_path / "mine"
    model.save_pretrained(folder)
    own_code(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_mine.LlamaForCausalLM"}})
    )
    remote = Checkpoint(str(folder), device="cpu", trust_remote_code=True).load()
    assert type(remote.module).__module__.startswith("transformers_modules.")
    ours = Checkpoint(str(folder), device="cpu").load()
    assert type(ours.module).__module__ == LLAMA
    for mine, theirs in zip(events(remote), events(ours), strict=True):
        assert all(
            torch.equal(getattr(mine, kind), getattr(theirs, kind)) for kind in ("q", "k", "v", "q_pre", "k_pre")
        )


def test_a_family_imported_early_is_tapped_when_it_is_loaded(olmo: ModuleType, tmp_path: Path):
    untapped(olmo).save_pretrained(tmp_path)
    config: PretrainedConfig = AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "olmo2"
    with pytest.raises(UnsupportedModelError, match="imported before the tap's import hook"):
        find_backbone(untapped(olmo))
    undo = retrofit(model := untapped(olmo))
    assert len(LoadedBackbone(find_backbone(model)).geometry) == 4
    undo()


def test_the_compiler_follows_a_tap_without_a_break():
    finder.install()
    backbone = LoadedBackbone(find_backbone(tiny_model(tiny_config("llama", num_hidden_layers=2))))
    seen: list[Seen] = []
    with torch.inference_mode(), tap(seen.append):
        explained = torch._dynamo.explain(backbone.module)(input_ids=tiny_ids(), use_cache=False)
    assert explained.graph_break_count == 0 and len(seen) == 2
    torch._dynamo.reset()


def test_two_models_in_one_process_keep_their_layers_apart():
    finder.install()
    small, large = (
        LoadedBackbone(find_backbone(tiny_model(tiny_config("llama", num_hidden_layers=n)))) for n in (2, 3)
    )
    other = LoadedBackbone(find_backbone(tiny_model(tiny_config("gemma3_text"))))
    for backbone, depth in ((small, 2), (large, 3), (other, 4), (small, 2)):
        assert [backbone.layer_of[event.module] for event in events(backbone)] == list(range(depth))
