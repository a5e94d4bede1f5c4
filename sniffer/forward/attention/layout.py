"""What a run keeps of attention, from what is asked for. Needs no torch: plans are made without."""

from __future__ import annotations

from sniffer.errors import ConfigError
from sniffer.forward.selection import CaptureConfig
from sniffer.sampler import Picker
from sniffer.types import AttentionLayout


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
    return AttentionLayout(capture.attention, buckets, longest.bit_length(), capture.attention_top)
