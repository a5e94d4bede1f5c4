"""Nothing is read from a download before it has settled, and the way over CUDA changes no value."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sniffer.gather import gather
from sniffer.transfer import BlockingTransfer, CudaTransfer, HostTransfer, transfer_for

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


class LateTransfer:
    """A device whose copies arrive only when they are waited for; until then they hold nonsense."""

    def __init__(self) -> None:
        self.under_way: deque[list[tuple[torch.Tensor, torch.Tensor]]] = deque([[]])

    def upload(self, indices: np.ndarray, device: torch.device) -> torch.Tensor:
        return torch.from_numpy(indices)

    def download(self, vectors: torch.Tensor) -> torch.Tensor:
        host = torch.full_like(vectors, -12345.0)
        self.under_way[-1].append((host, vectors))
        return host

    def end_batch(self) -> None:
        self.under_way.append([])

    def settle(self, vectors: dict) -> dict:
        arrived = self.under_way.popleft()
        assert {id(host) for host, _ in arrived} == {id(chunk) for chunk in vectors.values()}
        for host, device in arrived:
            host.copy_(device)
        return vectors


def test_a_run_settles_each_batch_before_it_keeps_it(run: Callable, monkeypatch: pytest.MonkeyPatch):
    plain = run("sampler=all", "batch.max_tokens=1").manifest.digest
    late = LateTransfer()
    monkeypatch.setattr("sniffer.passes.transfer_for", lambda device: late)
    assert run("sampler=all", "batch.max_tokens=1").manifest.digest == plain
    assert list(late.under_way) == [[]]


def test_each_kind_of_device_has_its_way():
    assert isinstance(transfer_for(torch.device("cpu")), HostTransfer)
    assert isinstance(transfer_for(torch.device("meta")), BlockingTransfer)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_brings_back_what_was_gathered(dtype: torch.dtype):
    transfer = CudaTransfer()
    states = torch.randn(2, 100, 4, 8, dtype=dtype).transpose(1, 2)
    indices = np.array([0, 5, 150, 199], dtype=np.int32)
    expected = gather(states, torch.from_numpy(indices))
    rows = transfer.download(gather(states.cuda(), transfer.upload(indices, torch.device("cuda"))))
    transfer.end_batch()
    settled = transfer.settle({(0, "q"): rows})
    assert torch.equal(settled[0, "q"], expected)


@needs_cuda
def test_cuda_waits_for_nothing_before_it_settles():
    transfer = CudaTransfer()
    states = torch.randn(1, 4, 512, 8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        indices = transfer.upload(np.arange(0, 512, 7, dtype=np.int32), torch.device("cuda"))
        kept = [transfer.download(gather(states, indices)) for _ in range(20)]
        transfer.end_batch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(transfer.settle({(layer, "q"): rows for layer, rows in enumerate(kept)})) == 20
