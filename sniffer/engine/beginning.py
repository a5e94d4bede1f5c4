"""The manifest of a run that is about to start: on what it will run, and what it will capture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sniffer.config.saving import saved_config
from sniffer.config.schema import Config
from sniffer.engine.base import Plan
from sniffer.engine.facts import Facts
from sniffer.sampler import describe
from sniffer.storage.manifest import Manifest
from sniffer.storage.urls import require_url
from sniffer.types import by_rope, described


def first_manifest(config: Config, plan: Plan, folder: Path, model: Facts, tokenizer: Mapping[str, str]) -> Manifest:
    """What is known by then; `tokenizer` is what it says of itself, nothing where it is a plain function."""
    return Manifest(
        status="running",
        seed=config.seed,
        model={**config.model.describe(), **({"tokenizer": dict(tokenizer)} if tokenizer else {})},
        dataset=described(config.dataset, generates=plan.continuing is not None),
        sampler=describe(config.sampler),
        geometry=tuple(plan.geometry.values()),
        selection=plan.selection.by_layer(),
        threads=model.threads,
        device=dict(model.described),
        backbone=model.describe(),
        config=saved_config(folder),
        attention=None if plan.attention is None else plan.attention.as_json(),
        moments=plan.moments_told(),
        scores={layer: facts.as_json() for layer, facts in model.scores.items()},
        rope=by_rope(model.rope),
        generation=None if plan.continuing is None else plan.continuing.as_json(),
        parts_at=None if config.output.keep_local else require_url(str(config.output.mirror), "output.mirror="),
    )
