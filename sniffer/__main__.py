"""The command line: `python -m sniffer`. Compose, check, run (sniffer/cli/); an error is one line.

Exit codes: 0 done, 1 refused or failed (of a sweep: any job), 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import sys

from sniffer.cli.compose import run_all, told
from sniffer.terminal.command import exit_code


def main() -> int:
    return exit_code(run_all, told)


if __name__ == "__main__":
    sys.exit(main())
