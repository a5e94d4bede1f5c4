"""Taps for a model whose code was imported without the hook: in a notebook, early, or from the hub.

The import hook (models/finder.py) sees only modules that are imported after it. For all others the tapped
source is derived just the same, and the *code objects* of the methods that attend are swapped in place: the
functions, classes and live instances stay the ones they were, so every reference to them is tapped at
once, and putting the old code back undoes it exactly. Code belongs to the whole process: it is swapped for the first
model that needs it and put back after the last, and a forward that is under way meanwhile goes on unharmed.

The source on disk must be the one that was loaded; else the swap is refused.
"""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from types import CodeType, FunctionType, ModuleType

import torch
from torch import nn
from transformers import PreTrainedModel

from sniffer.errors import CaptureError, UnsupportedModelError
from sniffer.tap import TAP

from .attachment import Attachment, model_in
from .derive import TAP_NAME, derive
from .finder import DERIVED_NAME, MODELLING_MODULE, TAPPED_CLASSES, is_modelling_module, is_tapped

Undo = Callable[[], object]

LOCK = RLock()
"""Held while code is swapped."""


class Shared:
    """A change of the process that several need: made for the first of them, undone after the last."""

    def __init__(self, make: Callable[[], Undo]) -> None:
        self._make = make
        self._holders = 0

    def hold(self) -> Undo:
        """Makes the change, unless it is made, and returns how to let go of it, which may be called again."""
        with LOCK:
            if not self._holders:
                self._undo = self._make()
            self._holders += 1
        released = False

        def release() -> None:
            nonlocal released
            with LOCK:
                if released:
                    return
                released = True
                self._holders -= 1
                if not self._holders:
                    self._undo()

        return release


SWAPPED: dict[ModuleType, Shared] = {}
"""Modules that were imported without the hook and have been tapped since."""


def retrofit(model: nn.Module) -> Undo:
    """Taps the code of a model that did not come through the import hook, and returns how to undo that.

    Raises:
        UnsupportedModelError: its source is not at hand or has changed, or a local copy would be ignored.
    """
    undo: list[Undo] = []
    with LOCK:
        try:
            for module in _untapped_homes(model):
                undo.append(_swapped(module).hold())
        except BaseException:
            _undo_all(undo)
            raise
    return lambda: _undo_all(undo)


@contextmanager
def attached(model: nn.Module) -> Iterator[Attachment]:
    """The proven backbone of a model that somebody else loaded; afterwards the model is as it was.

    Raises:
        UnsupportedModelError: it cannot be tapped soundly, and why.
        CaptureError: it is attached to already, here or in another thread.
    """
    whole = model_in(model)
    with _reserved(whole):
        undo = [EAGER.hold()]
        try:
            undo.append(retrofit(whole))
            with LOCK:
                backbone = Attachment(whole)
            yield backbone
        finally:
            _undo_all(undo)


IN_USE: set[nn.Module] = set()
"""The models that are attached to, with all the models inside them."""


@contextmanager
def _reserved(model: nn.Module) -> Iterator[None]:
    """Refuses a model of which a part is attached to already, before anything is touched."""
    parts = {part for part in model.modules() if isinstance(part, PreTrainedModel)}
    with LOCK:
        if parts & IN_USE:
            raise CaptureError(
                "this model is being sniffed already: end that `with` first, or name all kinds and layers in the one"
            )
        IN_USE.update(parts)
    try:
        yield
    finally:
        with LOCK:
            IN_USE.difference_update(parts)


def _uncompiled() -> Undo:
    """Code that was compiled before it was tapped would go on without taps."""
    stance = torch.compiler.set_stance("force_eager")
    stance.__enter__()
    return lambda: stance.__exit__(None, None, None)


EAGER = Shared(_uncompiled)


def _swapped(module: ModuleType) -> Shared:
    return SWAPPED.setdefault(module, Shared(lambda: _retrofit_module(module)))


def _undo_all(undo: list[Undo]) -> None:
    while undo:
        undo.pop()()


def _untapped_homes(model: nn.Module) -> list[ModuleType]:
    """The modules that define the model's classes and did not come tapped, libraries below it left out."""
    names = dict.fromkeys(cls.__module__ for part in model.modules() for cls in type(part).__mro__)
    ours = [name for name in names if is_modelling_module(name) or name.split(".")[0] not in ("torch", "transformers")]
    homes = [sys.modules[name] for name in ours if name in sys.modules]
    return [
        home for home in homes if getattr(home, "__file__", None) and (home in SWAPPED or not is_tapped(home.__name__))
    ]


def _retrofit_module(module: ModuleType) -> Undo:
    _refuse_ignored_copy(module.__name__)
    path = str(module.__file__)
    source = Path(path).read_text(encoding="utf-8")
    derived = derive(source, path)
    undo: list[Undo] = [lambda: SWAPPED.pop(module, None)]
    if not derived.taps and not is_modelling_module(module.__name__):
        return lambda: _undo_all(undo)
    before = _methods(compile(source, path, "exec", dont_inherit=True))
    after = _methods(compile(derived.tree, path, "exec", dont_inherit=True))
    # A forward that is under way when the code is put back still looks for the name, and then finds it here.
    setattr(builtins, TAP_NAME, TAP)
    try:
        for tap in derived.taps:
            owner = getattr(module, tap.class_name, None)
            if owner is not None:  # None: a class within a function
                name = f"{tap.class_name}.{tap.method}"
                undo.append(_replace(vars(owner).get(tap.method), name, before, after, path))
    except BaseException:
        _undo_all(undo)
        raise
    for key, value in (
        (TAP_NAME, TAP),
        (DERIVED_NAME, derived),
        (TAPPED_CLASSES, {t.class_name for t in derived.taps}),
    ):
        undo.append(_bind(module, key, value))
    return lambda: _undo_all(undo)


def _replace(
    attribute: object, name: str, before: Mapping[str, CodeType], after: Mapping[str, CodeType], path: str
) -> Undo:
    """Gives a method its tapped code, if what it has is what the file says."""
    function = _function(attribute, name)
    if function is None or function.__code__ not in (before[name], after[name]):
        raise UnsupportedModelError(
            f"{name} in {path} is not what was loaded: restart Python, and tap the model before changing it"
        )
    return _swap_code(function, after[name])


def _refuse_ignored_copy(name: str) -> None:
    match = MODELLING_MODULE.fullmatch(name)
    if match and (copy := Path(__file__).parent / match[1] / f"{match[2]}.py").is_file():
        raise UnsupportedModelError(
            f"{name} was imported before the local copy {copy} could take its place: "
            "call sniffer.models.finder.install() before importing the family"
        )


def _methods(code: CodeType) -> dict[str, CodeType]:
    """The code objects of a module's functions and methods by qualified name."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    found = {one.co_qualname: one for one in inner}
    for one in inner:
        found |= _methods(one)
    return found


def _function(attribute: object, name: str) -> FunctionType | None:
    """The plain function of that qualified name, below any decorators."""
    while attribute is not None:
        if isinstance(attribute, FunctionType) and attribute.__code__.co_qualname == name:
            return attribute
        attribute = inspect.getattr_static(attribute, "__wrapped__", None)
    return None


def _swap_code(function: FunctionType, code: CodeType) -> Undo:
    before = function.__code__
    function.__code__ = code

    def restore() -> None:
        function.__code__ = before

    return restore


def _bind(module: ModuleType, key: str, value: object) -> Undo:
    setattr(module, key, value)

    def restore() -> None:
        vars(module).pop(key, None)

    return restore
