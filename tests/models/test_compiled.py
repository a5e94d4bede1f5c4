"""A compiled backbone: one graph a layer, the same events, the same rows, and the early exit still."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sniffer.models import finder
from sniffer.models.compiled import HELD, attending_layers, check_alike, compile_layers
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from torch._dynamo.utils import counters

from sniffer.errors import ConfigError
from sniffer.tap import TAP, Seen, StopForward, tap
from tests.tiny_families import tiny_config, tiny_ids, tiny_model

finder.install()

FAMILIES = ("llama", "gemma3_text", "qwen3_moe", "gpt2")


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """What was compiled, and what was counted, stays within a test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are followed as ever, but no code is made of them: that takes seconds each."""
    monkeypatch.setattr("sniffer.models.compiled.BACKEND", "eager")


def backbone_of(family: str) -> LoadedBackbone:
    return LoadedBackbone(find_backbone(tiny_model(tiny_config(family))))


class Watcher:
    """An observer as a run makes one for each batch."""

    def __init__(self, last: torch.nn.Module | None = None) -> None:
        self.seen: list[Seen] = []
        self.last = last

    def __call__(self, event: Seen) -> None:
        assert not torch.compiler.is_compiling()
        self.seen.append(event)
        if event.module is self.last:
            raise StopForward


@torch.inference_mode()
def events(backbone: LoadedBackbone, ids: torch.Tensor, *, pre: bool = False) -> list[Seen]:
    watcher = Watcher()
    with tap(watcher, pre=pre):
        backbone(ids)
    return watcher.seen


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_no_graph_breaks_and_nothing_compiled_anew_for_a_batch(traced: None, family: str):
    backbone = backbone_of(family)
    plain = events(backbone, tiny_ids())
    compile_layers(backbone)
    check_alike(plain, events(backbone, tiny_ids()))
    compiled = counters["stats"]["unique_graphs"]
    for n_tokens in range(3, 12):
        seen = events(backbone, tiny_ids()[:, :n_tokens])
        assert [event.module for event in seen] == [event.module for event in plain]
    assert counters["stats"]["unique_graphs"] == compiled
    assert not counters["graph_break"]


def test_layers_that_are_alike_share_their_code(traced: None):
    few, many = (LoadedBackbone(find_backbone(tiny_model(tiny_config("llama", num_hidden_layers=n)))) for n in (2, 6))
    compile_layers(few)
    graphs = counters["stats"]["unique_graphs"]
    counters.clear()
    compile_layers(many)
    assert len(attending_layers(many)) == 6 and counters["stats"]["unique_graphs"] <= graphs


@pytest.mark.parametrize("last", [0, 2])
def test_the_forward_ends_with_the_last_wanted_layer(traced: None, last: int):
    backbone = backbone_of("llama")
    compile_layers(backbone)
    modules = {number: module for module, number in backbone.layer_of.items()}
    watcher = Watcher(modules[last])
    with torch.inference_mode(), tap(watcher):
        backbone(tiny_ids())
        pytest.fail("the forward went on")
    assert [backbone.layer_of[event.module] for event in watcher.seen] == list(range(last + 1))
    assert TAP.observer is None and not HELD.seen


def test_an_error_inside_a_layer_shows_nothing_and_gives_the_tap_back(traced: None):
    backbone = backbone_of("llama")
    compile_layers(backbone)
    watcher = Watcher()
    with torch.inference_mode(), pytest.raises(Exception, match="size|shape"), tap(watcher):
        attending_layers(backbone)[0](torch.zeros(2, 5, 7), position_embeddings=(torch.zeros(1), torch.zeros(1)))
    assert TAP.observer is None and not HELD.seen and not watcher.seen


def test_a_layer_that_is_no_single_graph_is_refused(traced: None):
    backbone = backbone_of("llama")
    layer = attending_layers(backbone)[1]
    forward = layer.forward

    def printing(*args: object, **kwargs: object) -> object:
        torch._dynamo.graph_break()
        return forward(*args, **kwargs)

    layer.forward = printing
    with pytest.raises(ConfigError, match="model.compile=true fails for this model: .*leave model.compile out"):
        compile_layers(backbone)


def test_other_vectors_are_refused():
    plain = events(backbone_of("llama"), tiny_ids())
    other = [event._replace(k=event.k * 1.01) for event in plain]
    with pytest.raises(ConfigError, match="shows a k that differs by 0.01 of its largest value"):
        check_alike(plain, other)
    with pytest.raises(ConfigError, match="do not show"):
        check_alike(plain, plain[1:])


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "level"), [(torch.float32, 3e-4), (torch.float16, 2e-3), (torch.bfloat16, 0.0156)])
def test_rounding_does_not_add_up_with_depth(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, level: float):
    """Eighty layers, each of which rounds a little otherwise than before."""
    eighty = tiny_model(tiny_config("llama", num_hidden_layers=80)).to(dtype)
    backbone = LoadedBackbone(find_backbone(eighty))
    plain = events(backbone, tiny_ids())
    monkeypatch.setattr("sniffer.models.compiled._compiled", lambda forward: rounded(forward, level))
    compile_layers(backbone)
    with pytest.raises(ConfigError, match="differs by"):  # as it adds up, it is too much
        check_alike(plain, events(backbone, tiny_ids()))


def rounded(forward: Callable[..., Any], level: float) -> Callable[..., Any]:
    """A layer whose outputs are changed by noise of some level."""

    def noisy(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(output.numel()))
        return output + (level * output.abs().max() * drawn.clamp(-2, 2)).to(output.dtype)

    return noisy


@pytest.mark.parametrize("tokens", [2, 5])
def test_a_layer_that_computes_something_else_is_refused_though_it_shows_the_same(
    monkeypatch: pytest.MonkeyPatch, tokens: int
):
    """Two tokens of 22 may have gone to other experts; five have not."""

    def wrong(forward: Callable[..., Any]) -> Callable[..., Any]:
        def other(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs).clone()
            output[0, :tokens] *= 1.5
            return output

        return other

    monkeypatch.setattr("sniffer.models.compiled._compiled", wrong)
    if tokens == 2:
        return compile_layers(backbone_of("llama"))
    with pytest.raises(ConfigError, match="LlamaDecoderLayer gives an output that differs by"):
        compile_layers(backbone_of("llama"))


def test_nan_that_was_there_before_is_no_difference_and_new_nan_is():
    plain = events(backbone_of("llama"), tiny_ids())
    k = plain[1].k.clone()
    k[0, 0, 3] = torch.nan
    some = [*plain[:1], plain[1]._replace(k=k), *plain[2:]]
    check_alike(some, some)
    check_alike([event._replace(v=event.v * 0) for event in plain], [event._replace(v=event.v * 0) for event in plain])
    for one, other in ((plain, some), (some, plain)):
        with pytest.raises(ConfigError, match="shows a k that differs by inf"):
            check_alike(one, other)


@pytest.mark.long
def test_a_compiled_run_captures_the_same_rows_up_to_rounding(run: Callable):
    """With real code made by the compiler; documents of different lengths, one a batch and together."""
    plain = run("sampler=all", "model.compile=false")
    compiled = run("sampler=all", "model.compile=true")
    assert compiled.manifest.model["compile"] and "compile" not in plain.manifest.model
    for layer in plain.layers:
        for kind in ("q", "k"):
            one, other = (each.vectors(layer=layer, head=0, kind=kind) for each in (plain, compiled))
            assert (one.positions == other.positions).all() and (one.example_ids == other.example_ids).all()
            np.testing.assert_allclose(other.vectors, one.vectors, rtol=0, atol=1e-5 * np.abs(one.vectors).max())
