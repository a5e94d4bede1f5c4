"""A model's shapes without its weights, for plans: a 70B model in a second, on a laptop.

The model is built of fake tensors, which have a shape and a type but no storage, and goes through one tapped
forward. So the geometry is read off the same taps as that of a real run, for every family alike.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from sniffer.errors import SnifferError, UnsupportedModelError, first_line
from sniffer.tap import Seen, tap
from sniffer.types import Outline, WorkingMemory

from . import quantized, selfcheck
from .architecture import auto_class, type_of
from .layers import find_backbone, number_layers, sight_of
from .loaded import why_no_pre
from .retrofit import retrofit
from .weights import with_attention
from .working_memory import working_memory

STAND_IN = torch.bfloat16
"""Shapes do not depend on the type of the weights, but some operations are fake in this one only."""


def outline(
    config: PretrainedConfig, dtype: str, trust_remote_code: bool, title: str, quantization: str | None = None
) -> Outline:
    """The shapes of a model of this config; `dtype` and `quantization` as in the config group `model`.

    Raises:
        UnsupportedModelError: it cannot be tapped, or its shapes depend on values.
    """
    kind = type_of(config, dtype)
    with _fake(config, "auto", trust_remote_code, title) as backbone:
        missing, seen = _seen(backbone)
    names = {part: name for name, part in backbone.named_modules()}
    numbers = number_layers({names[event.module]: event.module for event in seen}, backbone)
    sight = sight_of(backbone, numbers)
    layers = (
        selfcheck.geometry_of(event, number, names[event.module], **sight[number])
        for event, number in ((event, numbers[event.module]) for event in seen)
    )
    return Outline(
        geometry=tuple(sorted(layers, key=lambda layer: layer.layer)),
        dtype=str(kind).removeprefix("torch."),
        itemsize=kind.itemsize,
        parameters=sum(parameter.numel() for parameter in backbone.parameters()),
        pre_missing=missing,
        quantization=quantization,
        quantized_bytes=quantized.weight_bytes(backbone, quantization, kind.itemsize) if quantization else None,
    )


def working_memory_of(
    config: PretrainedConfig, dtype: str, attention: str, trust_remote_code: bool, title: str, rows: int, tokens: int
) -> WorkingMemory:
    """What one forward of so many rows and tokens needs beside the weights; raises as `outline`.

    Where operations of the model are not fake in its own type, another stands in for it, of which it may need more.
    """
    kind = type_of(config, dtype)
    try:
        with _fake(config, attention, trust_remote_code, title, kind) as backbone:
            return working_memory(backbone, rows, tokens)
    except UnsupportedModelError:
        if kind is STAND_IN:
            raise
    with _fake(config, attention, trust_remote_code, title) as backbone:
        return working_memory(backbone, rows, tokens, {STAND_IN: kind.itemsize})


@contextmanager
def _fake(
    config: PretrainedConfig, attention: str, trust_remote_code: bool, title: str, kind: torch.dtype = STAND_IN
) -> Iterator[PreTrainedModel]:
    """The tapped backbone, made of fake tensors, for as long as it is open.

    Raises:
        UnsupportedModelError: it cannot be tapped, or what is done with it depends on values.
    """

    def attempt(name: str) -> PreTrainedModel:
        auto = auto_class(config)
        return auto.from_config(config, dtype=kind, attn_implementation=name, trust_remote_code=trust_remote_code)

    try:
        with _silent(), FakeTensorMode(), torch.no_grad(), ExitStack() as given_back:
            model = with_attention(attempt, attention, title)
            given_back.callback(retrofit(model))
            backbone = find_backbone(model)
            backbone.config.use_cache = False
            yield backbone
    except SnifferError:
        raise
    except Exception as error:  # of upstream code: any
        raise UnsupportedModelError(
            f"{title} cannot be planned for without its weights: {type(error).__name__}: {first_line(error)}"
        ) from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps fake tensors from logging the traceback of an error that is told in one line."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _seen(backbone: PreTrainedModel) -> tuple[str, list[Seen]]:
    """Why pre kinds are missing, if they are, and what the taps show, with the pre kinds where there are any."""
    seen: list[Seen] = []
    with tap(seen.append, pre=True):
        backbone(input_ids=torch.zeros((selfcheck.PROBE_BATCH, selfcheck.PROBE_SEQ), dtype=torch.long))
    seen = [event for event in seen if not selfcheck.attends_within_tokens(event)]
    missing = why_no_pre({event.module for event in seen})
    return missing, [event._replace(q_pre=None, k_pre=None) for event in seen] if missing else seen
