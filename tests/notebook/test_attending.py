"""Statistics of attention of somebody's calls are those of the weights that the whole text has, attended step by step.

The witness is what transformers returns as `output_attentions` of a plain forward over the text alone, without padding,
cache or sniff; what follows from it is recomputed with NumPy.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from sniffer.models import finder

import sniffer
from sniffer import open_run
from sniffer.errors import CaptureError, ConfigError, RunError, UnsupportedModelError
from sniffer.forward.attention import calls
from sniffer.notebook.captured import Captured
from sniffer.reader.run import Run
from sniffer.runs.verify import verify
from sniffer.sampler import All, LogUniform
from tests.helpers_attention import TOP, from_weights
from tests.models.attention_witness import weights_of
from tests.notebook.test_going_on import HOW, numbers_of, text_of
from tests.notebook.test_listener import COUNTED, IDS, LEFT, PACKED, RIGHT, generate
from tests.tiny_families import tiny_config, tiny_model

finder.install()

pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).resolve().parents[2]
EVERY: dict[str, Any] = {"sampler": All(bucket_size=1), "attention": ["all", "out"], "attention_top": TOP}


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="sdpa").eval()


@pytest.fixture(scope="module")
def eager(model: Any) -> Any:
    found = copy.deepcopy(model)
    found.set_attn_implementation("eager")
    return found


def check(captured: Captured, weights: dict[int, list[np.ndarray]], apart: float = 2e-6, first: int = 0) -> None:
    """All statistics of each document's rows, all layers and heads, given the weights of its whole text.

    Args:
        first: the position of its first token.
    """
    for place, layer in enumerate(captured.selection.layers):
        for head in captured.selection.heads[layer, "attention"]:
            table = captured.attention(layer=layer, q_head=head)
            for number, known in weights.items():
                wanted = {name: values[:, head] for name, values in from_weights(known[place]).items()}
                start = captured.branches[number].position if number in captured.branches else first
                mine = table.filter(pl.col("example_id") == number).sort("position")
                positions = mine["position"].to_numpy()
                assert positions.tolist() == list(range(start, first + len(known[place][head])))
                for name, values in wanted.items():
                    found, expected = mine[name].to_numpy(), values[positions - first]
                    if name == "mass":
                        assert not found[:, :first].any()
                        found = found[:, first:]
                    if name in ("mass", "distance"):
                        short = found.shape[1] - expected.shape[1]
                        expected = np.pad(expected, ((0, 0), (0, short)))
                    if name == "top_position":  # where weights tie, either will do
                        at = np.maximum(found - first, 0)
                        expected = np.where(found < 0, 0, np.take_along_axis(wanted["mass"][positions - first], at, 1))
                        found = mine["top"].to_numpy()
                    if name == "first" and first:
                        expected = np.zeros_like(expected)
                    assert np.abs(found - expected).max() < apart * (20 if name == "entropy" else 1), (name, layer)
                assert np.allclose(np.linalg.norm(mine["out"].to_numpy(), axis=1), mine["out_norm"], atol=1e-5)


def whole(captured: Captured, eager: Any) -> dict[int, list[np.ndarray]]:
    return {number: weights_of(eager, text_of(captured, number)) for number in numbers_of(captured)}


def test_while_a_model_writes_and_as_a_run(model: Any, eager: Any, tmp_path: Path):
    """Padded on the left, in chunks, in a static cache; what it writes stays the same, and a run has the same rows."""
    expected = generate(model, attention_mask=LEFT)
    state = torch.get_rng_state()
    with sniffer.sniff(model, **EVERY, max_tokens=40) as captured:
        for how in ("one step after the other", "static, in chunks"):
            assert torch.equal(generate(model, attention_mask=LEFT, **HOW[how]), expected)
    assert torch.equal(state, torch.get_rng_state()) and captured.rows["attention"] == captured.rows["q"]
    check(captured, whole(captured, eager))
    folder = captured.save(tmp_path / "run")
    run = open_run(folder)
    assert verify(folder)[1] == [] and isinstance(run, Run)
    for layer, head in ((0, 0), (1, 3)):
        mine, theirs = (one.attention(layer=layer, q_head=head) for one in (captured, run))
        assert mine.schema == theirs.schema and mine.equals(theirs)
    tables = [one.scan(kind="attention").with_columns(pl.col("kind").cast(pl.String)) for one in (captured, run)]
    mine, theirs = (one.select(sorted(one.collect_schema())).collect() for one in tables)
    order = ["layer", "head", "example_id", "position"]
    assert mine.sort(order).equals(theirs.sort(order))
    with pytest.raises(RunError, match=r"captured.attention\(layer=1, q_head=0\) has its columns"):
        captured.vectors(layer=1, head=0, kind="attention")
    captured.clear()
    assert not len(captured.attention(layer=0, q_head=0))


def test_whatever_way_a_model_is_called(model: Any, eager: Any):
    """Padding on either side, documents packed into a row, positions from 100 on, beams, and no cache."""
    with sniffer.sniff(model, **EVERY, max_tokens=140) as captured:
        with torch.no_grad():
            model(IDS, RIGHT)
            model(IDS, LEFT, position_ids=COUNTED)
            model(IDS, position_ids=PACKED, use_cache=False)
        generate(model, use_cache=False)
        generate(model, num_beams=3)
        assert captured.branches and captured.documents == 11
        check(captured, whole(captured, eager))
        captured.clear()
        model(IDS, position_ids=torch.arange(100, 112)[None])
        with torch.no_grad():
            shifted = eager(IDS[:1], position_ids=torch.arange(100, 112)[None], output_attentions=True).attentions
        check(captured, {numbers_of(captured)[0]: [one[0].numpy() for one in shifted]}, first=100)


def test_a_call_stays_what_it_was(model: Any):
    """With gradients and in training too; under autocast statistics are still those of what attention was given."""
    captured, losses = [], []
    for sniffs in (False, True):
        mine = copy.deepcopy(model).train()
        torch.manual_seed(3)
        if sniffs:
            with sniffer.sniff(mine, sampler=LogUniform(base_rate=4.0, min_bucket_size=8), attention="all") as found:
                loss = mine(IDS, labels=IDS).loss
            captured.append(found)
        else:
            loss = mine(IDS, labels=IDS).loss
        loss.backward()
        losses.append([loss, torch.rand(3), *(one.grad for one in mine.parameters() if one.grad is not None)])
    assert captured[0].rows["attention"] and all(map(torch.equal, *losses))
    with torch.autocast("cpu", torch.bfloat16), sniffer.sniff(model, **EVERY) as found:
        model(IDS)
    row = found.attention(layer=1, q_head=0)
    assert np.abs(row["mass"].to_numpy().sum(1) - 1).max() < 1e-5


def test_what_cannot_be_had_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch):
    with sniffer.sniff(model, attention="all", max_tokens=9) as captured:
        with pytest.raises(
            CaptureError, match=r"has 12 tokens, and .* columns for 9: give sniff max_tokens=12 or more"
        ):
            model(IDS)
        assert captured.documents == 0
    with pytest.raises(ConfigError, match="names .'most'."), sniffer.sniff(model, attention="most"):
        pass
    inline = tiny_model(tiny_config("bloom"), attn_implementation="eager")
    refused = pytest.raises(UnsupportedModelError, match="attention of layer 0 is no call")
    with refused, sniffer.sniff(inline, attention="all", max_tokens=20):
        pass
    with sniffer.sniff(inline, sampler="all") as captured:
        inline(IDS)
    assert captured.rows["q"]
    dropping = copy.deepcopy(model).train()
    for layer in dropping.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with sniffer.sniff(dropping, attention="all"), pytest.raises(CaptureError, match="attends with dropout"):
        dropping(IDS)
    config = tiny_config("gemma3")
    config.image_token_id, config.mm_tokens_per_image = 7, 4
    config.vision_config.image_size = 4 * config.vision_config.patch_size
    pictured, image = tiny_model(config), torch.randn(1, 3, *[config.vision_config.image_size] * 2)
    ids = torch.cat([IDS[:1, :2], torch.full((1, 4), 7), IDS[:1, 2:]], 1)
    told = {"pixel_values": image, "token_type_ids": (ids == 7).long()}
    with sniffer.sniff(pictured, sampler="all", attention="lse", max_tokens=40, layers=[0]) as captured:
        with pytest.raises(CaptureError, match="see those after them in layer 0"):
            pictured(ids, **told)
        pictured(IDS)
    real = calls.by_steps

    def forgetful(call: Any, q: Any, k: Any, mask: Any, **how: Any) -> Any:
        return real(call, q, k, torch.zeros_like(mask), **how)

    with sniffer.sniff(model, sampler="all", attention="all") as captured:
        monkeypatch.setattr("sniffer.forward.attention.scores.by_steps", forgetful)
        with pytest.raises(CaptureError, match="do not follow from its own logits") as refusal:
            model(IDS, LEFT, position_ids=COUNTED)
    assert captured.partial is not None and "\n" not in str(refusal.value) and "layers=[...]" in str(refusal.value)


FAMILIES = {
    "gpt_oss": "one step after the other",
    "gemma2": "static, in chunks",
    "gemma3_text": "static",
    "gemma3n_text": "prompt in chunks of 5",
    "llama4_text": "prompt in chunks of 5",
    "deepseek_v3": "static",
    "lfm2": "prompt in chunks of 5",
    "gpt2": "no cache",
    "falcon": "one step after the other",
}


@pytest.mark.long
def test_families_agree_with_another_process(tmp_path: Path):
    """Windows that are left behind, chunks, sinks, soft caps, latent keys, shared ones, convolutions between."""
    from tests.models.generation_witness import CHANGES, EAGER

    found, texts = {}, {}
    for family, how in FAMILIES.items():
        attention = "eager" if family in EAGER else "sdpa"
        model = tiny_model(tiny_config(family, **CHANGES.get(family, {})), attn_implementation=attention)
        with sniffer.sniff(model, **EVERY, max_tokens=32) as captured:
            generate(model, attention_mask=LEFT, **HOW[how])
        found[family] = captured
        texts[family] = {number: text_of(captured, number) for number in numbers_of(captured)}
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    witness = [sys.executable, "-m", "tests.models.attention_witness", str(tmp_path / "out.npz")]
    subprocess.run([*witness, str(tmp_path / "texts.json")], cwd=ROOT, check=True)
    with np.load(tmp_path / "out.npz") as file:
        for family, captured in found.items():
            layers = range(len(captured.selection.layers))
            known = {number: [file[f"{family}/{number}/{layer}"] for layer in layers] for number in texts[family]}
            check(captured, known, apart=2e-5)
