"""A backbone: the part of a loaded model that its attention layers live in, with the map of its layers.

The language-model head, vision towers and the like are left out: of a whole model we take the deepest
part that takes token ids and holds every tapped attention of its decoder. A layer's number is its place in
the list of layers, since the `layer_idx` that modules carry is wrong or missing in some families.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sniffer.errors import UnsupportedModelError, first_line
from sniffer.types import LayerGeometry, Rope

from . import selfcheck
from .causality import check_causal
from .config_keys import POSITION_KEYS, value_of
from .coverage import check_alone, check_lengths, check_parts, check_silent
from .finder import DERIVED_NAME
from .kernels import allowed
from .language_model import LoadedLanguageModel
from .layers import accepts, check_skipped, number_layers, sight_of, skipped_layers, tapped
from .lengths import UNKNOWN, PositionCall, study, watched
from .provenance import code_of, packages_in_use
from .rope import ropes_of
from .sharded import check_whole
from .state import ModuleState, kept, simple_parts
from .unrotated import inputs_of, why_unproven

log = logging.getLogger(__name__)

PLACES = ("_name_or_path", "name_or_path", "_model_name_or_path")
"""Keys of a config that name a folder or hub id."""


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
        rope: how each layer turns q and k by position (rope.py).
        config: of the whole model, of which this is a part.
        language_model: the whole model, where it was asked for, which goes on with prompts.
    """

    language_model: LoadedLanguageModel | None = None

    def __init__(self, module: PreTrainedModel, sdpa_kernels: Sequence[str] | None = None) -> None:
        """Finds the layers of a backbone and proves its taps.

        Args:
            sdpa_kernels: those that attention may use (kernels.py); None leaves them as they are.

        Raises:
            UnsupportedModelError: it cannot be tapped soundly, and why.
        """
        self.module = module.eval()
        self.dtype: torch.dtype = module.dtype
        self.device: torch.device = input_device(module)
        self.sdpa_kernels = sdpa_kernels
        self.config: PretrainedConfig = module.config
        self.drawn: tuple[str, ...] = ()
        self.quantized: Mapping[str, int] = {}
        self._takes_use_cache = accepts(module, "use_cache")
        names = {part: name for name, part in module.named_modules()}
        check_whole(tapped(module), module, names)
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
        sight = sight_of(module, numbers)
        self.geometry: tuple[LayerGeometry, ...] = tuple(
            selfcheck.geometry_of(event, number, names[event.module], **sight[number])
            for event, number in sorted(((e, numbers[e.module]) for e in seen), key=lambda pair: pair[1])
        )
        self.skipped_layers = skipped_layers(module, set(numbers))
        check_skipped(module, self.skipped_layers)
        self.shared_keys = selfcheck.shared_keys(seen, numbers)
        self.rope: Mapping[int, Rope] = ropes_of(module, seen, numbers, self.lengths, self.pre_missing)
        self.code, self.packages = code_of(module), packages_in_use(module)

    def _probe(self, names: selfcheck.Modules) -> tuple[list[selfcheck.Seen], list[PositionCall]]:
        """Proves the taps by a few forwards: what the layers have shown, and which parts were given positions.

        Raises:
            UnsupportedModelError: it cannot be tapped soundly, and why.
        """
        module = self.module
        ids = selfcheck.probe_ids(self.vocabulary, self.device)
        with inputs_of(tapped(module)) as called, watched(module) as calls:
            first = selfcheck.observe_probe(self, ids, names, pre=False)
        check_parts(module, names)
        selfcheck.check_taps(first, names)
        check_silent(called, first, names)
        check_causal(first, self, names, self.vocabulary)
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
        attention = self.module.config._attn_implementation
        kernels = self.sdpa_kernels if attention == "sdpa" else None
        return {
            "attn_implementation": attention,
            **({} if kernels is None else {"sdpa_kernels": list(kernels)}),
            "skipped_layers": list(self.skipped_layers),
            "shared_keys": {str(layer): other for layer, other in self.shared_keys.items()},
            "code": self.code,
            "packages": self.packages,
            **({"missing": list(self.drawn)} if self.drawn else {}),
            **({"quantized": dict(self.quantized)} if self.quantized else {}),
            **({"lengths": lengths} if (lengths := self.lengths.as_json()) else {}),
        }

    def model_config(self) -> dict[str, Any]:
        """The config of the whole model as it runs, as plain values, but for where it was read from."""
        try:
            text = self.config.to_json_string(use_diff=False)
        except TypeError:  # a value of its own class, in a checkpoint's own code
            text = json.dumps(self.config.to_dict(), default=str)
        return dict(_without_places(json.loads(text)))

    def __call__(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq width"] | None:
        """Runs right-padded token ids, with no cache and no mask; the caller opens torch.inference_mode.

        What ran before has no say in it. Returns the last hidden state, or None from a backbone that gives none.
        """
        self.forget()
        options = {"use_cache": False} if self._takes_use_cache else {}
        with allowed(self.sdpa_kernels, self.device):
            output = self.module(input_ids=input_ids, **options)
        return getattr(output, "last_hidden_state", None)

    def forget(self) -> None:
        """Puts back what changes from one forward to the next."""
        for state in self._changing:
            state.restore()


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_places(inner) for name, inner in value.items() if name not in PLACES}
    return [_without_places(inner) for inner in value] if isinstance(value, list) else value


def input_device(module: PreTrainedModel) -> torch.device:
    """Where token ids go. Parameters that `device_map` offloads lie on `meta`; their hook says where they are used."""
    if module.device.type != "meta":
        return module.device
    hook = getattr(module.get_input_embeddings(), "_hf_hook", None)
    devices = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", (hook,))]
    return next((torch.device(device) for device in devices if device is not None), module.device)


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
            f"{type(module).__name__} does not say how many tokens it knows (get_input_embeddings): {first_line(error)}"
        ) from error


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
