"""Where an adapter for a checkpoint is, in a folder of its own or on the hub, and what is recorded of it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sniffer.errors import CheckpointError, ConfigError

from . import locate
from .fingerprint import digests


def require_peft(adapter: str) -> None:
    """Raises ConfigError where the package that puts adapters on models is missing."""
    if find_spec("peft") is None:
        raise ConfigError(f"model.adapter={adapter} needs peft: pip install 'qk-sniffer[peft]'")


def folder_of(adapter: str) -> Path:
    """Where an adapter lies: a local folder, or the copy of one of the hub.

    Raises:
        CheckpointError: there is no such folder, it holds no adapter, or the hub denies or does not answer.
    """
    folder = Path(adapter).expanduser()
    if folder.is_dir() or not locate.is_hub_id(adapter):
        if not (folder / locate.ADAPTER).is_file():
            raise CheckpointError(f"model.adapter={adapter} has no {locate.ADAPTER}: give an adapter's own folder")
        return folder
    if (cached := locate.cached(adapter, None, locate.ADAPTER)) is not None:
        return cached
    return locate.fetched_adapter(adapter)


def describe(adapter: str, *, merged: bool) -> dict[str, Any]:
    """What the manifest records: where it is from, the digests of its files, whether it was merged."""
    folder = folder_of(adapter)
    files = {name: digest for name, digest in digests(folder).items() if name.startswith("adapter_")}
    return {"source": adapter, "merged": merged, "files": files}
