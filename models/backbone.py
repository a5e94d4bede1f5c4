"""The config group `model`: a checkpoint, asked cheap questions first and its weights last.

A YAML in conf/model/ is a `Checkpoint(...)` written down. `check` says within seconds whether it can be had;
`limits` and `tokenizer` read small files only, so that mistakes show before gigabytes are read; `load` reads
the weights (models/weights.py) and returns a backbone whose taps have been proven (models/loaded.py).

Torch and transformers take seconds to import, so the methods that need them import them: a wrong name is
answered before.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sniffer.errors import ConfigError, UnsupportedModelError
from sniffer.types import Caching, ModelLimits, Outline, Tokenize, WorkingMemory

from . import adapter, locate, quantized, stand_in
from .choices import DTYPES, WEIGHTS, check_choice, check_device, check_random, kernels_of
from .fingerprint import digests, snapshot_commit, unchanged
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from .loaded import LoadedBackbone

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be had.

    Attributes:
        checkpoint: a hub id, a local folder, a local .gguf file, or `embedded:<name>`.
        revision: branch, tag or commit on the hub, for the model and its own tokenizer.
        gguf_file: which GGUF file of a hub repository or folder to read instead of its safetensors.
        weights: `pretrained`, or `random`: the architecture alone, drawn from `seed`, without network.
        dtype: of weights and captured vectors; `auto` is the checkpoint's own.
        device: `auto` takes cuda, then mps, then cpu.
        device_map: spreads layers over several devices, in place of `device`: auto, balanced, sequential,
            or a mapping from module to device, as the accelerate package understands them.
        attn_implementation: `auto` takes sdpa, or eager for families without it; else sdpa, eager,
            flex_attention, flash_attention_2, ...
        sdpa_kernels: those that sdpa may use, of flash, efficient, math and cudnn; None for all but cudnn.
        config_overrides: keys of the model's config to replace, nested ones merged.
        compile: the layers through torch.compile; the vectors then differ by rounding (models/compiled.py).
        trust_remote_code: run code that comes with the checkpoint; it is tapped where our rules know it.
        model_type: the architecture to build when weights are random and no config is on this machine.
        architecture: the numbers of that architecture by checkpoint, as config.json of each has them; where this one is
            not among them, the class's defaults serve, with a warning.
        seed: of random weights.
        tokenizer: a folder or hub id to take the tokenizer from, where it is not the checkpoint's.
        adapter: a folder or hub id of an adapter to put on the weights (adapter.py); `merge_adapter`: into them.
        quantization: how linear layers are quantised as they are loaded, of `quantized.METHODS`; None: as they are.
        allow_missing: tensors that the checkpoint lacks are drawn from `seed`, and recorded, instead of refused.
        headed: with which cache it goes on with documents, where the head is loaded too.
    """

    checkpoint: str
    revision: str | None = None
    gguf_file: str | None = None
    weights: str = "pretrained"
    dtype: str = "auto"
    device: str = "auto"
    device_map: Any = None
    attn_implementation: str = "auto"
    sdpa_kernels: Any = None
    config_overrides: dict[str, Any] | None = None
    compile: bool = False
    trust_remote_code: bool = False
    model_type: str | None = None
    architecture: dict[str, Any] | None = None
    seed: int = 0
    tokenizer: str | None = None
    adapter: str | None = None
    merge_adapter: bool = False
    quantization: str | None = None
    allow_missing: bool = False
    headed: ClassVar[Caching | None] = None

    def __post_init__(self) -> None:
        check_choice("model.weights", self.weights, WEIGHTS)
        check_choice("model.dtype", self.dtype, DTYPES)
        if self.config_overrides is None:  # OmegaConf makes None of an empty mapping
            object.__setattr__(self, "config_overrides", {})
        if self.architecture is not None:
            stand_in.require_numbers(self.architecture)
        if not self.checkpoint.strip():
            raise ConfigError("model.checkpoint is empty: give a hub id or a local folder")
        check_device(self.device, self.device_map)
        object.__setattr__(self, "sdpa_kernels", kernels_of(self.sdpa_kernels, self.attn_implementation))
        if self.adapter is not None:
            adapter.require_peft(self.adapter)
        if self.weights == "random":
            check_random(self.seed, put_on=self.adapter is not None or self.allow_missing)
        if self.gguf_file is None and self.checkpoint.endswith(".gguf"):
            folder, file = Path(self.checkpoint).parent, Path(self.checkpoint).name
            object.__setattr__(self, "checkpoint", str(folder.expanduser().absolute()))
            object.__setattr__(self, "gguf_file", file)
        quantized.check_request(self)

    def check(self) -> None:
        """Finds out within seconds whether the checkpoint can be had; needs neither torch nor transformers.

        Raises:
            CheckpointError: it cannot; gated, not found or no network, and what to do.
        """
        self.place()
        if self.tokenizer is not None:
            locate.tokenizer_source(self.tokenizer)
        if self.adapter is not None:
            adapter.folder_of(self.adapter)

    def limits(self) -> ModelLimits:
        """What the config tells of the text model, read without any weights."""
        from . import finder
        from .limits import check_writes, limits_of

        with finder.installed():
            config = self._config()
            if self._geometry() == stand_in.DEFAULT:
                stand_in.warn_of_defaults(self.checkpoint, config)
            check_writes(config, self.checkpoint, wanted=self.headed is not None)
            return limits_of(config, trust_remote_code=self.trust_remote_code)

    def load_tokenizer(self) -> tuple[Tokenize, int]:
        """A tokenize function and the id to pad with.

        Raises:
            CheckpointError, ConfigError: there is none; with random weights, it has more tokens than the model.
        """
        place, named, options = self._tokenizer_source()
        tokenize = Tokenizer.read(place, named, trust_remote_code=self.trust_remote_code, **options)
        if self.weights == "random":
            stand_in.require_vocabulary(self._config(), len(tokenize), place)
        return tokenize, tokenize.pad_id

    def load(self) -> LoadedBackbone:
        """Reads or draws the weights, finds the backbone and proves its taps.

        Raises:
            CheckpointError: the weights cannot be loaded.
            CaptureError: the device has not the memory for it, or fails.
            UnsupportedModelError, ConfigError: the model cannot be tapped soundly; or not be compiled.
        """
        from . import finder

        source = self.place() if self.weights == "pretrained" else None
        with finder.installed(), unchanged(source, self.gguf_file):
            backbone = self._proven()
        if self.compile:
            from .compiled import compile_layers
            from .trouble import told

            with told("in a short probe of the compiled model"):
                compile_layers(backbone)
        return backbone

    def with_head(self, caching: Caching = Caching()) -> Checkpoint:  # noqa: B008 - it is frozen
        """The same, whose backbone has a language model too, which writes with this cache."""
        made = replace(self)
        object.__setattr__(made, "headed", caching)
        return made

    def outline(self) -> Outline:
        """The shapes that `load` would bring, without any weights.

        Raises:
            CheckpointError, UnsupportedModelError: no config; it cannot be tapped, or its shapes depend on values.
        """
        from . import finder
        from .outline import outline

        with finder.installed():
            return outline(self._config(), self.dtype, self.trust_remote_code, self.checkpoint, self.quantization)

    def working_memory(self, rows: int, tokens: int) -> WorkingMemory | None:
        """What one forward of so many rows and tokens needs on its device beside the weights.

        None where it cannot be found without them: an attention that is computed by a package of its own, or a model
        that cannot be outlined.
        """
        from . import finder
        from .outline import working_memory_of

        if self.attn_implementation not in ("auto", "sdpa", "eager"):
            return None
        try:
            with finder.installed():
                of = self._config(), self.dtype, self.attn_implementation, self.trust_remote_code, self.checkpoint
                return working_memory_of(*of, rows, tokens)
        except UnsupportedModelError:
            return None

    def sources(self, names: Iterable[str]) -> dict[str, str]:
        """What modelling modules of transformers would be made from now: a digest of each, and whether of a copy."""
        from .finder import source_of

        return {name: told for name in names if (told := source_of(name)) is not None}

    def describe(self) -> dict[str, Any]:
        """What the manifest records: architecture, revision, digests of the files on this machine."""
        import transformers

        config = self._config()
        folder = self._on_disk() if self.weights == "pretrained" else None
        return {
            "checkpoint": self.checkpoint,
            "revision": self.revision,
            "gguf_file": self.gguf_file,
            "commit": getattr(config, "_commit_hash", None) or snapshot_commit(folder),
            "weights": self.weights,
            "seed": self.seed if self.weights == "random" else None,
            **({"geometry": found} if (found := self._geometry()) is not None else {}),
            "model_type": config.model_type,
            "architecture": type(config).__name__.removesuffix("Config"),
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
            "config_overrides": self.config_overrides,
            **({"compile": True} if self.compile else {}),
            **({"adapter": locate.ADAPTER} if folder is not None and (folder / locate.ADAPTER).exists() else {}),
            **({"put_on": adapter.describe(self.adapter, merged=self.merge_adapter)} if self.adapter else {}),
            **({"quantization": quantized.describe(self.quantization)} if self.quantization else {}),
            **({"allow_missing": True} if self.allow_missing else {}),
            "transformers": transformers.__version__,
            "files": digests(folder, self.gguf_file) if folder is not None else {},
        }

    def _proven(self) -> LoadedBackbone:
        from . import weights

        config = self._config()
        how = weights.How(self.dtype, self.device, self.device_map, self.attn_implementation, self.sdpa_kernels)
        how = replace(how, headed=self.headed, trust_remote_code=self.trust_remote_code)
        if self.weights == "random":
            return weights.draw(config, self.seed, how, f"a random {self.checkpoint}")
        seed = self.seed if self.allow_missing else None
        how = replace(how, options=self._options(), quantization=self.quantization, missing_seed=seed)
        if self.adapter is not None:
            how = replace(how, adapter=adapter.folder_of(self.adapter), merge_adapter=self.merge_adapter)
        plain = replace(self, config_overrides={})._config if self.config_overrides else None
        return weights.read(str(self.place()), config, how, self.checkpoint, plain)

    def _config(self) -> PretrainedConfig:
        from .architecture import read_config

        source, overrides = self.place(), self.config_overrides or {}
        if source is None:
            alone, stated = self.tokenizer is None, self._numbers()
            return stand_in.config_of(str(self.model_type), stated, overrides, tokenizer=alone)
        config = read_config(source, overrides, trust_remote_code=self.trust_remote_code, **self._options())
        if self.quantization is not None:
            adapted = (Path(source) / locate.ADAPTER).is_file()
            quantized.check_config(config, self.quantization, self.dtype, source, adapted=adapted)
        return config

    def _numbers(self) -> dict[str, Any] | None:
        """What the configuration states of this checkpoint's architecture."""
        return (self.architecture or {}).get(self.checkpoint)

    def _geometry(self) -> str | None:
        """Where a random model's shapes are from, if not from a config on this machine."""
        if self.weights != "random" or self.place() is not None:
            return None
        return stand_in.DEFAULT if self._numbers() is None else stand_in.STATED

    def place(self) -> str | None:
        """A folder or an accessible hub id; None for random weights whose config comes from `model_type`."""
        if self.weights == "pretrained":
            return locate.locate(self.checkpoint, self.revision, self.gguf_file)
        if (folder := self._on_disk()) is None and self.model_type is None:
            raise ConfigError(
                f"model.weights=random: the config of {self.checkpoint} is not on this machine, so model.model_type"
                " (such as llama) is needed to know the architecture"
            )
        return None if folder is None else str(folder)

    def _on_disk(self) -> Path | None:
        return locate.on_disk(self.checkpoint, self.revision, self.gguf_file)

    def _options(self) -> dict[str, Any]:
        """What every from_pretrained of this checkpoint is given; transformers ignores what is None."""
        options = {"revision": self.revision, "gguf_file": self.gguf_file}
        return {key: value for key, value in options.items() if value is not None}

    def _tokenizer_source(self) -> tuple[str, str | None, dict[str, Any]]:
        """Where the tokenizer is; its name, where it is not the checkpoint's; and the options to read it with."""
        if self.tokenizer is not None:
            return locate.tokenizer_source(self.tokenizer), self.tokenizer, {}
        if self.weights == "pretrained":
            return str(self.place()), None, self._options()
        if (folder := self._on_disk()) is not None and (self.gguf_file is not None or any(folder.glob("tokenizer*"))):
            return str(folder), None, self._options()
        return stand_in.tokenizer_for(self.checkpoint), stand_in.TOKENIZER, {"stands_in": True}
