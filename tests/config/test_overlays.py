"""The studies in conf/experiment: each says what it is known for, and its sweep's values are of the right type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from sniffer.models.architecture import build_config

from sniffer.config.resolve import conf_folder, register
from sniffer.config.saving import plain_values

EXPERIMENTS = sorted(file.stem for file in (conf_folder() / "experiment").glob("*.yaml"))

PLASTICITY_MODELS = {
    "llama3_2": ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"),
    "mllama": ("meta-llama/Llama-3.2-11B-Vision",),
    "ministral3": tuple(f"mistralai/Ministral-3-{size}B-Base-2512" for size in (3, 8, 14)),
    "qwen3": tuple(f"Qwen/Qwen3-{size}B" for size in ("0.6", "1.7", "4", "8", "14")),
}
YARN = (
    "{max_position_embeddings: 131072, rope_parameters: {rope_type: yarn, factor: 4.0, "
    "original_max_position_embeddings: 32768}}"
)


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
    for checkpoint in PLASTICITY_MODELS[model]:
        plain = values("experiment=attention_plasticity", f"model={model}", f"model.checkpoint={checkpoint}")
        assert plain["sampler"]["_target_"] == "sniffer.sampler.Uniform"
        assert (plain["sampler"]["base_rate"], plain["sampler"]["bucket_size"], plain["seed"]) == (1.0, 8192, 0)
        assert plain["capture"]["head_sampling"] == {"count": 300, "seed": 0}
        assert plain["capture"]["full_attention_only"] is True
        assert (plain["model"]["dtype"], plain["dataset"]["max_tokens"]) == ("bfloat16", 131072)
    shown = (conf_folder() / "experiment" / "attention_plasticity.yaml").read_text()
    assert f"model={model}" in shown


def test_the_default_checkpoints_are_the_studys():
    for model, checkpoints in PLASTICITY_MODELS.items():
        assert values("experiment=attention_plasticity", f"model={model}")["model"]["checkpoint"] == checkpoints[0]


def test_qwen3_reaches_131072_positions_with_yarn():
    plain = values("experiment=attention_plasticity", "model=qwen3", f"model.config_overrides={YARN}")
    config: Any = build_config("qwen3", plain["model"]["config_overrides"])
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 32768)
    assert config.max_position_embeddings == 131072 == 4 * 32768
    shown = " ".join((conf_folder() / "experiment" / "attention_plasticity.yaml").read_text().replace("#", "").split())
    assert f"'model.config_overrides={YARN}'" in shown


def test_smollm3_has_sixteen_buckets_at_each_stage():
    plain = values("experiment=attention_plasticity_smollm3")
    assert plain["model"]["checkpoint"] == "HuggingFaceTB/SmolLM3-3B-checkpoints"
    assert plain["dataset"]["max_tokens"] // plain["sampler"]["bucket_size"] == 16
    shown = (conf_folder() / "experiment" / "attention_plasticity_smollm3.yaml").read_text()
    for bucket, tokens in ((2048, 32768), (4096, 65536)):
        assert f"sampler.bucket_size={bucket} dataset.max_tokens={tokens}" in shown
        assert tokens // bucket == 16
