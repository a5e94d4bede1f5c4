"""python -m sniffer.experiments query_key_gap run=RUN"""

import sys

from sniffer.experiments.common.entry import main

if __name__ == "__main__":
    sys.exit(main("query_key_gap"))
