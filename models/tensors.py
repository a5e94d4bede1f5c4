"""Whether the tensors of a checkpoint are those of the backbone that was made for it.

Transformers draws a tensor at random that a checkpoint lacks, and leaves out one that has no place in the model, with
a table on the console. Here a tensor of the backbone that is missing, or of another shape, is an error, and so is one
left over in a layer: what the config describes is then not what the weights are of. Not an error is what the model
does without: heads and towers beside the backbone, what transformers ignores by its own rules, layers that
an override takes away, and those that predict further tokens in training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import peft

from sniffer.errors import CheckpointError, ConfigError, SnifferError

from .architecture import auto_class
from .config_keys import value_of

log = logging.getLogger(__name__)

SHOWN = 3
"""Names in a message."""

BEYOND = "num_nextn_predict_layers"
"""How many layers after the last one predict further tokens, in training only."""

HERE, BESIDE = -1, -2
"""Where a tensor is that belongs to no layer: in a part that the backbone has, or in one that it does not have."""

CONSTANTS = ("inv_freq", "masked_bias", "causal_mask")
"""What earlier releases saved beside the weights; models compute it."""

ADAPTER = "default"
"""In the names of an adapter's tensors: what it is called in a model."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Fit:
    """How a checkpoint's tensors fitted a model, by their names in it; from `output_loading_info`."""

    missing: Collection[str]
    unexpected: Collection[str]
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @classmethod
    def told(cls, info: Mapping[str, Any]) -> Fit:
        shapes = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}
        return cls(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), shapes)


def check_tensors(
    model: PreTrainedModel,
    backbone: nn.Module,
    fit: Fit,
    title: str,
    plain: Callable[[], PretrainedConfig] | None,
    *,
    may_lack: bool = False,
    quantized_here: bool = False,
) -> list[str]:
    """Refuses a backbone that is not made of the checkpoint's tensors.

    Args:
        model: what was loaded, of which `backbone` is a part.
        plain: the checkpoint's config without overrides; None where there are none.
        may_lack: whether missing tensors are told instead of refused.
        quantized_here: whether the weights were plain in the checkpoint, though the model is quantised.

    Returns:
        The missing tensors of the backbone, which were drawn at random.

    Raises:
        CheckpointError: naming the tensors.
        ConfigError: an override is why.
    """
    place = next(name for name, part in model.named_modules() if part is backbone)
    missing = [name for name in fit.missing if _within(name, place)]
    mismatched = {name: shapes for name, shapes in fit.mismatched.items() if _within(name, place)}
    places = {name: _where(name, place, backbone) for name in fit.unexpected}
    left = {name: where for name, where in places.items() if where is not None}
    if not (missing or mismatched or left):
        return []
    before = _shapes(plain) if plain is not None else {}
    if missing and may_lack:
        log.warning("%s lacks %s: drawn at random (model.allow_missing)", title, _named(missing))
    elif missing:
        asked = before and not all(name in before for name in missing)
        raise _refusal(title, f"lacks {_named(missing)}, which the model needs", by_override=bool(asked))
    if mismatched:
        asked = any(before.get(name) == found for name, (found, _) in mismatched.items())
        shapes = [f"{name}: {found}, where the model has {wanted}" for name, (found, wanted) in mismatched.items()]
        what = f"has {_named(shapes)} of another shape"
        raise _refusal(title, what, by_override=asked)
    after = _further_layers(backbone)
    left = {name: at for name, at in left.items() if not (_has(before, name) or at in after)}
    inside = [name for name, at in left.items() if at != BESIDE]
    # What quantised checkpoints have beside their weights is their own affair.
    if inside and (quantized_here or value_of(model.config, "quantization_config") is None):
        raise _refusal(title, f"has {_named(inside)}, for which the model has no place", by_override=False)
    if left:
        log.warning("%s has %s, which the model leaves out", title, _named(list(left)))
    return missing


def check_adapter(fit: Fit, title: str) -> None:
    """Refuses an adapter of which a tensor is missing, or made for another model.

    Raises:
        CheckpointError: naming the tensors.
    """
    absent = [name for name in fit.missing if ADAPTER in name.split(".")]
    for names, what in ((absent, "lacks"), (list(fit.mismatched), "has, in another shape than the model's,")):
        if names:
            raise CheckpointError(
                f"the adapter in {title} {what} {_named(names)}: its adapter_config.json is not that of its weights, or"
                " they are incomplete; fetch it anew, or take it away"
            )


@contextmanager
def adapters_aside() -> Iterator[None]:
    """Has transformers load a checkpoint as if it had no adapter."""
    honest = peft.is_peft_available
    peft.is_peft_available = lambda: False
    try:
        yield
    finally:
        peft.is_peft_available = honest


def _where(name: str, place: str, backbone: nn.Module) -> int | None:
    """Where a tensor left over would belong: the number of its layer, HERE, BESIDE, or None: nothing of the backbone's.

    A checkpoint of the backbone alone has names without the backbone's place in the whole model.
    """
    *path, leaf = name.removeprefix(f"{place}.").split(".")
    named_so = not place or name.startswith(f"{place}.")
    if not path or path[0] not in backbone._modules:
        return BESIDE if named_so else None
    owner, layer = backbone, HERE
    for part in path:
        if isinstance(owner, nn.ModuleList) and part.isdigit() and layer == HERE:
            layer = int(part)
        inner = owner._modules.get(part)
        if inner is None:
            return None if leaf.endswith(CONSTANTS) else layer
        owner = inner
    # A bias of what has parts is a mask: parameters of that name are those of a projection or norm.
    computed = leaf in owner._buffers or leaf.endswith(CONSTANTS) or (leaf == "bias" and bool(owner._modules))
    return None if computed else layer


def _further_layers(backbone: nn.Module) -> range:
    """The numbers of layers that a checkpoint may have after the backbone's own."""
    config: Any = backbone.config
    depth, more = value_of(config, "num_hidden_layers"), value_of(config, BEYOND)
    return range(depth, depth + more) if isinstance(depth, int) and isinstance(more, int) else range(0)


def _within(name: str, place: str) -> bool:
    return not place or name.startswith(f"{place}.")


def _has(shapes: Shapes, name: str) -> bool:
    return name in shapes or any(other.endswith(f".{name}") for other in shapes)


def _shapes(plain: Callable[[], PretrainedConfig]) -> Shapes:
    """The tensors of the model that the checkpoint's own config describes; none where that cannot be built."""
    try:
        config = plain()
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except Exception:  # of upstream code: any; it only serves to tell whose fault something is
        return {}
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _named(names: Collection[str]) -> str:
    listed, more = "; ".join(list(names)[:SHOWN]), len(names) - SHOWN
    return f"{len(names)} tensor{'s' * (len(names) > 1)} ({listed}{f'; and {more} more' if more > 0 else ''})"


def _refusal(title: str, what: str, *, by_override: bool) -> SnifferError:
    if by_override:
        return ConfigError(
            f"{title} {what}: model.config_overrides asks for another model than the checkpoint is of; take back what"
            " changes its shapes, or set model.weights=random"
        )
    return CheckpointError(
        f"{title} {what}: its config.json is not that of its weights, or they are incomplete; fetch it anew, or set"
        " model.weights=random (model.allow_missing=true draws what is missing)"
    )
