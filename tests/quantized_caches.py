"""Live capture with caches that quanto and hqq quantise is what transformers attends with in a process of its own.

It needs these packages, which are no part of `make test`; fp8, which needs none, is in tests/models/test_live.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.models import test_live
from tests.models.generation_witness import PACKAGED


@pytest.mark.parametrize("cache", PACKAGED)
def test_vectors_and_statistics_are_those_of_a_process_of_its_own(cache: str, tmp_path: Path):
    name = f"{cache}:gemma"
    witness = test_live.seen_by_witness(tmp_path, [name, "gemma"])
    test_live.test_live_vectors_are_those_that_transformers_attends_with(name, witness)
    test_live.test_live_statistics_are_those_of_what_transformers_attends_with(name, witness)
    rounded, whole = (witness[f"{one}/0/0/k"] for one in (name, "gemma"))
    assert np.allclose(rounded[:, :7], whole[:, :7], atol=1e-5)
    # What steps come to is another matter, beyond the first layer.
    assert not np.allclose(witness[f"{name}/0/3/q"], witness["gemma/0/3/q"], atol=1e-3)
