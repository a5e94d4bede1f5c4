"""A comparison in sentences, each with how many heads it is of and how sure it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import polars as pl

from .figures import label_of, of_key
from .members import Course
from .tables import Compared, Key, same_heads

MOST = 4
"""Names that a sentence lists."""


def findings(
    found: Compared,
    keys: Sequence[Key],
    tables: Mapping[str, pl.DataFrame],
    left_out: Mapping[str, str],
    trained: Course | None,
    groups: int,
) -> list[str]:
    said = [f"{len(found.members)} runs compared with {found.baseline}: {_some([m.label for m in found.members])}."]
    said += [f"{label} is left out: {reason}." for label, reason in left_out.items()]
    said += list(_of_intervals(found, groups))
    for key in keys:
        said.append(_of_runs(found, of_key(tables["runs"], key), key))
        said += _of_heads(found, of_key(tables["differences"], key), key)
    if trained is not None:
        said += [_of_training(of_key(tables["runs"], key), key, trained, found) for key in keys]
    for row in tables.get("correlations", pl.DataFrame()).iter_rows(named=True):
        said.append(_of_scores(row, found.level))
    return said


def _of_intervals(found: Compared, groups: int) -> Iterator[str]:
    if groups < 1:
        yield "No intervals were asked for (groups=0)."
        return
    without = [(member.label, found.measured[member.label].without) for member in found.members]
    for label, reason in without:
        if reason is not None:
            yield f"{label} has no intervals: it {reason}."
    dealt = [(member.label, found.measured[member.label].dealt) for member in found.members]
    told = {(len(one.groups), len(one.documents)) for _, one in dealt if one is not None}
    if told:
        each = " or ".join(f"{documents} documents in {count} groups" for count, documents in sorted(told))
        yield (
            f"Intervals are of {found.level:.0%}, from {each}, each measured alone: they tell how far other documents "
            "would give other numbers, not other heads or models."
        )
    others = [label for label, one in dealt if one is not None and label != found.baseline and not found.paired(label)]
    if others and found.measured[found.baseline].dealt is not None:
        yield (
            f"{_some(others)} {'has' if len(others) == 1 else 'have'} other documents than {found.baseline}: there a "
            "difference is also one of texts."
        )
    odd = [member.label for member in found.members if not same_heads(found, member)]
    if odd:
        yield (
            f"{_some(odd)} {'has' if len(odd) == 1 else 'have'} other layers or heads than {found.baseline}, and so no "
            "difference head by head: compare by depth, and by averages."
        )


def _of_runs(found: Compared, runs: pl.DataFrame, key: Key) -> str:
    there = runs.drop_nulls("value").sort("value")
    if not len(there):
        return f"{label_of(key)} is defined in no run."
    low, high = there.row(0, named=True), there.row(-1, named=True)
    if low["value"] == high["value"]:
        return f"The {found.average} over heads of {label_of(key)} is the same in all: {_number(low)}."
    return (
        f"The {found.average} over heads of {label_of(key)}: least in {_number(low)}, most in {_number(high)}"
        f"{'' if low['heads'] == high['heads'] else ' (of other numbers of heads)'}, of {high['heads']} heads."
    )


def _of_heads(found: Compared, differences: pl.DataFrame, key: Key) -> list[str]:
    tested = differences.drop_nulls("differs")
    if not len(tested):
        return []
    by_run = tested.group_by("run", maintain_order=True).agg(pl.col("differs").sum(), pl.len().alias("heads"))
    most = by_run.sort("differs", descending=True).head(MOST)
    listed = ", ".join(f"in {differ} of {heads} heads of {run}" for run, differ, heads in most.iter_rows())
    chance = (1 - found.level) * int(most["heads"][0])
    more = f" ({len(by_run) - MOST} more runs in the table)" if len(by_run) > MOST else ""
    return [
        f"Head by head, {label_of(key)} differs from that of {found.baseline} {listed}{more}; by chance alone it would "
        f"in about {chance:.2g}."
    ]


def _of_training(runs: pl.DataFrame, key: Key, trained: Course, found: Compared) -> str:
    by_run = {row["run"]: row for row in runs.iter_rows(named=True)}
    first, last = (by_run[trained.members[place].label] for place in (0, -1))
    return f"Over training, {label_of(key)} ({found.average} over heads) goes from {_number(first)} to {_number(last)}."


def _of_scores(row: Mapping[str, object], level: float) -> str:
    key = str(row["analysis"]), str(row["statistic"]), str(row["kind"])
    if row["pearson"] is None:
        return (
            f"{row['score']} and {label_of(key)} have no correlation: {row['runs']} runs have both, or one of the two "
            "does not vary."
        )
    told = []
    for way, name in (("pearson", "r"), ("spearman", "Spearman's rank correlation")):
        reach = "" if row[f"{way}_low"] is None else f" [{row[f'{way}_low']:.2f}, {row[f'{way}_high']:.2f}]"
        told.append(f"{name} = {row[way]:.2f}{reach}")
    few = "" if row["pearson_low"] is not None else "; too few for an interval"
    return f"{row['score']} against {label_of(key)} over {row['runs']} runs: {', '.join(told)} ({level:.0%}{few})."


def _number(row: Mapping[str, object]) -> str:
    value, low, high = row["value"], row["low"], row["high"]
    if value is None:
        return f"{row['run']} (undefined)"
    reach = "" if low is None else f" [{low:.3g}, {high:.3g}]"
    return f"{row['run']} ({value:.3g}{reach})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
