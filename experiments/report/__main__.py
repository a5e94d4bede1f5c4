"""python -m experiments.report run=RUN"""

import sys

from experiments.common.entry import main
from experiments.report import write

if __name__ == "__main__":
    sys.exit(main("report", act=write))
