"""Analyses of captures. They may import anything; nothing imports them."""

import os
import sys

# The algebra is of many small matrices, over which threads of BLAS mostly wait for each other: with one, an analysis
# takes half to a quarter of the processor time, and no longer by the clock. BLAS reads this as numpy is loaded. "-m"
# stands there while Python looks for what `python -m sniffer.experiments` is; an import by other code changes nothing.
if sys.argv[:1] == ["-m"]:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
