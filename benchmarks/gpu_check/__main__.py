"""python -m benchmarks.gpu_check [--device DEVICE] [--minutes M] [PART ...]

A part that fails, hangs or takes its process with it is told and noted, and the next one begins; none begins when the
minutes are over. What was found lies in gpu.json and gpu.txt, and what was printed meanwhile in gpu.log, in the folder
that $OUT names, or in outputs/gpu.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import wheels

Found = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]

SECONDS = {
    "environment": 60,
    "runs": 200,
    "throughput": 150,
    "synchronisations": 60,
    "new_lengths": 60,
    "probes": 90,
    "beside_the_processor": 60,
    "long_document": 90,
    "out_of_memory": 90,
    "everything": 120,
    "compiled": 120,
    "tests": 150,
}
"""Parts in their order, and what each may take, importing torch included; most take a fraction of it."""

LOOK_EVERY = 0.1


class Hand:
    """The process that does the parts, as long as it lasts. Its children end with it."""

    def __init__(self, worker: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self._worker, self._log, self._environment = worker, log, dict(environment)
        self._answers = Path(tempfile.mkdtemp())
        self._process: subprocess.Popen[str] | None = None

    def do(self, part: str, seconds: float) -> Found:
        """What a part has found, or why there is nothing."""
        answer, until = self._answers / f"{part}.json", time.monotonic() + seconds
        process = self._asked(part)
        while not answer.exists():
            if process.poll() is not None:
                self._process = None
                return {"failed": f"its process ended with exit code {process.returncode}: see {self._log.name}"}
            if time.monotonic() > until:
                self.end()
                return {"failed": f"it took more than {seconds:.0f} seconds"}
            time.sleep(LOOK_EVERY)
        found: Found = json.loads(answer.read_text(encoding="utf-8"))
        return found

    def end(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _asked(self, part: str) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            with self._log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [*self._worker, str(self._answers)],
                    cwd=ROOT,
                    env=self._environment,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                )
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which `do` sees
            self._process.stdin.write(f"{part}\n")
            self._process.stdin.flush()
        return self._process


def flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(f"{name}, {key}" if name else str(key), inner)
    else:
        yield name, value


def table(found: Mapping[str, Found]) -> str:
    """A line per value, indented under its part."""
    lines = []
    for part, values in found.items():
        rows = list(flat("", values))
        width = max(len(name) for name, _ in rows)
        lines += [part, *(f"    {name:<{width}}  {_shown(value)}" for name, value in rows)]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return value if isinstance(value, str) else json.dumps(value)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(SECONDS)}; without names all")
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, ...")
    parser.add_argument("--minutes", type=float, default=8.0)
    arguments = parser.parse_args()
    if set(arguments.parts) - set(SECONDS):
        parser.error(f"choose parts from {', '.join(SECONDS)}")
    until = time.monotonic() + 60 * arguments.minutes
    out = Path(os.environ.get("OUT", ROOT / "outputs" / "gpu"))
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.log").unlink(missing_ok=True)
    worker = (sys.executable, "-m", "benchmarks.gpu_check.worker", arguments.device)
    hand = Hand(worker, out / "gpu.log", wheels.environment(ROOT))
    found: dict[str, Found] = {}
    try:
        for part in arguments.parts or SECONDS:
            began, left = time.monotonic(), until - time.monotonic()
            found[part] = hand.do(part, min(left, SECONDS[part])) if left > 0 else {"skipped": "the time was over"}
            found[part]["seconds"] = round(time.monotonic() - began, 1)
            print(table({part: found[part]}), end="", flush=True)
            (out / "gpu.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            (out / "gpu.txt").write_text(table(found), encoding="utf-8")
    finally:
        hand.end()
    return int(any("failed" in values for values in found.values()))


if __name__ == "__main__":
    sys.exit(main())
