"""Parquet files, opened wherever they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sniffer.storage.remote import Ranges, RemotePath


def parquet(path: Path, **options: Any) -> pq.ParquetFile:
    """A Parquet file, opened; of one at a URL the ranges that are read together are fetched together."""
    if not isinstance(path, RemotePath):
        return pq.ParquetFile(path, **options)
    return pq.ParquetFile(pa.PythonFile(Ranges(path), mode="r"), **{**options, "pre_buffer": True})
