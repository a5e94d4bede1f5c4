"""The studies in conf/experiment: each says what it is known for, and its sweep's values are of the right type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from sniffer.models.architecture import build_config
from sniffer.models.backbone import Checkpoint

from sniffer.cli.plan import Needs, facts, needs
from sniffer.config.resolve import conf_folder, register, resolve
from sniffer.config.saving import plain_values
from sniffer.config.schema import PlanConfig

EXPERIMENTS = sorted(file.stem for file in (conf_folder() / "experiment").glob("*.yaml"))

PLASTICITY_MODELS = {
    "llama3_2_1b": ("meta-llama/Llama-3.2-1B", 512),
    "llama3_2_3b": ("meta-llama/Llama-3.2-3B", 672),
    "llama3_2_11b": ("meta-llama/Llama-3.2-11B-Vision", 1280),
    **{
        f"ministral3_{n}b": (f"mistralai/Ministral-3-{n}B-Base-2512", 32 * deep)
        for n, deep in ((3, 26), (8, 34), (14, 40))
    },
    "qwen3_0_6b": ("Qwen/Qwen3-0.6B", 448),
    "qwen3_1_7b": ("Qwen/Qwen3-1.7B", 448),
    "qwen3_4b": ("Qwen/Qwen3-4B", 1152),
    "qwen3_8b": ("Qwen/Qwen3-8B", 1152),
    "qwen3_14b": ("Qwen/Qwen3-14B", 1600),
    "llama3_1_8b": ("meta-llama/Llama-3.1-8B", 1024),
    "mistral_v0_2_7b": ("mistralai/Mistral-7B-Instruct-v0.2", 1024),
}
"""Checkpoints of the study (configs/attention-plasticity of github.com/viktor-shcherb/qk-sniffer), and how many query
heads theirs have, by the table of models in chapter 5 of github.com/viktor-shcherb/msc_thesis."""


@pytest.fixture(autouse=True)
def schema() -> Iterator[None]:
    register()
    yield
    GlobalHydra.instance().clear()


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("config", list(overrides), return_hydra_config=True)


def values(*overrides: str) -> dict[str, Any]:
    cfg = composed(*overrides)
    return plain_values(cfg.__class__({key: cfg[key] for key in cfg if key != "hydra"}))


@pytest.mark.long
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_job_of_an_overlay_composes(name: str):
    params = composed(f"experiment={name}").hydra.sweeper.params or {}
    for key, text in params.items():
        (swept,) = OverridesParser.create().parse_overrides([f"{key}={text}"])
        assert swept.is_sweep_override()
        for value in swept.sweep_string_iterator():
            assert values(f"experiment={name}", f"{key}={value}")


def test_base_rate_by_layer_sweeps_both():
    params = composed("experiment=base_rate_by_layer").hydra.sweeper.params
    assert list(params) == ["sampler.base_rate", "capture.layers"]


@pytest.mark.parametrize("model", PLASTICITY_MODELS)
def test_attention_plasticity_is_the_published_set_up(model: str):
    """One command: model, text, sampling and heads. No hub is asked, neither to compose nor to plan."""
    checkpoint, there = PLASTICITY_MODELS[model]
    longest = 32768 if model == "mistral_v0_2_7b" else 131072
    chosen = [f"model=plasticity/{model}", "model.weights=random", f"dataset.max_tokens={longest}"]
    plain = values("experiment=attention_plasticity", *chosen)
    assert plain["model"]["checkpoint"] == checkpoint and plain["model"]["dtype"] == "bfloat16"
    text = {
        key: plain["dataset"][key] for key in ("_target_", "name", "split", "text_column", "id_column", "max_tokens")
    }
    assert text == {
        "_target_": "sniffer.tables.Hub",
        "name": "viktoroo/longbench-pro-128k-plus",
        "split": "test",
        "text_column": "text",
        "id_column": "id",
        "max_tokens": longest,
    }
    assert plain["sampler"]["_target_"] == "sniffer.sampler.Uniform"
    assert (plain["sampler"]["base_rate"], plain["sampler"]["bucket_size"], plain["seed"]) == (1.0, 8192, 0)
    assert plain["capture"]["head_sampling"] == {"count": 300, "seed": 0}
    assert plain["capture"]["full_attention_only"] is True
    names = ("checkpoint", "model_type", "architecture", "weights", "config_overrides")
    limits = Checkpoint(**{name: plain["model"][name] for name in names}, device="cpu").limits()
    assert (limits.layers or 0) * (limits.query_heads or 0) == there
    assert (limits.max_positions or 0) >= longest
    shown = (conf_folder() / "experiment" / "attention_plasticity.yaml").read_text()
    assert model in shown


def test_the_study_is_one_sweep():
    (swept,) = composed("experiment=attention_plasticity_models").hydra.sweeper.params.values()
    assert {name.removeprefix("plasticity/") for name in swept.split(",")} == {*PLASTICITY_MODELS} - {"mistral_v0_2_7b"}
    assert {path.stem for path in (conf_folder() / "model" / "plasticity").glob("*.yaml")} == {*PLASTICITY_MODELS}


def test_a_text_of_ones_own_takes_the_place_of_the_published_one():
    plain = values("experiment=attention_plasticity", "dataset=parquet", "dataset.path=books.parquet")
    assert plain["dataset"]["_target_"] == "sniffer.tables.Parquet" and "name" not in plain["dataset"]
    assert (plain["dataset"]["max_tokens"], plain["dataset"]["id_column"]) == (131072, None)


def planned(*overrides: str) -> Needs:
    chosen = ["experiment=attention_plasticity", *overrides]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return needs(resolve(compose("config", chosen), chosen), PlanConfig())


def test_its_plan_asks_no_hub():
    """500 texts, about a position in 8192, 300 of the heads that do not attend to pictures."""
    plan = planned("model=plasticity/llama3_2_11b", "model.weights=random")
    assert len(plan.outline.geometry) == 40 - 8
    assert sum(len(heads) for (_, kind), heads in plan.selection.heads.items() if kind == "q") == 300
    assert plan.lengths == [131072] * 500 and plan.selection.note is None
    assert plan.expected.rows["q"] == pytest.approx(500 * 16 * 300)


def test_a_model_with_fewer_heads_gives_all_of_them():
    plan = planned("model=smollm2", "dataset.max_tokens=8192")
    assert plan.selection.heads[0, "q"] == tuple(range(9)) and "all 270 query heads are taken" in facts(plan)["heads"]


def test_qwen3_reaches_131072_positions_with_yarn():
    plain = values("experiment=attention_plasticity", "model=plasticity/qwen3_0_6b")
    config: Any = build_config("qwen3", plain["model"]["config_overrides"])
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 32768)
    assert config.max_position_embeddings == 131072 == 4 * 32768


def test_smollm3_has_sixteen_buckets_at_each_stage():
    plain = values("experiment=attention_plasticity_smollm3")
    assert plain["model"]["checkpoint"] == "HuggingFaceTB/SmolLM3-3B-checkpoints"
    assert plain["dataset"]["max_tokens"] // plain["sampler"]["bucket_size"] == 16
    shown = (conf_folder() / "experiment" / "attention_plasticity_smollm3.yaml").read_text()
    for bucket, tokens in ((2048, 32768), (4096, 65536)):
        assert f"sampler.bucket_size={bucket} dataset.max_tokens={tokens}" in shown
        assert tokens // bucket == 16
