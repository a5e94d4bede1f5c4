"""A whole model, with its head, that goes on with prompts; and the proof that what it does with a cache is right.

transformers' own `generate` runs it, with a logits processor that takes the token which is chosen for each row: caches,
masks and positions are those of anybody's generation. What a checkpoint says of penalties and the like is left out.
At start-up two prompts of different lengths, side by side, are gone on with for a few tokens, and compared with one
forward over each of the texts that came out: logits and vectors of all kinds must be equal up to rounding, at the same
positions. Where that holds for one prompt alone only, prompts of different lengths do not share a batch. The cache is
the one that is asked for, and prompts come in chunks if they are to; of a cache that quantises, what it does to numbers
is left out of the proof (caches.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sniffer.errors import SnifferError, UnsupportedModelError, first_line, of_a_device
from sniffer.tap import Seen, tap
from sniffer.types import KIND, KINDS, Caching

from . import caches, selfcheck
from .kernels import allowed
from .proofs import TOLERANCE, apart

if TYPE_CHECKING:
    from .loaded import LoadedBackbone

Choose = Callable[[Tensor], "np.ndarray | None"]

SHORTER, NEW = 4, 6
"""Of the proof: tokens that the second prompt is shorter by, and that come after each."""


class LoadedLanguageModel:
    """A model with its head: what a checkpoint with `headed` brings beside its backbone.

    Attributes:
        eos: the tokens that end its texts, by its generation config.
        pads: whether rows of different lengths may share a batch.
        whole: the model with its head, as transformers has it.
        caching: the cache that it writes with.
    """

    def __init__(self, model: PreTrainedModel, backbone: LoadedBackbone, caching: Caching = Caching()) -> None:  # noqa: B008
        """Proves that it can go on with prompts.

        Raises:
            UnsupportedModelError: it cannot, or not soundly; and why.
        """
        check_writes_now(model)
        self.whole, self.caching = model, caching
        self._backbone = backbone
        self.eos = eos_of(model)
        # Whatever else it says, such as a penalty, would be put upon what is chosen.
        model.generation_config = GenerationConfig()
        self.pads = prove(self, backbone)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Int[np.ndarray, "batch seq"],
        mask: Int[np.ndarray, "batch seq"],
        choose: Choose,
        most: int,
    ) -> None:
        """Runs prompts, padded on the left, and then a token of each row at a time (`sniffer.types.LanguageModel`)."""
        device, choosing = self._backbone.device, _Choosing(choose)
        how = GenerationConfig(
            max_new_tokens=most,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
            **caches.options_of(self.caching),
        )
        self._backbone.forget()
        caches.forget(self.whole)
        with allowed(self._backbone.sdpa_kernels, device):
            generate: Any = self.whole.generate
            generate(
                input_ids=torch.from_numpy(input_ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                generation_config=how,
                logits_processor=LogitsProcessorList([choosing]),
                stopping_criteria=StoppingCriteriaList([choosing.stops]),
            )

    def logits(self, input_ids: Int[Tensor, "1 seq"]) -> Tensor:
        """Those of every token, in one forward without a cache."""
        self._backbone.forget()
        with allowed(self._backbone.sdpa_kernels, self._backbone.device):
            logits: Tensor = self.whole(input_ids=input_ids, use_cache=False).logits
        return logits


class _Choosing(LogitsProcessor):
    """Leaves one token of each row its score: the one that is chosen."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self.stops = _Stops()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = None if self.stops.ended else self._choose(scores)
        if chosen is None:
            self.stops.ended = True
            chosen = np.zeros(len(scores), dtype=np.int64)
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, torch.from_numpy(chosen).to(scores.device)[:, None], 0.0)


class _Stops(StoppingCriteria):
    """Ends all rows at once."""

    def __init__(self) -> None:
        self.ended = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), self.ended, dtype=torch.bool, device=input_ids.device)


def check_writes_now(model: PreTrainedModel) -> None:
    """Raises UnsupportedModelError for a model that was loaded without what a generation needs."""
    writes: Any = getattr(model, "can_generate", lambda: False)
    if not writes() or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no head that says which token comes next: leave generate out"
        )


def eos_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that end a model's texts."""
    said = getattr(model.generation_config, "eos_token_id", None)
    if said is None:
        said = getattr(model.config.get_text_config(), "eos_token_id", None)
    return tuple(said) if isinstance(said, list | tuple) else () if said is None else (int(said),)


def prove(model: LoadedLanguageModel, backbone: LoadedBackbone) -> bool:
    """Whether prompts of different lengths may share a batch.

    Raises:
        UnsupportedModelError: not even a prompt alone is gone on with soundly, and why.
    """
    seq = selfcheck.PROBE_SEQ + NEW + 1
    # A head may know fewer tokens than are embedded, where some stand for images.
    head: Any = model.whole.get_output_embeddings()
    vocabulary = min(backbone.vocabulary, getattr(head, "out_features", backbone.vocabulary))
    first, second = selfcheck.probe_ids(vocabulary, backbone.device, seq).tolist()
    texts = [first, second[SHORTER:]]
    with caches.in_a_proof(model, seq - NEW - 1):
        if not _why_not(model, backbone, texts):
            why, pads = "", True
        else:
            why, pads = next(filter(None, (_why_not(model, backbone, [text]) for text in texts)), ""), False
    why = why or _fails_as_it_is(model, backbone, texts if pads else texts[:1])
    if why:
        how = ", ".join(["generate", *(f"generate.{key}={value}" for key, value in model.caching.as_json().items())])
        raise UnsupportedModelError(f"it cannot be captured while it generates ({how}): {why}")
    return pads


def _fails_as_it_is(model: LoadedLanguageModel, backbone: LoadedBackbone, texts: Sequence[list[int]]) -> str:
    """Why a cache that quantises fails; what it does to numbers is its own affair."""
    if model.caching.cache != "quantized":
        return ""
    try:
        _by_steps(model, backbone, texts)
    except SnifferError:
        raise
    except Exception as error:  # of upstream code: any
        return _told(error)
    return ""


def _why_not(model: LoadedLanguageModel, backbone: LoadedBackbone, texts: Sequence[list[int]]) -> str:
    """Why what a model does with these texts side by side, token by token, is not what it does with each at once."""
    try:
        logits, shown = _by_steps(model, backbone, texts)
        for row, text in enumerate(texts):
            own, whole = _at_once(model, backbone, text)
            if _far(torch.stack([step[row] for step in logits]), own[-len(logits) - 1 : -1]):
                return "its logits are not those of one forward over the whole text"
            for layer, alone in whole.items():
                for kind, states in alone.items():
                    # Their last tokens go through no step.
                    ours, wanted = shown[layer][kind][row : row + 1, :, 1 - len(text) :], states[:, :, :-1]
                    if ours.shape != wanted.shape or apart(ours, wanted) > TOLERANCE.get(ours.dtype, 1e-3):
                        return f"{kind} of layer {layer} is not that of one forward over the whole text"
    except SnifferError:
        raise
    except Exception as error:  # of upstream code: any
        return _told(error)
    return ""


def _told(error: Exception) -> str:
    if of_a_device(error):
        raise error
    return f"it fails in a probe ({type(error).__name__}: {first_line(error)})"


Shown = dict[int, dict[str, Tensor]]
"""Vectors (batch, heads, seq, dim) by layer and kind."""


def _by_steps(
    model: LoadedLanguageModel, backbone: LoadedBackbone, texts: Sequence[list[int]]
) -> tuple[list[Tensor], Shown]:
    """The logits of each step, and what the layers show, all steps side by side; NEW + 1 tokens are steps.

    Which tokens come is given: the likeliest might be one and the same all along, or one that stands for an image.
    """
    prompts = [text[: -NEW - 1] for text in texts]
    seq = max(map(len, prompts))
    ids = np.array([[0] * (seq - len(prompt)) + prompt for prompt in prompts], dtype=np.int64)
    mask = np.array([[0] * (seq - len(prompt)) + [1] * len(prompt) for prompt in prompts], dtype=np.int64)
    logits: list[Tensor] = []
    notes = _Notes(backbone, model.caching)

    def choose(scores: Tensor) -> np.ndarray | None:
        logits.append(scores.clone())
        return None if len(logits) > NEW else np.array([text[len(logits) - NEW - 2] for text in texts])

    with tap(notes, pre=not backbone.pre_missing), caches.seen_in(model.whole, model.caching) as why:
        model.generate(ids, mask, choose, NEW + 1)
    if model.caching.chunk is not None and notes.most > model.caching.chunk:
        kept = f"prompts go through {type(model.whole).__name__} {notes.most} tokens at a time all the same"
        why.append(f"generate.prefill_chunk_size: {kept}")
    if why:
        raise UnsupportedModelError(why[0])
    return logits, notes.joined()


@torch.inference_mode()
def _at_once(model: LoadedLanguageModel, backbone: LoadedBackbone, text: list[int]) -> tuple[Tensor, Shown]:
    """The logits of each token of a text, and what the layers show, in one forward without a cache."""
    notes = _Notes(backbone, Caching())
    with tap(notes, pre=not backbone.pre_missing):
        logits = model.logits(torch.tensor([text], device=backbone.device))[0]
    return logits, notes.joined()


class _Notes:
    """What layers show of new tokens, forward by forward; `most` is the most of them in one."""

    def __init__(self, backbone: LoadedBackbone, caching: Caching) -> None:
        self._backbone, self._caching = backbone, caching
        self.most = 0
        self._columns: dict[int, int] = {}
        self._shown: dict[int, dict[str, list[Tensor]]] = {}

    def __call__(self, seen: Seen) -> None:
        layer, new = self._backbone.layer_of.get(seen.module), seen.q.shape[2]
        if layer is None:
            return
        self.most = max(self.most, new)
        before = self._columns.get(layer, 0)
        self._columns[layer] = before + new
        kinds = self._shown.setdefault(layer, {})
        for kind in KINDS:
            if (states := KIND[kind].shown(seen)) is not None:
                newest = states[:, :, -new:] if KIND[kind].draw == "q" else self._caching.newest(states, before, new)
                kinds.setdefault(kind, []).append(newest.clone())

    def joined(self) -> Shown:
        """Of each layer and kind all tokens."""
        return {
            layer: {kind: torch.cat(states, 2) for kind, states in kinds.items()}
            for layer, kinds in self._shown.items()
        }


def _far(one: Tensor, other: Tensor) -> bool:
    """Whether logits (tokens, vocabulary) are apart by more than rounding, over their spread."""
    spread = (other - other.mean(-1, keepdim=True)).float().norm()
    return float((one.float() - other.float()).norm()) > TOLERANCE.get(other.dtype, 1e-3) * float(spread)
