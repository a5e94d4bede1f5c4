"""python -m sniffer.experiments stability run=RUN, or runs=SWEEP"""

import sys

from sniffer.experiments.common.entry import main
from sniffer.experiments.stability import steady

if __name__ == "__main__":
    sys.exit(main("stability", act=steady))
