"""python -m sniffer.experiments position_geometry run=RUN"""

import sys

from sniffer.experiments.common.entry import main

if __name__ == "__main__":
    sys.exit(main("position_geometry"))
