"""A plan says what the run then does; it makes no weights and leaves nothing behind."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from sniffer.models import quantized
from sniffer.models.backbone import Checkpoint

from sniffer.__main__ import main
from sniffer.cli.plan import Needs, facts, needs
from sniffer.config.resolve import conf_folder, plan_asked, register, resolve
from sniffer.config.schema import Config
from sniffer.errors import ConfigError, RunError, UnsupportedModelError
from tests.tiny_run import TEXTS, overrides

SEVENTY_BILLION = (
    "model=llama3",
    "model.weights=random",
    "model.dtype=bfloat16",
    "model.config_overrides={num_hidden_layers: 80, hidden_size: 8192, intermediate_size: 28672, "
    "num_attention_heads: 64, num_key_value_heads: 8, vocab_size: 128256, max_position_embeddings: 131072}",
    "dataset.max_examples=500",
    "dataset.max_tokens=131072",
)
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "vocab_size": 300,
}


@pytest.fixture(autouse=True)
def schema() -> Iterator[None]:
    register()
    yield
    GlobalHydra.instance().clear()


def configured(*arguments: str) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return resolve(compose("config", list(arguments)), arguments)


def planned(*arguments: str, **asked: Any) -> Needs:
    return needs(configured(*arguments), plan_asked(asked or True))


def test_what_is_planned_is_what_happens(run: Callable, checkpoint: Path, texts: Path):
    choices = ["capture.kinds=[q,k,v,k_pre]", "capture.layers=[1]", "sampler=all"]
    done = run(*choices).manifest
    plan = planned(*overrides(checkpoint, texts, *choices))
    assert plan.read and plan.tokens == done.counts["tokens"] and len(plan.lengths) == len(TEXTS)
    assert plan.expected.rows == done.rows_by_kind
    assert plan.outline.geometry == done.geometry
    assert plan.parts == len(done.parts)


def test_unread_documents_are_counted_as_long_as_they_may_be(checkpoint: Path):
    unread = ["dataset.path=nowhere.jsonl", "dataset.max_examples=7", "dataset.max_tokens=100"]
    arguments = [*overrides(checkpoint, Path("nowhere.jsonl")), *unread, "sampler=all"]
    plan = planned(*arguments)
    assert not plan.read and plan.lengths == [100] * 7
    assert plan.expected.rows == {"q": 700 * 2 * 4, "k": 700 * 2 * 2}
    shards = [planned(*arguments, "dataset.shard.count=3", f"dataset.shard.index={n}") for n in range(3)]
    assert [len(shard.lengths) for shard in shards] == [3, 2, 2]


def test_unread_is_a_bound_on_read(checkpoint: Path, texts: Path):
    arguments = overrides(checkpoint, texts, "dataset.max_examples=3", "dataset.max_tokens=200")
    most, exact = planned(*arguments), planned(*arguments, read=True)
    assert (most.read, exact.read) == (False, True)
    assert exact.tokens <= most.tokens and exact.expected.vectors < most.expected.vectors


def test_limits_of_the_model_are_met_in_a_plan(checkpoint: Path, texts: Path):
    with pytest.raises(ConfigError, match="more than the model's 2048 positions"):
        planned(*overrides(checkpoint, texts, "dataset.max_examples=3", "dataset.max_tokens=4096"))
    with pytest.raises(ConfigError, match=r"capture\.layers"):
        planned(*overrides(checkpoint, texts, "capture.layers=[9]"))
    with pytest.raises(ConfigError, match="needs dataset"):
        planned(*overrides(checkpoint, texts), read=False)


def test_no_weights_are_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Checkpoint, "load", lambda self: pytest.fail("weights are being loaded"))
    plan = planned(*SEVENTY_BILLION)  # 130 GiB, if they were
    assert 69e9 < plan.outline.parameters < 71e9 and plan.weights == 2 * plan.outline.parameters
    assert len(plan.outline.geometry) == 80
    assert plan.outline.geometry[7].heads["q"] == 64 and plan.outline.geometry[7].heads["k"] == 8
    assert plan.expected.rows["q"] == pytest.approx(8 * plan.expected.rows["k"])
    assert "65,536,000" in facts(plan)["forward tokens"]
    # Gate and up projection of all tokens lie side by side: two of 131,072 x 28,672 values of 2 bytes, 14 GiB.
    two = 2 * 131_072 * 28_672 * 2
    assert plan.forward is not None and plan.forward.mask == 0 and two < plan.forward.peak < 3 * two
    assert "for a batch of 1 x 131,072 tokens" in facts(plan)["on the device"]


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("llama", {"num_key_value_heads": 2}),
        ("gemma3_text", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16}),
        ("gpt_oss", {"num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4}),
        ("gpt_neox", {}),
    ],
)
def test_the_outline_is_that_of_the_loaded_model(model_type: str, more: dict[str, Any]):
    made = Checkpoint("none", weights="random", model_type=model_type, config_overrides=SMALL | more, device="cpu")
    outline, backbone = made.outline(), made.load()
    assert outline.geometry == backbone.geometry
    assert outline.pre_missing == backbone.pre_missing
    assert f"torch.{outline.dtype}" == str(backbone.dtype)
    assert outline.parameters == sum(parameter.numel() for parameter in backbone.module.parameters())


def test_a_plan_tells_weights_as_they_are_quantised(checkpoint: Path, texts: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: True)
    plain = planned(*overrides(checkpoint, texts))
    plan = planned(*overrides(checkpoint, texts, "model.quantization=bnb_4bit"))
    assert plan.weights < plain.weights == plain.outline.parameters * plain.outline.itemsize
    assert facts(plan)["weights"].startswith("about ") and "linear layers by bnb_4bit" in facts(plan)["weights"]
    assert "what dequantising a layer takes is unknown, and not in it" in facts(plan)["on the device"]
    assert "dequantising" not in facts(plain)["on the device"]


def test_a_lower_memory_limit_means_less_memory_and_more_files(checkpoint: Path, texts: Path):
    many = ["sampler=all", "dataset.max_examples=50", "dataset.max_tokens=100", "batch.max_tokens=100"]
    free = planned(*overrides(checkpoint, texts, *many))
    tight = planned(*overrides(checkpoint, texts, *many, "output.memory_limit=10kB"))
    assert free.least_ram <= tight.ram < free.ram and tight.parts > free.parts
    often = planned(*overrides(checkpoint, texts, "output.checkpoint_every=1"))
    assert often.parts == len(TEXTS) * free.parts


def test_time_follows_from_a_measured_speed(run: Callable, checkpoint: Path, texts: Path):
    arguments = overrides(checkpoint, texts)
    assert "unknown" in facts(planned(*arguments))["time"]
    given = planned(*arguments, tokens_per_second=0.1)
    assert given.speed == 0.1 and facts(given)["time"].startswith(f"{given.tokens * 10 // 3600}h")
    done = run()
    taken = planned(*arguments, run=str(done.folder))
    assert taken.speed == done.manifest.counts["tokens"] / done.manifest.timings["inference"]
    with pytest.raises(RunError, match="not a run folder"):
        planned(*arguments, run="nowhere")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (3, "plan=3"),
        ({"speed": 1}, "plan.speed"),
        ({"tokens_per_second": 0}, "plan.tokens_per_second=0"),
        ({"tokens_per_second": 1.0, "run": "x"}, "leave one"),
        ({"read": "perhaps"}, "plan.read"),
    ],
)
def test_a_wrong_request_is_refused(value: Any, named: str):
    with pytest.raises(ConfigError) as caught:
        plan_asked(value)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", [[], ["-m", "sampler.base_rate=1,2"]])
def test_a_plan_leaves_nothing_behind(
    mode: list[str],
    checkpoint: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "argv", ["sniffer", *mode, *overrides(checkpoint, texts, "plan=true")])
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        assert main() == 0
    finally:
        logging.root.handlers[:], logging.root.level = handlers, level
    assert capsys.readouterr().out.count("what the run would need") == len(mode or [1])
    assert [path for path in (tmp_path / "here").rglob("*") if path.name != "outputs"] == []


def test_a_model_that_cannot_be_outlined_is_one_line(caplog: pytest.LogCaptureFixture):
    bad = {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 4}
    with pytest.raises(UnsupportedModelError, match="cannot be planned for"):
        Checkpoint("none", weights="random", model_type="mixtral", config_overrides=SMALL | bad).outline()
    assert not caplog.records
