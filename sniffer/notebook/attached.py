"""What sniff needs of a model that somebody else calls: a backbone, and the modules by which it may be called."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from sniffer.types import Backbone


class Attached(Backbone, Protocol):
    """A tapped backbone inside a model that its user calls."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def calls(self) -> Sequence[nn.Module]:
        """The modules by which it may be called, the outermost first, itself last."""

    @property
    def max_positions(self) -> int | None:
        """Tokens of the longest text that it takes; None where that is not known."""

    def undisturbed(self) -> AbstractContextManager[None]:
        """For the length of a `with`, whatever runs it leaves no trace."""

    def why_not(self, claim: str, module: nn.Module, use_cache: Any = None, *, pre: bool = False) -> str:
        """Why calls of `module` that make a claim cannot be captured; empty where the model has proven it. `pre`:
        the pre kinds too."""
