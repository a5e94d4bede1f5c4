"""The observer of one batch: it knows the picks, and gathers them as each layer is seen."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sniffer.gather import gather
from sniffer.sampler import Picker
from sniffer.selection import Selection
from sniffer.tap import Seen, StopForward
from sniffer.transfer import Transfer
from sniffer.types import DRAW_OF_KIND, LayerGeometry, Picks, TokenBatch


class Observer:
    """Gathers what a selection wants from every attention layer of one forward pass.

    Before the forward it draws all picks and sends their indices to the device in one piece. It is then
    called with each layer's inputs; after the last wanted layer it ends the forward, unless `stops` is
    set to False. `seconds` is the time spent in those calls.
    """

    def __init__(
        self,
        batch: TokenBatch,
        picks: Mapping[tuple[int, str], Picks],
        plan: GatherPlan,
    ) -> None:
        self.batch = batch
        self.picks = picks
        self.vectors: dict[tuple[int, str], Tensor] = {}
        self.seconds = 0.0
        self.stops = True
        self._plan = plan
        self._indices = self._upload()

    def __call__(self, seen: Seen) -> None:
        started = time.perf_counter()
        layer = self._plan.layer_of.get(seen.module)
        if layer is not None:
            for kind, heads in self._plan.active.get(layer, ()):
                states = getattr(seen, kind)
                rows = gather(states, self._indices[layer, DRAW_OF_KIND[kind]], heads)
                self.vectors[layer, kind] = self._plan.transfer.download(rows)
        self.seconds += time.perf_counter() - started
        if self.stops and layer == self._plan.last_layer:
            raise StopForward

    def _upload(self) -> dict[tuple[int, str], Tensor]:
        """One index tensor for the whole batch, cut into views by (layer, draw)."""
        seq = self.batch.seq_len
        flat = [drawn.rows * np.int32(seq) + drawn.positions for drawn in self.picks.values()]
        uploaded = self._plan.transfer.upload(np.concatenate([np.empty(0, np.int32), *flat]))
        return dict(zip(self.picks, uploaded.split([len(part) for part in flat]), strict=True))


class GatherPlan:
    """What stays the same for every batch of a run: heads on their device, the last layer, the way back."""

    def __init__(
        self,
        selection: Selection,
        geometry: Mapping[int, LayerGeometry],
        layer_of: Mapping[torch.nn.Module, int],
        transfer: Transfer,
        device: torch.device,
    ) -> None:
        self.layer_of = layer_of
        self.transfer = transfer
        self.last_layer = max(selection.layers)
        self.active = {
            layer: [
                (kind, _heads_tensor(selection.heads[layer, kind], geometry[layer].heads[kind], device))
                for kind in selection.kinds_of(layer)
            ]
            for layer in selection.layers
        }


def _heads_tensor(active: tuple[int, ...], n_heads: int, device: torch.device) -> Tensor | None:
    """None when every head is active, which gathers whole rows."""
    return None if len(active) == n_heads else torch.tensor(active, dtype=torch.int32, device=device)


def draw(picker: Picker, selection: Selection, batch: TokenBatch) -> dict[tuple[int, str], Picks]:
    """The picks of a batch, by (layer, draw)."""
    return {(layer, side): picker.pick(batch, layer, side) for layer, side in selection.draws}
