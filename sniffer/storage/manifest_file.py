"""manifest.json as a file: read within bounds, checked by its checksum, its values turned into records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sniffer.errors import RunError, unbroken
from sniffer.storage.layout import RunFolder
from sniffer.storage.schema import Part
from sniffer.storage.untrusted import read_json

CHECKSUM = "checksum"


def checksum_of(values: Mapping[str, Any]) -> str:
    """Of values read from JSON or about to be written, whatever their layout in the file."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def take_checksum(values: dict[str, Any]) -> None:
    """Manifests of early releases have no checksum."""
    found = values.pop(CHECKSUM, None)
    if found is not None and found != checksum_of(values):
        raise ValueError("its content does not match its checksum")


def read_manifest(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        values = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(
            f"{folder} is not a run folder: it has no {RunFolder.MANIFEST}; give the folder that a run printed"
        ) from None
    except OSError as error:
        raise RunError(f"could not read {path}: {error.strerror}; check its permissions") from error
    except ValueError as error:
        raise broken(folder, f"it cannot be read as JSON ({unbroken(error)})") from error
    if not isinstance(values, dict):
        raise broken(folder, "it is not a JSON object")
    return values


def part_from(values: Mapping[str, Any]) -> Part:
    return record_from(Part, {**values, "buckets": numbered(values["buckets"])})


def numbered(values: Mapping[str, Any]) -> dict[int, Any]:
    """JSON has no integer keys."""
    return {int(number): value for number, value in values.items()}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value if isinstance(value, int) else float(value) for name, value in values.items()}


def record_from(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A dataclass from its JSON object, without keys that a later release added; early ones lack some."""
    wanted = [f.name for f in fields(kind) if f.name in values or f.default is MISSING]
    return kind(**{name: values[name] for name in wanted})


def check_path(folder: Path, path: str) -> None:
    """Refuses a path that could name anything outside the run folder, on any system."""
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    leaves = posix.is_absolute() or windows.anchor or ".." in posix.parts or ".." in windows.parts
    if leaves or not path:
        raise RunError(
            f"{folder / RunFolder.MANIFEST} names {path!r}, which is outside the run folder: get the run again "
            "from a source you trust"
        )


def broken(folder: Path, what: str) -> RunError:
    return RunError(
        f"{folder / RunFolder.MANIFEST} is broken: {what}; restore the file, or "
        f"`python -m sniffer.runs resume {folder}`, which does if it can"
    )
