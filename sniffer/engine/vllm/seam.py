"""The seam, in each of vLLM's workers: `Attention.forward`, whose arguments are q, k and v after norms and RoPE.

vLLM mixes `Seam` into its worker class (worker_extension_cls) and calls it by name, on every rank of a model that is
spread over several. The layers of this one model are watched while a batch is run, and nothing else of vLLM is touched.
Which request and position each token is, comes from the runner's own batch, and is looked up once a step, in the first
layer.

Of a rank's heads those are kept that are wanted, numbered as in the whole model: with so many ranks, rank r has the
query heads from r * heads / ranks on, and likewise key heads; where there are fewer key heads than ranks, several ranks
have the same one, and the first of these keeps it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sniffer.engine.vllm.steps import Pair, Steps
from sniffer.errors import CaptureError, UnsupportedModelError
from sniffer.forward.generation.live import Places
from sniffer.types import KIND


@dataclass(frozen=True)
class Watched:
    """An attention layer of vLLM's model, as one rank has it."""

    layer: int
    name: str
    heads: int
    key_heads: int
    dim: int
    value_dim: int
    scaling: float
    window: int | None
    backend: str


class Seam:
    """What our side calls on a worker of vLLM; `self` is that worker."""

    model_runner: Any
    _sniffer_watched: dict[int, Watched]
    _sniffer_modules: dict[int, Any]
    _sniffer_steps: Steps | None
    _sniffer_kept: Mapping[Pair, Tensor | None]

    def sniffer_watch(self) -> tuple[list[Watched], str, str]:
        """The attention layers that can be watched, the device and the dtype.

        Raises:
            UnsupportedModelError: a layer attends otherwise than through Attention.forward.
        """
        from vllm.model_executor.layers.attention.attention import Attention
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
        from vllm.model_executor.models.utils import extract_layer_index

        self._sniffer_watched, self._sniffer_modules, self._sniffer_steps = {}, {}, None
        for name, module in self.model_runner.compilation_config.static_forward_context.items():
            if not isinstance(module, AttentionLayerBase):
                continue  # such as a layer of experts, which has a context of its own too
            if type(module) is not Attention:
                raise UnsupportedModelError(
                    f"{name} of vLLM's model is a {type(module).__name__}, which hands over no q and k that could be "
                    "captured: choose engine=local"
                )
            if module.kv_sharing_target_layer_name is not None:
                raise UnsupportedModelError(
                    f"{name} of vLLM's model attends with another layer's keys: choose engine=local"
                )
            layer = extract_layer_index(name)
            if layer in self._sniffer_watched:
                raise UnsupportedModelError(f"vLLM's model attends twice in layer {layer}: choose engine=local")
            window = getattr(module, "sliding_window", None)
            self._sniffer_watched[layer] = Watched(
                layer,
                name,
                module.num_heads,
                module.num_kv_heads,
                module.head_size,
                module.head_size_v,
                float(module.impl.scale),
                None if window is None else int(window),
                str(module.attn_backend.get_name()),
            )
            self._sniffer_modules[layer] = module
        dtype = str(self.model_runner.model_config.dtype).removeprefix("torch.")
        return sorted(self._sniffer_watched.values(), key=lambda one: one.layer), self.model_runner.device.type, dtype

    def sniffer_begin(
        self,
        requests: Mapping[str, int],
        places: Mapping[Pair, Places],
        heads: Mapping[Pair, Sequence[int]],
        totals: Mapping[int, tuple[int, int]],
    ) -> None:
        """A batch of documents is about to be run.

        Args:
            heads: those wanted of each (layer, kind), as the whole model numbers them.
            totals: query heads and key heads of each layer of the whole model.
        """
        self._sniffer_steps = Steps(requests, places)
        self._sniffer_kept = {pair: self._sniffer_own(pair, wanted, totals[pair[0]]) for pair, wanted in heads.items()}
        self._sniffer_context: Any = None
        self._sniffer_seconds = 0.0
        self._sniffer_rest()
        for layer, module in self._sniffer_modules.items():
            module.forward = partial(self._sniffer_forward, layer, module.forward)

    def sniffer_take(
        self, wanted: Mapping[Pair, Places], host: bool
    ) -> tuple[dict[Pair, Tensor], np.ndarray, float, int]:
        """The rows of a batch that is over, heads side by side; tokens computed of each document; seconds it took;
        tokens computed again.

        Args:
            host: whether they have to leave the device, as they do for another process.
        """
        assert self._sniffer_steps is not None
        started, steps = time.perf_counter(), self._sniffer_steps
        pairs = [pair for pair, heads in self._sniffer_kept.items() if heads is None or len(heads)]
        found = steps.taken(pairs, wanted)
        if host:
            found = {pair: rows.cpu() for pair, rows in found.items()}
        self._sniffer_rest()
        self._sniffer_steps = None
        return found, steps.reached, self._sniffer_seconds + time.perf_counter() - started, steps.again

    def _sniffer_rest(self) -> None:
        """The layers are as vLLM has them."""
        for module in self._sniffer_modules.values():
            vars(module).pop("forward", None)

    def _sniffer_own(self, pair: Pair, wanted: Sequence[int], totals: tuple[int, int]) -> Tensor | None:
        """Those of this rank's heads that are wanted and that no rank before it has; None for all of them."""
        from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

        layer, kind = pair
        watched = self._sniffer_watched[layer]
        side = KIND[kind].draw
        own, total = (watched.heads, totals[0]) if side == "q" else (watched.key_heads, totals[1])
        first, keeps = first_head(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size(), own, total)
        mine = [head - first for head in wanted if first <= head < first + own] if keeps else []
        if mine == list(range(own)):
            return None
        return torch.tensor(mine, dtype=torch.int64, device=self.model_runner.device)

    def _sniffer_forward(
        self, layer: int, forward: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **keywords: Any
    ) -> Any:
        if self._sniffer_steps is not None:
            started = time.perf_counter()
            self._sniffer_see(self._sniffer_steps, layer, {"q": query, "k": key, "v": value})
            self._sniffer_seconds += time.perf_counter() - started
        return forward(query, key, value, *arguments, **keywords)

    def _sniffer_see(self, steps: Steps, layer: int, shown: Mapping[str, Tensor]) -> None:
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        if context.attn_metadata is None:  # vLLM tries out how much memory it needs
            return
        if context is not self._sniffer_context:
            self._sniffer_context = context
            batch = self.model_runner.input_batch
            many = batch.num_reqs
            ends = self.model_runner.query_start_loc.np[: many + 1].astype(np.int64)
            steps.begin(
                list(batch.req_ids[:many]), batch.num_computed_tokens_cpu[:many].astype(np.int64), np.diff(ends)
            )
        for kind, states in shown.items():
            if (layer, kind) not in self._sniffer_kept or not steps.wants(layer, kind):
                continue
            if states is None:
                raise CaptureError(f"layer {layer} of vLLM's model attends without a {kind} of its own")
            heads, watched = self._sniffer_kept[layer, kind], self._sniffer_watched[layer]
            if heads is None or len(heads):
                own = watched.heads if KIND[kind].draw == "q" else watched.key_heads
                steps.keep(layer, kind, states, heads, own)


def first_head(rank: int, ranks: int, own: int, total: int) -> tuple[int, bool]:
    """The number in the whole model of a rank's first head, and whether it is the first rank to have it."""
    if own * ranks == total:
        return rank * own, True
    copies = ranks // total
    return rank // copies, rank % copies == 0
