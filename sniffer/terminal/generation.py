"""What a summary says of text that a model has written: how fast, and how far live vectors are from others."""

from __future__ import annotations

from rich.table import Table

from sniffer.storage.manifest import Manifest
from sniffer.terminal.printing import Grid
from sniffer.types import KINDS


def generated_speed(manifest: Manifest) -> str:
    """Of prompts as a model read them, and of what it wrote, where it did."""
    if manifest.generation is None:
        return ""
    generated = manifest.counts.get("generated", 0)
    tokens = {"prefill": manifest.counts["tokens"] - generated, "decode": generated}
    speeds = {stage: n / max(1e-9, manifest.timings.get(stage, 0.0)) for stage, n in tokens.items()}
    return f" (prompts read at {speeds['prefill']:,.0f}, texts generated at {speeds['decode']:,.0f})"


def difference_table(manifest: Manifest) -> Table | None:
    """By layer, the largest difference of a live vector over its length; None where nobody has looked."""
    if not manifest.differences:
        return None
    found = {kind for kinds in manifest.differences.values() for kind in kinds}
    kinds = [kind for kind in KINDS if kind in found]
    table = Grid(title="live vectors and those of one forward over the whole document: largest difference, over length")
    for title in ("layer", *kinds):
        table.add_column(title, justify="right")
    for layer, of_layer in manifest.differences.items():
        cells = (f"{of_layer[kind].get('relative', 0.0):.1e}" if kind in of_layer else "" for kind in kinds)
        table.add_row(str(layer), *cells)
    return table
