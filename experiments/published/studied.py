"""A run as the figures see it: what analyses say of it, computed when a figure first wants it, or as they left it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Float64

from sniffer.errors import RunError, first_line
from sniffer.reader.run import Run
from sniffer.storage.untrusted import CONFIG_BYTES, read_json

from ..attention_plasticity import AttentionPlasticity
from ..common.entry import progress
from ..common.results import PROVENANCE, folder_of
from ..common.rows import chosen_layers, of_sections
from ..compare.members import Member
from ..position_geometry import PositionGeometry

NO_MATTER = ("resamples", "level", "points", "seed")
"""Settings of position_geometry that what figures show does not depend on."""
CELLS = 24
"""Steps of either distance in a map."""

Tables = dict[str, pl.DataFrame]


class Studied:
    """One run of a figure. Tables are those of position_geometry and attention_plasticity."""

    def __init__(self, member: Member, layers: Any, weights: str, sections: list[str] | None) -> None:
        self.member, self.label, self.weights = member, member.label, weights
        self.run: Run = of_sections(member.run, sections)
        self._geometry = PositionGeometry(layers=layers, weights=weights, sections=sections, resamples=0)
        self._plasticity = AttentionPlasticity(layers=layers, weights=weights, sections=sections)

    @cached_property
    def family(self) -> str:
        """The model type, else what the checkpoint is called."""
        try:
            return str(self.member.run.model_config["model_type"])
        except (RunError, KeyError):
            return self.member.checkpoint.rstrip("/").rpartition("/")[2]

    @property
    def phase(self) -> str:
        """What the revision says before its number of steps; empty where there is none."""
        return re.sub(r"step[-_]?\d.*$", "", self.member.revision or "")

    @cached_property
    def geometry(self) -> Tables:
        return self._tables("position_geometry", self._geometry, NO_MATTER)

    @cached_property
    def plasticity(self) -> Tables:
        return self._tables("attention_plasticity", self._plasticity, ())

    @cached_property
    def layers(self) -> list[int]:
        return chosen_layers(self.run, self._geometry.layers, "q", "k")

    @cached_property
    def cells(self) -> tuple[Float64[np.ndarray, "away apart"], float]:
        """Mean plasticity by how far a pair's middle is from the query, and its keys from each other.

        nan where there is no pair. And the longest distance, which CELLS steps go to.
        """
        longest = float(self.run.examples()["n_tokens"].max() or 1)  # type: ignore[arg-type]
        edges = np.linspace(0, longest, CELLS + 1)
        sums, counts = np.zeros((CELLS, CELLS)), np.zeros((CELLS, CELLS))
        for layer in progress(self.layers, f"distances of {self.label}"):
            found = self._plasticity.prefixes(self.run, layer)
            for values, apart, away in zip(found.values, found.apart, found.away, strict=True):
                sums += np.histogram2d(away, apart, (edges, edges), weights=values.sum(0))[0]
                counts += len(values) * np.histogram2d(away, apart, (edges, edges))[0]
        return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0), longest

    def need(self) -> None:
        """Looks whether there is something to draw.

        Raises:
            RunError: there are no rows, or not of queries and keys; or its positions cannot be measured.
        """
        if not self.run.manifest.rows:
            raise RunError(f"{self.run.folder} has no rows yet: wait for its first commit, or capture again")
        if not len(self.geometry["heads"]):
            raise RunError(f"{self.run.folder} has no heads to draw")

    @property
    def deepest(self) -> int:
        """The number of the model's last layer, captured or not."""
        return self.member.deepest

    def _tables(self, name: str, analysis: Any, no_matter: tuple[str, ...]) -> Tables:
        """As they were left of these rows with these settings, else measured now.

        Raises:
            RunError: they cannot be read, or the run cannot be measured.
        """
        folder = folder_of(self.member.run.folder, name)
        try:
            told = read_json(folder / PROVENANCE, CONFIG_BYTES)
            same = told["run_digest"] == self.run.manifest.digest and _settings(
                told["settings"], no_matter
            ) == _settings(json.loads(json.dumps(asdict(analysis))), no_matter)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            same = False
        if not same:
            return dict(analysis.measure(self.run).tables)
        try:
            return {path.stem: pl.read_parquet(path.read_bytes()) for path in folder.glob("*.parquet")}
        except (OSError, pl.exceptions.PolarsError) as error:
            raise RunError(f"could not read {folder}: {first_line(error)}; run {name} again") from error


def _settings(values: dict[str, Any], no_matter: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in no_matter}
