"""Gathering equals plain indexing, whatever the memory layout, and never aliases the model's tensors."""

from __future__ import annotations

import pytest
import torch

from sniffer.forward.gather import gather

BATCH, HEADS, SEQ, DIM = 3, 4, 11, 5


def layouts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """(batch, heads, seq, dim) tensors as models make them."""
    by_token = torch.randn(BATCH, SEQ, HEADS, DIM, dtype=dtype)
    fused = torch.randn(BATCH, SEQ, 3 * HEADS * DIM, dtype=dtype)
    return {
        "token-major": by_token.transpose(1, 2),
        "head-major": torch.randn(BATCH, HEADS, SEQ, DIM, dtype=dtype),
        "slice of fused qkv": fused[..., HEADS * DIM : 2 * HEADS * DIM].view(BATCH, SEQ, HEADS, DIM).transpose(1, 2),
        "shared by heads": torch.randn(BATCH, 1, SEQ, DIM, dtype=dtype).expand(-1, HEADS, -1, -1),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [None, [2], [0, 3]])
@pytest.mark.parametrize("layout", list(layouts(torch.float32)))
def test_gather_is_plain_indexing(layout: str, heads: list[int] | None, dtype: torch.dtype):
    states = layouts(dtype)[layout]
    rows = torch.tensor([0, 0, 2, 2, 1], dtype=torch.int32)
    positions = torch.tensor([0, 10, 3, 4, 7], dtype=torch.int32)
    active = None if heads is None else torch.tensor(heads, dtype=torch.int32)
    gathered = gather(states, rows * SEQ + positions, active)
    expected = torch.stack([states[r, :, p] for r, p in zip(rows.tolist(), positions.tolist(), strict=True)])
    expected = expected if heads is None else expected[:, heads]
    assert gathered.dtype == dtype and gathered.is_contiguous()
    assert torch.equal(gathered, expected.reshape(len(rows), -1))


@pytest.mark.parametrize("layout", list(layouts(torch.float32)))
def test_gathered_rows_are_a_copy(layout: str):
    states = layouts(torch.float32)[layout]
    every = torch.arange(BATCH * SEQ, dtype=torch.int32)
    gathered = gather(states, every)
    assert gathered.untyped_storage().data_ptr() != states.untyped_storage().data_ptr()


@pytest.mark.parametrize("heads", [None, torch.tensor([1], dtype=torch.int32)])
def test_no_picks_give_no_rows(heads: torch.Tensor | None):
    states = layouts(torch.float32)["token-major"]
    width = HEADS * DIM if heads is None else DIM
    assert gather(states, torch.empty(0, dtype=torch.int32), heads).shape == (0, width)
