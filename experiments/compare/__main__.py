"""python -m sniffer.experiments compare runs=SWEEP"""

import sys

from sniffer.experiments.common.entry import main
from sniffer.experiments.compare import compare

if __name__ == "__main__":
    sys.exit(main("compare", act=compare))
