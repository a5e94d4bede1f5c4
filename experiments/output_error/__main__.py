"""python -m sniffer.experiments output_error run=RUN"""

import sys

from sniffer.experiments.common.entry import main

if __name__ == "__main__":
    sys.exit(main("output_error"))
