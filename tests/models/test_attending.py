"""What attends is seen from outside the taps: nothing attends that shows nothing, and what is shown is what attends."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from sniffer.models import finder, selfcheck
from sniffer.models.attending import Witness, same_values
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone, other_length
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sniffer.errors import UnsupportedModelError
from tests.tiny_copies import ATTEND, GUARD, ROTATE, edited, imported, llama_source, model_of, tap_line, write_copy
from tests.tiny_families import tiny_config, tiny_model

finder.install()

Attend = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def llama() -> Any:
    return tiny_model(tiny_config("llama", num_hidden_layers=3))


def by_sdpa(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_operator(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_softmax(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def with_a_sink(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One more key than there are tokens."""
    scores = torch.cat([(q @ k.mT).tril(), torch.zeros(*q.shape[:-1], 1)], dim=-1)
    return torch.softmax(scores, dim=-1)[..., :-1].tril() @ v


def by_the_registered_function(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, None, scaling=0.25)[0].transpose(1, 2)


def in_somebody_elses_name(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module.neighbour[0], q, k, v, None, scaling=0.25)[0].transpose(1, 2)


def unseen(module: nn.Module, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By nothing that can be recognised, as a kernel of somebody's would."""
    weights = (q @ k.mT).exp().tril()
    return weights / weights.sum(-1, keepdim=True) @ v


def forward_by(attend: Attend) -> Callable[..., Any]:
    """The forward of an attention as people replace it in an instance or a subclass."""

    def forward(self: Any, hidden_states: Tensor, position_embeddings: Any = None, **_: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (part(hidden_states).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (one.repeat_interleave(self.num_key_value_groups, dim=1) for one in (k, v))
        q, k = sys.modules[LLAMA_MODULE].apply_rotary_pos_emb(q, k, *position_embeddings)  # type: ignore[attr-defined]
        out = attend(self, 1.5 * q, k, v).transpose(1, 2)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None

    return forward


LLAMA_MODULE = "transformers.models.llama.modeling_llama"
WAYS = (by_sdpa, by_operator, by_softmax, with_a_sink, by_the_registered_function, in_somebody_elses_name, unseen)


def replace_instance(model: Any, attend: Attend) -> None:
    attention = model.model.layers[1].self_attn
    attention.neighbour = [model.model.layers[0].self_attn]
    attention.forward = types.MethodType(forward_by(attend), attention)


def replace_class(model: Any, attend: Attend) -> None:
    old = model.model.layers[1].self_attn
    mine = type("Mine", (type(old),), {"forward": forward_by(attend)})(model.config, 1)
    mine.load_state_dict(old.state_dict())
    mine.neighbour = [model.model.layers[0].self_attn]
    model.model.layers[1].self_attn = mine


@pytest.mark.parametrize("replace", [replace_instance, replace_class])
@pytest.mark.parametrize("attend", WAYS)
def test_a_layer_that_attends_by_itself_is_refused_by_name(attend: Attend, replace: Callable[[Any, Attend], None]):
    model = llama()
    replace(model, attend)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn \((LlamaAttention|Mine)\)") as caught:
        LoadedBackbone(find_backbone(model))
    assert "\n" not in str(caught.value)


class Own(nn.Module):
    """An attention of somebody's, without anything of transformers."""

    def __init__(self, like: Any, attend: Attend) -> None:
        super().__init__()
        self.like, self.attend = [like], attend

    def forward(self, hidden_states: Tensor, **more: Any) -> Any:
        self.like[0].training = self.training
        return forward_by(lambda _, q, k, v: self.attend(self, q, k, v))(self.like[0], hidden_states, **more)


@pytest.mark.parametrize("attend", [by_sdpa, by_softmax])
def test_an_attention_of_another_class_is_refused_by_name(attend: Attend):
    model = llama()
    model.model.layers[1].self_attn = Own(model.model.layers[1].self_attn, attend)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn \(Own\) attends by .* without a tap"):
        LoadedBackbone(find_backbone(model))


class Around(nn.Module):
    """Passes on what it is given, as adapters do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Routing(nn.Module):
    """A layer without attention: a softmax over as many experts as the probe has tokens is none."""

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        experts = hidden_states[..., : selfcheck.PROBE_SEQ].softmax(-1)
        return hidden_states * experts.max(-1, keepdim=True).values


def test_a_wrapper_changes_nothing():
    model = llama()
    model.model.layers[1].self_attn = Around(model.model.layers[1].self_attn)
    assert [layer.layer for layer in LoadedBackbone(find_backbone(model)).geometry] == [0, 1, 2]


def test_a_layer_without_attention_is_listed_and_not_refused():
    model = llama()
    model.model.layers[1] = Routing()
    backbone = LoadedBackbone(find_backbone(model))
    assert [layer.layer for layer in backbone.geometry] == [0, 2] and backbone.skipped_layers == ("layers.1",)


class Adapting(nn.Module):
    """Takes another way for short texts, for good, as some attentions over blocks do."""

    def __init__(self, long: nn.Module, short: nn.Module) -> None:
        super().__init__()
        self.inner, self.short = long, [short]

    def forward(self, hidden_states: Tensor, **more: Any) -> Any:
        if hidden_states.shape[1] < 100:
            self.inner = self.short[0]
        return self.inner(hidden_states, **more)


def test_a_model_that_changes_itself_is_refused():
    """What is proven of the parts that short texts leave behind says nothing of those that it was loaded with."""
    model = llama()
    layer, other = model.model.layers[1], llama().model.layers[1].self_attn
    layer.self_attn = Adapting(layer.self_attn, other)
    module = find_backbone(model)
    with pytest.raises(UnsupportedModelError, match=r"puts LlamaAttention in the place of .* at layers\.1"):
        LoadedBackbone(module)


def show_later(line: str) -> str:
    """The tap after attention, where its tensors are the same still."""
    source = llama_source().replace(f"        {GUARD}\n            {line}\n", "")
    place = "        attn_output = attn_output.reshape("
    assert source.count(place) == 1
    return source.replace(place, f"        {GUARD}\n            {line}\n{place}")


LINE = tap_line(llama_source())
WRONG_COPIES = {
    "q is changed in place": (
        edited(f"        {ATTEND}", f"        query_states.mul_(2)\n        {ATTEND}"),
        "changes q",
    ),
    "one k is changed": (
        edited(f"        {ATTEND}", f"        key_states[0, 0, 3] = 0\n        {ATTEND}"),
        "changes k",
    ),
    "another scaling": (edited(LINE, LINE.replace("scaling=self.scaling", "scaling=123.0")), "shows scaling=123"),
    "no scaling": (edited(LINE, LINE.replace(", scaling=self.scaling", "")), "shows scaling=None"),
    "a window": (edited(LINE, LINE.replace("scaling=", "sliding_window=8, scaling=")), "shows sliding_window=8"),
    "short texts": (edited(GUARD, GUARD.replace(":", " and query_states.shape[2] < 12:")), "none in one of 19"),
    "long texts": (edited(GUARD, GUARD.replace(":", " and query_states.shape[2] > 12:")), "no attention of this model"),
    "copies": (edited(LINE, LINE.replace("query_states,", "query_states.clone(),", 1)), "other tensors"),
    "k and v": (edited(LINE, LINE.replace("key_states, value_states", "value_states, key_states", 1)), "other tensors"),
    "before RoPE": (edited(ROTATE, f"{GUARD}\n            {LINE}\n        {ROTATE}"), "times in one forward"),
    "the first layer": (edited(GUARD, GUARD.replace(":", " and self.layer_idx == 0:")), "layers.1.self_attn"),
}
RIGHT_COPIES = {"as written": llama_source(), "after attention": show_later(LINE)}


@pytest.mark.parametrize("wrong", list(WRONG_COPIES))
def test_a_copy_that_shows_something_else_than_attention_receives_is_refused(tmp_path: Path, wrong: str):
    source, complaint = WRONG_COPIES[wrong]
    write_copy(tmp_path, source)
    with imported(tmp_path) as module, pytest.raises(UnsupportedModelError, match=complaint):
        LoadedBackbone(model_of(module))


@pytest.mark.parametrize("right", list(RIGHT_COPIES))
def test_a_copy_that_shows_the_truth_is_taken(tmp_path: Path, right: str):
    write_copy(tmp_path, RIGHT_COPIES[right])
    with imported(tmp_path) as module:
        backbone = LoadedBackbone(model_of(module))
        assert len(backbone.geometry) == 2 and not backbone.pre_missing


def test_a_tap_of_scores_must_show_what_enters_the_product():
    """Where no function of transformers is called, the products are watched."""
    model = tiny_model(tiny_config("bloom"), attn_implementation="eager")
    bloom = sys.modules[type(model).__module__]
    assert LoadedBackbone(find_backbone(model)).geometry
    real = bloom.__sniffer_tap__.observe

    def other(module: Any, q: Tensor, *rest: Any, **more: Any) -> None:
        real(module, q + 0, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(bloom.__sniffer_tap__), "observe", lambda self, *args, **more: other(*args, **more))
        with pytest.raises(UnsupportedModelError, match="its q enters no attention"):
            LoadedBackbone(find_backbone(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_widened_before_its_product_is_what_was_shown(dtype: torch.dtype):
    model = tiny_model(tiny_config("gptj"), attn_implementation="eager").to(dtype)
    assert len(LoadedBackbone(find_backbone(model)).geometry) == 4


def test_a_model_with_few_positions_is_probed_with_a_shorter_text():
    roomy = llama().model
    assert other_length(roomy) == 19
    roomy.config.max_position_embeddings = 16
    assert other_length(roomy) == 7


def test_not_a_number_is_the_same_as_itself():
    one = torch.tensor([1.0, torch.nan, torch.inf])
    assert same_values(one, one.clone()) and not same_values(one, torch.tensor([1.0, 2.0, torch.inf]))
    assert not same_values(one, one[:2])


def test_the_witness_is_gone_after_an_error():
    with pytest.raises(KeyError), Witness(()):
        raise KeyError
    assert not torch.overrides._is_torch_function_mode_enabled()


def test_what_another_thread_computes_is_not_watched():
    witness, model = Witness(()), llama().model
    seen = Thread(target=witness.show, args=(selfcheck.Seen(model, *[torch.zeros(1)] * 3, None, None, None, None),))
    with witness:
        seen.start()
        seen.join()
        softmax = Thread(target=lambda: torch.zeros(2, 3).softmax(-1))
        softmax.start()
        softmax.join()
    assert not witness.seen and not witness.attended
