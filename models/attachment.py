"""A backbone inside a model that somebody else has loaded, calls and wraps as they like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sniffer.errors import UnsupportedModelError, of_a_device
from sniffer.tap import Seen, tap

from . import proofs, selfcheck
from .caches import NAMES
from .layers import find_backbone
from .limits import limits_of
from .loaded import LoadedBackbone
from .quantized import unpack
from .undisturbed import undisturbed


class Attachment(LoadedBackbone):
    """The proven backbone of a model that goes on belonging to its user.

    Attributes:
        calls: the modules by which the backbone may be called, the outermost first, itself last.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Proves the taps, in evaluation mode, and gives everything back, but for what a first forward unpacks.

        Raises:
            UnsupportedModelError: it cannot be tapped soundly, and why.
        """
        self._model = model
        self._known: dict[tuple[str, nn.Module, Any, bool], str] = {}
        unpack(model)
        with undisturbed(model), _flags_kept(model):
            super().__init__(find_backbone(model))
        parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        self.calls: tuple[nn.Module, ...] = tuple(part for part in parts if self.module in part.modules())

    def why_not(self, claim: str, module: nn.Module, use_cache: Any = None, *, pre: bool = False) -> str:
        """Why calls of `module` that make a claim (proofs.CLAIMS) cannot be captured; empty where they can.

        It is proven once, when first asked. `use_cache` is what the call says of it; with `pre` it is proven of
        the pre kinds too, where that is another matter.
        """
        key = (claim, module, use_cache, pre)
        if key not in self._known:
            embeddings: Any = self.module.get_input_embeddings()
            ids = selfcheck.probe_ids(embeddings.num_embeddings, self.device)
            try:
                self._known[key] = proofs.CLAIMS[claim](self._shown_by(module, use_cache, pre), ids)
            except Exception as error:  # of upstream code: any
                if of_a_device(error):
                    raise
                reason = str(error).strip().split("\n")[0]
                self._known[key] = f"it fails in a probe ({type(error).__name__}: {reason})"
        return self._known[key]

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """For the length of a `with`, the model is in evaluation mode, and whatever runs it leaves no trace."""
        with undisturbed(self._model):
            self._model.eval()
            yield

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest text that the model takes; None where its config does not say."""
        with undisturbed(self._model):
            limits = limits_of(self._model.config)
        known = [one for one in (limits.max_positions, limits.reach) if one is not None]
        return max(known, default=None)

    def _shown_by(self, module: nn.Module, use_cache: Any, pre: bool) -> proofs.Show:
        options = {} if use_cache is None else {"use_cache": use_cache}

        def show(ids: Tensor, *, split: int = 0, **said: Tensor) -> list[Seen]:
            seen: list[Seen] = []
            with undisturbed(self._model), torch.inference_mode(), tap(seen.append, pre=pre):
                self._model.eval()
                if not split:
                    module(input_ids=ids, **said, **options)
                else:
                    cache = _cache_of(module(input_ids=ids[:, :split], **_before(said, split), use_cache=True))
                    seen.clear()
                    module(input_ids=ids[:, split:], **_behind(said, split), **cache, use_cache=True)
            events = [event for event in seen if event.module in self.layer_of]
            return [_last(event, ids.shape[1] - split) for event in events] if split else events

        return show


def _cache_of(returned: Any) -> dict[str, Any]:
    for name in NAMES:
        if (cache := getattr(returned, name, None)) is not None:
            return {name: cache}
    raise UnsupportedModelError("it returns no cache")


def _before(said: dict[str, Tensor], split: int) -> dict[str, Tensor]:
    return {name: states[:, :split] for name, states in said.items()}


def _behind(said: dict[str, Tensor], split: int) -> dict[str, Tensor]:
    """A mask is of the cache's tokens too."""
    return {name: states if name == "attention_mask" else states[:, split:] for name, states in said.items()}


def _last(event: Seen, n: int) -> Seen:
    return proofs.cut(event, -n)


def model_in(model: Any) -> PreTrainedModel:
    """The transformers model in a wrapper, such as that of torch.compile, DataParallel or an adapter.

    Raises:
        UnsupportedModelError: there is none, or several side by side.
    """
    if isinstance(model, PreTrainedModel):
        return model
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"this is no model but a {name}: give the transformers model itself")
    found = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    inner = {part for one in found for part in one.modules() if part is not one}
    outermost = [one for one in found if one not in inner]
    if len(outermost) != 1:
        names = ", ".join(type(one).__name__ for one in outermost) or "none"
        raise UnsupportedModelError(f"this {name} should hold one transformers model, and holds {names}: give that one")
    return outermost[0]


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Which parameters have gradients stays as it is."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
