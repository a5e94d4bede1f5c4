"""Packages that a machine with a GPU may lack, as a folder of wheels that travels there: `make gpu-wheels`.

    python -m benchmarks.gpu_check.wheels [--python 3.12]

Such machines bring torch, transformers and what these need, and may reach no registry. gpu_check installs what is
missing into a folder of its own, and leaves the machine's packages as they are. This needs Python alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path("outputs", "gpu-wheels")
MOST_BYTES = 50 * 1024 * 1024

WHEELS = {
    "hydra": "hydra-core==1.3.8",
    "omegaconf": "omegaconf==2.3.1",
    "antlr4": "antlr4-python3-runtime==4.9.3",
    "polars": "polars==1.35.2",
    "_polars_runtime_32": "polars-runtime-32==1.35.2",
    "datasets": "datasets==5.2.0",
    "dill": "dill==0.4.1",
    "multiprocess": "multiprocess==0.70.19",
    "rich": "rich==15.0.0",
    "jaxtyping": "jaxtyping==0.3.11",
    "wadler_lindig": "wadler-lindig==0.1.8",
    "beartype": "beartype==0.23.1",
}
"""By the module that each brings. A newer polars alone has more than 50 MiB."""

FROM_SOURCE = ("antlr4-python3-runtime",)
"""Of which there are no wheels: pure Python, built here."""

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def environment(root: Path) -> dict[str, str]:
    """Of child processes: what this machine lacks comes from the wheels, where they were brought along."""
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    if missing := list(_files(root / FOLDER)):
        site = tempfile.mkdtemp(prefix="gpu-check-")
        options = ("--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check", "--target", site)
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", *options, *missing], check=True)
        paths.append(site)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _files(folder: Path) -> Iterator[str]:
    """Wheels of what cannot be imported here."""
    for module, wanted in WHEELS.items():
        name = wanted.partition("==")[0].replace("-", "_")
        found = [path for path in folder.glob("*.whl") if path.name.lower().startswith(f"{name}-")]
        if found and find_spec(module) is None:
            yield str(found[0])


def fetch(folder: Path, python: str) -> int:
    """Has pip put all of them into a folder; their bytes.

    Raises:
        SystemExit: they are more than may travel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    pip = [sys.executable, "-m", "pip"]
    common = ["-q", "--disable-pip-version-check", "--no-deps"]
    built = [one for one in WHEELS.values() if one.startswith(FROM_SOURCE)]
    fetched = [one for one in WHEELS.values() if one not in built]
    kind = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    kind += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*pip, "download", *common, *kind, "-d", str(folder), *fetched], check=True)
    subprocess.run([*pip, "wheel", *common, "-w", str(folder), *built], check=True)
    size = sum(path.stat().st_size for path in folder.glob("*.whl"))
    if size > MOST_BYTES:
        raise SystemExit(f"{size / 1024**2:.1f} MiB of wheels, {MOST_BYTES / 1024**2:.0f} may travel")
    return size


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.wheels", description=__doc__)
    parser.add_argument("--python", default="3.12", help="of the machine that they are for")
    size = fetch(FOLDER, parser.parse_args().python)
    print(f"{len(WHEELS)} wheels, {size / 1024**2:.1f} MiB, in {FOLDER}")


if __name__ == "__main__":
    main()
