"""What is in a batch, and what came before it, has no say in a document's vectors: over all kinds of RoPE.

The witness is another model of the same weights, made anew for each document and run on it alone, whose attention
functions are wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models import finder, lengths, witness
from sniffer.models.layers import find_backbone
from sniffer.models.lengths import UNKNOWN, PositionCall, StandIn
from sniffer.models.loaded import LoadedBackbone
from sniffer.models.state import ModuleState, kept, simple_parts
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sniffer.dataset.batching import batches
from sniffer.errors import UnsupportedModelError
from sniffer.tap import Seen, tap
from sniffer.types import Document, LengthClasses
from tests.tiny_families import tiny_config, tiny_model

finder.install()

MADE_FOR, ORIGINAL = 128, 64
"""Positions of the tiny models, and those that their scalings were made from."""

LENGTHS = (20, 63, 64, 64, 65, 66, 127, 128, 129, 130, 130, 150)
THETA = {"rope_theta": 10000.0}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
FROM = {"original_max_position_embeddings": ORIGINAL}
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, **FROM},
    "longrope": {"factor": 4.0, **FROM, **FACTORS},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **FROM},
    "proportional": {"partial_rotary_factor": 0.5},
}
BEYOND = LengthClasses(apart_from=MADE_FOR + 1)
FOUND = {"dynamic": BEYOND, "longrope": LengthClasses((ORIGINAL + 1,))}
"""Classes of lengths by kind of RoPE, of those that have several."""


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, **THETA, **ROPES[kind], **more}


def untapped(family: str, **config: Any) -> nn.Module:
    return find_backbone(tiny_model(tiny_config(family, **config)))


def documents(sizes: Sequence[int] = LENGTHS) -> list[Document]:
    random = np.random.default_rng(3)
    return [Document(n, str(n), random.integers(20, 150, size).astype(np.int32), False) for n, size in enumerate(sizes)]


def captured(backbone: LoadedBackbone, texts: Sequence[Document], max_tokens: int) -> dict[int, list[Tensor]]:
    """The q and k of each document's own tokens, layer by layer, in batches of that many tokens."""
    found = {}
    for batch in batches(texts, max_tokens, 0, backbone.lengths):
        seen: list[Seen] = []
        with torch.inference_mode(), tap(seen.append):
            backbone(torch.from_numpy(batch.input_ids()))
        for row, document in enumerate(batch.documents):
            states = [states for event in seen for states in (event.q, event.k)]
            found[document.example_id] = [one[row, :, : document.n_tokens].clone() for one in states]
    return found


def alone(make: Callable[[], nn.Module], document: Document) -> list[Tensor]:
    """What attention receives in a model that has run nothing else."""
    ids = torch.from_numpy(document.token_ids.astype(np.int64))[None]
    with torch.inference_mode(), witness.witnessed() as received:
        make()(input_ids=ids, use_cache=False)
    return [states[0].clone() for call in received for states in (call.q, call.k)]


def must_not_depend_on_batches(make: Callable[[], nn.Module]) -> None:
    texts, backbone = documents(), LoadedBackbone(make())
    one_by_one, together = captured(backbone, texts, 1), captured(backbone, texts, 100_000)
    # Batches begin with the longest document; here it comes last.
    again = {}
    for text in sorted(texts, key=lambda text: text.n_tokens):
        again |= captured(backbone, [text], 1)
    for document in texts:
        # A batch of one is the very call of the witness; larger ones add up in another order.
        expected = alone(make, document)
        for true, first, second, batched in zip(
            expected, *(found[document.example_id] for found in (one_by_one, again, together)), strict=True
        ):
            assert torch.equal(true, first) and torch.equal(true, second)
            assert torch.allclose(true, batched, atol=1e-5 * float(true.abs().max()))


@pytest.mark.parametrize("kind", ["default", *ROPE_INIT_FUNCTIONS])
def test_batches_have_no_say(kind: str):
    def make() -> nn.Module:
        return untapped("llama", num_hidden_layers=2, rope_parameters=rope(kind))

    assert LoadedBackbone(make()).lengths == FOUND.get(kind, LengthClasses())
    must_not_depend_on_batches(make)


def test_batches_have_no_say_where_layers_rotate_differently():
    ropes = {"full_attention": rope("dynamic"), "sliding_attention": rope("default")}
    kinds = ["sliding_attention", "full_attention"]

    def make() -> nn.Module:
        return untapped("gemma3_text", num_hidden_layers=2, layer_types=kinds, rope_parameters=ropes)

    assert LoadedBackbone(make()).lengths == BEYOND
    must_not_depend_on_batches(make)


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_longrope_has_two_classes(family: str):
    if family == "phimoe" and not hasattr(PretrainedConfig, "validate"):
        pytest.skip("early releases of transformers 5 cannot build it")
    scales = {"short_mscale": 1.0, "long_mscale": 1.5} if family == "phimoe" else {}

    def make() -> nn.Module:
        return untapped(family, num_hidden_layers=1, rope_parameters=rope("longrope", **scales), **FROM)

    assert LoadedBackbone(make()).lengths == FOUND["longrope"]
    must_not_depend_on_batches(make)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_of_someone_else_goes_on_as_if_it_had_not_been_probed(kind: str):
    ids = torch.from_numpy(documents((200, 100))[0].token_ids.astype(np.int64))[None]
    outcomes = []
    for probes in (0, 1):
        module = untapped("llama", num_hidden_layers=1, rope_parameters=rope(kind))
        with torch.no_grad():
            module(input_ids=ids, use_cache=False)
            before = {name: value.clone() for name, value in module.rotary_emb.named_buffers()}
            for _ in range(probes):
                LoadedBackbone(module)
            for name, value in module.rotary_emb.named_buffers():
                assert torch.equal(value, before[name]) and not value.is_inference()
            outcomes.append(module(input_ids=ids[:, :100], use_cache=False).last_hidden_state)
    assert torch.equal(*outcomes)


def test_a_state_is_put_back_whole():
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(2), persistent=False)
    module.plain, module.cache = 1, {"a": 1}
    kept_buffer, state = module.kept, ModuleState(module)
    for _ in range(2):
        module.kept.add_(1)
        module.register_buffer("kept", torch.ones(3))
        module.register_buffer("more", torch.ones(3))
        module.plain, module.other = torch.tensor(7), 3
        module.cache.update(b=2)
        state.restore()
        assert module.kept is kept_buffer and torch.equal(kept_buffer, torch.zeros(2))
        assert module._non_persistent_buffers_set == {"kept"} and list(module._buffers) == ["kept"]
        assert (module.plain, module.cache, hasattr(module, "other")) == (1, {"a": 1}, False)


def test_states_are_put_back_after_an_exception():
    module = untapped("llama", num_hidden_layers=1, rope_parameters=rope("dynamic"))
    frequencies = module.rotary_emb.inv_freq
    with pytest.raises(KeyError), kept(simple_parts(module)):
        module.rotary_emb.inv_freq = torch.zeros(8)
        raise KeyError
    assert module.rotary_emb.inv_freq is frequencies


class Rotary(nn.Module):
    """Turns by what a function makes of the length of the forward."""

    def __init__(self, angle: Callable[[int], float]) -> None:
        super().__init__()
        self.angle = angle

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return position_ids * self.angle(int(position_ids.max()) + 1)


POINTS = [1 << n for n in range(4, 24)]


@pytest.mark.parametrize(
    ("angle", "classes"),
    [
        (lambda length: 1.0, LengthClasses()),
        (lambda length: 1.0 if length <= 5000 else 2.0, LengthClasses((5001,))),
        (lambda length: float(length.bit_length() > 12) + (length > 70_000), LengthClasses((4096, 70_001))),
        (lambda length: max(length, 3000) / 7, LengthClasses(apart_from=3001)),
        (lambda length: 1.0 if length < 100 else 2.0 if length < 300 else float(length), LengthClasses((100,), 300)),
        (lambda length: float(length // 64), LengthClasses(apart_from=64)),
        (lambda length: 1 / (length < 0), UNKNOWN),
    ],
)
def test_classes_are_found_by_asking(angle: Callable[[int], float], classes: LengthClasses):
    call = PositionCall(Rotary(angle), (torch.zeros(1, 11, 4), torch.arange(11)[None]), {}, 1)
    found = StandIn(call).classes(POINTS)
    assert found == classes
    for length in (16, 99, 100, 4095, 4096, 5000, 5001, 100_000):
        alike = [other for other in (length, length + 1, 2 * length) if found.of(other) == found.of(length)]
        if found != UNKNOWN:
            assert all(angle(other) == angle(length) for other in alike)


def test_where_nothing_can_be_shown_each_length_is_by_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lengths, "_are_positions", lambda value: False)
    assert LoadedBackbone(untapped("llama", rope_parameters=rope("yarn"))).lengths == UNKNOWN
    assert LoadedBackbone(untapped("llama")).lengths == LengthClasses()

    def make() -> nn.Module:
        return untapped("llama", num_hidden_layers=1, rope_parameters=rope("dynamic"))

    must_not_depend_on_batches(make)


SEEN_BY_ALL: list[int] = []


def test_a_module_that_cannot_be_put_back_is_refused():
    module = untapped("llama", num_hidden_layers=1, rope_parameters=rope("dynamic"))
    plain = type(module.rotary_emb)

    class Remembering(plain):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, position_ids: Tensor) -> Any:
            SEEN_BY_ALL.append(int(position_ids.max()))
            cos, sin = super().forward(x, position_ids)
            return cos * max(SEEN_BY_ALL), sin

    module.rotary_emb = Remembering(module.config)
    with pytest.raises(UnsupportedModelError, match="Remembering keeps something from one forward to the next"):
        LoadedBackbone(module)


def test_documents_longer_than_the_model_was_made_for_are_captured(run: Callable, tmp_path: Any):
    from tests.tiny_run import save_checkpoint

    folder = save_checkpoint(tmp_path / "dynamic", max_position_embeddings=200, rope_parameters=rope("dynamic"))
    model = (f"model.checkpoint={folder}", "sampler=all", "dataset.max_tokens=700")
    together, single = run(*model, "batch.max_tokens=100000"), run(*model, "batch.max_tokens=1")
    for layer in (0, 1):
        ours, theirs = (one.vectors(layer=layer, head=0, kind="q") for one in (together, single))
        assert max(ours.positions) == 699 and np.array_equal(ours.example_ids, theirs.example_ids)
        assert np.allclose(ours.vectors, theirs.vectors, atol=1e-5)
    assert together.manifest.backbone["lengths"] == {"apart_from": 201}


def test_a_run_over_both_sides_of_longrope(run: Callable, tmp_path: Any):
    from tests.tiny_run import save_checkpoint, save_texts

    long = {"rope_parameters": {**rope("longrope"), "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}, **FROM}
    folder = save_checkpoint(tmp_path / "phi3", "phi3", **long)
    texts = save_texts(tmp_path / "near.jsonl", {str(n): "x" * n for n in (62, 63, 64, 65, 66)})
    model = (f"model.checkpoint={folder}", f"dataset.path={texts}", "sampler=all")
    together, single = run(*model), run(*model, "batch.max_tokens=1")
    ours, theirs = (one.vectors(layer=1, head=0, kind="q") for one in (together, single))
    assert np.allclose(ours.vectors, theirs.vectors, atol=1e-5)
