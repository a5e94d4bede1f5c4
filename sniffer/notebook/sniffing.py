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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from sniffer.errors import ConfigError, RunError
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.selection import CaptureConfig, HeadSampling, Selection, select
from sniffer.notebook.example_ids import ExampleIds
from sniffer.notebook.listener import CallRows, Listener
from sniffer.notebook.missed import Missed
from sniffer.reader.vectors import Vectors, probabilities
from sniffer.sampler import LogUniform, Picker, Sampler, picker_of
from sniffer.types import KIND, LayerGeometry, by_number

ATTACH = "sniffer.models.retrofit.attached"


@contextmanager
def sniff(
    model: Any,
    *,
    sampler: Sampler | None = None,
    kinds: Sequence[str] = ("q", "k"),
    layers: Any = None,
    heads: Any = None,
    head_sampling: HeadSampling | None = None,
    full_attention_only: bool = False,
    seed: int = 0,
    example_ids: Iterable[int] | None = None,
    attach: str = ATTACH,
) -> Iterator[Captured]:
    """Captures from every call of `model` inside the `with`; the model computes what it always computes.

    A document begins where its row begins, or where its position_ids do. What is not captured is counted, and told in a
    warning at the end.

    Args:
        model: a transformers model, however it was loaded, or one thing that holds it.
        sampler: which positions to keep; LogUniform() by default.
        kinds, layers, heads, head_sampling, full_attention_only: as the keys `capture.*` of a run.
        seed: of the draws.
        example_ids: the identities of the documents, in the order in which their rows come; 0, 1, 2, ...
            by default. A call that fails uses none.
        attach: the dotted name of what taps a model.

    Raises:
        ConfigError: the selection names what the model does not have, or an id is none.
        UnsupportedModelError: the model cannot be tapped soundly.
        CaptureError: the model is being sniffed already; or, raised by a call: it has no input_ids, says what this
            model does not heed, has more rows than `example_ids`, or does not run all layers.
    """
    if sampler is not None and sampler.keep_sections:
        raise ConfigError(f"keep_sections={list(sampler.keep_sections)}: documents of calls have no sections")
    request = CaptureConfig(list(kinds), layers, heads, head_sampling or HeadSampling(), full_attention_only)
    ids, picker = ExampleIds(example_ids), picker_of(sampler or LogUniform(), seed)
    module, _, name = attach.rpartition(".")
    with getattr(importlib.import_module(module), name)(model) as backbone:
        selection = select(backbone.geometry, request, backbone.pre_missing)
        captured = Captured(backbone.geometry, selection, picker)
        with Listener(backbone, selection, picker, ids, captured.keep, captured.missed).listening():
            yield captured
    if notes := captured.notes:
        warnings.warn(f"sniff: {'; '.join(notes)}", stacklevel=3)


class Captured:
    """What has been captured so far.

    `geometry` describes the model's attention layers, `selection` what is kept of them, `documents` counts documents
    and `rows` rows by kind. `missed` counts what was not captured, and `notes` says so.
    """

    def __init__(self, geometry: Sequence[LayerGeometry], selection: Selection, picker: Picker) -> None:
        self.geometry = by_number(geometry)
        self.selection = selection
        self.documents = 0
        self.missed = Missed()
        self._picker = picker
        self._accumulator = Accumulator(selection)

    def __repr__(self) -> str:
        rows = ", ".join(f"{count:,} {kind}" for kind, count in self.rows.items())
        return f"Captured({'; '.join([f'{self.documents:,} documents', f'rows: {rows}', *self.notes])})"

    @property
    def rows(self) -> dict[str, int]:
        return dict(self._accumulator.rows)

    @property
    def passed_over(self) -> int:
        """Calls that go on with an earlier one, as the steps of a generation do: only what begins is captured."""
        return self.missed.passed_over

    @property
    def notes(self) -> list[str]:
        """What was not captured, or not as one might think."""
        missed = self.missed.notes()
        if not missed and not self.documents:
            missed = ["no call of this model was made"]
        return missed if self.selection.note is None else [self.selection.note, *missed]

    def keep(self, call: CallRows) -> None:
        """Takes the rows of a call."""
        self._accumulator.add(call.batch, call.picks, call.vectors)
        self.documents += len(call.batch.documents)

    def vectors(self, *, layer: int, head: int, kind: str = "q") -> Vectors:
        """One head's vectors, as `run.vectors` of a run gives them.

        Raises:
            RunError: the layer, kind or head was not captured.
        """
        heads = self.selection.heads.get((layer, kind), ())
        if head not in heads:
            raise RunError(f"layer {layer}, kind {kind}, head {head} was not captured: see captured.selection")
        dim = self.geometry[layer].dims[kind]
        columns = self._accumulator.columns(layer, kind, dim)
        order = columns.rows.order
        chunks = [chunk.view(-1, len(heads), dim)[:, heads.index(head)].float() for chunk in columns.vectors]
        rows = columns.rows[order]
        law = self._picker.side(KIND[kind].draw).probability_by_bucket(int(rows.position.max(initial=0)) + 1)
        return Vectors(torch.cat([torch.empty(0, dim), *chunks]).numpy()[order], rows, probabilities(law, rows.bucket))
