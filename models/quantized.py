"""A checkpoint's weights are quantised as they are loaded, by bitsandbytes or torchao through transformers.

Only linear layers are: embeddings, norms and experts in one tensor stay as they are, so what was done is counted.
Vectors remain activations, of the type that the model computes in. A method says which type and device it needs, and
what does not fit is refused before any weight is read. Needs neither torch nor transformers until then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from sniffer.errors import CheckpointError, ConfigError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from .backbone import Checkpoint

log = logging.getLogger(__name__)

NEAR = 0.4
"""As difflib counts: 1 for the same name, 0 for nothing in common."""

KEY = "quantization_config"
"""Of a config: how its checkpoint is quantised."""

BLOCK, GROUP, PADDED = 64, 128, 1024
"""Weights that share a scale: of a row in bitsandbytes' 4 bits, in torchao's; and what torchao pads rows to."""

SCALE = 4
"""Bytes of a scale, but for those of torchao's 4 bits, which have the type of the model."""

TENSOR_CORES = (8, 0)
"""The CUDA capability that torchao's 4 bits need."""


@dataclass(frozen=True)
class Method:
    """How linear layers are quantised.

    Attributes:
        package: which does it.
        options: what it is told, as the manifest records it.
        dtype: the one that it computes in; None for any.
        cuda: whether it needs a GPU of NVIDIA; else the package, or the probe at start-up, says where it runs.
    """

    package: str
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    cuda: bool = False


METHODS = {
    "bnb_4bit": Method("bitsandbytes", {"type": "nf4", "double": False, "block": BLOCK}),
    "bnb_8bit": Method("bitsandbytes", {"threshold": 6.0}, dtype="float16"),
    "torchao_int8": Method("torchao", {"weights_only": True, "scales": "row"}),
    "torchao_int4": Method("torchao", {"weights_only": True, "group": GROUP}, dtype="bfloat16", cuda=True),
}


def check_request(asked: Checkpoint) -> None:
    """Raises ConfigError where a checkpoint cannot be quantised as asked, as far as its keys tell."""
    name = asked.quantization
    if name is None:
        return
    said = f"model.quantization={name}"
    if not isinstance(name, str) or name not in METHODS:
        near = get_close_matches(str(name), METHODS, 1, NEAR)
        meant = f", did you mean {near[0]}?" if near else ":"
        raise ConfigError(f"{said} is no method{meant} there are {', '.join(METHODS)}, and null")
    if asked.weights == "random":
        raise ConfigError(f"{said} is for the weights of a checkpoint: with model.weights=random drop it")
    if asked.gguf_file is not None:
        raise ConfigError(f"{said}: {asked.gguf_file} is quantised already, and dequantised as it is read: drop it")
    if asked.merge_adapter:
        raise ConfigError(f"{said} would round a merged adapter with the weights: set model.merge_adapter=false")
    if asked.allow_missing:
        raise ConfigError(f"{said} and model.allow_missing: weights that are drawn are not quantised; drop one")
    if _has_key(asked.config_overrides):
        raise ConfigError(f"{said} and {KEY} in model.config_overrides say the same thing twice: drop the override")
    if METHODS[name].cuda and asked.device.partition(":")[0] not in ("auto", "cuda"):
        raise ConfigError(f"{said} runs on CUDA only, and model.device={asked.device}: take torchao_int8")
    missing = [package for package in (METHODS[name].package, "accelerate") if find_spec(package) is None]
    if missing:
        raise ConfigError(f"{said} needs {' and '.join(missing)}: pip install 'qk-sniffer[quantization]'")


def check_config(config: PretrainedConfig, name: str, dtype: str, source: str, *, adapted: bool) -> None:
    """Refuses to quantise a checkpoint again, one that holds an adapter (`adapted`), or in a type that does not suit.

    Raises:
        ConfigError: it is, and what to do.
    """
    from .architecture import type_of

    said = f"model.quantization={name}"
    if _has_key(config.to_dict()):
        raise ConfigError(f"{said}: {source} is quantised already, and is loaded as it is: drop it")
    if adapted:
        # With torchao such vectors were not those of the rounded weights and the adapter (transformers 5.24).
        raise ConfigError(f"{said}: {source} has an adapter in it: move its files to a folder, as model.adapter=FOLDER")
    needed, found = METHODS[name].dtype, str(type_of(config, dtype)).removeprefix("torch.")
    if needed is not None and needed != found:
        raise ConfigError(f"{said} computes in {needed}, and the model is in {found}: set model.dtype={needed}")


def options_of(name: str, device: torch.device, dtype: torch.dtype, *, mapped: bool) -> dict[str, Any]:
    """What from_pretrained is given. Weights are quantised where they are to lie, which it is told as a device map.

    Args:
        device: where the model goes; where it is `mapped` to several, one of them.

    Raises:
        ConfigError: the installed package does not run there.
    """
    try:
        _check_device(name, device)
        options = {KEY: _config(name, dtype)}
    except ConfigError:
        raise
    except Exception as error:  # of packages that cannot be imported, or are too old: any
        package = METHODS[name].package
        raise ConfigError(f"model.quantization={name}: {package} cannot be used ({first_line(error)})") from error
    return options if mapped else {**options, "device_map": {"": str(device)}}


def describe(name: str) -> dict[str, Any]:
    """What the manifest records."""
    method = METHODS[name]
    return {"method": name, "options": dict(method.options), method.package: metadata.version(method.package)}


def counted(backbone: nn.Module, name: str, title: str) -> dict[str, int]:
    """How many linear layers of a backbone are quantised, of how many.

    Raises:
        CheckpointError: none is.
    """
    from torch import nn

    layers = {path: part for path, part in backbone.named_modules() if isinstance(part, _linear())}
    plain = [path for path, part in layers.items() if type(part.weight) is nn.Parameter]
    if len(plain) == len(layers):
        raise CheckpointError(
            f"{title} has no linear layer that model.quantization={name} quantises"
            f"{f' ({len(plain)} are not, such as {plain[0]})' if plain else ''}: take another method, or null"
        )
    if plain:
        log.warning("%d of %d linear layers are not quantised, such as %s", len(plain), len(layers), plain[0])
    return {"linear": len(layers) - len(plain), "of": len(layers)}


def unpack(model: PreTrainedModel) -> None:
    """Does at once what compressed-tensors puts off until a whole model's first forward; only a part may run."""
    if hasattr(model, "ct_decompress_hook"):
        quantizer: Any = model.hf_quantizer
        quantizer.compressor.decompress_model(model)


def weight_bytes(backbone: nn.Module, name: str, itemsize: int) -> int:
    """Bytes of a backbone that is still to be quantised, its scales among them; other weights take `itemsize` each."""
    rest = sum(parameter.numel() for parameter in backbone.parameters())
    total = 0
    for rows, columns in _shapes(backbone, name):
        rest -= rows * columns
        total += _bytes(name, rows, columns, itemsize)
    return total + rest * itemsize


def _bytes(name: str, rows: int, columns: int, itemsize: int) -> int:
    if name == "bnb_4bit":
        return -(-rows * columns // 2) + -(-rows * columns // BLOCK) * SCALE
    if name == "torchao_int4":
        padded = -(-columns // PADDED) * PADDED
        return rows * padded // 2 + rows * padded // GROUP * 2 * itemsize
    return rows * columns + rows * SCALE


def _shapes(backbone: nn.Module, name: str) -> Iterator[tuple[int, int]]:
    """Rows and columns of the weights that will be quantised."""
    kept = getattr(backbone, "_keep_in_fp32_modules", None) or ()
    for path, part in backbone.named_modules():
        if not isinstance(part, _linear(name)) or any(one in path.split(".") for one in kept):
            continue
        rows, columns = part.weight.shape
        if name != "torchao_int4" or columns % GROUP == 0:
            yield rows, columns


def _linear(name: str | None = None) -> tuple[type[Any], ...]:
    """Of what bitsandbytes quantises, torchao leaves one class alone."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return (nn.Linear,) if name is not None and METHODS[name].package == "torchao" else (nn.Linear, Conv1D)


def _check_device(name: str, device: torch.device) -> None:
    import torch

    if METHODS[name].cuda:
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < TENSOR_CORES:
            raise ConfigError(
                f"model.quantization={name} needs an NVIDIA GPU of capability 8.0, and the model goes to {device}: "
                "take torchao_int8"
            )
    elif METHODS[name].package == "bitsandbytes":
        import bitsandbytes

        # Early versions were for CUDA alone, and have no such list.
        known = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
        if device.type not in known:
            raise ConfigError(
                f"model.quantization={name}: bitsandbytes {metadata.version('bitsandbytes')} runs on "
                f"{', '.join(sorted(known))}, and the model goes to {device}: choose another model.device or method"
            )


def _config(name: str, dtype: torch.dtype) -> Any:
    import transformers

    options = METHODS[name].options
    if name == "bnb_4bit":
        more = {"bnb_4bit_quant_type": options["type"], "bnb_4bit_use_double_quant": options["double"]}
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **more)
    if name == "bnb_8bit":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=options["threshold"])
    # The settings of torch's compiler are the user's.
    from torchao import quantization

    if name == "torchao_int8":
        return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    packing = {"int4_packing_format": "tile_packed_to_4d", "group_size": options["group"]}
    return transformers.TorchAoConfig(quantization.Int4WeightOnlyConfig(set_inductor_config=False, **packing))


def _has_key(values: Any) -> bool:
    if not isinstance(values, Mapping):
        return False
    return values.get(KEY) is not None or any(_has_key(inner) for inner in values.values())
