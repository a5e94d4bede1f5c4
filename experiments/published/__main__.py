"""python -m sniffer.experiments published run=RUN figure=all"""

import sys

from sniffer.experiments.common.entry import main
from sniffer.experiments.published import publish

if __name__ == "__main__":
    sys.exit(main("published", act=publish))
