"""What a run keeps of attention, from what is asked for. Needs no torch: plans are made without."""

from __future__ import annotations

from sniffer.errors import ConfigError
from sniffer.forward.selection import CaptureConfig
from sniffer.sampler import Picker
from sniffer.types import AttentionLayout, Checkpoint, Dataset, has_sections


def check_attention(capture: CaptureConfig, model: Checkpoint, dataset: Dataset, *, generates: bool = False) -> None:
    """Meets what can be known to be wrong before the model loads.

    Raises:
        ConfigError: the model is compiled, or documents have no sections to weigh.
    """
    if capture.attention and getattr(model, "compile", False):
        raise ConfigError(
            "capture.attention is not possible with model.compile=true, which hides calls of attention: leave one out"
        )
    if capture.attention_sections and not has_sections(dataset, generates=generates):
        raise ConfigError(
            f"capture.attention_sections={list(capture.attention_sections)}: documents here have no sections "
            "(docs/text.md says which have)"
        )


def layout_of(capture: CaptureConfig, picker: Picker, longest: int | None) -> AttentionLayout | None:
    """The columns of a row, as many as the longest document may need; None where nothing is asked for.

    Raises:
        ConfigError: nothing says how long documents may be.
    """
    if not capture.attention:
        return None
    if longest is None:
        raise ConfigError("capture.attention needs to know how long documents may be: set dataset.max_tokens")
    buckets = 1 + int(picker.side("k").buckets_until(longest).max())
    sections = (capture.attention_sections or ()) if "section" in capture.attention else ()
    return AttentionLayout(capture.attention, buckets, longest.bit_length(), capture.attention_top, sections)
