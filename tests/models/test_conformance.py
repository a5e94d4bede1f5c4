"""The conformance suite itself: a few families through it, and that each of its checks can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sniffer.models import finder, loaded
from sniffer.models.layers import find_backbone
from sniffer.models.loaded import LoadedBackbone
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from sniffer.tap import TAP
from sniffer.types import LengthClasses
from tests import helpers_overrides
from tests.conformance import __main__ as suite
from tests.conformance import checks, lengths, scores
from tests.conformance.__main__ import surprises
from tests.conformance.report import CHECKS, render
from tests.tiny_families import tiny_config, tiny_ids, tiny_model

finder.install()

ROOT = Path(__file__).resolve().parents[2]
SCOUTS = ("llama", "gpt_oss", "mllama")
"""Of all that `make conformance` looks at."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The suite over a few families, in processes of their own."""
    path = tmp_path_factory.mktemp("conformance") / "results.json"
    command = [sys.executable, "-m", "tests.conformance", "--jobs", "1", "--json", str(path), *SCOUTS]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    return {result["model_type"]: result for result in json.loads(path.read_text())["families"]}


@pytest.mark.long
@pytest.mark.parametrize("family", SCOUTS)
def test_every_check_holds(results: dict[str, dict[str, Any]], family: str):
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {family}")
    result = results[family]
    assert result["outcome"] == "tapped", result
    assert not any(result[name] for name in CHECKS), result


def backbone() -> LoadedBackbone:
    return LoadedBackbone(find_backbone(tiny_model(tiny_config("llama"))))


def test_a_tap_that_shows_copies_is_found(monkeypatch: pytest.MonkeyPatch):
    tapped, real = backbone(), TAP.observe
    assert not checks.check_same(tapped, tiny_ids())
    monkeypatch.setattr(TAP, "observe", lambda module, q, *rest, **more: real(module, q.clone(), *rest, **more))
    assert "other objects" in checks.check_same(tapped, tiny_ids())


def test_pre_kinds_that_are_rotated_are_found(monkeypatch: pytest.MonkeyPatch):
    tapped, real = backbone(), TAP.observe

    def lie(module: Any, q: Any, k: Any, v: Any, q_pre: Any = None, k_pre: Any = None, **more: Any) -> None:
        real(module, q, k, v, q, k, **more)

    rotated = checks.watch(tapped, tiny_ids(), pre=True)[0]
    assert not checks.check_pre(tapped, rotated, tiny_ids())
    monkeypatch.setattr(TAP, "observe", lie)
    rotated = checks.watch(tapped, tiny_ids(), pre=True)[0]
    assert checks.check_pre(tapped, rotated, tiny_ids())


def test_a_backbone_that_looks_ahead_is_found(monkeypatch: pytest.MonkeyPatch):
    tapped = backbone()
    real = torch.nn.functional.scaled_dot_product_attention

    def blind(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **{**kwargs, "attn_mask": None, "is_causal": False})

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", blind)
    assert "changes real tokens" in checks.check_mask(tapped, tiny_ids())


def test_layers_that_go_missing_are_found():
    tapped = backbone()
    seen = checks.watch(tapped, tiny_ids())[0]
    assert not checks.check_numbers(tapped, seen)
    assert checks.check_numbers(tapped, seen[:-1])
    tapped.module.config.num_hidden_layers = 5
    assert "where the config has 5" in checks.check_numbers(tapped, seen)


@pytest.mark.parametrize(
    ("lie", "found"),
    [
        ({"max_positions": 40, "rows_before": 88}, "is no limit of it"),
        ({"max_positions": 127}, "does not fit"),
        ({"layers": 3}, "more than the 3 layers"),
        ({"query_heads": 2}, "more than the 2 query heads"),
    ],
)
def test_limits_that_are_not_the_models_are_found(monkeypatch: pytest.MonkeyPatch, lie: dict[str, Any], found: str):
    model = tiny_model(tiny_config("llama"))
    tapped = LoadedBackbone(find_backbone(model))
    assert not lengths.check_limits(model, tapped)
    honest = lengths.limits_of(model.config)
    monkeypatch.setattr(lengths, "limits_of", lambda config: replace(honest, **lie))
    assert found in lengths.check_limits(model, tapped)


def test_a_table_that_ends_before_its_limit_is_found(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(tiny_config("gpt2"))
    tapped = LoadedBackbone(find_backbone(model))
    assert not lengths.check_limits(model, tapped)
    honest = lengths.limits_of(model.config)
    for most, found in ((129, "does not run at its limit of 129 tokens"), (None, "limits do not tell")):
        monkeypatch.setattr(lengths, "limits_of", lambda config, most=most: replace(honest, max_positions=most))
        assert found in lengths.check_limits(model, tapped)


def test_batches_that_have_a_say_are_found(monkeypatch: pytest.MonkeyPatch):
    build = partial(checks.build, "llama")
    assert not lengths.check_batches(build)
    honest = loaded.study
    monkeypatch.setattr(loaded, "study", lambda *given: (honest(*given)[0], []))
    assert "other vectors after longer texts" in lengths.check_batches(build)
    monkeypatch.setattr(loaded, "study", lambda *given: (LengthClasses(), honest(*given)[1]))
    assert "in a batch that differ" in lengths.check_batches(build)


def test_overrides_that_change_more_are_found(monkeypatch: pytest.MonkeyPatch):
    def careless(model_type: str, overrides: dict[str, Any]) -> Any:
        return AutoConfig.for_model(
            model_type, **overrides, rope_parameters={"rope_type": "default", "rope_theta": 7.0}
        )

    assert not helpers_overrides.changed_too_much("llama")
    monkeypatch.setattr(helpers_overrides, "build_config", careless)
    assert "changes rope_parameters.rope_theta" in helpers_overrides.changed_too_much("llama")[0]


@pytest.mark.parametrize(
    ("family", "change", "found"),
    [
        ("gemma2", {"facts": {"softcap": 30.0}}, "logits"),
        ("gpt_oss", {"facts": {"sinks": None}}, "lse"),
        ("bloom", {"facts": {"alibi": None}}, "logits"),
        ("mistral", {"layer": {"sliding_window": 17}}, "probabilities"),
        ("mistral", {"layer": {"sliding_window": None}}, "probabilities"),
        ("llama4_text", {"layer": {"chunked": False}}, "probabilities"),
        ("llama", {"layer": {"scaling": 0.26}}, "logits"),
        ("llama", {"layer": {"scaling": None}}, "no scaling"),
    ],
)
def test_scores_that_are_not_attentions_are_found(
    monkeypatch: pytest.MonkeyPatch, family: str, change: dict[str, Any], found: str
):
    assert not scores.scores_of(checks.build, family)
    honest = scores.as_told

    def lie(backbone: LoadedBackbone) -> dict[int, Any]:
        return {
            number: (replace(layer, **change.get("layer", {})), replace(facts, **change.get("facts", {})))
            for number, (layer, facts) in honest(backbone).items()
        }

    monkeypatch.setattr(scores, "as_told", lie)
    wrong = scores.scores_of(checks.build, family)
    assert wrong.startswith("layer 0: ") and found in wrong
    (line,) = suite.complaints(result_of(family, scores=wrong))
    assert line.startswith("scores from the manifest are others: layer 0")


def test_scores_that_are_refused_are_no_complaint():
    refused = scores.scores_of(checks.build, "mpt")
    assert refused == "refused: 4 of 4 layers: it adds a constant to all logits of a query"
    result = result_of("mpt", proven="", exact="", scores=refused)
    assert not suite.complaints(result)
    page = render({"transformers": "5.1", "expected": {}, "families": [result, result_of("llama", scores="")]})
    assert "| yes | yes | no |" in page and "| yes |  | yes |" in page


def result_of(name: str, **changes: Any) -> dict[str, Any]:
    passed = {"outcome": "tapped", "layers": 2, "skipped": 1, "attention": "sdpa"}
    return {"model_type": name, **passed, **dict.fromkeys(CHECKS, ""), **changes}


def test_what_differs_from_what_is_expected_is_an_error():
    lost, won, fine = result_of("lost", pre="missing"), result_of("won"), result_of("fine")
    refused = result_of("refused", outcome="refused", reason="no attention")
    found = surprises([lost, won, fine, refused], {"won": "was hard", "refused": "has no attention"})
    assert [line.split()[0] for line in found] == ["lost", "won"]


def test_the_page_names_what_is_tapped_and_what_is_not():
    families = [result_of("fine"), {"model_type": "odd", "outcome": "refused", "reason": "a|b"}]
    page = render({"transformers": "5.1", "expected": {}, "families": families})
    assert (
        "1 of 2 are tapped" in page and "| fine | 2 + 1 | sdpa | yes |" in page and "| odd | refused | a\\|b |" in page
    )


def test_the_page_names_further_types_and_the_settings_they_need():
    families = [
        result_of("fine", path="model.decoder", only={"is_decoder": [True]}),
        result_of("speaks", only={"attention_type": ["original_full"]}),
    ]
    page = render({"transformers": "5.1", "expected": {}, "further": ["speaks"], "families": families})
    main, further = page.split("## Further types")
    assert "1 of 1 are tapped" in main and "[1 more" in main
    assert "| fine |" in main and "| model.decoder | `is_decoder: true` |" in main and "speaks" not in main
    assert "| speaks |" in further and "`attention_type: original_full`" in further


@pytest.mark.parametrize(
    ("model_type", "only"),
    [("bert", {"is_decoder": [True]}), ("llama", {}), ("gemma3_text", {"use_bidirectional_attention": [False, None]})],
)
def test_settings_that_decide_are_found(model_type: str, only: dict[str, Any]):
    assert suite.conditions(model_type) == only


def test_further_types_are_in_no_other_list():
    assert not set(suite.further_types()) & set(suite.model_types())
    assert len(suite.further_types()) == len(set(suite.further_types()))
    assert {"t5", "voxtral", "qwen2_audio"} <= set(suite.further_types())
    assert not set(suite.unlisted_types()) & {*suite.further_types(), *suite.model_types()}


def busy() -> dict[str, Any]:
    while True:
        pass


def waiting() -> dict[str, Any]:
    time.sleep(1.5)
    return {"outcome": "tapped"}


def test_a_family_is_given_up_for_what_it_computes_and_not_for_what_it_waits(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(suite, "PROCESSOR_S", 1)
    assert suite.in_process(waiting) == {"outcome": "tapped"}
    assert suite.in_process(busy) == {"outcome": "failed", "reason": "needs more than 1 s of processor time"}
    monkeypatch.setattr(suite, "PATIENCE_S", 0.1)
    assert suite.in_process(waiting) == {"outcome": "failed", "reason": "no answer in 0.1 s"}
    monkeypatch.setattr(suite, "PATIENCE_S", 60)
    assert suite.in_process(os._exit, 3) == {"outcome": "failed", "reason": "the process died (3)"}


def choices() -> list[Path]:
    return sorted((ROOT / "conf" / "model").glob("*.yaml"))


@pytest.mark.parametrize("choice", choices(), ids=lambda path: path.stem)
def test_every_choice_of_model_is_a_family_that_has_passed(choice: Path):
    record = json.loads((ROOT / "docs" / "families.json").read_text())
    passed = {family["model_type"] for family in record["families"] if family["outcome"] == "tapped"}
    assert yaml.safe_load(choice.read_text()).get("model_type") in {None, *passed}
