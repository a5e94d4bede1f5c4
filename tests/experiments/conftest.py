"""Shapes and dtypes in the signatures of the mathematics are checked at every call of these tests."""

from __future__ import annotations

from jaxtyping import install_import_hook

CHECKED = (
    "common.moments",
    "common.turns",
    "compare.intervals",
    "common.resampling",
    "position_geometry.line",
    "position_geometry.heads",
    "position_geometry.pca",
    "position_geometry.plane",
    "position_geometry.rings",
    "attention_plasticity.core",
    "attention_plasticity.pairs",
    "quantisation.core",
    "output_error.core",
    "output_error.grids",
    "rope_frequencies.core",
    "query_groups.core",
    "query_key_gap.core",
    "sampling_error.statistics",
    "stability.core",
    "virtual_distance.core",
    "virtual_distance.preferences",
)
install_import_hook([f"sniffer.experiments.{name}" for name in CHECKED], "beartype.beartype")
