"""Any analysis by its name: `python -m sniffer.experiments NAME run=RUN [key=value ...]`; without one, a list."""

from __future__ import annotations

import ast
import runpy
import sys
from difflib import get_close_matches
from pathlib import Path

from sniffer.errors import ConfigError
from sniffer.terminal.command import exit_code


def analyses() -> dict[str, str]:
    """What there is, by name, each with the first sentence that its code says of it; nothing is imported."""
    code = {file.parent.name: file.with_name("__init__.py") for file in Path(__file__).parent.glob("*/__main__.py")}
    told = {name: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for name, file in code.items()}
    return {name: text.split("; see README")[0].split("\n\n")[0].rstrip(".") for name, text in sorted(told.items())}


def usage() -> str:
    lines = "\n".join(f"  {name:22}{text}" for name, text in analyses().items())
    return f"python -m sniffer.experiments NAME run=RUN [out=FOLDER] [key=value ...], or NAME --help\n\n{lines}"


def main() -> int:
    return exit_code(run)


def run() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in analyses():
        close = get_close_matches(name, analyses(), n=1)
        meant = f"did you mean {close[0]}?" if close else f"choose from {', '.join(analyses())}"
        raise ConfigError(f"there is no analysis {name}: {meant}")
    del sys.argv[1]
    runpy.run_module(f"sniffer.experiments.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
