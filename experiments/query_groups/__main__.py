"""python -m sniffer.experiments query_groups run=RUN"""

import sys

from sniffer.experiments.common.entry import main

if __name__ == "__main__":
    sys.exit(main("query_groups"))
