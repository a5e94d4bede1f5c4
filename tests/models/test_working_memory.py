"""What a forward needs beside the weights: fake tensors say what an allocator says of real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sniffer.models.backbone import Checkpoint
from torch.profiler import ProfilerActivity, profile

from tests.tiny_run import save_checkpoint

LLAMA = {"model_type": "llama", "config_overrides": {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 99}}
GEMMA = {"model_type": "gemma3_text", "config_overrides": {"hidden_size": 64, "sliding_window": 32, "vocab_size": 99}}
MIXTRAL = {"model_type": "mixtral", "config_overrides": {"hidden_size": 64, "num_local_experts": 4, "vocab_size": 99}}


def checkpoint(family: dict, **more) -> Checkpoint:
    overrides = {**family["config_overrides"], "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {"checkpoint": "none/such", "weights": "random", "model_type": family["model_type"], "device": "cpu"}
    return Checkpoint(**{**made, "config_overrides": {**overrides, "num_key_value_heads": 2}, **more})


def allocated(made: Checkpoint, rows: int, tokens: int) -> int:
    """The most bytes that torch's allocator has handed out at one time in one forward, as its profiler tells.

    oneDNN is left out: on a processor without bfloat16 of its own it sums products in float32, in memory of its own for
    the length of one call.
    """
    model, ids = made.load(), torch.zeros((rows, tokens), dtype=torch.long)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
        model(ids)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            model(ids)
    assert found.profiler is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", [LLAMA, GEMMA], ids=["llama", "gemma3"])
def test_it_is_what_an_allocator_hands_out(family: dict, dtype: str, attention: str):
    made = checkpoint(family, dtype=dtype, attn_implementation=attention)
    needed = made.working_memory(2, 150)
    assert needed is not None and (needed.rows, needed.tokens) == (2, 150)
    assert needed.peak == pytest.approx(allocated(made, 2, 150), rel=0.05)


def test_masks_are_those_of_layers_with_a_window():
    """A number to add for each pair of tokens; where all layers attend to everything, fused kernels need none."""
    for tokens, mask in ((30, 0), (64, 4 * 64 * 64)):
        needed = checkpoint(GEMMA, attn_implementation="sdpa").working_memory(1, tokens)
        assert needed is not None and needed.mask == mask
    needed = checkpoint(LLAMA, attn_implementation="sdpa").working_memory(1, 64)
    assert needed is not None and needed.mask == 0


def test_what_cannot_be_found_is_not_made_up(monkeypatch: pytest.MonkeyPatch):
    assert checkpoint(LLAMA, attn_implementation="flash_attention_2").working_memory(1, 64) is None


def test_afterwards_transformers_is_as_it_was(tmp_path: Path):
    from transformers import masking_utils

    before = masking_utils.find_packed_sequence_indices
    made = Checkpoint(str(save_checkpoint(tmp_path)), device="cpu")
    assert made.working_memory(1, 64) is not None
    assert masking_utils.find_packed_sequence_indices is before
