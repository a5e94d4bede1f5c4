"""The dataset card of a published run: what it is, how positions were drawn, and how to load it.

The YAML head names one configuration per (layer, kind). One per head would be thousands, with which
load_dataset takes minutes to list them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from sniffer.sampler import FORMULAS, SIDES
from sniffer.storage.law import side_of
from sniffer.storage.manifest import Manifest
from sniffer.terminal.summary import not_finite_line
from sniffer.words import printable

TEXT_LICENCES = {
    "sniffer.dataset.Sotu": "public domain (works of the United States government)",
    "sniffer.dataset.Pydoc": "Python Software Foundation License 2.0",
}
"""Of the datasets that come with this project or with Python."""


def config_name(layer: int, kind: str) -> str:
    """What load_dataset calls the vectors of one layer and kind."""
    return f"l{layer:02d}{kind}"


def card(manifest: Manifest, repo: str, text_licence: str | None) -> str:
    """README.md of the published folder."""
    licence = text_licence or TEXT_LICENCES.get(_text_source(manifest.dataset))
    head = yaml.safe_dump(_head(manifest, text_licence), sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n{_body(manifest, repo, licence or 'not stated: ask whoever published this')}"


def _text_source(dataset: Mapping[str, Any]) -> str:
    """The class of a dataset, or of the hay that needles are hidden in."""
    hay = dataset.get("hay")
    return str((hay if isinstance(hay, Mapping) else dataset).get("_target_"))


def _head(manifest: Manifest, text_licence: str | None) -> dict[str, Any]:
    folders = {(part.layer, part.kind): part.path.rpartition("/")[0] for part in manifest.parts}
    configs = [
        {"config_name": config_name(*pair), "data_files": [{"split": "train", "path": f"{folder}/*.parquet"}]}
        for pair, folder in folders.items()
    ]
    return {
        "license": text_licence or "other",
        "tags": ["attention", "queries-and-keys", "interpretability", "qk-sniffer"],
        "pretty_name": f"q and k vectors of {manifest.model.get('checkpoint')}",
        "configs": configs,
    }


def _body(manifest: Manifest, repo: str, licence: str) -> str:
    first = next((config_name(part.layer, part.kind) for part in manifest.parts), "l00q")
    counts = manifest.counts
    kinds = ", ".join(f"{rows:,} {kind}" for kind, rows in manifest.rows_by_kind.items())
    section = "section, " if manifest.has_sections else ""
    return f"""# Vectors of attention: {printable(manifest.model.get("checkpoint"))}

{manifest.rows:,} vectors ({kinds}) of {len(manifest.selection)} layers over {counts.get("examples", 0):,} documents
({counts.get("tokens", 0):,} tokens), as attention received them: after RoPE, norms and scaling, except for
q_pre and k_pre, which are as if RoPE were the identity.

| | |
| --- | --- |
| model | {_described(manifest.model, "checkpoint", "architecture", "revision", "commit", "weights", "geometry")} |
| computed in | {_described(manifest.device)} |
| text | {_described(manifest.dataset, "path", "name", "split", "package", "documents")} |
| licence of the text | {licence} |
| captured with | {_described(manifest.versions)} |
| numbers that are not finite | {not_finite_line(manifest)} |
| digest of all rows | `{manifest.digest}` |

## How positions were drawn

{_laws(manifest)}

Each decision belongs to a position: a 64-bit hash of (seed, {_seeds(manifest)}, position) is compared with the
probability. Weight rows by its inverse for unbiased sums over all positions.

## Loading

```python
from datasets import load_dataset

rows = load_dataset("{repo}", "{first}", split="train")
```

There is one configuration per layer and kind, named like `{first}`.
Columns: head, bucket, position, token_id, example_id, {section}vector. `examples.parquet` says which text each
example_id stands for. With qk-sniffer, layers, heads and the
grouped-query map are at hand:

```python
from huggingface_hub import snapshot_download
from sniffer import open_run

run = open_run(snapshot_download("{repo}", repo_type="dataset"))
run.vectors(layer=0, head=0, kind="q")
```
"""


def _laws(manifest: Manifest) -> str:
    """The law of the sampler, or of that of each side."""
    sides = {name: manifest.sampler[name] for name in SIDES if isinstance(manifest.sampler.get(name), Mapping)}
    whom = {"q": "Queries: sampler", "k": "Keys and values: sampler"}
    told = [(whom[name], side) for name, side in sides.items()] or [("Sampler", manifest.sampler)]
    return "\n\n".join(f"{who} {_law(side, manifest.seed)}" for who, side in told)


def _law(sampler: Mapping[str, Any], seed: int) -> str:
    target = str(sampler.get("_target_"))
    law = FORMULAS.get(target, f"that of {target}")
    names = ", ".join(map(printable, sampler.get("keep_sections", ())))
    kept = f" Positions of these sections are all kept: {names}." if names else ""
    return f"{target.rpartition('.')[2]} ({_described(_numbers(sampler))}, seed {seed}): {law}.{kept}"


def _seeds(manifest: Manifest) -> str:
    return " or ".join(dict.fromkeys(", ".join(side_of(manifest.sampler, name).get("seed_by", ())) for name in SIDES))


def _numbers(sampler: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sampler.items() if isinstance(value, int | float)}


def _described(values: Mapping[str, Any], *names: str) -> str:
    shown = {name: values.get(name) for name in names or values}
    return ", ".join(f"{name} {printable(value)}" for name, value in shown.items() if value is not None)
