"""Whether a model does as it is told about positions, packed rows and padding is found out on the model."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from sniffer.models import finder
from sniffer.models.attachment import Attachment, model_in
from sniffer.models.proofs import alike, apart
from torch import nn

from sniffer.errors import UnsupportedModelError
from sniffer.tap import Seen
from tests.tiny_families import tiny_config, tiny_model

finder.install()


@lru_cache
def attachment(family: str) -> Attachment:
    return Attachment(tiny_model(tiny_config(family), attn_implementation="eager" if family == "bloom" else "sdpa"))


SEE_EACH_OTHER = "documents of a row see each other"

PROVEN = {
    # RoPE: masks of its own making keep packed documents apart where no cache is kept.
    ("llama", "stated", None): "",
    ("llama", "positions", None): "",
    ("llama", "packed", False): "",
    ("llama", "packed", True): SEE_EACH_OTHER,
    ("llama", "packed", None): SEE_EACH_OTHER,
    ("llama", "left", None): "",
    # Learned positions, which attention mixes after the first layer.
    ("gpt2", "positions", None): "",
    ("gpt2", "left", None): "",
    # Convolutions reach over from one document to the next.
    ("lfm2", "packed", False): SEE_EACH_OTHER,
    # Positions that begin at 2 where none are stated, and at 0 where those of generate are.
    ("roberta", "stated", None): "position_ids that count from 0 do not give what none give",
    # ALiBi: position_ids are swallowed by **kwargs of the whole model.
    ("bloom", "positions", None): "its vectors show no positions",
    ("bloom", "packed", False): SEE_EACH_OTHER,
}


@pytest.mark.parametrize(("family", "claim", "use_cache"), PROVEN)
def test_claims_are_tried_on_the_model(family: str, claim: str, use_cache: bool | None):
    one, expected = attachment(family), PROVEN[family, claim, use_cache]
    reason = one.why_not(claim, one.calls[0], use_cache)
    assert reason.startswith(expected) and bool(reason) == bool(expected)
    assert not any(part.training for part in one.module.modules())


def test_a_model_that_takes_no_such_word_says_so():
    reason = attachment("llama").why_not("left", nn.Linear(1, 1))
    assert reason.startswith("it fails in a probe (TypeError: ") and "\n" not in reason


def test_differences_count_by_the_spread_of_vectors_not_by_their_size():
    """A bias that all tokens share, as in keys of qwen2, hides nothing."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(1, 2, 8, 4, generator=generator)
    other = states + 0.01 * torch.randn(1, 2, 8, 4, generator=generator)
    assert 0.005 < apart(states, other) < 0.02
    assert apart(states + 20, other + 20) == pytest.approx(apart(states, other), rel=0.2)
    module = nn.Identity()
    one, another = (Seen(module, s, s, s, None, None, None, None) for s in (states, other))
    assert alike([one], [one]) and not alike([one], [another])


class Around(nn.Module):
    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleList(inner)


def test_the_one_model_in_a_wrapper_is_found():
    model = attachment("llama").calls[0]
    for wrapped in (model, Around(model), Around(Around(model), nn.Linear(1, 1)), nn.DataParallel(model)):
        assert model_in(wrapped) is model
    for wrong, complaint in (
        (Around(model, attachment("gpt2").calls[0]), "holds LlamaForCausalLM, GPT2LMHeadModel"),
        (Around(nn.Linear(1, 1)), "holds none"),
        ("meta-llama/Llama-3", "this is no model but a str"),
    ):
        with pytest.raises(UnsupportedModelError, match=complaint):
            model_in(wrong)
