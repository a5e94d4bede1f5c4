"""The identities of documents, in the order in which they come; one is used up only when its rows are kept."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

import numpy as np

from sniffer.errors import CaptureError, ConfigError
from sniffer.sampler.identity import stable_id


class ExampleIds:
    """Ids for documents: those that are given, else 0, 1, 2, ...

    `given` says whether there are any, `names` which texts numbers stand for. A list is checked at once, whatever else
    can be gone through as it is used.
    """

    def __init__(self, ids: Iterable[Any] | None) -> None:
        """
        Raises:
            ConfigError: an id is no whole number in [0, 2^63), or comes twice.
        """
        self.given = ids is not None
        self.names: dict[int, str] = {}
        self._known: set[int] = set()
        self._returned: deque[int] = deque()
        if isinstance(ids, str):
            raise ConfigError(f"example_ids={ids!r} is no list: give one number or text a document")
        if isinstance(ids, Sequence | np.ndarray):
            self._returned.extend(self._checked(one) for one in ids)
            ids = ()
        try:
            self._more = count() if ids is None else iter(ids)
        except TypeError:
            raise ConfigError(f"example_ids={ids!r} is no list: give one whole number a document") from None

    def take(self, n: int) -> list[int]:
        """The next `n` ids; none is taken where there are too few.

        Raises:
            CaptureError: there are too few.
            ConfigError: one is no id.
        """
        taken: list[int] = []
        try:
            while len(taken) < n:
                taken.append(self._returned.popleft() if self._returned else self._checked(next(self._more)))
        except StopIteration:
            self.give_back(taken)
            raise CaptureError(
                f"this call has more rows than example_ids are left ({len(taken)} for {n}): give one id a document"
            ) from None
        except ConfigError:
            self.give_back(taken)
            raise
        return taken

    def give_back(self, ids: Sequence[int]) -> None:
        """Takes back ids that were not used; they come first again."""
        self._returned.extendleft(reversed(ids))

    def _checked(self, value: Any) -> int:
        if isinstance(value, str):
            self.names[stable_id(value)] = value
            value = stable_id(value)
        try:
            number = operator.index(value)
        except TypeError:
            number = -1
        if isinstance(value, bool | np.bool_) or not 0 <= number < 2**63:
            raise ConfigError(f"example_ids has {value!r}: give whole numbers in [0, 2^63)")
        if self.given and number in self._known:
            raise ConfigError(
                f"example_ids has {self.names.get(number, number)} twice: give every document an id of its own"
            )
        if self.given:
            self._known.add(number)
        return number
