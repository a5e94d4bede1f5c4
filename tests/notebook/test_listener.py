"""Whatever way a model is called, what is kept is what attention received, under the position it has; the rest is told.

The witness is transformers' own attention function, wrapped by nothing of ours, on the same call without sniff.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models import finder
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sniffer
from sniffer.errors import CaptureError, ConfigError
from sniffer.notebook.captured import Captured
from sniffer.sampler import All, LogUniform
from sniffer.tap import TAP
from tests.tiny_families import tiny_config, tiny_model

finder.install()

pytestmark = pytest.mark.filterwarnings("ignore:sniff. ", "ignore:.past_key_values. is deprecated")

BATCH, SEQ = 2, 12
IDS = torch.arange(30, 30 + BATCH * SEQ).view(BATCH, SEQ)
RIGHT, LEFT = (torch.ones(BATCH, SEQ, dtype=torch.long) for _ in range(2))
RIGHT[1, 7:] = 0
LEFT[1, :5] = 0
COUNTED = (LEFT.cumsum(1) - 1).clamp(min=0)
PACKED = torch.tensor([[*range(5), *range(7)], [*range(12)]])
CAUSAL = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()

WHOLE = [(0, 0, 0, 12), (1, 0, 0, 12)]
CUT = [(0, 0, 0, 12), (1, 0, 0, 7)]


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa").eval()


@pytest.fixture
def model(loaded: Any) -> Any:
    return copy.deepcopy(loaded)


@contextmanager
def received() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """q and k as transformers hands them to attention, layer by layer."""
    calls: list[tuple[Tensor, Tensor]] = []
    real = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query.detach().clone(), key.detach().clone()))
        return real(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = real


def check_rows(captured: Captured, seen: Sequence[tuple[Tensor, Tensor]], pieces: Sequence[tuple[int, int, int, int]]):
    """What is captured are the pieces (row, first column, first position, tokens), a document each, and no more."""
    assert captured.documents == len(pieces)
    for place, layer in enumerate(captured.geometry):
        for kind, states in zip(("q", "k"), seen[place], strict=True):
            for head in captured.selection.heads[layer, kind]:
                found = captured.vectors(layer=layer, head=head, kind=kind)
                order = np.lexsort((found.positions, found.example_ids))
                at = [
                    (n, row, column + i, first + i)
                    for n, (row, column, first, m) in enumerate(pieces)
                    for i in range(m)
                ]
                documents, rows, columns, positions = (list(part) for part in zip(*at, strict=True))
                assert found.example_ids[order].tolist() == documents
                assert found.positions[order].tolist() == positions
                assert torch.equal(torch.from_numpy(found.vectors[order]), states[rows, head, columns].float())


def by_pair(mask: Tensor) -> Tensor:
    return CAUSAL[None, None] & mask[:, None, None].bool()


class Around(nn.Module):
    """Somebody's module around a model, with arguments of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, text: Tensor) -> Any:
        return self.inner(text).logits


CALLS: dict[str, tuple[Callable[[Any], Any], list[tuple[int, int, int, int]]]] = {
    "mask by place": (lambda model: model(IDS, RIGHT), CUT),
    "inner model, mask by place": (lambda model: model.model(IDS, RIGHT), CUT),
    "mask of pairs": (lambda model: model(input_ids=IDS, attention_mask=by_pair(RIGHT)), CUT),
    "positions from 100": (
        lambda model: model(input_ids=IDS, position_ids=torch.arange(100, 112)[None]),
        [(0, 0, 100, 12), (1, 0, 100, 12)],
    ),
    "positions by place": (
        lambda model: model.model(IDS, None, torch.arange(7, 19)[None]),
        [(0, 0, 7, 12), (1, 0, 7, 12)],
    ),
    "packed": (
        lambda model: model(input_ids=IDS, position_ids=PACKED, use_cache=False),
        [(0, 0, 0, 5), (0, 5, 0, 7), (1, 0, 0, 12)],
    ),
    "left, positions counted": (
        lambda model: model(input_ids=IDS, attention_mask=LEFT, position_ids=COUNTED),
        [(0, 0, 0, 12), (1, 5, 0, 7)],
    ),
    "left": (lambda model: model(IDS, LEFT), [(0, 0, 0, 12), (1, 5, 5, 7)]),
    "left, inner model": (lambda model: model.model(IDS, LEFT), [(0, 0, 0, 12), (1, 5, 5, 7)]),
    "left, mask of pairs": (lambda model: model(IDS, by_pair(LEFT)), [(0, 0, 0, 12), (1, 5, 5, 7)]),
    "cache by place": (lambda model: model.model(IDS, None, None, DynamicCache(config=model.config)), WHOLE),
    "static cache": (
        lambda model: model(input_ids=IDS, past_key_values=StaticCache(config=model.config, max_cache_len=20)),
        WHOLE,
    ),
    "forward": (lambda model: model.forward(IDS), WHOLE),
    "around": (lambda model: Around(model)(IDS), WHOLE),
    "data parallel": (lambda model: nn.DataParallel(model)(input_ids=IDS, attention_mask=RIGHT), CUT),
}


def generate(model: Any, **how: Any) -> Any:
    return model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, **how)


@torch.no_grad()
@pytest.mark.parametrize("case", CALLS)
def test_rows_are_what_attention_received_at_their_positions(model: Any, case: str):
    call, pieces = CALLS[case]
    with received() as seen:
        call(model)
    with sniffer.sniff(model, sampler=All()) as captured:
        call(model)
    check_rows(captured, seen, pieces)


@pytest.mark.parametrize("wrapper", [Around, nn.DataParallel, torch.compile], ids=lambda wrapper: wrapper.__name__)
def test_a_wrapper_is_sniffed_like_the_model_in_it(model: Any, wrapper: Any):
    with received() as seen, torch.no_grad():
        model(IDS)
    wrapped = wrapper(model)
    with sniffer.sniff(wrapped, sampler=All()) as captured, torch.no_grad():
        wrapped(IDS)
    check_rows(captured, seen, WHOLE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (
            lambda model: model(IDS, position_ids=PACKED),
            "several documents in a row, and in this model documents of a row see each other: pass use_cache=False",
        ),
        (lambda model: model(IDS, torch.ones_like(IDS), PACKED), "beside an attention_mask"),
        (lambda model: model(IDS, position_ids=PACKED * 2), "they must count on, or begin anew at 0"),
        (lambda model: model(inputs_embeds=model.get_input_embeddings()(IDS)), "no input_ids"),
    ],
)
def test_what_cannot_be_told_is_refused_and_uses_no_ids(model: Any, call: Any, complaint: str):
    expected = model(IDS).logits
    with sniffer.sniff(model, sampler=All(), example_ids=[5, 6]) as captured:
        with pytest.raises(CaptureError, match=complaint) as refusal:
            call(model)
        assert TAP.observer is None and captured.documents == 0 and "\n" not in str(refusal.value)
        assert torch.equal(model(IDS).logits, expected)
    assert set(captured.vectors(layer=0, head=0).example_ids) == {5, 6}
    assert captured.missed.failed == 1


@torch.no_grad()
def test_offset_positions_are_drawn_like_those_of_a_whole_document(model: Any):
    """Position 40 of document 3 is kept or not, wherever a call begins."""
    sampler = LogUniform(base_rate=20.0, min_bucket_size=8)
    ids = torch.arange(60).remainder(200)[None] + 5
    kept = []
    for first in (0, 33):
        with sniffer.sniff(model, sampler=sampler, example_ids=[3]) as captured:
            model(ids[:, first:], position_ids=torch.arange(first, 60)[None])
        found = captured.vectors(layer=1, head=0)
        kept.append(
            {(p, b, t) for p, b, t in zip(found.positions, found.buckets, found.token_ids, strict=True) if p >= 33}
        )
    assert kept[0] == kept[1] and 0 < len(kept[0]) < 27


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
def test_models_that_look_their_tokens_up_themselves(family: str):
    """Their language model is handed vectors, and masks or axes of positions of their own making."""
    model = tiny_model(tiny_config(family))
    for mask, pieces in ((None, WHOLE), (RIGHT, CUT)):
        with received() as seen:
            model(input_ids=IDS, attention_mask=mask)
        with sniffer.sniff(model, sampler=All()) as captured:
            model(input_ids=IDS, attention_mask=mask)
        check_rows(captured, seen, pieces)
        found = captured.vectors(layer=0, head=0)
        assert found.token_ids.tolist() == [
            int(IDS[piece]) for piece in zip(found.example_ids, found.positions, strict=True)
        ]


@torch.no_grad()
def test_an_image_is_captured_with_the_text_around_it():
    config = tiny_config("gemma3")
    config.image_token_id, config.mm_tokens_per_image = 7, 4
    config.vision_config.image_size = 4 * config.vision_config.patch_size
    model = tiny_model(config)
    ids = IDS[:1].clone()
    ids[0, 2:6] = 7
    image = {
        "pixel_values": torch.randn(1, 3, *[config.vision_config.image_size] * 2),
        "token_type_ids": (ids == 7).long(),
    }
    with received() as seen:
        model(input_ids=ids, **image)
    with sniffer.sniff(model, sampler=All()) as captured:
        model(input_ids=ids, **image)
    check_rows(captured, seen[-len(captured.geometry) :], [(0, 0, 0, 12)])
    found = captured.vectors(layer=0, head=0)
    assert found.token_ids.tolist() == ids[0].tolist()
    assert found.sections is not None
    assert found.sections.tolist() == ["image" if 2 <= place < 6 else "" for place in range(12)]


def ids_of(captured: Captured) -> list[int]:
    return sorted(set(captured.vectors(layer=0, head=0).example_ids.tolist()))


class Stopped(Exception):  # noqa: N818 - what people raise to end a forward early
    pass


def stop(*_: Any) -> None:
    raise Stopped


@torch.no_grad()
@pytest.mark.parametrize("where", ["model.layers.1", "model", "lm_head"])
def test_a_call_that_raises_keeps_nothing_and_uses_no_ids(model: Any, where: str):
    """Even where all layers have been seen: the next call may be the same one, tried again."""
    with sniffer.sniff(model, sampler=All(), example_ids=[101, 102, 103]) as captured:
        handle = model.get_submodule(where).register_forward_hook(stop)
        with pytest.raises(Stopped):
            model(IDS)
        handle.remove()
        assert captured.documents == 0 and captured.rows == {"q": 0, "k": 0}
        model(IDS)
        model(IDS[:1])
    assert ids_of(captured) == [101, 102, 103] and captured.missed.failed == 1
    assert "kept nothing of 1 call that raised an error" in repr(captured)


@torch.no_grad()
def test_an_interrupt_leaves_nothing_behind(model: Any):
    """It passes by all hooks."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with sniffer.sniff(model, sampler=All()) as captured:
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS)
        handle.remove()
        with received() as seen:
            model(IDS)
    check_rows(captured, seen, WHOLE)
    assert captured.missed.failed == 1 and TAP.observer is None


@torch.no_grad()
def test_a_call_while_an_error_is_handled_is_like_any_other(model: Any):
    with sniffer.sniff(model, sampler=All()) as captured:
        try:
            raise KeyError
        except KeyError:
            model(IDS)
    assert captured.documents == 2 and not captured.missed.failed


@torch.no_grad()
def test_a_second_sniff_is_refused_and_the_first_goes_on_unharmed(model: Any):
    with sniffer.sniff(model, sampler=All(), example_ids=[7, 8]) as captured:
        for part in (model, model.model, Around(model)):
            with pytest.raises(CaptureError, match="is being sniffed already"), sniffer.sniff(part):
                pass
        with received() as seen:
            model(IDS)
    assert ids_of(captured) == [7, 8] and len(seen) == 2 and not captured.notes


@torch.no_grad()
def test_two_models_are_sniffed_at_once_and_one_within_the_other(model: Any, loaded: Any):
    """A hook of a user may call a second model in the middle of the first one's forward."""
    other = copy.deepcopy(loaded)
    model.model.layers[0].register_forward_hook(lambda *_: other(IDS[:1]) and None)
    with sniffer.sniff(model, sampler=All()) as outer, sniffer.sniff(other, sampler=All(), kinds=["q_pre"]) as inner:
        model(IDS)
    assert outer.documents == 2 and inner.documents == 1
    assert outer.rows == {"q": 192, "k": 96} and inner.rows == {"q_pre": 96}


@torch.no_grad()
def test_what_other_threads_do_is_left_alone_and_told(model: Any):
    outputs: list[Tensor] = []
    with received() as seen:
        expected = model(IDS).logits

    def work() -> None:
        with torch.no_grad():
            outputs.extend(model(IDS).logits for _ in range(3))

    with sniffer.sniff(model, sampler=All()) as captured:
        threads = [Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        model(IDS)
        for thread in threads:
            thread.join()
    check_rows(captured, seen, WHOLE)
    assert captured.missed.elsewhere == 6
    assert len(outputs) == 6 and all(torch.equal(output, expected) for output in outputs)


@torch.no_grad()
def test_each_thread_may_sniff_a_model_of_its_own(loaded: Any):
    models = [copy.deepcopy(loaded) for _ in range(2)]
    found: list[Captured] = []
    errors: list[BaseException] = []

    def work(model: Any) -> None:
        try:
            for _ in range(3):
                with sniffer.sniff(model, sampler=All()) as captured, torch.no_grad():
                    model(IDS)
                found.append(captured)
        except BaseException as error:
            errors.append(error)

    threads = [Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and [captured.documents for captured in found] == [2] * 6


@torch.no_grad()
def test_a_copy_of_a_model_takes_no_listener_along(model: Any):
    with sniffer.sniff(model, sampler=All()) as captured:
        twin = copy.deepcopy(model)
        twin(IDS)
        assert captured.missed.elsewhere == 1 and captured.documents == 0
        torch.save(model, file := BytesIO())
    twin(IDS)
    saved = torch.load(BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(saved(IDS).logits, model(IDS).logits)
    assert captured.missed.elsewhere == 1 and TAP.observer is None


@torch.no_grad()
def test_a_forward_past_the_models_call_is_told(model: Any):
    with sniffer.sniff(model) as captured:
        model.model.forward(IDS)
    assert captured.missed.unseen == 1 and "past the model's own call" in repr(captured)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_are_computed_again_for_gradients_count_once(model: Any, reentrant: bool):
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with sniffer.sniff(model, sampler=All()) as captured:
        for _ in range(2):
            model(IDS, labels=IDS).loss.backward()
    assert captured.documents == 4 and not captured.notes


@torch.no_grad()
def test_what_is_passed_over_is_told_once_at_the_end(model: Any):
    said = "sniff: passed over 2 calls of 4 tokens that go on with a cache filled elsewhere"
    cache = model(IDS).past_key_values
    with pytest.warns(UserWarning, match=said) as told, sniffer.sniff(model) as captured:
        for _ in range(2):
            model(IDS[:, :1], past_key_values=cache)
    (ours,) = [one for one in told if str(one.message).startswith("sniff")]
    assert ours.filename == __file__
    assert "passed over 2 calls" in repr(captured) and captured.passed_over == 2 and captured.documents == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sniffer.sniff(model):
            model(IDS)
        with pytest.raises(KeyError), sniffer.sniff(model):
            raise KeyError
    with pytest.warns(UserWarning, match="no call of this model was made"), sniffer.sniff(model):
        pass


@torch.no_grad()
def test_equal_rows_of_a_plain_call_are_documents_and_it_is_told(model: Any):
    with sniffer.sniff(model, sampler=All()) as captured:
        model(IDS[:1].expand(3, -1))
    assert captured.documents == 3 and captured.missed.repeated_rows == 2
    assert "captured 2 rows that repeated another row of the same call" in repr(captured)


@torch.no_grad()
def test_nothing_to_capture_is_no_error_of_ours(model: Any):
    nothing = torch.empty(1, 0, dtype=torch.long)
    with pytest.raises(RuntimeError) as plain:
        model(nothing)
    with sniffer.sniff(model) as captured, pytest.raises(RuntimeError) as sniffed:
        model(nothing)
    assert str(plain.value) == str(sniffed.value) and captured.documents == 0


def test_opening_and_closing_changes_nothing():
    """A rotary embedding with dynamic scaling replaces its frequencies in a long forward, such as our probe is here."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model(tiny_config("llama", max_position_embeddings=8, rope_parameters=rope)).train()
    seen: list[nn.Module] = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, *_: seen.append(module))
    before = [(name, buffer, buffer.clone()) for name, buffer in model.named_buffers()]
    plain = [dict(vars(part)) for part in model.modules()]
    drawn = torch.get_rng_state(), np.random.get_state()[1].tolist()
    with sniffer.sniff(model):
        pass
    assert not seen
    assert [name for name, _ in model.named_buffers()] == [name for name, _, _ in before]
    for (_, now), (_, buffer, values) in zip(model.named_buffers(), before, strict=True):
        assert now is buffer and torch.equal(now, values)
    assert [vars(part) for part in model.modules()] == plain
    assert torch.equal(torch.get_rng_state(), drawn[0]) and np.random.get_state()[1].tolist() == drawn[1]
    model(IDS, labels=IDS).loss.backward()


def test_a_proof_in_the_middle_of_training_leaves_the_gradients(model: Any):
    """Also under autocast, which keeps the weights that it has cast."""

    def gradient() -> Tensor:
        model.zero_grad()
        model(IDS, position_ids=torch.arange(3, 15)[None], labels=IDS).loss.backward()
        return model.model.layers[0].mlp.up_proj.weight.grad.clone()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16), sniffer.sniff(model, sampler=All()) as captured:
        assert torch.equal(gradient(), expected)
    assert captured.documents == 2


def test_ids_that_are_none_are_refused_before_the_model_is_touched(model: Any):
    model.register_forward_pre_hook(lambda *_: pytest.fail("it has been called"))
    with pytest.raises(ConfigError, match="example_ids has 1 twice"), sniffer.sniff(model, example_ids=[1, 1]):
        pass


@torch.no_grad()
def test_an_interrupt_ends_a_call_for_whoever_reads_or_calls_next(model: Any):
    """Its hooks are not told; a part that was interrupted alone does not take a later call of the whole along."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(interrupt)
    with sniffer.sniff(model, sampler=All()) as captured:
        with pytest.raises(KeyboardInterrupt):
            model.model(IDS)
        assert captured.partial is not None and captured.partial.rows["q"] and TAP.observer is None
        with pytest.raises(KeyboardInterrupt):
            model.model(IDS)
        handle.remove()
        failing = model.lm_head.register_forward_pre_hook(lambda *_: {}["none"])
        with pytest.raises(KeyError):
            model(IDS)
        failing.remove()
        assert captured.documents == 0 and captured.missed.failed == 3
        model(IDS)
    assert captured.documents == 2 and ids_of(captured) == [0, 1]
