"""Run by torchrun in two processes (test_sharded.py): prints what becomes of a model that is split in some ways.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.models.sharded WAY ...
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from sniffer.models.retrofit import attached
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoConfig, AutoModelForCausalLM

from sniffer.errors import UnsupportedModelError
from sniffer.tap import Seen, tap

IDS = torch.arange(12).view(2, 6)


def model() -> torch.nn.Module:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **small, num_key_value_heads=2, head_dim=8, vocab_size=64)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def split(way: str) -> torch.nn.Module:
    whole = model()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp" if way == "gathered" else "tp",))
    if way == "gathered":
        for layer in whole.model.layers:
            fully_shard(layer, mesh=mesh)
        return whole
    part, plan = {
        "heads": ("self_attn", {f"{name}_proj": ColwiseParallel() for name in "qkv"} | {"o_proj": RowwiseParallel()}),
        "feed-forward": (
            "mlp",
            {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()},
        ),
    }[way]
    for layer in whole.model.layers:
        parallelize_module(getattr(layer, part), mesh, plan)
    return whole


def shown(one: torch.nn.Module) -> list[Seen]:
    seen: list[Seen] = []
    with attached(one) as backbone, torch.inference_mode(), tap(seen.append):
        one(input_ids=IDS)
        assert len(backbone.geometry) == 2
    return seen


def what_becomes_of(way: str) -> str:
    try:
        pairs = zip(shown(split(way)), shown(model()), strict=True)
        close = all(torch.allclose(a.q, b.q, atol=1e-5) and a.q.shape == b.q.shape for a, b in pairs)
        return "whole" if close else "other vectors"
    except UnsupportedModelError as error:
        return f"refused: {error}"


def main(ways: list[str]) -> None:
    dist.init_process_group("gloo")
    for way in ways:
        sys.stdout.write(f"rank {dist.get_rank()}, {way}: {what_becomes_of(way)}\n")  # in one piece, beside the other's
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
