"""Values on disk: how those of a dtype are stored."""

from __future__ import annotations

COMPRESSIONS = ("auto", "zstd", "none")
"""Of vectors on disk, as output.compression has it; see `codec`."""

WIDE = ("float32", "float64")
"""Dtypes of models whose values, stored as float32, compression does little for."""


def codec(compression: str, source_dtype: str) -> str:
    """The codec of vectors on disk, zstd or none.

    Args:
        compression: one of COMPRESSIONS; auto is zstd where the model's dtype is narrower than the float32 on disk.
        source_dtype: the model's dtype, such as bfloat16.
    """
    if compression != "auto":
        return compression
    return "none" if source_dtype in WIDE else "zstd"
