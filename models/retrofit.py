"""Taps for a model whose code was imported without the hook: in a notebook, early, or from the hub.

The import hook (models/finder.py) sees only modules that are imported after it. For all others the tapped
source is derived just the same, and the *code objects* of the methods that attend are swapped in place: the
functions, classes and live instances stay the ones they were, so every reference to them is tapped at
once, and putting the old code back undoes it exactly.

The source on disk must be the one that was loaded; else the swap is refused.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from torch import nn
from transformers import PreTrainedModel

from sniffer.errors import UnsupportedModelError
from sniffer.tap import TAP

from .derive import TAP_NAME, derive
from .finder import DERIVED_NAME, MODELLING_MODULE, TAPPED_CLASSES, is_modelling_module, is_tapped
from .loaded import LoadedBackbone, find_backbone

Undo = Callable[[], None]


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[LoadedBackbone]:
    """The proven backbone of a model that somebody else loaded; afterwards the model is as it was.

    Raises:
        UnsupportedModelError: it cannot be tapped soundly, and why.
    """
    undo = retrofit(model)
    try:
        yield _probed(model)
    finally:
        undo()


def retrofit(model: nn.Module) -> Undo:
    """Taps the code of a model that did not come through the import hook, and returns how to undo that.

    Raises:
        UnsupportedModelError: its source is not at hand or has changed, or a local copy would be ignored.
    """
    undo: list[Undo] = []
    try:
        for module in _untapped_homes(model):
            undo += _retrofit_module(module)
    except BaseException:
        _undo_all(undo)
        raise
    return lambda: _undo_all(undo)


def _probed(model: PreTrainedModel) -> LoadedBackbone:
    """The backbone, proven in evaluation mode; training flags and requires_grad are given back."""
    training = [(part, part.training) for part in model.modules()]
    with_gradient = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        return LoadedBackbone(find_backbone(model))
    finally:
        for part, flag in training:
            part.training = flag
        for parameter, flag in with_gradient:
            parameter.requires_grad_(flag)


def _undo_all(undo: list[Undo]) -> None:
    while undo:
        undo.pop()()


def _untapped_homes(model: nn.Module) -> list[ModuleType]:
    """The modules that define the model's classes and carry no taps, libraries below it left out."""
    names = dict.fromkeys(cls.__module__ for part in model.modules() for cls in type(part).__mro__)
    ours = [name for name in names if is_modelling_module(name) or name.split(".")[0] not in ("torch", "transformers")]
    homes = [sys.modules[name] for name in ours if name in sys.modules and not is_tapped(name)]
    return [module for module in homes if getattr(module, "__file__", None)]


def _retrofit_module(module: ModuleType) -> list[Undo]:
    _refuse_ignored_copy(module.__name__)
    path = str(module.__file__)
    source = Path(path).read_text(encoding="utf-8")
    derived = derive(source, path)
    if not derived.taps and not is_modelling_module(module.__name__):
        return []
    before = _methods(compile(source, path, "exec", dont_inherit=True))
    after = _methods(compile(derived.tree, path, "exec", dont_inherit=True))
    undo: list[Undo] = []
    for tap in derived.taps:
        owner = getattr(module, tap.class_name, None)
        if owner is None:  # a class within a function
            continue
        name = f"{tap.class_name}.{tap.method}"
        function = _function(vars(owner).get(tap.method), name)
        if function is None or function.__code__ not in (before[name], after[name]):
            raise UnsupportedModelError(
                f"{name} in {path} is not what was loaded: restart Python, and tap the model before changing it"
            )
        undo.append(_swap_code(function, after[name]))
    for key, value in (
        (TAP_NAME, TAP),
        (DERIVED_NAME, derived),
        (TAPPED_CLASSES, {t.class_name for t in derived.taps}),
    ):
        undo.append(_bind(module, key, value))
    return undo


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
    return lambda: delattr(module, key)
