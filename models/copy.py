"""Writes a tapped copy of a modelling file to edit: `python -m sniffer.models.copy llama`.

The copy is the installed file with its taps written out, as models/<family>/modeling_<family>.py. From then
on it is what `import transformers.models.<family>.modeling_<family>` gives, in this project. Methods that
attend are printed anew, without their comments; all else is the upstream text.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path

from sniffer.errors import SnifferError, UnsupportedModelError

from .derive import TAP_NAME, derive

HEAD = """# A tapped copy of {name}.py of transformers {version}, made by `python -m sniffer.models.copy {family}`.
# It takes the upstream module's place. {tap} is bound by models/finder.py: keep one `observe` before
# each attention call, with the tensors that attention receives; all else is yours to edit.
"""


def write_copy(family: str, folder: Path) -> Path:
    """Writes folder/<family>/modeling_<family>.py and returns its path.

    Raises:
        UnsupportedModelError: transformers has no such family, no rule taps it, or there is a copy already.
    """
    name = f"modeling_{family}"
    target = folder / family / f"{name}.py"
    if target.exists():
        raise UnsupportedModelError(f"{target} exists: edit it, or remove it to start anew")
    upstream = _upstream(family, name)
    text = tapped_source(upstream.read_text(encoding="utf-8"), str(upstream))
    head = HEAD.format(name=name, version=version("transformers"), family=family, tap=TAP_NAME)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(head + text, encoding="utf-8")
    return target


def tapped_source(source: str, filename: str) -> str:
    """The source with the taps of its derived tree written out as text.

    Raises:
        UnsupportedModelError: no rule matches its attention.
    """
    derived = derive(source, filename)
    if not derived.taps:
        reasons = "; ".join(f"{one.class_name} at line {one.line}: {one.reason}" for one in derived.untapped)
        raise UnsupportedModelError(f"no attention in {filename} is tapped: {reasons or 'it has no softmax attention'}")
    tapped = {(tap.class_name, tap.method) for tap in derived.taps}
    lines = source.splitlines()
    # From the end on, so that the line numbers before stay right.
    for method in sorted(_methods(derived.tree, tapped), key=lambda node: -node.lineno):
        indent = method.col_offset
        method.decorator_list = []
        assert method.end_lineno is not None
        lines[method.lineno - 1 : method.end_lineno] = textwrap.indent(ast.unparse(method), " " * indent).splitlines()
    return "\n".join(lines) + "\n"


def _methods(tree: ast.Module, wanted: set[tuple[str, str]]) -> list[ast.FunctionDef]:
    return [
        method
        for cls in ast.walk(tree)
        if isinstance(cls, ast.ClassDef)
        for method in cls.body
        if isinstance(method, ast.FunctionDef) and (cls.name, method.name) in wanted
    ]


def _upstream(family: str, name: str) -> Path:
    package = importlib.util.find_spec("transformers")
    path = Path(str(package.origin)).parent / "models" / family / f"{name}.py" if package else Path(name)
    if not path.is_file():
        raise UnsupportedModelError(f"transformers {version('transformers')} has no models/{family}/{name}.py")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sniffer.models.copy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", help="a folder of transformers/models, such as llama")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent, help="where copies lie; this package")
    options = parser.parse_args()
    try:
        print(write_copy(options.family, options.into))
    except SnifferError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
