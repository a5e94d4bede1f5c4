"""python -m sniffer.experiments virtual_distance run=RUN"""

import sys

from sniffer.experiments.common.entry import main

if __name__ == "__main__":
    sys.exit(main("virtual_distance"))
