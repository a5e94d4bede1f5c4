"""The process that does the parts: their names come by its standard input, what they find goes to a folder."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
from sniffer.models import finder

from benchmarks.gpu_check.commands import everything, out_of_memory, runs, tests
from benchmarks.gpu_check.parts import (
    beside_the_processor,
    compiled,
    environment,
    new_lengths,
    probes,
    synchronisations,
)
from benchmarks.gpu_check.place import Found, Place
from benchmarks.gpu_check.speed import long_document, throughput
from sniffer.errors import first_line
from sniffer.process.memory import let_go

PARTS = {
    part.__name__: part
    for part in (
        environment,
        runs,
        throughput,
        synchronisations,
        new_lengths,
        probes,
        beside_the_processor,
        long_document,
        out_of_memory,
        everything,
        compiled,
        tests,
    )
}


def do(part: str, place: Place) -> Found:
    """What it finds, or why it has failed; what it held on the device is let go of."""
    try:
        return PARTS[part](place)
    except Exception as error:
        traceback.print_exc()
        failed = {"failed": f"{type(error).__name__}: {first_line(error)}"}
        let_go(error)
        return failed
    finally:
        let_go()


def main(device: str, answers: str) -> None:
    finder.install()
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    place = Place(torch.device(name), full=name.startswith("cuda"))
    for line in sys.stdin:
        part = line.strip()
        print(f"=== {part}", flush=True)
        text = json.dumps(do(part, place), default=str)
        unfinished = Path(answers, f".{part}")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, Path(answers, f"{part}.json"))


if __name__ == "__main__":
    main(*sys.argv[1:])
