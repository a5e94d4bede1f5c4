"""Weights into memory: read from a checkpoint, or drawn from a seed; then the backbone, proven."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from sniffer.errors import CheckpointError, ConfigError, SnifferError, of_a_device
from sniffer.types import Caching

from . import kernels, quantized
from .adapted import put_on
from .architecture import auto_class, type_of
from .devices import check_device_map, device_of
from .language_model import LoadedLanguageModel
from .layers import find_backbone
from .loaded import LoadedBackbone
from .retrofit import retrofit
from .tensors import Fit, adapters_aside, check_adapter, check_tensors
from .trouble import told

log = logging.getLogger(__name__)

NO_SUCH_ATTENTION = "does not support an attention implementation"


@dataclass(frozen=True)
class How:
    """How a model is brought in: the keys of the config group `model` that say so, and `options` to read with.

    `missing_seed`: draws the tensors that a checkpoint lacks; None refuses it. `headed`: the head is kept, and
    this cache is what it generates with.
    """

    dtype: str = "auto"
    device: str = "auto"
    device_map: Any = None
    attn_implementation: str = "auto"
    sdpa_kernels: Sequence[str] | None = None
    trust_remote_code: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    missing_seed: int | None = None
    adapter: Path | None = None
    merge_adapter: bool = False
    quantization: str | None = None
    headed: Caching | None = None


def read(
    source: str, config: PretrainedConfig, how: How, title: str, plain: Callable[[], PretrainedConfig] | None = None
) -> LoadedBackbone:
    """The backbone of a checkpoint at `source`, a folder or hub id.

    Args:
        plain: the checkpoint's config without overrides, where there are some.

    Raises:
        CheckpointError: the weights cannot be loaded, or are not those of the model.
        ConfigError: the family lacks this attention implementation, or accelerate is missing.
        UnsupportedModelError: the model cannot be tapped soundly.
    """
    options = {**how.options, "trust_remote_code": how.trust_remote_code}
    if how.device_map is not None:
        check_device_map()
        options["device_map"] = how.device_map
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if (method := how.quantization) is not None:
        device, mapped = device_of(how.device), how.device_map is not None
        how = replace(how, device=str(device))
        options |= quantized.options_of(method, device, type_of(config, how.dtype), mapped=mapped)

    # Tensors of another shape are named by us.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    info_of: dict[str, Any] = {}

    def load(attention: str, **more: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        dtype = "auto" if how.dtype == "auto" else getattr(torch, how.dtype)
        chosen = {"config": config, "dtype": dtype, "attn_implementation": attention, **options, **more}
        with _report_withheld(title), seeded(how.missing_seed):
            loaded: tuple[PreTrainedModel, dict[str, Any]] = auto_class(config).from_pretrained(source, **chosen)
        return loaded

    def attempt(attention: str) -> PreTrainedModel:
        model, info = load(attention)
        if getattr(model, "_hf_peft_config_loaded", False):
            # What was told is of the adapter; the tensors that it is put on are looked through without reading them.
            check_adapter(Fit.told(info), title)
            with adapters_aside():
                _, info = load(attention, device_map="meta")
        info_of.update(info)
        return model

    drawn: list[str] = []
    counts: dict[str, int] = {}

    def check(model: PreTrainedModel, backbone: PreTrainedModel) -> None:
        may = {"may_lack": how.missing_seed is not None, "quantized_here": how.quantization is not None}
        drawn.extend(check_tensors(model, backbone, Fit.told(info_of), title, plain, **may))
        if how.quantization is not None:
            counts.update(quantized.counted(backbone, how.quantization, title))
        if how.adapter is not None:
            put_on(model, how.adapter, merge=how.merge_adapter)

    loaded = _backbone(attempt, how, title, check)
    loaded.drawn, loaded.quantized = tuple(drawn), counts
    return loaded


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Has transformers draw what it initialises from this seed."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def draw(config: PretrainedConfig, seed: int, how: How, title: str) -> LoadedBackbone:
    """The backbone of a model with random weights, drawn on the CPU so that every machine draws the same.

    Raises:
        As `read`.
    """
    if how.device_map is not None:
        raise ConfigError("model.device_map spreads a checkpoint's weights: with model.weights=random use model.device")
    dtype = type_of(config, how.dtype)

    def attempt(attention: str) -> PreTrainedModel:
        with seeded(seed):
            return auto_class(config).from_config(config, dtype=dtype, attn_implementation=attention)

    return _backbone(attempt, how, title)


def _backbone(
    attempt: Callable[[str], PreTrainedModel],
    how: How,
    title: str,
    check: Callable[[PreTrainedModel, PreTrainedModel], None] = lambda model, backbone: None,
) -> LoadedBackbone:
    device = device_of(how.device) if how.device_map is None else None
    with quiet_bars(), told("while the model was loaded"):
        model = with_attention(attempt, how.attn_implementation, title)
        quantized.unpack(model)
    # The checkpoint's own code, and families imported before the hook.
    undo = retrofit(model)
    try:
        backbone, config = find_backbone(model), model.config
        check(model, backbone)
        whole = model if how.headed is not None else None
        del model  # and, where nobody wants it, with it the language-model head
        if device is not None:
            with told(f"while the model was moved to {device}"):
                torch.nn.Module.to(whole or backbone, device)
        with told("in a short probe of the model"):
            loaded = LoadedBackbone(backbone, kernels.DEFAULT if how.sdpa_kernels is None else how.sdpa_kernels)
            if whole is not None and how.headed is not None:
                loaded.language_model = LoadedLanguageModel(whole, loaded, how.headed)
        loaded.config = config
    except BaseException:
        undo()
        raise
    # That code stays tapped for as long as somebody has the backbone.
    weakref.finalize(backbone, undo).atexit = False
    return loaded


def with_attention(attempt: Callable[[str], PreTrainedModel], wanted: str, title: str) -> PreTrainedModel:
    """Tries the attention implementation asked for; `auto` is sdpa, or else eager."""
    try:
        return attempt("sdpa" if wanted == "auto" else wanted)
    except SnifferError:
        raise
    except Exception as error:  # of upstream code: any
        if of_a_device(error):
            raise
        if wanted == "auto" and NO_SUCH_ATTENTION in str(error):
            log.info("%s has no sdpa attention: using eager, which needs more memory", title)
            return with_attention(attempt, "eager", title)
        raise _unloadable(error, wanted, title) from error


def _unloadable(error: Exception, attention: str, title: str) -> SnifferError:
    if (ours := _ours(error)) is not None:
        return ours
    if NO_SUCH_ATTENTION in str(error):
        return ConfigError(
            f"{title} has no attention of kind model.attn_implementation={attention}:"
            " set model.attn_implementation=auto"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A line that ends so says what to do in the next one: "... You can install it with pip:" and how.
    reason = " ".join(lines[: 1 + lines[0].endswith(":")]) if lines else type(error).__name__
    # Messages of these are sentences; those of others, such as a KeyError's, are often a word.
    plain = isinstance(error, (ValueError, OSError, EOFError, ImportError, RuntimeError))
    return CheckpointError(f"{title} cannot be loaded: {reason if plain else f'{type(error).__name__}: {reason}'}")


REPORT = "LOAD REPORT"
"""In the table that transformers logs of tensors that do not fit."""

NOT_CONVERTED = re.compile(r"^(\S+)\s*\|[^|]*CONVERSION", re.MULTILINE)
"""A row of that table: a tensor that could not be made of those in the checkpoint."""


@contextmanager
def _report_withheld(title: str) -> Iterator[None]:
    """Keeps transformers' table of tensors off the console: what matters of it is told in one line.

    Raises:
        CheckpointError: tensors, such as a layer's experts, could not be put together.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    tables: list[str] = []

    def withhold(record: logging.LogRecord) -> bool:
        if REPORT in (text := record.getMessage()):
            tables.append(text)
        return REPORT not in text

    logger.addFilter(withhold)
    try:
        yield
    except RuntimeError as error:
        names = [name for table in tables for name in NOT_CONVERTED.findall(table)]
        if names:
            raise CheckpointError(
                f"{title} has not all the tensors that {', '.join(names[:3])} are made of, or not in their shapes:"
                " its config.json is not that of its weights, or they are incomplete"
            ) from error
        raise
    finally:
        logger.removeFilter(withhold)


def _ours(error: BaseException | None) -> SnifferError | None:
    """What we raised ourselves while transformers imported a family, which it wraps in an error of its own."""
    while error is not None and not isinstance(error, SnifferError):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Keeps transformers' own progress bars off the terminal, where ours may be."""
    logging_of_transformers = transformers.utils.logging
    shown = logging_of_transformers.is_progress_bar_enabled()
    logging_of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging_of_transformers.enable_progress_bar()
