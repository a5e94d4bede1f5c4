"""Selections exist in the model, bring each query's keys, and nest when heads are sampled."""

from __future__ import annotations

import pytest

from sniffer.errors import ConfigError
from sniffer.forward.selection import CaptureConfig, HeadSampling, check_request, select
from sniffer.types import KINDS, LayerGeometry, ModelLimits, key_head


def layer(number: int, *, query_heads: int = 8, key_heads: int = 2, window: int | None = None) -> LayerGeometry:
    heads = {kind: query_heads if kind in ("q", "q_pre") else key_heads for kind in KINDS}
    return LayerGeometry(number, f"layers.{number}", heads, dict.fromkeys(KINDS, 16), 0.25, window)


MODEL = [layer(0), layer(1, window=32), layer(2), layer(5, query_heads=6, key_heads=6)]


def test_everything_by_default():
    selection = select(MODEL, CaptureConfig())
    assert selection.layers == (0, 1, 2, 5)
    assert selection.kinds == ("q", "k")
    assert selection.heads[0, "q"] == tuple(range(8)) and selection.heads[0, "k"] == (0, 1)
    assert selection.heads[5, "k"] == tuple(range(6))


def test_chosen_query_heads_bring_their_key_heads():
    selection = select(MODEL, CaptureConfig(kinds=["q", "k", "v", "k_pre"], layers=[2], heads=[1, 5]))
    assert selection.heads == {(2, "q"): (1, 5), (2, "k"): (0, 1), (2, "v"): (0, 1), (2, "k_pre"): (0, 1)}
    assert selection.draws == ((2, "q"), (2, "k"))


def test_key_heads_are_the_ones_that_grouped_query_attention_repeats():
    for query_heads, key_heads in ((9, 3), (8, 2), (4, 4), (5, 1)):
        repeated = [head for head in range(key_heads) for _ in range(query_heads // key_heads)]
        assert [key_head(head, query_heads, key_heads) for head in range(query_heads)] == repeated


def test_sampled_heads_are_deterministic_and_nest():
    def sampled(count: int, seed: int = 0) -> set[tuple[int, int]]:
        selection = select(MODEL, CaptureConfig(head_sampling=HeadSampling(count=count, seed=seed)))
        return {(number, head) for (number, kind), heads in selection.heads.items() if kind == "q" for head in heads}

    assert len(sampled(5)) == 5
    assert sampled(5) == sampled(5) < sampled(12)
    assert sampled(5, seed=1) != sampled(5)


def test_heads_by_layer_say_the_layers_too():
    """Also as text, which is how config.yaml and the manifest have the layers."""
    for heads in ({5: "0-2", 0: [7, 1]}, {"5": [0, 1, 2], "0": [1, 7]}):
        selection = select(MODEL, CaptureConfig(heads=heads))
        assert selection.heads == {(0, "q"): (1, 7), (0, "k"): (0, 1), (5, "q"): (0, 1, 2), (5, "k"): (0, 1, 2)}
    assert select(MODEL, CaptureConfig(layers=[0], heads={0: 3})).heads == {(0, "q"): (3,), (0, "k"): (0,)}


def test_a_count_beyond_the_heads_there_are_takes_all_and_says_so():
    def sampled(count: int | None, **more):
        return select(MODEL, CaptureConfig(head_sampling=HeadSampling(count=count), **more))

    assert sampled(99).heads == sampled(None).heads == sampled(30).heads
    assert sampled(99).note == (
        "all 30 query heads are taken: capture.head_sampling.count=99 asks for more than there are"
    )
    assert sampled(30).note is None and sampled(None).note is None
    assert "all 22 query heads" in str(sampled(23, full_attention_only=True).note)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"heads": {0: [1], 2: [1]}, "layers": [0]}, "it follows from capture.heads"),
        ({"heads": {}}, "names nothing"),
        ({"heads": {"first": [1]}}, "give heads by layer as in"),
        ({"heads": {0: None}}, "give heads by layer as in"),
        ({"heads": {0: "3-1"}}, "capture.heads.0 has '3-1'"),
    ],
)
def test_heads_by_layer_that_make_no_sense(options: dict, said: str):
    with pytest.raises(ConfigError, match=said):
        CaptureConfig(**options)


def test_a_head_that_a_layer_does_not_have_is_named():
    with pytest.raises(ConfigError, match=r"capture.heads names \[6\], but the model's query heads of layer 5"):
        select(MODEL, CaptureConfig(heads={0: [6], 5: [6]}))
    limits = ModelLimits(layers=6, query_heads=8, key_heads=2, max_positions=None)
    with pytest.raises(ConfigError, match=r"capture.heads names \[9\]"):
        check_request(CaptureConfig(heads={0: [1], 1: [9]}), limits)


def test_full_attention_only_leaves_sliding_layers_out():
    assert select(MODEL, CaptureConfig(full_attention_only=True)).layers == (0, 2, 5)


@pytest.mark.parametrize(
    ("capture", "said"),
    [
        (
            CaptureConfig(layers=[3]),
            r"capture.layers names \[3\], but the model's attention layers are \[0, 1, 2, 5\]",
        ),
        (
            CaptureConfig(heads=[7]),
            r"capture.heads names \[7\], but the model's query heads of layer 5 are 0 to 5",
        ),
        (CaptureConfig(layers=[1], full_attention_only=True), "leaves no head"),
    ],
)
def test_what_does_not_exist_is_refused(capture: CaptureConfig, said: str):
    with pytest.raises(ConfigError, match=said):
        select(MODEL, capture)


def test_what_the_checkpoint_rules_out_is_refused_before_loading():
    limits = ModelLimits(layers=30, query_heads=9, key_heads=3, max_positions=8192)
    check_request(CaptureConfig(layers=[29], heads=[8]), limits)
    with pytest.raises(ConfigError, match=r"capture.layers names \[30\], but the model's layers are 0 to 29"):
        check_request(CaptureConfig(layers=[0, 30]), limits)
    with pytest.raises(ConfigError, match="query heads are 0 to 8"):
        check_request(CaptureConfig(heads=[9]), limits)
    check_request(CaptureConfig(layers=[99]), ModelLimits(None, None, None, None))


@pytest.mark.parametrize("claim", [{"layers": 10**9}, {"query_heads": 10**9}])
def test_a_checkpoint_cannot_claim_more_than_can_be_counted(claim: dict[str, int]):
    limits = ModelLimits(**{"layers": 2, "query_heads": 4, "key_heads": 2, "max_positions": 9} | claim)
    with pytest.raises(ConfigError, match="1,000,000,000"):
        check_request(CaptureConfig(layers=[0], heads=[0]), limits)
