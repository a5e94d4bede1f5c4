"""A backbone: the part of a loaded model that its attention layers live in, with the map of its layers.

The language-model head, vision towers and the like are left out: of a whole model we take the deepest
part that takes token ids and holds every tapped attention of its decoder. A layer's number is its place in
the list of layers, since the `layer_idx` that modules carry is wrong or missing in some families.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sniffer.errors import UnsupportedModelError
from sniffer.types import LayerGeometry

from . import selfcheck
from .config_keys import POSITION_KEYS, value_of
from .coverage import check_alone, check_lengths, check_parts, check_silent
from .finder import DERIVED_NAME, TAPPED_CLASSES, is_modelling_module, is_tapped
from .lengths import UNKNOWN, PositionCall, study, watched
from .provenance import code_of, packages_in_use
from .state import ModuleState, kept, simple_parts
from .unrotated import inputs_of, why_unproven

log = logging.getLogger(__name__)


class LoadedBackbone:
    """A checked backbone: what `Checkpoint.load` returns.

    Attributes:
        geometry: one entry per layer that was seen to attend, in order.
        layer_of: attention module -> layer number.
        skipped_layers: paths of layers without softmax self-attention over the tokens.
        shared_keys: layer -> the earlier layer whose keys it attends with, for layers without keys of their
            own. Its k, v and k_pre are that layer's.
        vocabulary: rows of its embedding.
        pre_missing: why q_pre and k_pre cannot be had; empty where they can. They are then absent from
            the geometry too.
        code, packages: what the vectors depend on besides the weights (provenance.py), as it was when this
            was made.
        lengths: which lengths of a forward the model treats alike.
    """

    def __init__(self, module: PreTrainedModel) -> None:
        """Finds the layers of a backbone and proves its taps.

        Raises:
            UnsupportedModelError: it cannot be tapped soundly, and why.
        """
        self.module = module.eval()
        self.dtype: torch.dtype = module.dtype
        self.device: torch.device = input_device(module)
        self._takes_use_cache = _accepts(module, "use_cache")
        names = {part: name for name, part in module.named_modules()}
        self.vocabulary = vocabulary_of(module)
        self._changing: Sequence[ModuleState] = ()
        with kept(simple_parts(module)):
            seen, calls = self._probe(names)
        self.lengths, changing = study(module, calls)
        self._changing = [ModuleState(part) for part in changing]
        if self.lengths == UNKNOWN:
            log.info(
                "nothing shows that this model turns positions alike in texts of any length: batches hold one length"
            )
        numbers = number_layers({names[event.module]: event.module for event in seen}, module)
        self.layer_of: Mapping[nn.Module, int] = numbers
        windows = windows_of(module)
        self.geometry: tuple[LayerGeometry, ...] = tuple(
            selfcheck.geometry_of(event, number, names[event.module], windows.get(number))
            for event, number in sorted(((e, numbers[e.module]) for e in seen), key=lambda pair: pair[1])
        )
        self.skipped_layers = skipped_layers(module, set(numbers))
        check_skipped(module, self.skipped_layers)
        self.shared_keys = selfcheck.shared_keys(seen, numbers)
        self.code, self.packages = code_of(module), packages_in_use()

    def _probe(self, names: selfcheck.Modules) -> tuple[list[selfcheck.Seen], list[PositionCall]]:
        """Proves the taps by a few forwards: what the layers have shown, and which parts were given positions.

        Raises:
            UnsupportedModelError: it cannot be tapped soundly, and why.
        """
        module = self.module
        ids = selfcheck.probe_ids(self.vocabulary, self.device)
        with inputs_of(_tapped(module)) as called, watched(module) as calls:
            first = selfcheck.observe_probe(self, ids, names, pre=False)
        check_parts(module, names)
        selfcheck.check_taps(first, names)
        check_silent(called, first, names)
        selfcheck.check_causal(first, self, names)
        self.pre_missing = why_no_pre({event.module for event in first.seen})
        ids = selfcheck.probe_ids(self.vocabulary, self.device, other_length(module))
        with inputs_of([event.module for event in first.seen]) as inputs:
            other = selfcheck.observe_probe(self, ids, names, pre=not self.pre_missing)
        check_lengths(first, other, names)
        selfcheck.check_taps(other, names)
        check_alone(first, other, names)
        self.pre_missing = (
            self.pre_missing or silent(other.seen) or why_unproven(self, ids, other.seen, inputs, module, names)
        )
        seen = [event._replace(q_pre=None, k_pre=None) for event in other.seen] if self.pre_missing else other.seen
        return seen, calls

    def describe(self) -> dict[str, Any]:
        """What the manifest records beyond the geometry, as plain values."""
        return {
            "attn_implementation": self.module.config._attn_implementation,
            "skipped_layers": list(self.skipped_layers),
            "shared_keys": {str(layer): other for layer, other in self.shared_keys.items()},
            "code": self.code,
            "packages": self.packages,
            **({"lengths": lengths} if (lengths := self.lengths.as_json()) else {}),
        }

    def __call__(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq width"] | None:
        """Runs right-padded token ids, with no cache and no mask; the caller opens torch.inference_mode.

        What ran before has no say in it. Returns the last hidden state, or None from a backbone that gives none.
        """
        for state in self._changing:
            state.restore()
        options = {"use_cache": False} if self._takes_use_cache else {}
        output = self.module(input_ids=input_ids, **options)
        return getattr(output, "last_hidden_state", None)


def input_device(module: PreTrainedModel) -> torch.device:
    """Where token ids go. Parameters that `device_map` offloads lie on `meta`; their hook says where they are used."""
    if module.device.type != "meta":
        return module.device
    hook = getattr(module.get_input_embeddings(), "_hf_hook", None)
    devices = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    return next((torch.device(device) for device in devices if device is not None), module.device)


def find_backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The deepest part of a model that takes token ids and holds every tapped attention of its decoder.

    Raises:
        UnsupportedModelError: no attention in it is tapped, or its code was imported before the hook.
    """
    check_imports(model)
    decoder = model.get_decoder() or model.base_model
    attention = _tapped(decoder)
    if not attention:
        decoder = model.base_model
        attention = _tapped(decoder)
    if not attention:
        raise UnsupportedModelError(
            f"no attention of {type(model).__name__} is tapped: {_reasons(model)}; a local copy"
            " models/<family>/modeling_<family>.py with tap lines can serve it"
        )
    holders = [
        part
        for part in decoder.modules()
        if isinstance(part, PreTrainedModel) and _accepts(part, "input_ids", only_named=True)
        if attention <= set(part.modules())
    ]
    if not holders:
        raise UnsupportedModelError(f"no part of {type(model).__name__} takes input_ids and holds its attention")
    return holders[-1]


def check_imports(model: nn.Module) -> None:
    """Refuses a model whose modelling code did not come through the import hook.

    Raises:
        UnsupportedModelError: naming those modules and what to do.
    """
    homes = {type(part).__module__ for part in model.modules()}
    early = sorted(name for name in homes if is_modelling_module(name) and not is_tapped(name))
    if early:
        raise UnsupportedModelError(
            f"{', '.join(early)} imported before the tap's import hook: call sniffer.models.finder.install() first"
        )
    remote = sorted(name for name in homes if name.split(".")[0] == "transformers_modules")
    if remote and not any(is_tapped(name) for name in remote):
        raise UnsupportedModelError(
            f"the checkpoint brings its own code ({remote[0]}), whose attention no rule matches: set"
            " model.trust_remote_code=false if transformers has this family"
        )


def number_layers(attention: Mapping[str, nn.Module], backbone: nn.Module) -> dict[nn.Module, int]:
    """Attention modules by their place in the outermost list of layers.

    Where layers hold several attentions, or none lies in a list, they are counted in order instead.
    """
    places = {path: layer_place(path, backbone) for path in attention}
    numbers = [number for number in places.values() if number is not None]
    if len(set(numbers)) == len(attention):
        return {module: places[path] or 0 for path, module in attention.items()}
    return {module: number for number, module in enumerate(attention.values())}


def layer_place(path: str, backbone: nn.Module) -> int | None:
    """The index in the outermost ModuleList on a module's path, None if there is none."""
    owner: nn.Module = backbone
    for part in path.split("."):
        if isinstance(owner, nn.ModuleList):
            return int(part)
        owner = getattr(owner, part)
    return None


def skipped_layers(backbone: nn.Module, attention: set[nn.Module]) -> tuple[str, ...]:
    """Layers that hold none of the given attention modules, of the list that holds most of them."""
    lists = [(name, part) for name, part in backbone.named_modules() if isinstance(part, nn.ModuleList)]
    outer = [(name, part) for name, part in lists if not any(name.startswith(other + ".") for other, _ in lists)]
    holding = [(len(attention & set(part.modules())), name, part) for name, part in outer]
    if not holding:
        return ()
    _, name, layers = max(holding, key=lambda item: item[0])
    return tuple(f"{name}.{i}" for i, layer in enumerate(layers) if not attention & set(layer.modules()))


def check_skipped(backbone: nn.Module, skipped: Sequence[str]) -> None:
    """Refuses to pass over a layer that seems to attend by code that no rule recognises.

    Raises:
        UnsupportedModelError: naming its class, file and line.
    """
    for path in skipped:
        if reasons := _unrecognised(backbone.get_submodule(path)):
            raise UnsupportedModelError(
                f"{path} attends by code that fits no rule: {'; '.join(reasons)}; a local copy"
                " models/<family>/modeling_<family>.py with tap lines can serve it"
            )


def vocabulary_of(module: PreTrainedModel) -> int:
    """How many tokens a backbone has an embedding for.

    Raises:
        UnsupportedModelError: it does not say.
    """
    try:
        embeddings: Any = module.get_input_embeddings()
        return int(embeddings.num_embeddings)
    except (NotImplementedError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not say how many tokens it knows (get_input_embeddings): {one_line(error)}"
        ) from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def other_length(module: PreTrainedModel) -> int:
    """Of a second probe: longer than the first where the model has positions enough, else shorter."""
    known = [value_of(module.config, key) for key in POSITION_KEYS]
    # Some families leave a few of their positions unused.
    room = min((number for number in known if isinstance(number, int)), default=1 << 30) - 4
    return next(seq for seq in selfcheck.OTHER_SEQS if seq <= room or seq < selfcheck.PROBE_SEQ)


def silent(seen: Sequence[selfcheck.Seen]) -> str:
    """Why there are no pre kinds, though they could be had: a tap that leaves them out."""
    lacking = [type(event.module).__name__ for event in seen if event.q_pre is None or event.k_pre is None]
    return f"{lacking[0]} hands over no q_pre and k_pre" if lacking else ""


def why_no_pre(attention: set[nn.Module]) -> str:
    for module in attention:
        for cls in type(module).__mro__:
            derived = getattr(sys.modules.get(cls.__module__), DERIVED_NAME, None)
            for one in derived.taps if derived is not None else ():
                if one.class_name == cls.__name__ and one.pre_missing:
                    return f"{cls.__name__}: {one.pre_missing}"
    return ""


def _tapped(root: nn.Module) -> set[nn.Module]:
    """The modules under `root` whose class, or a base of it, carries a tap."""
    return {part for part in root.modules() if any(_has_tap(cls) for cls in type(part).__mro__)}


def _has_tap(cls: type) -> bool:
    return cls.__name__ in getattr(sys.modules.get(cls.__module__), TAPPED_CLASSES, ())


def _reasons(model: nn.Module) -> str:
    """Why nothing in a model is tapped."""
    return "; ".join(_unrecognised(model)) or "it has no softmax attention that we recognise"


def _unrecognised(root: nn.Module) -> list[str]:
    """Where the attention-like classes of a module's parts stand that no rule matched: class, file and line."""
    used = {type(part).__name__: type(part).__module__ for part in root.modules()}
    found = []
    for name, home in used.items():
        derived = getattr(sys.modules.get(home), DERIVED_NAME, None)
        for one in derived.untapped if derived is not None else ():
            if one.class_name == name:
                file = getattr(sys.modules[home], "__file__", home)
                found.append(f"{name} in {file} line {one.line}: {one.reason}")
    return found


def _accepts(module: nn.Module, name: str, *, only_named: bool = False) -> bool:
    parameters = inspect.signature(module.forward).parameters
    starred = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return name in parameters or (starred and not only_named)


WINDOW_KEYS = {
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "local": "window_size",
}
"""Kinds of layers as configs name them, and the key that says how far such a layer sees."""


def windows_of(module: PreTrainedModel) -> dict[int, int]:
    """Windows that a layer has by its mask, though its attention call may not name them.

    The config lists the kind of each layer; without such a list, a backbone that makes sliding masks has them in
    every layer.
    """
    config: Any = module.config
    kinds = value_of(config, "layer_types") or value_of(config, "attention_layers")
    if not kinds and "create_sliding_window_causal_mask" in inspect.unwrap(type(module).forward).__code__.co_names:
        kinds = ["sliding_attention"] * config.num_hidden_layers
    sizes = {kind: value_of(config, key) for kind, key in WINDOW_KEYS.items()}
    return {layer: sizes[kind] for layer, kind in enumerate(kinds or []) if isinstance(sizes.get(kind), int)}
