"""What a run of engine=vllm cannot be asked for, known before anything is read or loaded. Needs no vLLM."""

from __future__ import annotations

from typing import Any

from sniffer.config.schema import Config
from sniffer.errors import ConfigError

WEIGHTS: dict[str, Any] = {
    "gguf_file": None,
    "config_overrides": {},
    "compile": False,
    "adapter": None,
    "quantization": None,
    "allow_missing": False,
    "device_map": None,
}
"""Of a checkpoint: what has to be as it is by default, for vLLM loads it in a way of its own."""


def check_vllm(config: Config) -> None:
    """Refuses by name what vLLM does not show, or would do otherwise.

    Raises:
        ConfigError: naming the key, and what serves instead.
    """
    capture, model, generate = config.capture, config.model, config.generate
    if capture.attention:
        _refuse("capture.attention", "whose kernels hand over no weights of attention")
    if capture.moments.layout:
        _refuse("capture.moments", "which shows tokens in pieces, and not whole texts")
    if generate is not None and generate.live not in (True, False):
        _refuse(f"generate.live={generate.live}", "which captures once: take true or false")
    for key in ("cache", "prefill_chunk_size") if generate is not None else ():
        if (value := getattr(generate, key)) is not None:
            _refuse(f"generate.{key}={value}", "which has a cache of its own, and takes prompts in by its own steps")
    if not callable(getattr(model, "place", None)):
        raise ConfigError("engine=vllm needs a checkpoint of ours, whose place it can ask for: choose engine=local")
    if getattr(model, "weights", "pretrained") != "pretrained":
        _refuse(f"model.weights={model.weights}", "which has other random numbers")  # type: ignore[attr-defined]
    for key, default in WEIGHTS.items():
        if (value := getattr(model, key, default)) != default:
            _refuse(f"model.{key}={value}", "which loads weights and their config in its own way")


def _refuse(what: str, why: str) -> None:
    raise ConfigError(f"{what} is not possible with vLLM, {why}; or choose engine=local")
