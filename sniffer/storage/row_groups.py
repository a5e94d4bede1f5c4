"""Which row groups of a file are worth reading, by what its footer says of them."""

from __future__ import annotations

import pyarrow.parquet as pq


def may_have(group: pq.RowGroupMetaData, *values: int | str) -> bool:
    """Whether a row group may have a row with these values in its first columns, as far as the file says."""
    for column, value in enumerate(values):
        found = group.column(column).statistics
        if found is not None and found.has_min_max and not found.min <= value <= found.max:
            return False
    return True
