"""What a model's vectors depend on besides its weights: the code that it runs, and packages that replace parts of it.

Everything is told as it was when the model was loaded: a file that is edited afterwards does not change what runs.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .finder import SOURCE, is_local_copy, is_modelling_module, source_told

log = logging.getLogger(__name__)

REMOTE = "transformers_modules."
"""Code that came with a checkpoint."""

REPLACING = {
    "peft": "peft",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "gptqmodel": "gptqmodel",
    "auto-gptq": "auto_gptq",
    "autoawq": "awq",
    "compressed-tensors": "compressed_tensors",
    "optimum-quanto": "optimum.quanto",
    "hqq": "hqq",
    "eetq": "eetq",
    "flash-attn": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "xformers": "xformers",
    "sageattention": "sageattention",
    "liger-kernel": "liger_kernel",
    "flash-linear-attention": "fla",
    "causal-conv1d": "causal_conv1d",
    "mamba-ssm": "mamba_ssm",
}
"""Packages that compute instead of torch and transformers once they are imported, and the modules to know that by."""


def code_of(backbone: nn.Module) -> dict[str, str]:
    """The SHA-256 of every modelling file that a backbone's classes come from or use, by the name of its module.

    That of a hand-edited copy says so.
    """
    found = {}
    for module in _modelling_modules(backbone):
        name = module.__name__
        copied = is_local_copy(name)
        # Those of a checkpoint are in a folder that is named after its place.
        title = name.rpartition(".")[2] if name.startswith(REMOTE) else name
        found[title] = source_told(_source_digest(module), copied=copied)
        if copied:
            log.info("the local copy %s takes the place of %s (%s)", module.__file__, name, found[title])
    return dict(sorted(found.items()))


def packages_in_use(backbone: nn.Module) -> dict[str, str]:
    """Versions of packages in this process that replace parts of models, and revisions of kernels from the hub."""
    used = {name: _version(name) for name, module in REPLACING.items() if module in sys.modules}
    # Transformers imports it wherever it is installed; what counts is whether the model is made of it.
    if "torchao" in used and not any(type(one).__module__.split(".")[0] == "torchao" for one in _made_of(backbone)):
        del used["torchao"]
    return {**used, **_kernels()}


def _made_of(backbone: nn.Module) -> Iterator[object]:
    yield from backbone.modules()
    for parameter in backbone.parameters():
        yield from (parameter, parameter.data)


def _kernels() -> dict[str, str]:
    """The package `kernels` is imported wherever it is installed; what counts is which ones it has loaded."""
    package = sys.modules.get("kernels")
    loaded: list[Any] = getattr(package, "get_loaded_kernels", list)()
    origins = [getattr(kernel, "repo_info", None) for kernel in loaded]
    known = {f"kernel {origin.repo_id}": str(origin.revision) for origin in origins if origin is not None}
    return {"kernels": _version("kernels"), **known} if loaded else {}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _modelling_modules(backbone: nn.Module) -> list[ModuleType]:
    """The modules of a model's classes, and those whose classes and functions they have imported."""
    todo = {cls.__module__ for part in backbone.modules() for cls in type(part).__mro__}
    found: dict[str, ModuleType] = {}
    while todo:
        name = todo.pop()
        if name not in found and name in sys.modules and (is_modelling_module(name) or name.startswith(REMOTE)):
            found[name] = sys.modules[name]
            todo |= set(_homes(found[name]))
    return list(found.values())


def _homes(module: ModuleType) -> Iterator[str]:
    for value in vars(module).values():
        home = getattr(value, "__module__", None)
        if isinstance(home, str):
            yield home


def _source_digest(module: ModuleType) -> str:
    """Of the text that was compiled; where another loader did that, of the file."""
    known = getattr(module, SOURCE, None)
    if known is not None:
        return str(known)
    try:
        return hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
    except OSError:
        return "unknown"
