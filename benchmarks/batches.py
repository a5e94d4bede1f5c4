"""Reading for training: shuffled batches of all keys of a layer, over pyarrow alone reading the same columns."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

from benchmarks.measure import Figure, both, figure, timed, whole_run
from sniffer import open_run
from sniffer.reader.run import Run
from sniffer.storage.schema import METADATA_COLUMNS

WIDE_KEYS = (
    "model=llama3",
    "model.weights=random",
    "model.config_overrides={num_hidden_layers: 1, hidden_size: 32, intermediate_size: 32, num_attention_heads: 8,"
    " num_key_value_heads: 8, head_dim: 128, vocab_size: 49152}",
    "dataset=pydoc",
    "dataset.max_tokens=2048",
    "dataset.max_examples=64",
    "sampler=all",
    "capture.kinds=[k]",
)
SIZE, EPOCHS = 4096, 2
ENOUGH, FASTEST = 0.8, 1.5e9
"""Of what pyarrow alone reads in a second, or so many bytes of vectors a second: whichever is less."""


def measure(repeats: int) -> list[Figure]:
    shuffled, ordered, speed, limited, alone = ([] for _ in range(5))
    with TemporaryDirectory() as scratch:
        whole_run(Path(scratch, "run"), *WIDE_KEYS, "output.checkpoint_every=8")
        run = open_run(Path(scratch, "run"))
        assert isinstance(run, Run)
        n_bytes = EPOCHS * 4 * 128 * run.manifest.rows
        _by_pyarrow(run)  # into the page cache
        for _ in range(repeats):
            rows, theirs = timed(_by_pyarrow, run)
            found, ours = timed(_in_batches, run, 0)
            in_order, plain = timed(_in_batches, run, None)
            assert rows == found == in_order == EPOCHS * run.manifest.rows
            shuffled.append(ours / theirs)
            ordered.append(plain / theirs)
            speed.append(n_bytes / ours.wall / 1e6)
            alone.append(n_bytes / theirs.wall / 1e6)
            limited.append(ours.wall / max(theirs.wall / ENOUGH, n_bytes / FASTEST))
        files = len(run.manifest.parts)
    of = f"{EPOCHS} x {n_bytes / EPOCHS / 2**20:,.0f} MiB of keys in {files} files"
    return [
        figure(f"shuffled batches, {of} / what is allowed", limited, limit=1.0),
        *both(f"shuffled batches, {of} / pyarrow alone", shuffled),
        *both(f"batches in the order of the files, {of} / pyarrow alone", ordered),
        figure("shuffled batches", speed, unit="MB/s"),
        figure("pyarrow alone", alone, unit="MB/s"),
    ]


def _in_batches(run: Run, shuffle: int | None) -> int:
    batches = run.batches(layer=0, kind="k", size=SIZE, shuffle=shuffle, epochs=EPOCHS)
    return sum(len(batch) for batch in batches)


def _by_pyarrow(run: Run) -> int:
    """File by file, as it reads by default."""
    paths = [run.folder / part.path for part in run.manifest.parts] * EPOCHS
    return sum(pq.ParquetFile(path).read(columns=[*METADATA_COLUMNS, "vector"]).num_rows for path in paths)
