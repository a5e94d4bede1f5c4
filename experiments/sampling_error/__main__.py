"""python -m sniffer.experiments sampling_error run=RUN"""

import sys

from sniffer.experiments.common.entry import main

if __name__ == "__main__":
    sys.exit(main("sampling_error"))
