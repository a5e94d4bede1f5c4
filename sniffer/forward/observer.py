"""The observer of one batch: it knows the picks, and gathers them as each layer is seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from jaxtyping import Float32, Int
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.forward.attention.attending import Attending, AttentionPlan
from sniffer.forward.gather import gather
from sniffer.forward.moments.counting import Counting, MomentsPlan
from sniffer.forward.selection import Selection
from sniffer.forward.transfer import Transfer
from sniffer.sampler import Picker
from sniffer.tap import TAP, Attended, Seen, StopForward, Tap, tap
from sniffer.types import ATTENTION, KIND, LayerGeometry, Picks, TokenBatch, draw_of


class Observer:
    """Gathers what a selection wants from every attention layer of one forward pass.

    Before the forward it draws all picks and sends their indices to the device in one piece. It is then
    called with each layer's inputs; after the last wanted layer it ends the forward, unless `stops` is
    set to False. `seconds` is the time spent in those calls.

    What was proven at start-up over a short text must hold for each batch: a layer that shows something a second
    time, or other than one vector per token, raises CaptureError.
    """

    def __init__(
        self,
        batch: TokenBatch,
        picks: Mapping[tuple[int, str], Picks],
        plan: Wanted,
        counted: Collection[int] = (),
        counting: Counting | None = None,
    ) -> None:
        """
        Args:
            counted: example ids of documents whose moments there are already.
            counting: what counts, where it is another than that of whole documents.
        """
        self.batch = batch
        self.picks = picks
        self.vectors: dict[tuple[int, str], Tensor] = {}
        self.seconds = 0.0
        self.stops = True
        self._plan = plan
        self._flat = [batch.cells(drawn) for drawn in picks.values()]
        self._indices = {plan.device: self._upload(plan.device)}
        if counting is None and plan.moments is not None:
            counting = Counting(plan.moments, batch, counted)
        self.counting = counting
        self.attending = None if plan.attention is None else Attending(plan.attention, batch, self)

    @contextmanager
    def open(self, *, pre: bool = False) -> Iterator[None]:
        """The tap, for the length of a forward."""
        if self.attending is None:
            with tap(self, pre=pre):
                yield
            return
        watch = self.attending.mode if self.attending.plan.inline else nullcontext()
        with watch, tap(self, pre=pre, attended=self.called):
            yield
        self.attending.end()
        self.seconds += self.attending.seconds

    def __call__(self, seen: Seen) -> None:
        started = time.perf_counter()
        layer = self._plan.layer_of.get(seen.module)
        if layer is not None:
            for kind in self._plan.kinds.get(layer, ()):
                self._keep(layer, kind, KIND[kind].shown(seen))
            if self.counting is not None:
                self._count(self.counting, layer, seen)
        self.seconds += time.perf_counter() - started
        if layer is not None and self.attending is not None:
            self.attending.show(layer, seen)
        else:
            self._stop_after(layer)

    def called(self, shown: Attended) -> None:
        """A call of attention is over."""
        layer = self._plan.layer_of.get(shown.module)
        if layer is not None and self.attending is not None:
            self.attending.called(layer, shown)

    def keep_statistics(self, layer: int, columns: Float32[Tensor, "picks heads width"]) -> None:
        """Takes what a layer's queries do with their keys, all query heads of the picks."""
        self.vectors[layer, ATTENTION] = self._plan.transfer.download(self._plan.statistics(layer, columns))
        self._stop_after(layer)

    def index(self, layer: int, kind: str, device: torch.device) -> Int[Tensor, " picks"]:
        """Where the picks of a (layer, kind) are on a device: row * seq + position."""
        # A model spread over several devices needs the indices on each of them.
        if device not in self._indices:
            self._indices[device] = self._upload(device)
        return self._indices[device][draw_of((layer, kind))]

    def _stop_after(self, layer: int | None) -> None:
        if self.stops and layer == self._plan.last_layer:
            raise StopForward

    def _keep(self, layer: int, kind: str, states: Tensor) -> None:
        self._check(layer, kind, states)
        flat = self.index(layer, kind, states.device)
        rows = gather(states, flat, self._plan.heads(layer, kind, states.device))
        self.vectors[layer, kind] = self._plan.transfer.download(rows)

    def _count(self, counting: Counting, layer: int, seen: Seen) -> None:
        for kind in counting.plan.kinds_of(layer):
            states = KIND[kind].shown(seen)
            self._check_shape(layer, kind, states)
            if (layer, kind) in counting.sums:
                raise CaptureError(twice(layer, kind))
            heads = self._plan.heads(layer, kind, states.device, counting.plan.heads)
            counting.see(layer, kind, states, heads)

    def _check(self, layer: int, kind: str, states: Tensor) -> None:
        ended = self.stops and layer == self._plan.last_layer
        if (layer, kind) in self.vectors and not ended:
            raise CaptureError(twice(layer, kind))
        self._check_shape(layer, kind, states)

    def _check_shape(self, layer: int, kind: str, states: Tensor) -> None:
        wanted = (self.batch.n_rows, self.batch.seq_len)
        if (states.shape[0], states.shape[2]) != wanted:
            raise CaptureError(
                f"layer {layer} shows its {kind} as {tuple(states.shape)}, wanted ({wanted[0]}, heads, {wanted[1]}, "
                "dim): one vector per token"
            )

    def _upload(self, device: torch.device) -> dict[tuple[int, str], Tensor]:
        """One index tensor for the whole batch, cut into views by (layer, draw)."""
        whole = np.concatenate([np.empty(0, np.int32), *self._flat])
        uploaded = self._plan.transfer.upload(whole, device)
        return dict(zip(self.picks, uploaded.split([len(part) for part in self._flat]), strict=True))


def twice(layer: int, kind: str) -> str:
    return f"layer {layer} shows its {kind} twice in one forward: only one tap may stand in its way"


class Wanted:
    """What stays the same for every batch of a run.

    `layer_of` numbers the attention modules, `kinds` lists the vectors that each layer is wanted for, `transfer` is
    the way to and from the device, `device` where the model's input goes; `attention` is what is wanted of what
    queries do with their keys, if anything, `moments` what is summed over all positions.
    """

    def __init__(
        self,
        selection: Selection,
        geometry: Mapping[int, LayerGeometry],
        layer_of: Mapping[torch.nn.Module, int],
        transfer: Transfer,
        device: torch.device,
        attention: AttentionPlan | None = None,
        moments: MomentsPlan | None = None,
    ) -> None:
        self.moments = moments
        self.layer_of = layer_of
        self.attention = attention
        self.transfer = transfer
        self.device = device
        self.kinds = {
            layer: tuple(kind for kind in selection.kinds_of(layer) if not KIND[kind].statistics)
            for layer in selection.layers
        }
        self.last_layer = max(selection.layers)
        self._selection = selection
        self._geometry = geometry
        self._heads: dict[tuple[int, str, torch.device], Tensor | None] = {}

    def heads(
        self,
        layer: int,
        kind: str,
        device: torch.device,
        among: Mapping[tuple[int, str], tuple[int, ...]] | None = None,
    ) -> Tensor | None:
        """The active heads as an index on `device`; None when all are active, which gathers whole rows.

        Args:
            among: those that are active; None for the selection's. Of one layer and kind they are the same in both.
        """
        key = (layer, kind, device)
        if key not in self._heads:
            active = (self._selection.heads if among is None else among)[layer, kind]
            every = len(active) == self._geometry[layer].heads[kind]
            self._heads[key] = None if every else self.transfer.upload(np.array(active, dtype=np.int32), device)
        return self._heads[key]

    def statistics(self, layer: int, columns: Float32[Tensor, "picks heads width"]) -> Float32[Tensor, "picks values"]:
        """Those of the active heads, side by side in memory of their own."""
        heads = self.heads(layer, ATTENTION, columns.device)
        rows = columns if heads is None else columns.index_select(1, heads)
        return rows.flatten(1).contiguous()


def draw(picker: Picker, selection: Selection, batch: TokenBatch) -> dict[tuple[int, str], Picks]:
    """The picks of a batch, by (layer, draw)."""
    return {(layer, side): picker.pick(batch, layer, side) for layer, side in selection.draws}


def open_tap(
    observe: Callable[[Seen], None], *, pre: bool, attended: Callable[[Attended], None] | None = None
) -> Tap | None:
    """Opens this thread's tap in calls that somebody else makes; what was open before is for `close_tap`."""
    return TAP.exchange(Tap(observe, pre, attended))


def close_tap(before: Tap | None) -> None:
    """Puts back what was open before."""
    TAP.exchange(before)
