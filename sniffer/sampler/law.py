"""A sampler's law as a table over positions, once it has been shown to be one.

A sampler may be a user's own, so nothing that it answers is taken on trust: one number per position, buckets that fit
their column, probabilities from 0 to 1 and the same throughout a bucket. And it must be a law of the position:
what a position gets may depend neither on the others asked about with it, nor on earlier questions, nor on chance, or
batches and lengths of documents would decide what is kept. So the sampler is asked again, about some of the positions
in another order, and a longer table must begin with the shorter one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float64, Int32, Int64

from sniffer.errors import ConfigError, SnifferError, first_line

if TYPE_CHECKING:
    from sniffer.sampler import Sampler

LARGEST_BUCKET = int(np.iinfo(np.int32).max)
ROUNDING = 1e-9
"""Relative difference of two answers for one position: mathematics of arrays may round otherwise at other lengths."""

Positions = Int64[np.ndarray, " n"]


@dataclass(frozen=True)
class Law:
    """The bucket and the keep probability of each of the first positions."""

    buckets: Int32[np.ndarray, " n"]
    probabilities: Float64[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.buckets)


NO_LAW = Law(np.empty(0, np.int32), np.empty(0, np.float64))


def law_of(sampler: Sampler, n: int, shorter: Law = NO_LAW) -> Law:
    """The law over the first `n` positions.

    Args:
        shorter: the law over fewer positions, as the same sampler told it before.

    Raises:
        ConfigError: it is not one; the message names the sampler, the method and a position.
    """
    name, positions = type(sampler).__name__, np.arange(n, dtype=np.int64)
    law = _told(sampler, positions)
    # Fewer, others first and last, and backwards.
    some = positions[n // 2 :: -3]
    _require_same(name, some, _told(sampler, some), law)
    _require_same(name, positions[: len(shorter)], shorter, law)
    _require_constant_within_buckets(name, law)
    return law


def _told(sampler: Sampler, positions: Positions) -> Law:
    return Law(
        _as_buckets(_answer(sampler, sampler.bucket, positions), sampler, positions),
        _as_probabilities(_answer(sampler, sampler.probability, positions), sampler, positions),
    )


def _answer(sampler: Sampler, method: Callable[[Any], Any], positions: Positions) -> np.ndarray:
    """What a method returns: one number per position, of whatever type."""
    what = f"sampler {type(sampler).__name__}: {method.__name__}()"
    try:
        # Its own copy, which it may change.
        answer = method(positions.copy())
    except SnifferError:
        raise
    except Exception as error:  # of a user's code: any
        raise ConfigError(f"{what} fails: {_told_of(error, sampler)}") from error
    if type(answer) is not np.ndarray:
        raise ConfigError(f"{what} returns {_named(answer)}: wanted a numpy array with one number per position")
    if answer.shape != positions.shape:
        raise ConfigError(f"{what} returns shape {answer.shape} for {len(positions)} positions: wanted one number each")
    if answer.dtype.kind not in "biuf":
        raise ConfigError(f"{what} returns an array of {answer.dtype}: wanted numbers")
    return answer


def _as_buckets(answer: np.ndarray, sampler: Sampler, positions: Positions) -> Int32[np.ndarray, " n"]:
    what = f"sampler {type(sampler).__name__}: bucket() gives"
    whole = answer if answer.dtype.kind != "f" else np.where(np.isfinite(answer), np.trunc(answer), 0)
    if (place := _first(whole != answer)) is not None:
        raise ConfigError(f"{what} {answer[place]} at position {positions[place]}: buckets are whole numbers")
    if (place := _first(answer < 0)) is not None:
        raise ConfigError(f"{what} a negative bucket, {answer[place]}, at position {positions[place]}: number from 0")
    if (place := _first(answer > LARGEST_BUCKET)) is not None:
        raise ConfigError(f"{what} {answer[place]} at position {positions[place]}: use buckets up to {LARGEST_BUCKET}")
    return answer.astype(np.int32)


def _as_probabilities(answer: np.ndarray, sampler: Sampler, positions: Positions) -> Float64[np.ndarray, " n"]:
    found = answer.astype(np.float64)
    if (place := _first(~((found >= 0) & (found <= 1)))) is not None:
        raise ConfigError(
            f"sampler {type(sampler).__name__}: probability() gives a probability outside [0, 1], {found[place]}, at "
            f"position {positions[place]}: clip it in probability()"
        )
    return found


def _require_same(name: str, positions: Positions, answers: Law, law: Law) -> None:
    """The answers for these positions against the law."""
    buckets, probabilities = law.buckets[positions], law.probabilities[positions]
    apart = np.abs(answers.probabilities - probabilities) > ROUNDING * probabilities
    for method, found, wanted, wrong in (
        ("bucket", answers.buckets, buckets, answers.buckets != buckets),
        ("probability", answers.probabilities, probabilities, apart),
    ):
        if (place := _first(wrong)) is not None:
            raise ConfigError(
                f"sampler {name}: {method}() gives {wanted[place]} and {found[place]} for one position, "
                f"{positions[place]}: its answer must depend on nothing but the position, neither on the others in the "
                "array nor on chance or earlier calls"
            )


def _require_constant_within_buckets(name: str, law: Law) -> None:
    order = np.lexsort((law.probabilities, law.buckets))
    same_bucket = np.diff(law.buckets[order]) == 0
    place = _first(same_bucket & (np.diff(law.probabilities[order]) != 0))
    if place is not None:
        one, other = sorted(order[place : place + 2].tolist())
        found = f"{law.probabilities[one]} at position {one}, {law.probabilities[other]} at {other}"
        raise ConfigError(
            f"sampler {name} gives different probabilities within one bucket ({found}): give each rate its own bucket"
        )


def _first(wrong: np.ndarray) -> int | None:
    return int(np.argmax(wrong)) if wrong.any() else None


def _named(answer: Any) -> str:
    return "None" if answer is None else f"a {type(answer).__name__}"


def _told_of(error: Exception, sampler: Sampler) -> str:
    """The class of an error, what it says, and where it came from: in the sampler's own file, if it is there."""
    frames = extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == inspect.getsourcefile(type(sampler))]
    frame = (own or frames)[-1]
    said = first_line(error) if str(error).strip() else ""
    return f"{type(error).__name__}{': ' if said else ''}{said} ({frame.filename} line {frame.lineno})"
