"""The import hook: transformers' modelling modules come in tapped.

`import transformers.models.llama.modeling_llama` asks every finder on sys.meta_path in turn. Ours stands
first and answers for modelling modules only: with a local copy models/llama/modeling_llama.py where there
is one, else with the installed file, derived (models/derive.py). Either way the module keeps its upstream
name and package, so its relative imports and transformers' own auto classes work as ever.

No .pyc is read or written: a cached upstream one would be untapped, and ours must not poison its place.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import decode_source, find_spec, spec_from_file_location
from pathlib import Path
from traceback import extract_tb
from types import CodeType, ModuleType

from sniffer.errors import SnifferError, UnsupportedModelError, first_line
from sniffer.tap import TAP

from .derive import TAP_NAME, Derived, derive, observing_classes

MODELLING_MODULE = re.compile(r"transformers\.models\.(\w+)\.(modeling_\w+)")
DERIVED_NAME = "__sniffer_derived__"
"""Where a derived module keeps its Derived record; None in a local copy."""
TAPPED_CLASSES = "__sniffer_classes__"
"""Where a module keeps the names of its classes that carry a tap."""
SOURCE = "__sniffer_source__"
"""Where a module keeps the SHA-256 of the text that it was compiled from."""


class TappedLoader(SourceFileLoader):
    """Runs a modelling file with the tap's socket in its namespace."""

    def __init__(self, fullname: str, path: str, *, local_copy: bool = False) -> None:
        super().__init__(fullname, path)
        self.local_copy = local_copy
        self.derived: Derived | None = None
        self.classes: frozenset[str] = frozenset()
        self.source = ""

    def get_code(self, fullname: str) -> CodeType:
        text = self.get_data(self.path)
        self.source = hashlib.sha256(text).hexdigest()
        source = decode_source(text)
        if self.local_copy:
            self.classes = observing_classes(source, self.path)
            return compile(source, self.path, "exec", dont_inherit=True)
        self.derived = derive(source, self.path)
        self.classes = frozenset(one.class_name for one in self.derived.taps)
        return compile(self.derived.tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, TAP_NAME, TAP)
        with _named(self.path) if self.local_copy else nullcontext():
            super().exec_module(module)
        setattr(module, DERIVED_NAME, self.derived)
        setattr(module, TAPPED_CLASSES, self.classes)
        setattr(module, SOURCE, self.source)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Names a hand-edited copy whose code fails as it is imported: of transformers' own error the file cannot be told.

    Raises:
        UnsupportedModelError: the file, the line, and what is wrong there.
    """
    try:
        yield
    except SnifferError:
        raise
    except Exception as error:
        here = [frame.lineno for frame in extract_tb(error.__traceback__) if frame.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else here[-1] if here else None
        what = error.msg if isinstance(error, SyntaxError) else first_line(error)
        raise UnsupportedModelError(
            f"{path}{f' line {line}' if line else ''}: {type(error).__name__}: {what}; mend this copy, or remove it to "
            "use that of transformers"
        ) from error


class TappedFinder(MetaPathFinder):
    """Answers for transformers' modelling modules; `copies` is the folder of local copies."""

    def __init__(self, copies: Path) -> None:
        self.copies = copies

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        match = MODELLING_MODULE.fullmatch(fullname)
        if match is None:
            return None
        copy = self.copies / match[1] / f"{match[2]}.py"
        if copy.is_file():
            return _spec(fullname, str(copy), local_copy=True)
        upstream = PathFinder.find_spec(fullname, path)
        if upstream is None or upstream.origin is None or not upstream.origin.endswith(".py"):
            return upstream
        return _spec(fullname, upstream.origin, local_copy=False)


def _spec(fullname: str, path: str, *, local_copy: bool) -> ModuleSpec | None:
    loader = TappedLoader(fullname, path, local_copy=local_copy)
    return spec_from_file_location(fullname, path, loader=loader)


COPIES = Path(__file__).parent
"""Where hand-edited local copies lie: this package's own folder."""


def install(copies: Path | None = None) -> None:
    """Taps the modelling modules imported from now on; a second call changes nothing.

    Args:
        copies: the folder of hand-edited local copies; COPIES by default.
    """
    if not any(isinstance(finder, TappedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, TappedFinder(copies or COPIES))


def uninstall() -> None:
    """Takes the hook away. Modules that are already imported keep their taps, which stay silent."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, TappedFinder)]


@contextmanager
def installed(copies: Path | None = None) -> Iterator[None]:
    """The hook for the length of a `with`; one that was there before stays."""
    before = list(sys.meta_path)
    install(copies)
    try:
        yield
    finally:
        if not any(isinstance(finder, TappedFinder) for finder in before):
            uninstall()


def is_modelling_module(name: str) -> bool:
    return MODELLING_MODULE.fullmatch(name) is not None


def is_tapped(name: str) -> bool:
    """Whether an imported module came through the hook."""
    return hasattr(sys.modules.get(name), TAP_NAME)


def is_local_copy(name: str) -> bool:
    """Whether an imported module is a hand-edited copy in the upstream one's place."""
    return bool(getattr(getattr(sys.modules.get(name), "__loader__", None), "local_copy", False))


def source_told(digest: str, *, copied: bool) -> str:
    """How a manifest names the text of a module."""
    return f"{'local copy, ' if copied else ''}sha256:{digest}"


def source_of(name: str) -> str | None:
    """What a modelling module would be made from now, as `source_told`; None where there is no such file."""
    match, package = MODELLING_MODULE.fullmatch(name), find_spec("transformers")
    if match is None or package is None or package.origin is None:
        return None
    copy, upstream = (place / match[1] / f"{match[2]}.py" for place in (COPIES, Path(package.origin).parent / "models"))
    path = copy if copy.is_file() else upstream
    if not path.is_file():
        return None
    return source_told(hashlib.sha256(path.read_bytes()).hexdigest(), copied=path is copy)
