"""What a configuration asks of moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sniffer.errors import ConfigError
from sniffer.types import KINDS, SECONDS, Dataset, MomentsLayout, has_sections


@dataclass
class MomentsConfig:
    """Of which kinds sums over all positions are kept: one or a list; null for none.

    `second` is one of sniffer.types.SECONDS. `sections` are counted apart, where documents have some.
    """

    kinds: Any = None
    second: str = "full"
    sections: Any = None

    def __post_init__(self) -> None:
        self.kinds = _names("kinds", self.kinds)
        self.sections = _names("sections", self.sections)
        if unknown := [kind for kind in self.kinds or () if kind not in KINDS]:
            raise ConfigError(f"capture.moments.kinds names {unknown}: take some of {list(KINDS)}")
        if self.second not in SECONDS:
            raise ConfigError(f"capture.moments.second={self.second} must be one of {', '.join(SECONDS)}")
        if self.sections and not self.kinds:
            raise ConfigError("capture.moments.sections without capture.moments.kinds: say of which kinds")

    @property
    def layout(self) -> MomentsLayout | None:
        """As the manifest tells it; None where nothing is asked for."""
        return MomentsLayout(self.kinds, self.second, self.sections or ()) if self.kinds else None


def check_moments(wanted: MomentsConfig, dataset: Dataset, *, generates: bool = False) -> None:
    """Raises ConfigError where documents have no sections to count apart."""
    if wanted.sections and not has_sections(dataset, generates=generates):
        raise ConfigError(
            f"capture.moments.sections={list(wanted.sections)}: documents here have no sections (docs/text.md says "
            "which have)"
        )


def _names(key: str, value: Any) -> tuple[str, ...] | None:
    """Null stays null, and so does a list of nothing."""
    names = () if value is None else (value,) if isinstance(value, str) else tuple(value)
    if len(set(names)) != len(names) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"capture.moments.{key}={value} must be names, each once, or null")
    return names or None
