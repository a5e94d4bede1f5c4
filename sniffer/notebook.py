"""Capture in a notebook: from a model that the user has loaded, while they call it as they always do.

    with sniffer.sniff(model, sampler=LogUniform(), kinds=["q", "k"]) as captured:
        model(**tokenizer(text, return_tensors="pt"))
    captured.vectors(layer=3, head=2, kind="q")

Each row of a call is a document; the same rows are picked, and the same vectors captured, as in a run over
documents with these ids. Afterwards the model is exactly as it was. A compiled model runs uncompiled inside.

This package does not know models/: what taps a model is named by `attach`, as `_target_` names a class
in a YAML, and imported when it is first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from sniffer.accumulator import Accumulator
from sniffer.arrange import sort_rows
from sniffer.config import CaptureConfig, HeadSampling
from sniffer.errors import CaptureError, RunError
from sniffer.observer import GatherPlan, Observer, draw
from sniffer.reader import Vectors
from sniffer.sampler import LogUniform, Picker, Sampler
from sniffer.selection import select
from sniffer.tap import Seen, tap
from sniffer.transfer import transfer_for
from sniffer.types import Backbone, Document, LayerGeometry, TokenBatch

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

    Args:
        model: a transformers model, however it was loaded.
        sampler: which positions to keep; LogUniform() by default.
        kinds, layers, heads, head_sampling, full_attention_only: as the keys `capture.*` of a run.
        seed: of the draws.
        example_ids: the identities of the documents, in the order in which their rows come; 0, 1, 2, ...
            by default.
        attach: the dotted name of what taps a model.

    Raises:
        ConfigError: the selection names what the model does not have.
        UnsupportedModelError: the model cannot be tapped soundly.
        CaptureError: a call has no input_ids, is padded on the left, has more rows than `example_ids`, or
            does not run all layers.
    """
    request = CaptureConfig(list(kinds), layers, heads, head_sampling or HeadSampling(), full_attention_only)
    module, _, name = attach.rpartition(".")
    tapped = getattr(importlib.import_module(module), name)(model)
    # Code that was compiled before it was tapped would go on without taps.
    with tapped as backbone, torch.compiler.set_stance("force_eager"):
        captured = Captured(backbone, request, Picker(sampler or LogUniform(), seed), example_ids)
        opened = [
            backbone.module.register_forward_pre_hook(captured.begin, with_kwargs=True),
            backbone.module.register_forward_hook(captured.end, always_call=True),
        ]
        try:
            yield captured
        finally:
            for handle in opened:
                handle.remove()
            captured.close()


class Captured:
    """What has been captured so far.

    `geometry` describes the model's attention layers, `selection` what is kept of them, `rows` counts by
    kind. `passed_over` counts forwards that continue a cached sequence, as in generation: positions are
    sampled from forwards that begin at the first token.
    """

    def __init__(
        self, backbone: Backbone, request: CaptureConfig, picker: Picker, example_ids: Iterable[int] | None
    ) -> None:
        self.geometry: dict[int, LayerGeometry] = {layer.layer: layer for layer in backbone.geometry}
        self.selection = select(backbone.geometry, request, backbone.pre_missing)
        self.passed_over = 0
        self._picker = picker
        self._ids = None if example_ids is None else iter(example_ids)
        self._n_documents = 0
        self._accumulator = Accumulator(self.selection)
        self._transfer = transfer_for(backbone.device)
        self._plan = GatherPlan(self.selection, self.geometry, backbone.layer_of, self._transfer, backbone.device)
        self._open = ExitStack()
        self._observer: Observer | None = None

    @property
    def rows(self) -> dict[str, int]:
        return dict(self._accumulator.rows)

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
        order = sort_rows(columns)
        chunks = [chunk.view(-1, len(heads), dim)[:, heads.index(head)].float() for chunk in columns.vectors]
        law = self._picker.probability_by_bucket(int(columns.positions.max(initial=0)) + 1)
        return Vectors(
            vectors=torch.cat([torch.empty(0, dim), *chunks]).numpy()[order],
            positions=columns.positions[order],
            buckets=columns.buckets[order],
            token_ids=columns.token_ids[order],
            example_ids=columns.example_ids[order],
            inclusion_probability=np.array([law[int(bucket)] for bucket in columns.buckets[order]], dtype=np.float64),
        )

    def begin(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: draws the picks of its rows and opens the tap."""
        if _continues(kwargs):
            self.passed_over += 1
            return
        batch = self._batch(args, kwargs)
        observer = Observer(batch, draw(self._picker, self.selection, batch), self._plan)
        observer.stops = False

        def observe(seen: Seen) -> None:
            with torch.no_grad():
                observer(seen)

        self._open.enter_context(tap(observe, pre=any(kind.endswith("_pre") for kind in self.selection.kinds)))
        self._observer = observer

    def end(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a forward, whether it failed or not: closes the tap; a whole batch is kept."""
        self._open.close()
        observer, self._observer = self._observer, None
        if observer is None or output is None:  # passed over, or failed
            return
        if unseen := sorted({layer for layer, _ in self.selection.heads.keys() - observer.vectors.keys()}):
            raise CaptureError(f"layers {unseen} were not run in this call: name those that are in layers=[...]")
        self._transfer.end_batch()
        self._accumulator.add(observer.batch, observer.picks, self._transfer.settle(observer.vectors))

    def close(self) -> None:
        """Closes the tap, should a forward have been cut short."""
        self._open.close()

    def _batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenBatch:
        """The rows of a call as documents, as long as their mask says."""
        ids = args[0] if args else kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise CaptureError("this call has no input_ids of shape (batch, seq): sniff needs the tokens")
        tokens: Int32[np.ndarray, "batch seq"] = ids.detach().cpu().numpy().astype(np.int32)
        lengths = self._lengths(kwargs.get("attention_mask"), tokens.shape)
        documents = []
        for row, length in zip(tokens, lengths, strict=True):
            number = self._next_id()
            documents.append(Document(number, str(number), row[:length], truncated=False))
        return _CallBatch(tuple(documents), pad_id=0, width=tokens.shape[1])

    def _lengths(self, mask: Any, shape: tuple[int, ...]) -> list[int]:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return [shape[1]] * shape[0]
        real = mask.detach().cpu().numpy().astype(bool)
        lengths = real.sum(axis=1)
        if real.shape != tuple(shape) or any(not row[:n].all() for row, n in zip(real, lengths, strict=True)):
            raise CaptureError("this call is padded on the left or inside: set tokenizer.padding_side = 'right'")
        return [int(length) for length in lengths]

    def _next_id(self) -> int:
        if self._ids is None:
            self._n_documents += 1
            return self._n_documents - 1
        try:
            return next(self._ids)
        except StopIteration:
            raise CaptureError("this call has more rows than example_ids: give one id per row") from None


def _continues(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call brings a cache that holds earlier tokens, under whichever name transformers gives it."""
    caches = [value for value in kwargs.values() if callable(getattr(value, "get_seq_length", None))]
    return any(cache.get_seq_length() > 0 for cache in caches)


@dataclass(frozen=True)
class _CallBatch(TokenBatch):
    """A batch as wide as the call it came with, even where all its rows are padded."""

    width: int

    @property
    def seq_len(self) -> int:
        return self.width
