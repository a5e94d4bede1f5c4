"""python -m sniffer.experiments report run=RUN"""

import sys

from sniffer.experiments.common.entry import main
from sniffer.experiments.report import write

if __name__ == "__main__":
    sys.exit(main("report", act=write))
