"""Tensor parallel: attention whose heads are split over processes shows each of them its share alone, numbered from 0.

    layers.3.self_attn of the whole model    q heads 0 1 2 3 4 5 6 7
    in the first of two processes            q heads 0 1 2 3
    in the second                            q heads 0 1 2 3        which are 4 5 6 7 of the model

Nothing in what a tap shows tells them apart, so the weights are asked. Weights that are split at rest and whole in a
forward (fully sharded data parallel), and experts that are split while attention is not, are no matter.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from sniffer.errors import UnsupportedModelError

WHOLE_IN_A_FORWARD = "FSDPModule"
"""The class that torch puts under a module whose weights it gathers for each forward."""


def check_whole(attention: Collection[nn.Module], backbone: nn.Module, names: Mapping[nn.Module, str]) -> None:
    """Refuses attention whose heads are split over processes.

    Raises:
        UnsupportedModelError: naming the first such module, and over how many.
    """
    gathered = any(WHOLE_IN_A_FORWARD in {cls.__name__ for cls in type(part).__mro__} for part in backbone.modules())
    for module in (part for part in names if part in attention):
        processes = max((_processes(part, gathered) for part in module.modules()), default=1)
        if processes > 1:
            raise UnsupportedModelError(
                f"{names[module]} ({type(module).__name__}) has its heads split over {processes} processes "
                "(tensor parallel), each of which would number its own from 0: load the model whole, or spread its "
                "layers over GPUs with device_map"
            )


def _processes(part: nn.Module, gathered: bool) -> int:
    """Over how many processes the weights of one module are split in a forward."""
    mesh: Any = getattr(part, "_hf_device_mesh", None)
    planned = mesh.size() if mesh is not None and getattr(part, "_hf_tp_plan", None) else 1
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is None:
        return planned
    split = [
        parameter.device_mesh.size(dim)
        for parameter in part.parameters(recurse=False)
        if isinstance(parameter, tensor.DTensor)
        for dim, placement in enumerate(parameter.placements)
        if placement.is_shard() and not (gathered and _is_of_data(parameter.device_mesh, dim))
    ]
    return max([planned, *split])


def _is_of_data(mesh: Any, dim: int) -> bool:
    """Whether a dimension of a mesh is one that weights are gathered over: any but that of tensor parallel."""
    return mesh.mesh_dim_names is None or mesh.mesh_dim_names[dim] != "tp"
