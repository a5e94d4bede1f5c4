"""The way over CUDA, without CUDA: transfer.py at work on a model of streams and of both caching allocators.

Streams do what they were given in order, but whenever they like: between any two steps of the host, some of what waits
is done, drawn by chance. Memory that is let go of is handed out again as soon as PyTorch's allocators would do so, and
whoever gets it writes over it:

    on the device    at once, for whoever works on the stream that it was made on; if other streams were recorded, once
                     these have done what they had to do by then
    pinned           once the streams that copied into it have done what they had to do by then

So a vector arrives as it was only if every wait, record and copy of transfer.py is there. Each is left out in turn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sniffer.forward import transfer as checked

ORDERS = 400

# The same source without the check of arguments, which are no tensors here.
SPEC = spec_from_file_location("transfer_unchecked", checked.__file__)
assert SPEC is not None and SPEC.loader is not None
module = module_from_spec(SPEC)
SPEC.loader.exec_module(module)
CudaTransfer = module.CudaTransfer


class Machine:
    """A device with streams, and the memory of both sides. Actions wait in their stream until it comes to them."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.queues: dict[str, list[Callable[[], None] | Event]] = {"compute": []}
        self.current = "compute"
        self.device: list[Block] = []
        self.pinned: list[Block] = []
        self.held_at_copy: list[int] = []
        """Pinned blocks in use each time that the host copies out of one."""

    def enqueue(self, action: Callable[[], None] | Event, stream: str | None = None) -> None:
        self.queues.setdefault(stream or self.current, []).append(action)
        self.some()

    def some(self) -> None:
        """Time passes: streams get on with their work, or do not."""
        for _ in range(self.chance.choice([0, 0, 0, 1, 2, 6])):
            self.step(self.chance.choice(list(self.queues)))

    def step(self, stream: str) -> bool:
        """The next action of a stream; False where it has to wait for another, or has none."""
        queue = self.queues[stream]
        if not queue or (isinstance(queue[0], Waiting) and not queue[0].event.done):
            return False
        action = queue.pop(0)
        if isinstance(action, Event):
            action.done = True
        elif not isinstance(action, Waiting):
            action()
        return True

    def until(self, event: Event) -> None:
        while not event.done:
            self.step(self.chance.choice(list(self.queues)))

    def mark(self, stream: str) -> Event:
        event = Event(self)
        self.queues.setdefault(stream, []).append(event)
        return event


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine, self.done = machine, False

    def synchronize(self) -> None:
        self.machine.until(self)


class Waiting(Event):
    """In a stream's queue: what comes after it waits for an event of another stream."""

    def __init__(self, event: Event) -> None:
        super().__init__(event.machine)
        self.event = event


class Block:
    """Memory that one number lies in. `after` are events that must be done before it is handed out again."""

    def __init__(self) -> None:
        self.value, self.free, self.after = 0.0, False, []  # type: ignore[var-annotated]


class Memory:
    """A tensor, as far as transfer.py looks at it; when nobody holds it, its allocator has its block back."""

    def __init__(self, machine: Machine, *, pinned: bool) -> None:
        self.machine, self.is_pinned = machine, pinned
        self.shape, self.dtype, self.device = (1, 1), "bfloat16", "cuda:0"
        self.used_by: set[str] = set()
        blocks = machine.pinned if pinned else machine.device
        found = next((one for one in blocks if one.free and all(event.done for event in one.after)), None)
        if found is None:
            found = Block()
            blocks.append(found)
        found.free = False
        self.block = found

    def __del__(self) -> None:
        self.block.after = [self.machine.mark(stream) for stream in self.used_by]
        self.block.free = True

    def copy_(self, source: Memory, non_blocking: bool) -> None:
        assert non_blocking
        here, there = self.block, source.block  # memory, whoever holds it by the time that it is copied
        self.used_by.add(self.machine.current)

        def copy() -> None:
            here.value = there.value

        self.machine.enqueue(copy)

    def record_stream(self, stream: Stream) -> None:
        self.used_by.add(stream.name)

    def clone(self) -> float:
        """The host reads at once what lies there now."""
        self.machine.held_at_copy.append(sum(not block.free for block in self.machine.pinned))
        self.machine.some()
        return self.block.value


class Stream:
    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name

    def wait_stream(self, other: Stream) -> None:
        self.machine.enqueue(Waiting(self.machine.mark(other.name)), self.name)

    def record_event(self) -> Event:
        return self.machine.mark(self.name)


def fake_torch(machine: Machine) -> Any:
    numbers = iter(range(99))

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        before, machine.current = machine.current, chosen.name
        yield
        machine.current = before

    cuda = SimpleNamespace(
        Stream=lambda device: Stream(machine, f"side {next(numbers)}"),
        current_stream=lambda device: Stream(machine, machine.current),
        stream=stream,
    )
    return SimpleNamespace(cuda=cuda, empty=lambda *_, dtype, pin_memory: Memory(machine, pinned=pin_memory))


def gathered(machine: Machine, value: float) -> Memory:
    """Rows of a layer: made on the compute stream, when it comes to them."""
    rows = Memory(machine, pinned=False)
    block = rows.block

    def fill() -> None:
        block.value = value

    machine.enqueue(fill)
    return rows


def all_arrive(transfer: Any, machine: Machine) -> bool:
    """Some batches, as passes.py runs them: each is settled once the next one has been through the model."""
    wanted, under_way, arrived = [], [], {}
    for batch in range(5):
        vectors = {}
        for layer in range(3):
            value = 1.0 + len(wanted)
            wanted.append(value)
            rows = gathered(machine, value)
            vectors[batch, str(layer)] = transfer.download(rows)
            del rows
            gathered(machine, -1.0)  # what the model makes next, and lets go of
        transfer.end_batch()
        under_way.append(vectors)
        del vectors
        if len(under_way) > 1:
            arrived |= transfer.settle(under_way.pop(0))
    while under_way:
        arrived |= transfer.settle(under_way.pop(0))
    found = [one.clone() if isinstance(one, Memory) else one for one in arrived.values()]
    return bool(np.array_equal(found, wanted))


def orders(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> list[bool]:
    results = []
    for seed in range(ORDERS):
        machine = Machine(seed)
        monkeypatch.setattr(module, "torch", fake_torch(machine))
        transfer = CudaTransfer()
        change(transfer)
        results.append(all_arrive(transfer, machine))
    return results


def test_every_vector_arrives_in_any_order(monkeypatch: pytest.MonkeyPatch):
    assert all(orders(monkeypatch, lambda transfer: None))


def test_pinned_memory_is_that_of_two_batches(monkeypatch: pytest.MonkeyPatch):
    """However long a run is: what was settled is handed out again."""
    most = 0
    for seed in range(50):
        machine = Machine(seed)
        monkeypatch.setattr(module, "torch", fake_torch(machine))
        assert all_arrive(CudaTransfer(), machine)
        most = max(most, len(machine.pinned))
    assert most <= 3 * 3  # of five batches of three: two under way, and one that is let go of as the next begins


def test_no_batch_is_there_twice(monkeypatch: pytest.MonkeyPatch):
    """As rows are copied out, what was copied is let go of: of three buffers, three, two, one are in use."""
    machine = Machine(0)
    monkeypatch.setattr(module, "torch", fake_torch(machine))
    transfer = CudaTransfer()
    vectors = {(layer, "q"): transfer.download(gathered(machine, float(layer))) for layer in range(3)}
    transfer.end_batch()
    assert transfer.settle(vectors) == {(layer, "q"): float(layer) for layer in range(3)}
    assert machine.held_at_copy == [3, 2, 1] and not vectors


def no_record(transfer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "record_stream", lambda self, stream: None)


def no_wait_for_the_model(transfer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None)


def no_wait_in_settle(transfer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "synchronize", lambda self: None)


def pinned_memory_handed_on(transfer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(vectors: Any) -> Any:
        for event in transfer.ended.popleft():
            event.synchronize()
        return {pair: chunk.block for pair, chunk in vectors.items()}

    monkeypatch.setattr(transfer, "settle", settle)


@pytest.mark.parametrize("mutant", [no_record, no_wait_for_the_model, no_wait_in_settle, pinned_memory_handed_on])
def test_nothing_of_it_can_be_left_out(monkeypatch: pytest.MonkeyPatch, mutant: Callable):
    with monkeypatch.context() as changed:
        assert not all(orders(changed, lambda transfer: mutant(transfer, changed)))
