"""The config group `model`: a checkpoint, asked cheap questions first and its weights last.

A YAML in conf/model/ is a `Checkpoint(...)` written down. `limits` and `tokenizer` read small files only,
so that mistakes show before gigabytes are read; `load` reads the weights and returns a backbone whose taps
have been proven (models/loaded.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Int
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from models import finder
from models.architecture import build_config, read_config
from models.embedded import WHEELS
from models.loaded import LoadedBackbone, find_backbone
from models.locate import EMBEDDED, locate, on_disk
from sniffer.errors import CheckpointError, ConfigError, SnifferError
from sniffer.types import ModelLimits, Tokenize

log = logging.getLogger(__name__)

WEIGHTS = ("pretrained", "random")
DTYPES = ("auto", "float32", "bfloat16", "float16")
STAND_IN = EMBEDDED + next(iter(WHEELS))
"""Whose tokenizer serves a random model that has none on this machine."""
WHOLE_FILE_BYTES = 1 << 30
"""Larger files are recorded by size and by the digest of their first MiB, which lists all tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be had.

    Attributes:
        checkpoint: a hub id, a local folder, or `embedded:<name>`.
        revision: branch, tag or commit on the hub, for model and tokenizer.
        weights: `pretrained`, or `random`: the architecture alone, drawn from `seed`, without network.
        dtype: of weights and captured vectors; `auto` is the checkpoint's own.
        device: `auto` takes cuda, then mps, then cpu.
        attn_implementation: sdpa, eager, flex_attention, flash_attention_2, ...
        config_overrides: keys of the model's config to replace, nested ones merged.
        trust_remote_code: run code that comes with the checkpoint (such a model is refused when tapped).
        model_type: the architecture to build when weights are random and no config is on this machine.
        seed: of random weights.
    """

    checkpoint: str
    revision: str | None = None
    weights: str = "pretrained"
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "sdpa"
    config_overrides: dict[str, Any] | None = None
    trust_remote_code: bool = False
    model_type: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _check_choice("model.weights", self.weights, WEIGHTS)
        _check_choice("model.dtype", self.dtype, DTYPES)
        if self.config_overrides is None:  # OmegaConf makes None of an empty mapping
            object.__setattr__(self, "config_overrides", {})
        if not self.checkpoint.strip():
            raise ConfigError("model.checkpoint is empty: give a hub id or a local folder")
        if self.device != "auto":
            try:
                torch.device(self.device)
            except RuntimeError as error:
                raise ConfigError(
                    f"model.device={self.device!r} is no device: use auto, cpu, cuda, cuda:1 or mps"
                ) from error

    def check(self) -> None:
        """Finds out within seconds whether the checkpoint can be had.

        Raises:
            CheckpointError: it cannot; gated, not found or no network, and what to do.
        """
        if self.weights == "pretrained":
            locate(self.checkpoint, self.revision)
        else:
            self._random_source()

    def limits(self) -> ModelLimits:
        """What the config tells of the text model, read without any weights."""
        text = self._config().get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        return ModelLimits(
            layers=_integer(getattr(text, "num_hidden_layers", None)),
            query_heads=_integer(heads),
            key_heads=_integer(getattr(text, "num_key_value_heads", None) or heads),
            max_positions=_integer(getattr(text, "max_position_embeddings", None)),
        )

    def tokenizer(self) -> tuple[Tokenize, int]:
        """A tokenize function and the id to pad with.

        Raises:
            CheckpointError: there is no tokenizer.
            ConfigError: with random weights, it has more tokens than the model.
        """
        source = self._tokenizer_source()
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=self._revision_of(source), trust_remote_code=self.trust_remote_code
            )
        except (ValueError, OSError, KeyError, ImportError) as error:
            raise CheckpointError(f"the tokenizer of {source} cannot be loaded: {_first_line(error)}") from error
        if self.weights == "random":
            self._check_vocabulary(len(tokenizer), source)

        def tokenize(text: str) -> Int[np.ndarray, " n_tokens"]:
            return np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64)

        pads = [tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
        return tokenize, next(int(pad) for pad in pads if pad is not None)

    def load(self) -> LoadedBackbone:
        """Reads or draws the weights, finds the backbone and proves its taps.

        Raises:
            CheckpointError: the weights cannot be loaded.
            UnsupportedModelError: the model cannot be tapped soundly.
        """
        finder.install()
        config = self._config()
        with _quiet_bars():
            model = self._drawn(config) if self.weights == "random" else self._read(config)
        backbone = find_backbone(model)
        del model  # and with it the language-model head
        torch.nn.Module.to(backbone, _device(self.device))
        return LoadedBackbone(backbone)

    def describe(self) -> dict[str, Any]:
        """What the manifest records: architecture, revision, digests of the files on this machine."""
        config = self._config()
        folder = on_disk(self.checkpoint, self.revision) if self.weights == "pretrained" else None
        return {
            "checkpoint": self.checkpoint,
            "revision": self.revision,
            "commit": getattr(config, "_commit_hash", None) or _snapshot_commit(folder),
            "weights": self.weights,
            "seed": self.seed if self.weights == "random" else None,
            "model_type": config.model_type,
            "architecture": type(config).__name__.removesuffix("Config"),
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "transformers": transformers.__version__,
            "files": _digests(folder) if folder is not None else {},
        }

    def _config(self) -> transformers.PretrainedConfig:
        source = self._random_source() if self.weights == "random" else locate(self.checkpoint, self.revision)
        if source is None:
            return build_config(str(self.model_type), {**self._room_for_tokens(), **(self.config_overrides or {})})
        return read_config(source, self._revision_of(source), self.config_overrides or {}, self.trust_remote_code)

    def _random_source(self) -> str | None:
        """A folder with the checkpoint's config, or None to build the config from `model_type`."""
        folder = on_disk(self.checkpoint, self.revision)
        if folder is None and self.model_type is None:
            raise ConfigError(
                f"model.weights=random: the config of {self.checkpoint} is not on this machine, so"
                " model.model_type (such as llama) is needed to know the architecture"
            )
        return str(folder) if folder is not None else None

    def _room_for_tokens(self) -> dict[str, Any]:
        """A vocabulary that holds the stand-in tokenizer's, for an architecture whose own size is unknown."""
        try:
            stand_in = on_disk(STAND_IN, None)
        except CheckpointError:
            return {}
        needed = json.loads((Path(str(stand_in)) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        default = build_config(str(self.model_type), {}).get_text_config()
        return {"vocab_size": needed} if getattr(default, "vocab_size", needed) < needed else {}

    def _tokenizer_source(self) -> str:
        if self.weights == "pretrained":
            return locate(self.checkpoint, self.revision)
        folder = on_disk(self.checkpoint, self.revision)
        if folder is not None and any(folder.glob("tokenizer*")):
            return str(folder)
        log.info("random weights: the tokenizer of %s is not here, using that of %s", self.checkpoint, STAND_IN)
        return str(on_disk(STAND_IN, None))

    def _check_vocabulary(self, n_tokens: int, source: str) -> None:
        available = getattr(self._config().get_text_config(), "vocab_size", None)
        if available is not None and available < n_tokens:
            raise ConfigError(
                f"the model's vocabulary of {available} is smaller than the {n_tokens} tokens of {source}:"
                f" set model.config_overrides.vocab_size={n_tokens}"
            )

    def _revision_of(self, source: str) -> str | None:
        return self.revision if source == self.checkpoint else None

    def _read(self, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
        source = locate(self.checkpoint, self.revision)
        try:
            return _auto_class(config).from_pretrained(
                source,
                config=config,
                revision=self._revision_of(source),
                dtype="auto" if self.dtype == "auto" else getattr(torch, self.dtype),
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
            )
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            raise self._unloadable(error) from error

    def _drawn(self, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
        """A model with weights drawn from the seed, on the CPU, so that every machine draws the same."""
        own = getattr(config.get_text_config(), "dtype", None) or torch.float32
        dtype = own if self.dtype == "auto" else getattr(torch, self.dtype)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                return _auto_class(config).from_config(
                    config, dtype=dtype, attn_implementation=self.attn_implementation
                )
        except (ValueError, ImportError, RuntimeError) as error:
            raise self._unloadable(error) from error

    def _unloadable(self, error: Exception) -> SnifferError:
        what = self.checkpoint if self.weights == "pretrained" else f"a random {self.checkpoint}"
        if "does not support an attention implementation" in str(error):
            return ConfigError(
                f"{what} has no attention of kind model.attn_implementation={self.attn_implementation}:"
                " set model.attn_implementation=eager"
            )
        return CheckpointError(f"{what} cannot be loaded: {_first_line(error)}")


def _auto_class(config: transformers.PretrainedConfig) -> Any:
    """The class a checkpoint of this kind was saved from, whose weight names therefore fit."""
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    return AutoModel


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Keeps transformers' own progress bars off the terminal while ours may be there."""
    logging_of_transformers = transformers.utils.logging
    shown = logging_of_transformers.is_progress_bar_enabled()
    logging_of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging_of_transformers.enable_progress_bar()


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a checkpoint; see WHOLE_FILE_BYTES."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return {path.name: _digest(path) for path in files}


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size <= WHOLE_FILE_BYTES:
            return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        head = hashlib.sha256(stream.read(1 << 20)).hexdigest()
    return f"{size} bytes, first MiB sha256:{head}"


def _snapshot_commit(folder: Path | None) -> str | None:
    """The commit in a hub cache path (.../snapshots/<commit>)."""
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(choices)}")


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
