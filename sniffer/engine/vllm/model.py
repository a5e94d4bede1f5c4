"""vLLM in this process: texts go in as requests, and the vectors of their picked positions come out.

vLLM schedules: several texts share a step, long ones come in pieces, and with too little room for keys one is put
back and computed again. What is kept does not depend on it. Where the model is spread over several processes, each
gathers the heads that it has (seam.py), and they are put side by side here.

What is set, and why: no cached prefixes (their tokens would not be computed), no speculative decoding and no
asynchronous scheduling (tokens would be computed that are taken back), and enforce_eager, for Python does not run
inside compiled and captured graphs.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from sniffer.config.schema import EngineConfig
from sniffer.engine.facts import Facts
from sniffer.engine.vllm.before import after_rope, before_rope, known_before
from sniffer.engine.vllm.draws import DRAWS, Draws
from sniffer.engine.vllm.seam import Watched
from sniffer.engine.vllm.steps import Pair
from sniffer.errors import CaptureError, UnsupportedModelError, first_line
from sniffer.forward.generation.live import Places
from sniffer.process.memory import let_go
from sniffer.types import KIND, Checkpoint, LayerGeometry, LengthClasses, by_number, draw_of

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler runs here, step by step
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # one more than the longest text, for a token that is never run
    "VLLM_NO_USAGE_STATS": "1",  # it would report its use to its makers
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # whose batches are laid out otherwise
}
LEAST_CACHE = 1 << 30
"""Bytes of keys and values on a processor, where vLLM would take most of the memory that there is."""

Goes = Callable[[int, int], bool]
"""Given a text's number and a token that comes after it: whether it goes on."""


class VllmModel:
    """What `Worker` takes for its backbone (`sniffer.types.ModelFacts`), and what runs texts.

    Attributes:
        seconds: that the seam took of the texts run last, in the slowest process.
        again: tokens that vLLM has computed more than once, so far.
    """

    lengths = LengthClasses()
    layer_of: Mapping[torch.nn.Module, int] = {}

    def __init__(
        self,
        checkpoint: Checkpoint,
        engine: EngineConfig,
        facts: Facts,
        longest: int | None,
        *,
        draws: bool = False,
    ) -> None:
        """Loads it, and watches its layers.

        Args:
            facts: of the same model in transformers.
            longest: tokens of the longest text, what is written included; None where that is not known.
            draws: whether tokens are to be drawn (`run`).

        Raises:
            UnsupportedModelError: its layers are others, or cannot be watched.
            CaptureError: vLLM cannot load it, and what it says.
        """
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        logging.getLogger("vllm").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of vLLM's own imports
            from vllm import EngineArgs, LLMEngine

        self.dtype, self.vocabulary, self.rope = facts.dtype, facts.vocabulary, facts.rope
        self.geometry, self.pre_missing = known_before(facts.geometry, facts.rope, facts.pre_missing)
        self._pairs: tuple[Pair, ...] = ()
        self._config, self._described = facts.model_config, facts.backbone
        self.ranks = engine.tensor_parallel or 1
        self.seconds, self.again, self._numbers = 0.0, 0, 0
        if self.ranks > 1 and facts.device.type == "cpu":
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else each wants a memory node of its own
        wanted = _arguments(checkpoint, engine, facts, longest)
        if draws:
            wanted["logits_processors"] = ["sniffer.engine.vllm.drawing:Drawing"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**wanted))
        except Exception as error:  # of vLLM: any
            raise CaptureError(f"vLLM cannot load {wanted['model']}: {first_line(error)}") from error
        try:
            found = self._engine.collective_rpc("sniffer_watch")
            (self.watched, device, dtype) = found[0]
            self.device = torch.device(device)
            if dtype != str(self.dtype).removeprefix("torch."):
                raise UnsupportedModelError(f"vLLM runs the model in {dtype}, transformers in {self.dtype}")
            _check_layers(self.geometry, self.watched, self.ranks)
        except BaseException:
            self.close()
            raise

    def describe(self) -> dict[str, Any]:
        """What the manifest records: as of the model in transformers, but for what attends."""
        import vllm

        backends = ", ".join(dict.fromkeys(one.backend for one in self.watched))
        told = {name: value for name, value in self._described.items() if name != "sdpa_kernels"}
        return {**told, "attn_implementation": f"vllm {vllm.__version__} {backends}"}

    def model_config(self) -> Mapping[str, Any]:
        return self._config

    def run(
        self,
        texts: Sequence[Int32[np.ndarray, " tokens"]],
        heads: Mapping[Pair, Sequence[int]],
        places: Mapping[Pair, Places],
        new_tokens: int = 0,
        goes_on: Goes = lambda text, token: True,
        only: int | None = None,
        draws: Sequence[Draws] = (),
    ) -> None:
        """Texts as token ids through the model, together, to be followed by `take`.

        Args:
            heads: of each (layer, kind) that is to be kept; with none, nothing is watched, and there is none to take.
            places: by (layer, draw), what may be kept of it.
            new_tokens: that go through the model after each text, at most; the one after that is left.
            goes_on: whether a text does, asked with each token that comes after it, in order.
            only: a token that is taken in place of the likeliest.
            draws: of each text, how its tokens are drawn; none where the likeliest are taken.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        allowed = None if only is None else [only]
        sampling: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
        params = SamplingParams(
            max_tokens=new_tokens + 1, output_kind=RequestOutputKind.DELTA, allowed_token_ids=allowed, **sampling
        )
        names, requests = {}, {}
        for number, text in enumerate(texts):
            name = str(self._numbers)
            self._numbers += 1
            names[name] = number
            asked = params.clone()
            if draws:
                asked.extra_args = {DRAWS: draws[number]}
            known = self._engine.add_request(name, {"prompt_token_ids": text.tolist()}, asked)
            requests[known or name] = number
        if heads:
            self._pairs = tuple(heads)
            self._begin(requests, after_rope(heads), places)
        try:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    number = names[output.request_id]
                    for token in output.outputs[0].token_ids:
                        if not goes_on(number, int(token)):
                            self._engine.abort_request([output.request_id])
                            break
        except BaseException:
            self._engine.abort_request(list(names))
            raise

    def _begin(
        self, requests: Mapping[str, int], heads: Mapping[Pair, Sequence[int]], places: Mapping[Pair, Places]
    ) -> None:
        totals = {layer.layer: (layer.heads["q"], layer.heads["k"]) for layer in self.geometry}
        self._engine.collective_rpc("sniffer_begin", args=(requests, dict(places), dict(heads), totals))

    def take(self, wanted: Mapping[Pair, Places], lengths: Sequence[int]) -> dict[Pair, Tensor]:
        """The rows at these places of each (layer, kind) of the last run, heads side by side.

        Those of q_pre and k_pre are q and k turned back (before.py).

        Args:
            lengths: tokens that must have been computed of each text.

        Raises:
            CaptureError: some were not.
        """
        answers = self._engine.collective_rpc("sniffer_take", args=(dict(wanted), self.ranks > 1))
        self.seconds = max(seconds for _, _, seconds, _ in answers)
        self.again += answers[0][3]
        for _, reached, _, _ in answers:
            if (short := reached < np.asarray(lengths)).any():
                text = int(np.argmax(short))
                raise CaptureError(
                    f"vLLM has computed {reached[text]} of {lengths[text]} tokens of a text: please report this"
                )
        pairs = dict.fromkeys(pair for rows, *_ in answers for pair in rows)
        found = {pair: _beside([rows[pair] for rows, *_ in answers if pair in rows]) for pair in pairs}
        layers = by_number(self.geometry)
        for layer, kind in self._pairs:
            if KIND[kind].pre:
                side = draw_of((layer, kind))
                states = found[side], wanted[side], layers[layer].dims[kind], self.rope[layer]
                found[layer, kind] = before_rope(*states)
        return {pair: found[pair] for pair in self._pairs}

    def close(self) -> None:
        """Lets go of vLLM, its processes and its memory."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        engine, self._engine = self._engine, None
        if engine is not None:
            engine.engine_core.shutdown()
            del engine
            cleanup_dist_env_and_memory()
            let_go()


def _beside(ranks: Sequence[Tensor]) -> Tensor:
    return ranks[0] if len(ranks) == 1 else torch.cat(list(ranks), dim=1)


def _arguments(checkpoint: Any, engine: EngineConfig, facts: Facts, longest: int | None) -> dict[str, Any]:
    cache, most = engine.kv_cache, None if longest is None else longest + 1
    if cache is None and facts.device.type == "cpu":
        row = sum(layer.heads[kind] * layer.dims[kind] for layer in facts.geometry for kind in ("k", "v"))
        cache = max(LEAST_CACHE, 2 * row * facts.dtype.itemsize * (most or 0))
    found = {
        "model": checkpoint.place(),
        "revision": checkpoint.revision,
        "tokenizer_revision": None,
        "trust_remote_code": checkpoint.trust_remote_code,
        "dtype": str(facts.dtype).removeprefix("torch."),
        "max_model_len": most,
        "tensor_parallel_size": engine.tensor_parallel or 1,
        "distributed_executor_backend": "mp" if (engine.tensor_parallel or 1) > 1 else "uni",
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "kv_cache_memory_bytes": cache,
        "worker_extension_cls": "sniffer.engine.vllm.seam.Seam",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "async_scheduling": False,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    return {name: value for name, value in found.items() if value is not None}


def _check_layers(geometry: Sequence[LayerGeometry], watched: Sequence[Watched], ranks: int) -> None:
    """Raises UnsupportedModelError where layers are not those of the model in transformers."""
    wanted, found = by_number(geometry), {one.layer: one for one in watched}
    if wanted.keys() != found.keys():
        raise UnsupportedModelError(
            f"vLLM's model attends in layers {sorted(found)}, that of transformers in {sorted(wanted)}: choose "
            "engine=local"
        )
    for number, layer in wanted.items():
        one = found[number]
        # With fewer key heads than ranks, each rank has one, which others have too.
        ours = layer.heads["q"], max(layer.heads["k"], ranks), layer.dims["q"], layer.dims["v"]
        theirs = one.heads * ranks, one.key_heads * ranks, one.dim, one.value_dim
        if theirs != ours:
            raise UnsupportedModelError(
                f"layer {number} has query heads, key heads and dimensions {theirs} in vLLM, and {ours} in "
                "transformers: choose engine=local"
            )
        if one.window != layer.sliding_window:
            raise UnsupportedModelError(
                f"layer {number} looks back over {one.window or 'all'} positions in vLLM, and over "
                f"{layer.sliding_window or 'all'} in transformers: choose engine=local"
            )
