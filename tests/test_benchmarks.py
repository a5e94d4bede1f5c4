"""The suites of benchmarks that stand in for parts of the product still fit it."""

from __future__ import annotations

from benchmarks import ceiling
from sniffer.forward.selection import CaptureConfig, select
from sniffer.sampler import LogUniform, Picker


def test_a_backbone_that_costs_nothing_is_captured_and_written():
    selection = select(ceiling.GEOMETRY, CaptureConfig())
    seconds, clock = ceiling.run(ceiling.Free(), selection, Picker(LogUniform(), 0), length=256, tokens=512)
    assert seconds > 0
    assert all(clock.seconds[stage] > 0 for stage in ("inference", "sample", "capture", "write"))
