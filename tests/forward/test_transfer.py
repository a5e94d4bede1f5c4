"""Nothing is read from a download before it has settled, and the way over CUDA changes no value."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from sniffer.forward.accumulator import Accumulator
from sniffer.forward.gather import gather
from sniffer.forward.observer import Observer, Wanted, draw
from sniffer.forward.selection import Selection
from sniffer.forward.transfer import BlockingTransfer, CudaTransfer, HostTransfer, Transfer, transfer_for
from sniffer.sampler import LogUniform, Picker
from sniffer.storage.sort import as_array
from sniffer.tap import TAP, tap
from sniffer.types import Document, LayerGeometry, TokenBatch

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
    monkeypatch.setattr("sniffer.forward.passes.transfer_for", lambda device: late)
    assert run("sampler=all", "batch.max_tokens=1").manifest.digest == plain
    assert list(late.under_way) == [[]]


def test_each_kind_of_device_has_its_way():
    assert isinstance(transfer_for(torch.device("cpu")), HostTransfer)
    assert isinstance(transfer_for(torch.device("meta")), BlockingTransfer)


def test_what_was_gathered_is_what_is_written():
    """On a processor a row is copied once, out of the layer's states: then the same memory goes the whole way."""
    device, batch = torch.device("cpu"), batch_of(40, 30)
    for dtype in (torch.float32, torch.bfloat16):
        observer = watched_on(device, batch, HostTransfer(), dtype=dtype)
        gathered = {pair: chunk.data_ptr() for pair, chunk in observer.vectors.items()}
        heads = {pair: tuple(range(chunk.shape[1] // 8)) for pair, chunk in observer.vectors.items()}
        accumulator = Accumulator(Selection(heads))
        accumulator.add(batch, observer.picks, HostTransfer().settle(observer.vectors))
        for pair, place in gathered.items():
            [chunk] = accumulator.columns(*pair, 8).vectors
            assert len(chunk) and chunk.data_ptr() == place == as_array(chunk).ctypes.data


def test_a_device_without_streams_is_waited_for_once_a_batch():
    """No copy is asked for while layers pass by; what is copied in the end are the rows as they were."""
    transfer, copies = BlockingTransfer(), []

    class Elsewhere(torch.Tensor):
        def cpu(self) -> torch.Tensor:
            copies.append(self.shape)
            return self.as_subclass(torch.Tensor)

    rows = {(layer, "q"): torch.full((3, 4), float(layer)) for layer in range(5)}
    there = {pair: transfer.download(chunk.as_subclass(Elsewhere)) for pair, chunk in rows.items()}
    transfer.end_batch()
    assert not copies
    here = transfer.settle(there)
    assert len(copies) == 5 and all(torch.equal(here[pair], chunk) for pair, chunk in rows.items())


def test_a_run_over_a_device_without_streams_is_the_same(run: Callable, monkeypatch: pytest.MonkeyPatch):
    plain = run("sampler.base_rate=20", "batch.max_tokens=50").manifest.digest
    monkeypatch.setattr("sniffer.forward.passes.transfer_for", lambda device: BlockingTransfer())
    assert run("sampler.base_rate=20", "batch.max_tokens=50").manifest.digest == plain


def test_batches_take_turns_with_two_sets_of_streams():
    """Without CUDA: which streams each batch has, and which it waits for when it is settled."""
    transfer, devices = CudaTransfer(), [torch.device("cuda", 0), torch.device("cuda", 1)]
    even, odd = ({device: MagicMock(name=f"{device} {turn}") for device in devices} for turn in range(2))
    transfer.streams = deque([even, odd])
    for of_batch in (even, odd, even):
        assert transfer.streams[0] is of_batch
        transfer.end_batch()
    expected = [[stream.record_event.return_value for stream in streams.values()] for streams in (even, odd, even)]
    assert list(transfer.ended) == expected


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


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Within the test, whatever makes the processor wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def watched_on(
    device: torch.device, batch: TokenBatch, transfer: Transfer, rate: float = 16, dtype: torch.dtype = torch.float32
) -> Observer:
    """A forward of four layers by hand: all heads and some heads, in either layout."""
    every = (0, 1, 2, 3)
    selection = Selection({(0, "q"): every, (0, "k"): (0, 1), (1, "q"): (1, 3), (2, "q"): every, (3, "q"): (1, 3)})
    heads, dims = {"q": 4, "k": 2, "v": 2}, dict.fromkeys("qkv", 8)
    modules = [torch.nn.Identity() for _ in range(4)]
    geometry = {n: LayerGeometry(n, f"layers.{n}", heads, dims, None, None) for n in range(4)}
    plan = Wanted(selection, geometry, {module: n for n, module in enumerate(modules)}, transfer, device)
    observer = Observer(batch, draw(Picker(LogUniform(base_rate=float(rate)), 0), selection, batch), plan)
    shape = (len(batch.documents), batch.seq_len)
    with tap(observer):
        for layer, module in enumerate(modules):
            states = {
                kind: torch.randn(*shape, n, 8, device=device, dtype=dtype).transpose(1, 2) for kind, n in heads.items()
            }
            laid_out = {kind: one.contiguous() if layer >= 2 else one for kind, one in states.items()}
            TAP.observe(module, **laid_out)
    transfer.end_batch()
    return observer


def batch_of(*lengths: int) -> TokenBatch:
    documents = (Document(i, str(i), np.zeros(n, np.int32), truncated=False) for i, n in enumerate(lengths))
    return TokenBatch(tuple(documents), pad_id=0)


@needs_cuda
def test_a_batch_without_picks_comes_back_empty():
    transfer, device = CudaTransfer(), torch.device("cuda", 0)
    settled = transfer.settle(watched_on(device, batch_of(50), transfer, rate=0).vectors)
    assert {pair: tuple(chunk.shape) for pair, chunk in settled.items()} == {
        (0, "q"): (0, 32),
        (0, "k"): (0, 16),
        (1, "q"): (0, 16),
        (2, "q"): (0, 32),
        (3, "q"): (0, 16),
    }


@needs_cuda
def test_cuda_waits_for_nothing_before_it_settles(no_waiting: None):
    transfer, device = CudaTransfer(), torch.device("cuda", 0)
    observers = [watched_on(device, batch_of(500, 300), transfer) for _ in range(2)]
    transfer.upload(batch_of(500, 300).input_ids(), device)
    torch.cuda.set_sync_debug_mode("default")
    for observer in observers:
        settled = transfer.settle(observer.vectors)
        assert not any(chunk.is_pinned() for chunk in settled.values())


@needs_cuda
def test_cuda_uses_the_pinned_buffers_of_settled_batches_again():
    transfer, device = CudaTransfer(), torch.device("cuda", 0)

    def rounds(n: int) -> int:
        """Batches as a run has them, two at a time; pinned blocks made until then."""
        in_flight = [watched_on(device, batch_of(512), transfer)]
        for _ in range(n):
            in_flight.append(watched_on(device, batch_of(512), transfer))
            transfer.settle(in_flight.pop(0).vectors)
        transfer.settle(in_flight.pop().vectors)
        torch.cuda.synchronize()
        return torch.cuda.host_memory_stats()["num_host_alloc"]

    # Six buffers a batch: without using them again it would be a hundred more.
    few = rounds(3)
    assert rounds(20) - few < 20


@needs_cuda
def test_a_run_on_cuda_picks_what_a_run_on_the_processor_picks(run: Callable):
    one, other = (run("sampler.base_rate=32", f"model.device={device}") for device in ("cpu", "cuda"))
    for layer in one.layers:
        for kind in ("q", "k"):
            here, there = (each.vectors(layer=layer, head=1, kind=kind) for each in (one, other))
            assert (here.positions == there.positions).all() and (here.example_ids == there.example_ids).all()
            np.testing.assert_allclose(there.vectors, here.vectors, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices on this machine")
def test_batches_of_a_model_over_two_devices_settle_whole():
    transfer = CudaTransfer()
    indices = np.arange(0, 512, 7, dtype=np.int32)
    states = torch.randn(1, 512, 4, 8).transpose(1, 2)
    vectors = {}
    for layer in range(8):
        device = torch.device("cuda", layer % 2)
        vectors[layer, "q"] = transfer.download(gather(states.to(device), transfer.upload(indices, device)))
    transfer.end_batch()
    expected = gather(states, torch.from_numpy(indices))
    assert all(torch.equal(chunk, expected) for chunk in transfer.settle(vectors).values())
