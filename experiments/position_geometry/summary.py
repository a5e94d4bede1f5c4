"""What is said of a whole run, with its interval: numbers over all heads, and the sentences that quote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from .heads import Numbers
from .pca import LOW, TAXONOMY, taxonomy

MEDIANS = (
    "linear_share",
    "linear_share_q",
    "linear_share_k",
    "linear_share_pcs_q",
    "linear_share_pcs_k",
    "r2_q",
    "r2_k",
    "separation_strength",
    "variance_a",
    "rope_share",
    "rope_planes",
    "kurtosis_q",
    "kurtosis_k",
)


@dataclass(frozen=True)
class Summary:
    """Of each number its value, and from and to where its interval goes; nan where there is none."""

    values: Mapping[str, tuple[float, float, float]]

    def table(self) -> pl.DataFrame:
        rows = [(name, *numbers) for name, numbers in self.values.items()]
        table = pl.DataFrame(rows, schema=["statistic", "value", "low", "high"], orient="row")
        return table.with_columns(pl.col("value", "low", "high").cast(pl.Float64).fill_nan(None))

    def told(self, name: str, form: str) -> str:
        """The value and its interval, for a sentence."""
        value, low, high = self.values[name]
        if not (np.isfinite(low) and np.isfinite(high)):
            return format(value, form)
        return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def summary(numbers: Numbers, again: Numbers | None, level: float) -> Summary:
    """`numbers` of all heads, and `again` in each draw of documents (draws, heads)."""
    strongest = int(np.abs(numbers["bias_strength"]).argmax())
    takes: dict[str, Callable[[Numbers], float]] = {
        "positive_bias": lambda n: float((n["bias_strength"] > 0).sum()),
        "positive_bias_share": lambda n: float((n["bias_strength"] > 0).mean()),
        "abs_r_q": lambda n: float(np.median(np.abs(n["r_q"]))),
        "abs_r_k": lambda n: float(np.median(np.abs(n["r_k"]))),
        "strongest_bias": lambda n: float(n["bias_strength"][strongest]),
        "strongest_bias_logits_per_1000": lambda n: float(n["bias_logits_per_1000"][strongest]),
        **{name: _median(name) for name in MEDIANS},
    }
    found = {name: [take(numbers)] for name, take in takes.items()}
    found |= {name: [count] for name, count in _counts(numbers).items()}
    draws = 0 if again is None else len(again["bias_strength"])
    for place in range(draws):
        assert again is not None
        one = {name: values[place] for name, values in again.items()}
        for name, take in takes.items():
            found[name].append(take(one))
        for name, count in _counts(one).items():
            found[name].append(count)
    cuts = (1 - level) / 2, (1 + level) / 2
    return Summary(
        {
            name: (values[0], *(np.quantile(values[1:], cuts) if draws else (np.nan, np.nan)))
            for name, values in found.items()
        }
    )


def _median(name: str) -> Callable[[Numbers], float]:
    return lambda numbers: float(np.median(numbers[name]))


def _counts(numbers: Numbers) -> dict[str, float]:
    """How many heads each of the two taxonomies puts under each name."""
    r_q, r_k = numbers["pc1_r_q"], numbers["pc1_r_k"]
    of_chapter, of_notes = taxonomy(r_q, r_k), taxonomy(r_q, r_k, LOW)
    return {f"taxonomy {name}": float(of_chapter.count(name)) for name in TAXONOMY} | {
        f"taxonomy_notes {name}": float(of_notes.count(name)) for name in TAXONOMY
    }


def sentences(heads: pl.DataFrame, found: Summary, documents: int | None, draws: int, level: float) -> list[str]:
    """What is said; `documents` that were drawn anew, None where there are no intervals."""
    told, bias = found.told, heads["bias_strength"]
    shown = heads.row(int(bias.abs().arg_max() or 0), named=True)
    logits = (
        f", {told('strongest_bias_logits_per_1000', '+.2f')} in the logit per 1000 positions."
        if np.isfinite(shown["bias_logits_per_1000"])
        else "."
    )
    says = [
        f"{told('positive_bias', '.0f')} of {len(heads)} heads ({told('positive_bias_share', '.0%')}) have a positive "
        "bias strength: along the drift axis they favour later keys whatever these hold.",
        f"On the drift axis the median |r| with position is {told('abs_r_q', '.2f')} for queries and "
        f"{told('abs_r_k', '.2f')} for keys; the axis holds {told('variance_a', '.1%')} of the variance, and a "
        f"straight line in position explains {told('linear_share', '.1%')} of it (medians).",
        f"Within their own kind a straight line explains {told('linear_share_q', '.1%')} of the queries' variance and "
        f"{told('linear_share_k', '.1%')} of the keys'; explained variance times r squared, summed over components, "
        f"gives {told('linear_share_pcs_q', '.1%')} and {told('linear_share_pcs_k', '.1%')} (medians).",
        f"By the leading component, heads are {_listed(found, 'taxonomy')}.",
        f"Where the other |r| must be below 0.3, they are {_listed(found, 'taxonomy_notes')}.",
        f"The strongest bias is in layer {shown['layer']}, head {shown['head']}: {told('strongest_bias', '+.4f')} "
        f"in q.k per position of the key{logits}",
        f"Of how far queries and keys are apart, {told('separation_strength', '.0%')} lies along the separation axis "
        "(median).",
        f"Off the plane, turns at even speed, as RoPE makes them, explain {told('rope_share', '.0%')} of the variance; "
        f"{told('rope_planes', '.0f')} pairs of components are mostly such a turn (medians).",
        f"Around their straight line, along its slope, the excess kurtosis is {told('kurtosis_q', '+.2f')} for queries "
        f"and {told('kurtosis_k', '+.2f')} for keys (medians; 0: Gaussian).",
    ]
    without = sorted(heads.filter(~pl.col("rope"))["layer"].unique())
    if without:
        says.append(f"RoPE turns nothing in layers {', '.join(map(str, without))}.")
    says.append(
        f"In brackets: where {level:.0%} of {draws} draws of the {documents} documents lie, with replacement."
        if documents
        else "There are no intervals: they take two documents, and resamples above 0."
    )
    return says


def _listed(found: Summary, which: str) -> str:
    counts = {name: found.values[f"{which} {name}"] for name in TAXONOMY}
    return ", ".join(f"{name} {found.told(f'{which} {name}', '.0f')}" for name in TAXONOMY if max(counts[name]) > 0)
