"""Proof that a backbone is causal: no token has a say in the vectors of earlier ones, so right padding needs no mask.

It is asked twice, since neither answer alone is enough. Attention says itself what it is given (sight.py), which holds
for weights of any size; but something else may mix tokens, such as a convolution. So the last token of a text is also
changed, and whatever an earlier position shows then must stay as it was:

    to the bit                          the usual case: forwards of one shape are computed alike
    or no more than what cannot depend  mixtures of experts batch all tokens anew, so that texts beside the changed one
    on that token changes, by rounding  move too: by as much as rounding, and a choice between experts, makes of it

The second needs a text that is changed beside several that are not, and is tried with one token after the other. What
a causal model shows is somewhere among the others' noise in one of these trials; what is not causal sticks out of it
in all.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sniffer.errors import UnsupportedModelError
from sniffer.types import MAIN_KINDS

from .differences import apart
from .selfcheck import Forward, Modules, Probe, named, observe_probe, probe_ids

TEXTS, TRIALS = 4, 8
"""Of the second question: side by side, and after each other at most."""
ABOVE_NOISE = 4
"""Times the mean change of what cannot depend on a token. That this is passed in all trials by noise of any law has a
chance below 4^-8 for each position (Markov)."""

Change = Float[Tensor, "batch seq"]
"""How far each position of a text has moved, over the largest value in the layer."""


def check_causal(first: Probe, forward: Forward, modules: Modules, vocabulary: int) -> None:
    """Refuses a backbone in which a token changes the vectors of earlier positions.

    Raises:
        UnsupportedModelError: it does, so that right padding would need a mask; or a layer gives no finite number at an
            earlier position, of which nothing can be shown.
    """
    _check_numbers(first)
    doubtful = _looks_ahead(first, modules)
    ids = first.ids.clone()
    ids[:, -1] = first.ids[:, 0]
    moved = changes(first, observe_probe(forward, ids, modules, pre=False))
    if not any(_early(change).any() for _, change in moved):
        return
    if doubtful is not None:
        raise _not_causal(f"{named(doubtful, modules)} gives weight to later tokens, and would to padding")
    ids = probe_ids(vocabulary, first.ids.device, rows=TEXTS)
    if (module := _sticks_out(ids, forward, modules)) is not None:
        raise _not_causal(f"a later token changes {type(module).__name__} at earlier positions, and padding would too")


def changes(one: Probe, other: Probe) -> list[tuple[nn.Module, Change]]:
    """How far the vectors of each attention are apart in two probes of one shape, and the output where there is one."""
    found = [
        (a.module, torch.stack([_change(getattr(a, kind), getattr(b, kind)) for kind in MAIN_KINDS]).amax(0))
        for a, b in zip(one.seen, other.seen, strict=True)
    ]
    if isinstance(one.output, Tensor) and one.output.dim() == 3:
        found.append((one.seen[-1].module, _change(one.output[:, None], other.output[:, None])))
    return found


def _change(before: Float[Tensor, "batch heads seq dim"], after: Float[Tensor, "batch heads seq dim"]) -> Change:
    """The largest difference at each position."""
    return apart(before, after).amax((1, 3)).cpu()


def _early(change: Change) -> Change:
    return change[:, :-1]


def _sticks_out(ids: Int[Tensor, "batch seq"], forward: Forward, modules: Modules) -> nn.Module | None:
    """The first module of which an earlier position of a changed text moves more than other texts do, in all trials."""
    plain = observe_probe(forward, ids, modules, pre=False)
    least: list[Tensor] = []
    noise: list[list[Tensor]] = []
    places: list[tuple[nn.Module, Tensor]] = []
    for trial in range(TRIALS):
        row, other = trial % TEXTS, ids.clone()
        # Another token of the text, so that it is one that the model knows.
        other[row, -1] = ids[row, trial % (ids.shape[1] - 1)]
        moved = changes(plain, observe_probe(forward, other, modules, pre=False))
        rest = [n for n in range(TEXTS) if n != row]
        signal = [_early(change)[row] for _, change in moved]
        least = [torch.minimum(*pair) for pair in zip(least, signal, strict=True)] if least else signal
        noise.append([_early(change)[rest] for _, change in moved])
        means = [torch.cat(of).mean(0) for of in zip(*noise, strict=True)]
        places = [
            (module, low > ABOVE_NOISE * mean) for (module, _), low, mean in zip(moved, least, means, strict=True)
        ]
        if not any(above.any() for _, above in places):
            return None
    return next(module for module, above in places if above.any())


def _looks_ahead(probe: Probe, modules: Modules) -> nn.Module | None:
    """A module whose softmax gives weight to later keys, which a mask may take away after it.

    Raises:
        UnsupportedModelError: one is given later keys, and nothing can take them away.
    """
    showing = {event.module for event in probe.seen}
    tokens, doubtful = probe.ids.shape[1], None
    for sight in probe.witness.sights:
        module = next((one for one in sight.running if one in showing), None)
        if module is None or sight.tokens != tokens or not sight.later:
            continue
        if sight.certain:
            raise _not_causal(
                f"{named(module, modules)} is given later tokens to attend to, and would be given padding"
            )
        doubtful = doubtful or module
    return doubtful


def _check_numbers(probe: Probe) -> None:
    for number, event in enumerate(probe.seen, 1):
        if not all(getattr(event, kind)[:, :, :-1].isfinite().any() for kind in ("q", "k")):
            raise UnsupportedModelError(
                f"{type(event.module).__name__}, attention {number} of {len(probe.seen)}, is given nothing but NaN and "
                "infinity by a short probe, of which nothing can be shown: see that the checkpoint is whole, or load "
                "it in another model.dtype"
            )


def _not_causal(why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"this backbone is not causal: {why}")
