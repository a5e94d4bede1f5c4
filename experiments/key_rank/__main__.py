"""python -m sniffer.experiments key_rank run=RUN"""

import sys

from sniffer.experiments.common.entry import main

if __name__ == "__main__":
    sys.exit(main("key_rank"))
