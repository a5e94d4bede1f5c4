"""Measures one peer inside its own environment, which has neither this project nor what it needs.

    python peer_loop.py PEER CHECKPOINT_FOLDER TOKEN_IDS.npy REPEATS

In turn, the plain forward of the same checkpoint by transformers, and the peer's forward with q and k of every
layer kept, after RoPE. Prints the seconds as JSON: a list of [wall, processor] for each.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

Forward = Callable[[torch.Tensor], object]


def transformer_lens(folder: str) -> Forward:
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)

    def capture(ids: torch.Tensor) -> object:
        _, cache = model.run_with_cache(ids, names_filter=lambda name: name.endswith(("hook_rot_q", "hook_rot_k")))
        return [cache[name] for name in cache]

    return capture


def nnsight(folder: str) -> Forward:
    import nnsight
    from nnsight import LanguageModel

    model = LanguageModel(folder, device_map="cpu", dtype=torch.float32, dispatch=True)

    def capture(ids: torch.Tensor) -> object:
        with model.trace(ids, use_cache=False):
            kept = nnsight.save([])
            for layer in model.model.layers:
                kept.append(layer.self_attn.source.apply_rotary_pos_emb_0.output)
        return [states for pair in kept for states in pair]

    return capture


PEERS = {"transformer-lens": transformer_lens, "nnsight": nnsight}


def plain(folder: str) -> Forward:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda ids: model(input_ids=ids, use_cache=False)


@torch.inference_mode()
def main(peer: str, folder: str, token_ids: str, repeats: str) -> int:
    ids = torch.from_numpy(np.load(token_ids).astype(np.int64))
    forwards = {"bare": plain(folder), "capture": PEERS[peer](folder)}
    forwards["bare"](ids)
    _check(forwards["capture"](ids), ids.shape[1])
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in forwards}
    for _ in range(int(repeats)):
        for name, forward in forwards.items():
            wall, cpu = time.perf_counter(), time.process_time()
            forward(ids)
            spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    print(json.dumps(spent))
    return 0


def _check(kept: object, n_tokens: int) -> None:
    """q and k of 30 layers, all heads of all tokens: what we capture too."""
    assert isinstance(kept, Sequence)
    values = sum(states.numel() for states in kept)
    wanted = 30 * (9 + 3) * 64 * n_tokens
    if values != wanted:
        raise SystemExit(f"the peer kept {values} values of {wanted}")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
