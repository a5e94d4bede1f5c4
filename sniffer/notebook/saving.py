"""What was captured in a notebook as a run folder: the manifest says what is known, which is less than of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sniffer.forward.accumulator import Accumulator
from sniffer.forward.selection import Selection
from sniffer.notebook.summed import Summed
from sniffer.sampler import Picker, describe
from sniffer.storage.manifest import Manifest
from sniffer.storage.whole import save_whole
from sniffer.types import AttentionLayout, Backbone, Document, LayerGeometry, Rope, by_rope


@dataclass(frozen=True)
class Told:
    """What is known of a model that is somebody else's, as a manifest has it; it holds nothing of the model itself."""

    checkpoint: str
    geometry: tuple[LayerGeometry, ...]
    dtype: str
    device: str
    backbone: Mapping[str, Any]
    rope: Mapping[int, Rope]
    model_config: Mapping[str, Any]
    attention: AttentionLayout | None = None

    @classmethod
    def of(cls, model: Any, backbone: Backbone, attention: AttentionLayout | None = None) -> Told:
        name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        places = str(backbone.dtype).removeprefix("torch."), str(backbone.device)
        geometry = backbone.geometry if attention is None else tuple(map(attention.of_layer, backbone.geometry))
        return cls(name, geometry, *places, backbone.describe(), backbone.rope, backbone.model_config(), attention)


def save_run(
    folder: Path,
    told: Told,
    selection: Selection,
    picker: Picker,
    accumulator: Accumulator,
    documents: Sequence[Document],
    begins: Mapping[int, int],
    summed: Summed | None = None,
    apart: bool = False,
) -> Path:
    """Writes the run, and returns its folder; as `Captured.save`.

    Args:
        begins: by example id, from which position on rows are of a document, where that is not 0.
        apart: whether some were turned by other positions, of which a run knows nothing: then it tells of no RoPE.
    """
    dataset: dict[str, Any] = {"notebook": "calls of a model"}
    if any(document.sections is not None for document in documents):
        dataset["sections"] = True
    if begins:
        dataset["branches"] = len(begins)
    manifest = Manifest(
        status="running",
        seed=picker.seed,
        model={"checkpoint": told.checkpoint},
        dataset=dataset,
        sampler=describe(picker.sampler),
        geometry=told.geometry,
        selection=selection.by_layer(),
        device={"device": told.device},
        backbone=told.backbone,
        moments=None if summed is None else {**summed.plan.layout.as_json(), "heads": selection.counted_by_layer()},
        attention=None if told.attention is None else told.attention.as_json(),
        rope=by_rope({} if apart else told.rope),
    )
    moments = None if summed is None else summed.rows()
    save_whole(folder, manifest, picker, told.dtype, accumulator, documents, told.model_config, moments, begins)
    return folder
