"""The embedded model, real text, and ways of capturing: what the suites that look at one forward pass share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from sniffer.models.backbone import Checkpoint
from sniffer.models.loaded import LoadedBackbone

from benchmarks.measure import timed
from sniffer.dataset.packages import Pydoc
from sniffer.forward.observer import Observer, Wanted, draw
from sniffer.forward.selection import CaptureConfig, select
from sniffer.forward.transfer import Vectors, transfer_for
from sniffer.process.memory import keep_freed_memory
from sniffer.sampler import All, LogUniform, Picker, Sampler, Uniform
from sniffer.tap import Seen, StopForward, tap
from sniffer.types import KIND, KINDS, Document, TokenBatch, by_number

EMBEDDED = "embedded:SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Way:
    """One way of capturing; where it captures some layers only, the forward ends with the last of them."""

    name: str
    sampler: Sampler
    kinds: tuple[str, ...] = ("q", "k")
    layers: tuple[int, ...] | None = None

    @property
    def wants_pre(self) -> bool:
        return any(KIND[kind].pre for kind in self.kinds)


LOG = Way("log_uniform, base_rate 1", LogUniform())
LOG_64 = Way("log_uniform, base_rate 64", LogUniform(base_rate=64))
UNIFORM = Way("uniform, base_rate 1", Uniform())
EVERY = Way("all positions", All())
LOG_5, LOG_64_5, UNIFORM_5, EVERY_5 = (
    replace(way, name=f"{way.name}, all five kinds", kinds=KINDS) for way in (LOG, LOG_64, UNIFORM, EVERY)
)
FIRST_3 = Way("first 3 of 30 layers", LogUniform(), layers=(0, 1, 2))


class Capture:
    """One way of capturing from one batch, set up as a run does it once for all its batches."""

    def __init__(self, way: Way, batch: TokenBatch, backbone: LoadedBackbone) -> None:
        self.way, self.batch = way, batch
        self.selection = select(backbone.geometry, CaptureConfig(kinds=list(way.kinds), layers=way.layers))
        geometry = by_number(backbone.geometry)
        self.transfer = transfer_for(backbone.device)
        self.plan = Wanted(self.selection, geometry, backbone.layer_of, self.transfer, backbone.device)
        self.picker = Picker(way.sampler, seed=0)

    def begin(self) -> None:
        """Draws; from here on `spent` is counted."""
        self.observer, self.spent = timed(self._observer)

    def observe(self, seen: Seen) -> bool:
        """Gathers, and says whether this was all."""
        stopped, spent = timed(self._gather, seen)
        self.spent += spent
        return stopped

    def end(self) -> Vectors:
        vectors, spent = timed(self._settle)
        self.spent += spent
        return vectors

    def _observer(self) -> Observer:
        observer = Observer(self.batch, draw(self.picker, self.selection, self.batch), self.plan)
        # A capture stops at the last wanted layer's attention; to compare like with like, let it run on.
        observer.stops = self.way.layers is not None
        return observer

    def _gather(self, seen: Seen) -> bool:
        try:
            self.observer(seen)
        except StopForward:
            return True
        return False

    def _settle(self) -> Vectors:
        self.transfer.end_batch()
        return self.transfer.settle(self.observer.vectors)


class Bench:
    """The embedded model, a batch of real text, and one run through the other."""

    def __init__(self, *lengths: int, dtype: str = "float32") -> None:
        self.backbone = loaded(dtype)
        self.batch = real_batch(lengths)
        self.input_ids = torch.from_numpy(self.batch.input_ids()).to(self.backbone.device)

    def forward(self) -> None:
        self.backbone(self.input_ids)
        self.wait()

    def capture(self, captures: Iterable[Capture]) -> None:
        """One forward that all of them watch; it ends when one has all it wants."""

        def observe(seen: Seen) -> None:
            stopped = [one.observe(seen) for one in captures]
            if any(stopped):
                raise StopForward

        for one in captures:
            one.begin()
        with tap(observe, pre=any(one.way.wants_pre for one in captures)):
            self.forward()
        for one in captures:
            one.end()

    def wait(self) -> None:
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize()


@cache
def loaded(dtype: str) -> LoadedBackbone:
    """As a run has it."""
    backbone = Checkpoint(EMBEDDED, dtype=dtype).load()
    keep_freed_memory(backbone.device)
    return backbone


def real_batch(lengths: Sequence[int]) -> TokenBatch:
    """Documents of exactly these many tokens of documentation."""
    tokenize, pad_id = Checkpoint(EMBEDDED).load_tokenizer()
    text = "\n".join(str(text) for _, _, text in Pydoc().texts())
    token_ids = np.asarray(tokenize(text)[: sum(lengths)], dtype=np.int32)
    pieces = np.split(token_ids, np.cumsum(lengths)[:-1])
    return TokenBatch(tuple(Document(row, "pydoc", ids, truncated=True) for row, ids in enumerate(pieces)), pad_id)
