"""What the page shows of one run, as plain values for JSON.

Results are taken from the tables that the analyses left. Any column of numbers in a `heads` table becomes a map of
layers by heads, so that a new analysis is in the report without a line here.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from sniffer.errors import RunError, first_line
from sniffer.reader.run import Run
from sniffer.storage.untrusted import CONFIG_BYTES, read_json, read_text
from sniffer.terminal.sections import by_section

from ..common.results import FINDINGS, PROVENANCE
from ..compare import MAIN
from .captured import ATTENTION, MOMENTS, attention, moments
from .glossary import ABOUT, NO_MEDIAN, ORDER
from .reading import read_table, short, unreadable
from .sure import Sure, basis, sure_of

NOT_STATISTICS = ("layer", "head", "key_head", "dim", "rows", "rows_q", "rows_k")
CSV = "data:text/csv;charset=utf-8;base64,"
PARQUET = "data:application/vnd.apache.parquet;base64,"


def collect(
    run: Run, overrides: dict[str, str], table_limit: int, groups: int = 0, left: Path | None = None
) -> dict[str, Any]:
    """Everything of one run.

    Args:
        groups: of documents that intervals rest on, where an analysis left none.
        left: the folder with what analyses have left, one for each; None for the one in the run's own.

    Raises:
        RunError: a result cannot be read.
    """
    left = run.folder / "experiments" if left is None else left
    folders = _folders(left)
    drawn = {folder.name: maps(folder, run, groups) for folder in folders}
    return {
        "name": run.folder.name,
        "overrides": overrides,
        "facts": facts(run),
        "coverage": coverage(run),
        "sections": sections(run),
        "findings": [_findings(folder, run, *drawn[folder.name]) for folder in folders],
        "maps": [one for found, _ in drawn.values() for one in found] + captured(run),
        "plane": plane(left / "position_geometry"),
        "profile": profile(left / "attention_plasticity"),
        "sampling": sampling(left / "sampling_error"),
        "tables": [one for folder in folders for one in _tables(folder, table_limit)],
    }


def facts(run: Run) -> list[tuple[str, str]]:
    """The run in a few lines."""
    manifest = run.manifest
    counts, sampler = manifest.counts, manifest.sampler_fields
    name = str(sampler.pop("_target_", "?")).rpartition(".")[2]
    settings = ", ".join(f"{key}={value}" for key, value in sampler.items())
    kinds = ", ".join(f"{kind} {rows:,}" for kind, rows in manifest.rows_by_kind.items())
    unsaid: tuple[Any, ...] = (None, {}, {"index": 0, "count": 1})
    text = {key: value for key, value in manifest.dataset.items() if key != "_target_" and value not in unsaid}
    return [
        ("model", str(manifest.model.get("checkpoint", "?"))),
        ("text", ", ".join(f"{key}={value}" for key, value in text.items())),
        ("documents", f"{counts.get('examples', 0):,}, {counts.get('tokens', 0):,} tokens"),
        ("sampler", f"{name} ({settings})"),
        ("layers", f"{len(manifest.selection)} of {len(manifest.geometry)}"),
        ("vectors", f"{manifest.rows:,} ({kinds})"),
        ("seed", str(manifest.seed)),
        ("captured", f"{manifest.created} ({manifest.status})"),
        ("digest", manifest.digest),
    ]


def coverage(run: Run) -> dict[str, Any]:
    """Rows per head by layer and bucket, for each kind."""
    buckets = list(run.manifest.rows_by_bucket)
    kinds: dict[str, Any] = {}
    for kind in run.kinds:
        rows = {layer: dict.fromkeys(buckets, 0) for layer in run.layers}
        for part in run.manifest.parts:
            if part.kind == kind:
                for bucket, count in part.buckets.items():
                    rows[part.layer][bucket] += count
        heads = {layer: len(run.manifest.selection[layer].get(kind, ())) or 1 for layer in run.layers}
        kinds[kind] = [[rows[layer][bucket] / heads[layer] for bucket in buckets] for layer in run.layers]
    return {"layers": list(run.layers), "buckets": buckets, "kinds": kinds}


def sections(run: Run) -> dict[str, Any] | None:
    """Titles and lines of the table by section; None where documents have none.

    Raises:
        RunError: examples.parquet cannot be read.
    """
    try:
        found = by_section(run.folder, run.manifest)
    except (OSError, ValueError) as error:
        raise RunError(
            f"could not read the documents of {run.folder}: {first_line(error)}; `python -m sniffer.runs resume "
            f"{run.folder}` mends them"
        ) from error
    return None if found is None else {"titles": found[0], "lines": found[1]}


def maps(folder: Path, run: Run, groups: int) -> tuple[list[dict[str, Any]], str]:
    """A matrix of layers by heads for each statistic of an analysis, and each kind of vector in it; and their basis."""
    path = folder / "heads.parquet"
    if not path.is_file():
        return [], ""
    table = read_table(path)
    sure = sure_of(folder, run, groups)
    return maps_of(folder.name, table, sure), basis(table, run, sure.how)


def captured(run: Run) -> list[dict[str, Any]]:
    """Maps of what the run has beside vectors."""
    found = []
    for name, table, about in (
        ("attention of all sampled queries", attention(run), ATTENTION),
        ("moments over all positions", moments(run), MOMENTS),
    ):
        if table is not None:
            found += maps_of(name, table, Sure(), about)
    return found


def maps_of(
    analysis: str, table: pl.DataFrame, sure: Sure, about: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """A matrix for each column of numbers. `about`: what each means, else the glossary's."""
    kinds = sorted(table["kind"].unique()) if "kind" in table.columns else [None]
    found = []
    for name in table.columns:
        if name in NOT_STATISTICS or not table.schema[name].is_numeric():
            continue
        for kind in kinds:
            some = table if kind is None else table.filter(kind=kind)
            key = name, kind or ""
            middle = some[name].cast(pl.Float64).drop_nulls().drop_nans().median()
            # A median of numbers of pairs, say, would be the number of no pair.
            median = None if f"{analysis}.{name}" in NO_MEDIAN or middle is None else short(middle)
            found.append(
                {"analysis": analysis, "name": name, "kind": kind}
                | {"label": name.replace("_", " ") + (f" of {kind}" if kind else "")}
                | {"about": ABOUT.get(f"{analysis}.{name}", "") if about is None else about[name]}
                # Key heads are fewer than query heads: a map of theirs cannot choose a query head.
                | {"of_queries": kind in (None, "q", "q_pre"), "median": median}
                | {
                    "median_from": [short(one) for one in sure.medians[key]]
                    if median is not None and key in sure.medians
                    else None
                }
                | {
                    "main": name in MAIN.get(analysis, ()),
                    **matrix(some, name, {} if f"{analysis}.{name}" in NO_MEDIAN else sure.heads.get(key, {})),
                }
            )
    return found


def matrix(table: pl.DataFrame, name: str, sure: Mapping[tuple[int, int], tuple[float, float]]) -> dict[str, Any]:
    """Values, and from and to where they are known, by layer and head."""
    layers, heads = (table[column].unique().sort().to_list() for column in ("layer", "head"))
    values = {(layer, head): value for layer, head, value in table.select("layer", "head", name).iter_rows()}
    found: dict[str, Any] = {
        "layers": layers,
        "heads": heads,
        "values": [[short(values.get((layer, head))) for head in heads] for layer in layers],
    }
    for side, end in (("low", 0), ("high", 1)) if sure else ():
        found[side] = [
            [short(sure[layer, head][end]) if (layer, head) in sure else None for head in heads] for layer in layers
        ]
    return found


def plane(folder: Path) -> dict[str, Any]:
    """layer -> head -> kind -> [position, a, b] of some vectors."""
    path = folder / "plane_points.parquet"
    if not path.is_file():
        return {}
    found: dict[str, Any] = {}
    for (layer, head, kind), some in read_table(path).group_by("layer", "head", "kind", maintain_order=True):
        points = [[t, short(a), short(b)] for t, a, b in some.select("position", "a", "b").iter_rows()]
        found.setdefault(str(layer), {}).setdefault(str(head), {})[str(kind)] = points
    return found


def profile(folder: Path) -> dict[str, Any]:
    """layer -> head -> [position of the query, plasticity, its bucket]."""
    path = folder / "profile.parquet"
    if not path.is_file():
        return {}
    found: dict[str, Any] = {}
    for (layer, head), some in read_table(path).group_by("layer", "head", maintain_order=True):
        columns = some.select("query_position", "plasticity", "query_bucket")
        curve = [[short(t), short(value), bucket] for t, value, bucket in columns.iter_rows()]
        found.setdefault(str(layer), {})[str(head)] = curve
    return found


def sampling(folder: Path) -> list[dict[str, Any]]:
    """Error against base rate, a curve per sampler, weighting and statistic."""
    path = folder / "summary.parquet"
    if not path.is_file():
        return []
    curves = []
    grouped = read_table(path).group_by("sampler", "weights", "statistic", maintain_order=True)
    for (sampler, weights, statistic), some in grouped:
        points = [[rate, short(error)] for rate, error in some.select("base_rate", "relative_error").iter_rows()]
        curves.append({"case": f"{sampler}, weighted by {weights}", "statistic": statistic, "points": points})
    return curves


def _folders(root: Path) -> list[Path]:
    """The analyses that left findings, in the order in which they are best read."""
    found = [path.parent for path in root.glob(f"*/{FINDINGS}")]
    return sorted(found, key=lambda folder: (ORDER.get(folder.name, len(ORDER)), folder.name))


def _findings(folder: Path, run: Run, found: list[dict[str, Any]], of: str) -> dict[str, Any]:
    """An analysis' sentences and what they are of; `source` names the run if it has other rows than this one."""
    try:
        sentences = read_text(folder / FINDINGS).splitlines()
        provenance = read_json(folder / PROVENANCE, CONFIG_BYTES)
        source = None if provenance["run_digest"] == run.manifest.digest else str(provenance["run"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise unreadable(folder, error) from error
    # Of other rows the basis would be wrong.
    main = [f"{one['name']}|{one['kind'] or ''}" for one in found if one["main"] and one["median"] is not None]
    told = {"analysis": folder.name, "sentences": sentences, "source": source}
    return {**told, "basis": of if source is None else "", "main": main}


def _tables(folder: Path, limit: int) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("*.parquet")):
        table = read_table(path)
        csv, raw = table.write_csv().encode(), path.read_bytes()
        found.append(
            {
                "name": f"{folder.name}_{path.stem}",
                "rows": len(table),
                "csv": CSV + base64.b64encode(csv).decode() if len(csv) <= limit else None,
                "parquet": PARQUET + base64.b64encode(raw).decode() if len(raw) <= limit else None,
            }
        )
    return found
