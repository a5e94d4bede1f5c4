"""Capture in a notebook: from a model that the user has loaded, while they call it as they always do.

    with sniffer.sniff(model, sampler=LogUniform(), kinds=["q", "k"]) as captured:
        model(**tokenizer(text, return_tensors="pt"))
    captured.vectors(layer=3, head=2, kind="q")

Each row of a call is a document; the same rows are picked, and the same vectors captured, as in a run over
documents with these ids. How calls become rows is told in listener.py, what a call may say in call.py. Afterwards the
model is exactly as it was. A compiled model runs uncompiled inside.

This package does not know models/: what taps a model is named by `attach`, as `_target_` names a class
in a YAML, and imported when it is first used.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sniffer.errors import ConfigError
from sniffer.forward.moments.counting import MomentsPlan
from sniffer.forward.moments.request import MomentsConfig
from sniffer.forward.selection import CaptureConfig, HeadSampling, listed, select
from sniffer.notebook.attending import plan_for
from sniffer.notebook.caches import nothing
from sniffer.notebook.captured import Captured
from sniffer.notebook.example_ids import ExampleIds
from sniffer.notebook.listener import Listener
from sniffer.notebook.saving import Told
from sniffer.sampler import All, LogUniform, PerSide, Sampler, Uniform, picker_of

ATTACH = "sniffer.models.retrofit.attached"


@contextmanager
def sniff(
    model: Any,
    *,
    sampler: Sampler | str = "log_uniform",
    kinds: Sequence[str] = ("q", "k"),
    layers: Any = None,
    heads: Any = None,
    head_sampling: HeadSampling | None = None,
    full_attention_only: bool = False,
    attention: Sequence[str] | str | None = None,
    attention_top: int = 8,
    attention_sections: Sequence[str] | str | None = None,
    max_tokens: int | None = None,
    moments: Sequence[str] | str | None = None,
    moments_second: str = "full",
    moments_sections: Sequence[str] | str | None = None,
    seed: int = 0,
    example_ids: Iterable[int | str] | None = None,
    attach: str = ATTACH,
) -> Iterator[Captured]:
    """Captures from every call of `model` inside the `with`; the model computes what it always computes.

    A document begins where its row begins, or where its position_ids do, and goes on where a call brings the cache that
    an earlier one has filled. What is not captured is counted, and told in a warning at the end.

    Args:
        model: a transformers model, however it was loaded, or one thing that holds it.
        sampler: which positions to keep, or the name of one with its defaults: log_uniform, uniform, all, per_side.
        kinds, layers, heads, head_sampling, full_attention_only: as the keys `capture.*` of a run.
        attention, attention_top, attention_sections: statistics of attention, as these keys of a run: names of some, or
            all. Documents of calls have the section image.
        max_tokens: of the longest text, for which their rows have columns; what the model takes by default.
        moments, moments_second, moments_sections: sums over all positions, as the keys `capture.moments.*` of a run:
            of which kinds, `kinds` or not.
        seed: of the draws.
        example_ids: the identities of the documents, in the order in which their rows come, whole numbers, or texts
            as a dataset has them; 0, 1, 2, ... by default. A call that fails uses none.
        attach: the dotted name of what taps a model.

    Raises:
        ConfigError: the selection names what the model does not have, or an id is none.
        UnsupportedModelError: the model cannot be tapped soundly; or its statistics of attention are not to be had.
        CaptureError: the model is being sniffed already; or, raised by a call: it has no input_ids, says what this
            model does not heed, has more rows than `example_ids`, or does not run all layers.
    """
    sampler = _named(sampler)
    if sampler.keep_sections:
        raise ConfigError(f"keep_sections={list(sampler.keep_sections)}: documents of calls have no sections")
    heads_of = layers, heads, head_sampling or HeadSampling(), full_attention_only
    summed = MomentsConfig(moments, moments_second, moments_sections)
    request = CaptureConfig(listed(kinds), *heads_of, attention, attention_top, attention_sections, moments=summed)
    ids, picker = ExampleIds(example_ids), picker_of(sampler, seed)
    module, _, name = attach.rpartition(".")
    with getattr(importlib.import_module(module), name)(model) as backbone:
        selection = select(backbone.geometry, request, backbone.pre_missing)
        plan = plan_for(backbone, request, selection, picker, max_tokens)
        layout = None if plan is None else plan.layout
        of_all = None
        if summed.layout is not None:
            of_all = MomentsPlan(summed.layout, selection.moments, picker, backbone.rope)
        captured = Captured(Told.of(model, backbone, layout), selection, picker, ids.names, of_all)
        listener = Listener(backbone, selection, picker, ids, captured, captured.missed, plan, of_all)
        captured.settle = listener.settle
        try:
            with listener.listening():
                yield captured
        finally:
            captured.settle = nothing
    if notes := captured.notes:
        warnings.warn(f"sniff: {'; '.join(notes)}", stacklevel=3)


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "log_uniform": LogUniform,
    "uniform": Uniform,
    "all": All,
    "per_side": lambda: PerSide(q=LogUniform(), k=All()),
}
"""By the names that they have in conf/sampler, with the defaults there."""


def _named(sampler: Sampler | str) -> Sampler:
    if not isinstance(sampler, str):
        return sampler
    if sampler not in SAMPLERS:
        raise ConfigError(f"sampler={sampler!r} is none of {', '.join(SAMPLERS)}: give one of these, or a sampler")
    return SAMPLERS[sampler]()
