"""What all tests share: one thread, so that workers side by side do not starve each other; no deadlines.

Shapes and dtypes in the signatures of the modules below are checked at every call.
"""

from __future__ import annotations

import os

from hypothesis import settings
from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Tests show what must stay true, never how fast; benchmarks/ does that.
settings.register_profile("sniffer", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("sniffer")

CHECKED = (
    "sampler",
    "gather",
    "observer",
    "accumulator",
    "transfer",
    "arrange",
    "digest",
    "hashing",
    "schema",
    "writer",
)
install_import_hook([f"sniffer.{name}" for name in CHECKED], "beartype.beartype")
