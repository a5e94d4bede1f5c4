"""model_config.json: the config of the model that ran, as its class resolved it, in transformers' own words.

Manifests record its size and SHA-256. Early runs have none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sniffer.errors import RunError, first_line
from sniffer.storage.durable import durable_file
from sniffer.storage.integrity import damage
from sniffer.storage.layout import RunFolder
from sniffer.storage.manifest import Manifest
from sniffer.storage.schema import FileRecord
from sniffer.storage.untrusted import read_json


def with_model_config(folder: Path, manifest: Manifest, values: Mapping[str, Any]) -> Manifest:
    """Writes a model's config into a run folder, and has the manifest name it.

    Raises:
        CaptureError: the disk is full or cannot be written to.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False)
    with durable_file(folder / RunFolder.MODEL_CONFIG) as file:
        file.write(f"{text}\n".encode())
    return replace(manifest, model_config=FileRecord(RunFolder.MODEL_CONFIG, 0, file.bytes, file.sha256))


def read_model_config(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What that file holds.

    Raises:
        RunError: the run has none, or it is not the one that the manifest names.
    """
    path = folder / RunFolder.MODEL_CONFIG
    if manifest.model_config is None:
        raise RunError(f"{folder} was captured by a release that did not keep the model's config: capture it anew")
    if wrong := lost_model_config(folder, manifest):
        raise RunError(f"{path} {wrong}: restore it, or `python -m sniffer.runs resume {folder}` writes it again")
    try:
        return dict(read_json(path))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"could not read {path}: {first_line(error)}") from error


def lost_model_config(folder: Path, manifest: Manifest) -> str | None:
    """What is wrong with that file; None where it is whole, or the run has none."""
    return None if manifest.model_config is None else damage(folder, manifest.model_config)
