"""The dataset card of a published run: what it is, how positions were drawn, and how to load it.

The YAML head of a run names one configuration per (layer, kind). One per head would be thousands, with which
load_dataset takes minutes to list them; so files of heads are loaded by their path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sniffer.runs.markdown import escaped, table
from sniffer.sampler import FORMULAS, SIDES
from sniffer.storage.law import side_of
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.terminal.summary import kinds_by_law, not_finite_line, rows_by_bucket

TEXT_LICENCES = {
    "sniffer.dataset.Sotu": "public domain (works of the United States government)",
    "sniffer.dataset.Pydoc": "Python Software Foundation License 2.0",
}
"""Of the datasets that come with this project or with Python."""

RUN, HEADS = "run", "heads"
BUCKETS = 40
"""Lines of a law that are shown."""

TOLD = {"sniffer.sampler.LogUniform": "log_uniform", "sniffer.sampler.Uniform": "uniform", "sniffer.sampler.All": "all"}
"""Samplers that `runs import` can be told."""

CHANGED = ("gguf_file", "config_overrides", "adapter", "put_on", "quantization")
"""Of a model, what makes it another one than its checkpoint."""

UNSAID: tuple[Any, ...] = (None, {}, [], "")

Section = tuple[Sequence[str], Iterable[Sequence[Any]]]


@dataclass(frozen=True)
class Place:
    """Where a run is published: owner/name, a branch (None for the main one), and in which layout."""

    repo: str
    branch: str | None = None
    layout: str = RUN

    @property
    def revision(self) -> str:
        """As an argument of what loads from the hub."""
        return f', revision="{self.branch}"' if self.branch else ""


def config_name(layer: int, kind: str) -> str:
    """What load_dataset calls the vectors of one layer and kind."""
    return f"l{layer:02d}{kind}"


def card(manifest: Manifest, place: Place, text_licence: str | None, sections: Section | None = None) -> str:
    """README.md of the published folder; `sections` are titles and lines of their table, in a run that has some."""
    licence = text_licence or TEXT_LICENCES.get(_text_source(manifest.dataset))
    head = yaml.safe_dump(_head(manifest, place, text_licence), sort_keys=False, allow_unicode=True)
    licence = licence or "not stated: ask whoever published this"
    body = [_about(manifest, place, licence), _drawn(manifest), _sections(sections), _loading(manifest, place)]
    return f"---\n{head}---\n\n" + "\n\n".join(part for part in body if part) + "\n"


def _text_source(dataset: Mapping[str, Any]) -> str:
    """The class of a dataset, or of the hay that needles are hidden in."""
    hay = dataset.get("hay")
    return str((hay if isinstance(hay, Mapping) else dataset).get("_target_"))


def _head(manifest: Manifest, place: Place, text_licence: str | None) -> dict[str, Any]:
    folders = {(part.layer, part.kind): part.path.rpartition("/")[0] for part in manifest.parts}
    configs = [
        {"config_name": config_name(*pair), "data_files": [{"split": "train", "path": f"{folder}/*.parquet"}]}
        for pair, folder in folders.items()
    ]
    return {
        "license": text_licence or "other",
        "tags": ["attention", "queries-and-keys", "interpretability", "qk-sniffer"],
        "pretty_name": f"q and k vectors of {manifest.model.get('checkpoint')}",
        **({"configs": configs} if place.layout == RUN else {"viewer": False}),
    }


def _about(manifest: Manifest, place: Place, licence: str) -> str:
    counts, geometry = manifest.counts, ("checkpoint", "architecture", "revision", "commit", "weights", "geometry")
    kinds = ", ".join(f"{rows:,} {kind}" for kind, rows in manifest.rows_by_kind.items())
    changed = _described(manifest.model, *CHANGED)
    facts = {
        "model": _described(manifest.model, *geometry),
        **({"model as it was changed": changed} if changed else {}),
        "computed in": _described(manifest.device),
        "text": _described(manifest.dataset, "path", "name", "split", "package", "documents", "imported"),
        "licence of the text": escaped(licence),
        "captured with": _described(manifest.versions),
        "numbers that are not finite": escaped(not_finite_line(manifest)),
        "digest of all rows": f"`{manifest.digest}`",
    }
    received = "as attention received them"
    if manifest.imported:
        received = "as the files say that they were imported from"
    branch = f" This is the branch `{place.branch}`; others may hold other runs." if place.branch else ""
    lines = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""# Vectors of attention: {escaped(manifest.model.get("checkpoint"))}

{manifest.rows:,} vectors ({kinds}) of {len(manifest.selection)} layers over {counts.get("examples", 0):,} documents
({counts.get("tokens", 0):,} tokens), {received}: after RoPE, norms and scaling, except for
q_pre and k_pre, which are as if RoPE were the identity.{branch}

| | |
| --- | --- |
{lines}"""


def _drawn(manifest: Manifest) -> str:
    if manifest.imported:
        rule = "These rows were imported from files of others, which do not tell of their draws."
    else:
        rule = (
            f"Each decision belongs to a position: a 64-bit hash of (seed, {_seeds(manifest)}, position) is compared "
            "with the\nprobability. Weight rows by its inverse for unbiased sums over all positions."
        )
    return "\n\n".join(["## How positions were drawn", _laws(manifest), rule, *_buckets(manifest)])


def _laws(manifest: Manifest) -> str:
    """The law of the sampler, or of that of each side."""
    sides = {name: manifest.sampler[name] for name in SIDES if isinstance(manifest.sampler.get(name), Mapping)}
    whom = {"q": "Queries: sampler", "k": "Keys and values: sampler"}
    told = [(whom[name], side) for name, side in sides.items()] or [("Sampler", manifest.sampler)]
    return "\n\n".join(f"{who} {_law(side, manifest)}" for who, side in told)


def _law(sampler: Mapping[str, Any], manifest: Manifest) -> str:
    target = str(sampler.get("_target_"))
    law = FORMULAS.get(target, f"that of {escaped(target)}")
    names = ", ".join(map(escaped, sampler.get("keep_sections", ())))
    kept = f" Positions of these sections are all kept: {names}." if names else ""
    numbers = _described(_numbers(sampler))
    seed = "" if manifest.imported else f"{', ' if numbers else ''}seed {manifest.seed}"
    return f"{escaped(target.rpartition('.')[2])} ({numbers}{seed}): {law}.{kept}"


def _buckets(manifest: Manifest) -> Iterator[str]:
    """With which probability positions were kept, and how many rows there are, by bucket."""
    for kinds in kinds_by_law(manifest):
        law, rows = manifest.probability_by_bucket(kinds[0]), rows_by_bucket(manifest, kinds)
        lines = [[str(bucket), float(law.get(bucket, "nan")), *counts.values()] for bucket, counts in rows.items()]
        more = [[f"{len(lines) - BUCKETS:,} more"]] if len(lines) > BUCKETS else []
        yield table(["bucket", "probability", *(f"rows of {kind}" for kind in kinds)], [*lines[:BUCKETS], *more])


def _sections(sections: Section | None) -> str:
    if sections is None:
        return ""
    titles, lines = sections
    shown = table([titles[0], titles[1], *(f"rows of {kind}" for kind in titles[2:])], lines)
    return (
        f"## Sections\n\nParts of documents that have a name, by tokens, and rows of all layers and heads.\n\n{shown}"
    )


def _loading(manifest: Manifest, place: Place) -> str:
    section = "section, " if manifest.has_sections else ""
    snapshot = f'snapshot_download("{place.repo}", repo_type="dataset"{place.revision})'
    if place.layout == HEADS:
        return _loading_heads(manifest, place, snapshot)
    first = next((config_name(part.layer, part.kind) for part in manifest.parts), "l00q")
    layer, kind, heads = _first(manifest)
    return f"""## Loading

```python
from datasets import load_dataset

rows = load_dataset("{place.repo}", "{first}", split="train"{place.revision})
```

There is one configuration per layer and kind, named like `{first}`.
Columns: head, bucket, position, token_id, example_id, {section}vector. `examples.parquet` says which text each
example_id stands for. With qk-sniffer, layers, heads and the
grouped-query map are at hand:

```python
from huggingface_hub import snapshot_download
from sniffer import open_run

run = open_run({snapshot})
run.vectors(layer={layer}, head={heads[0]}, kind="{kind}")
```"""


def _loading_heads(manifest: Manifest, place: Place, snapshot: str) -> str:
    layer, kind, heads = _first(manifest)
    file = RunFolder.head(layer, heads[0], kind)
    columns = ", ".join(["bucket, example_id, position, vector, sliding_window", *["section"] * manifest.has_sections])
    return f"""## Loading

```python
from datasets import load_dataset

rows = load_dataset("{place.repo}", data_files="{file}", split="train"{place.revision})
```

There is a folder for each layer, head and kind; heads of k, v and k_pre are key heads.
Columns: {columns}. sliding_window is null where a layer attends to everything. With qk-sniffer all of it becomes a run:

```python
from huggingface_hub import snapshot_download

print({snapshot})
```

```
python -m sniffer.runs import FOLDER --to RUN{_heads(manifest)}{_sampler(manifest)}
```"""


def _first(manifest: Manifest) -> tuple[int, str, tuple[int, ...]]:
    """A layer, kind and heads that there are."""
    for layer, kinds in manifest.selection.items():
        for kind in (kind for kind in ("q", "k", *kinds) if kinds.get(kind)):
            return layer, kind, kinds[kind]
    return 0, "q", (0,)


def _heads(manifest: Manifest) -> str:
    counts = {tuple(layer.heads.get(side, 0) for side in SIDES) for layer in manifest.geometry}
    queries, keys = counts.pop() if len(counts) == 1 else (0, 0)
    return f" --heads {queries}/{keys}" if queries and keys else ""


def _sampler(manifest: Manifest) -> str:
    name = TOLD.get(str(manifest.sampler.get("_target_")))
    if name is None or manifest.sampler.get("keep_sections"):
        return ""
    return "".join([f" --sampler {name}", *(f" {key}={value}" for key, value in _numbers(manifest.sampler).items())])


def _seeds(manifest: Manifest) -> str:
    sides = dict.fromkeys(", ".join(map(escaped, side_of(manifest.sampler, one).get("seed_by", ()))) for one in SIDES)
    return " or ".join(sides)


def _numbers(sampler: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sampler.items() if isinstance(value, int | float)}


def _described(values: Mapping[str, Any], *names: str) -> str:
    shown = {name: values.get(name) for name in names or values}
    return ", ".join(f"{escaped(name)} {escaped(value)}" for name, value in shown.items() if value not in UNSAID)
