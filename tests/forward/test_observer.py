"""What the observer gathers, and the accumulator then hands over, is what was seen at the picked positions."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import numpy as np
import pytest
import torch

from sniffer.errors import CaptureError
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.observer import Observer, Wanted, draw
from sniffer.forward.selection import Selection
from sniffer.forward.transfer import HostTransfer
from sniffer.sampler import All, LogUniform, Picker, Sampler
from sniffer.tap import TAP, StopForward, set_aside, tap
from sniffer.types import KIND, KINDS, Document, LayerGeometry, TokenBatch

QUERY_HEADS, KEY_HEADS, DIM = 4, 2, 3
MODULES = [torch.nn.Identity() for _ in range(3)]
STRANGER = torch.nn.Identity()


def geometry() -> dict[int, LayerGeometry]:
    heads = {kind: QUERY_HEADS if KIND[kind].draw == "q" else KEY_HEADS for kind in KINDS}
    dims = dict.fromkeys(KINDS, DIM)
    return {n: LayerGeometry(n, f"layers.{n}", heads, dims, None, None) for n in range(len(MODULES))}


def batch_of(*lengths: int) -> TokenBatch:
    documents = [
        Document(100 + i, str(i), np.arange(n, dtype=np.int32) + 1000 * i, truncated=False)
        for i, n in enumerate(lengths)
    ]
    return TokenBatch(tuple(documents), pad_id=0)


def states(batch: TokenBatch) -> dict[str, torch.Tensor]:
    shape = (len(batch.documents), batch.seq_len)
    return {kind: torch.randn(*shape, heads, DIM).transpose(1, 2) for kind, heads in geometry()[0].heads.items()}


SELECTION = Selection(
    {(0, "q"): (0, 1, 2, 3), (0, "k"): (0, 1), (2, "q"): (1, 3), (2, "q_pre"): (1, 3), (2, "v"): (1,)}
)


def observed(sampler: Sampler, batch: TokenBatch):
    """Runs a forward of three layers by hand; returns what each layer showed, and the observer."""
    layer_of = {module: number for number, module in enumerate(MODULES)}
    plan = Wanted(SELECTION, geometry(), layer_of, HostTransfer(), torch.device("cpu"))
    observer = Observer(batch, draw(Picker(sampler, 0), SELECTION, batch), plan)
    shown = [states(batch) for _ in MODULES]
    with tap(observer, pre=True):
        TAP.observe(STRANGER, **states(batch))
        for module, layer_states in zip(MODULES, shown, strict=True):
            TAP.observe(module, **layer_states)
    return shown, observer


@pytest.mark.parametrize("sampler", [All(bucket_size=4), LogUniform(base_rate=6.0, min_bucket_size=8)])
def test_rows_are_the_states_at_their_positions(sampler: Sampler):
    accumulator = Accumulator(SELECTION)
    shown_by_example: dict[int, tuple[list, int]] = {}
    for batch in (batch_of(30, 17), batch_of(25)):
        batch = TokenBatch(
            tuple(Document(d.example_id + batch.seq_len, d.source_id, d.token_ids, False) for d in batch.documents),
            0,
        )
        shown, observer = observed(sampler, batch)
        accumulator.add(batch, observer.picks, observer.vectors)
        for row, document in enumerate(batch.documents):
            shown_by_example[document.example_id] = (shown, row)
    for (layer, kind), heads in SELECTION.heads.items():
        columns = accumulator.columns(layer, kind, DIM)
        assert columns.heads == heads and len(columns) > 0
        vectors = torch.cat(columns.vectors).view(len(columns), len(heads), DIM)
        for index, (example, position) in enumerate(zip(columns.rows.example_id, columns.rows.position, strict=True)):
            shown, row = shown_by_example[int(example)]
            expected = shown[layer][kind][row, :, position][list(heads)]
            assert torch.equal(vectors[index], expected)
        assert (columns.rows.bucket == sampler.bucket(columns.rows.position.astype(np.int64))).all()
        assert (columns.rows.token_id % 1000 == columns.rows.position).all()


def test_kinds_of_one_draw_share_positions():
    batch = batch_of(60)
    _, observer = observed(LogUniform(base_rate=6.0, min_bucket_size=8), batch)
    accumulator = Accumulator(SELECTION)
    accumulator.add(batch, observer.picks, observer.vectors)
    q, q_pre = accumulator.columns(2, "q", DIM), accumulator.columns(2, "q_pre", DIM)
    assert q.rows.same(q_pre.rows) and len(q)


def test_accumulated_bytes_are_those_of_the_vectors_and_are_let_go():
    batch = batch_of(10)
    _, observer = observed(All(), batch)
    accumulator = Accumulator(SELECTION)
    accumulator.add(batch, observer.picks, observer.vectors)
    width = sum(len(heads) for heads in SELECTION.heads.values())
    assert accumulator.nbytes == 10 * width * DIM * 4
    assert accumulator.rows == {"q": 60, "k": 20, "q_pre": 20, "v": 10}
    for layer, kind in SELECTION.heads:
        accumulator.release(layer, kind)
    assert accumulator.nbytes == 0


def test_a_batch_that_was_not_seen_whole_is_not_added():
    batch = batch_of(10)
    _, observer = observed(All(), batch)
    del observer.vectors[2, "v"]
    accumulator = Accumulator(SELECTION)
    with pytest.raises(CaptureError, match=r"layers \[2\] have shown nothing in a text of 10 tokens"):
        accumulator.add(batch, observer.picks, observer.vectors)
    assert accumulator.nbytes == 0 and len(accumulator.columns(0, "q", DIM)) == 0


def test_nothing_after_the_last_wanted_layer_is_computed():
    selection = Selection({(1, "q"): (0,)})
    layer_of = {module: number for number, module in enumerate(MODULES)}
    plan = Wanted(selection, geometry(), layer_of, HostTransfer(), torch.device("cpu"))
    batch = batch_of(5)
    observer = Observer(batch, draw(Picker(All(), 0), selection, batch), plan)
    reached = []
    with tap(observer):
        for number, module in enumerate(MODULES):
            TAP.observe(module, **states(batch))
            reached.append(number)
    assert reached == [0]
    with pytest.raises(StopForward):
        observer(_seen(MODULES[1], batch))


def _seen(module: torch.nn.Module, batch: TokenBatch):
    from sniffer.tap import Seen

    return Seen(module, **states(batch), scaling=None, sliding_window=None)


def test_the_tap_is_given_back_after_an_exception():
    with pytest.raises(ZeroDivisionError), tap(lambda seen: None, pre=True):
        raise ZeroDivisionError
    assert TAP.observer is None and not TAP.wants_pre


def test_two_taps_at_once_are_refused():
    with (
        tap(lambda seen: None),
        pytest.raises(RuntimeError, match="another tap is open"),
        tap(lambda seen: None),
    ):
        pass


def test_a_tap_is_its_threads_own():
    """What another thread runs meanwhile is not shown, costs it no pre kinds, and has a tap of its own."""
    mine: list[torch.nn.Module] = []
    theirs: list[torch.nn.Module] = []
    wanted: list[bool] = []

    def elsewhere() -> None:
        TAP.observe(STRANGER, **states(batch_of(3)))
        wanted.append(TAP.wants_pre)
        with tap(lambda seen: theirs.append(seen.module)):
            TAP.observe(MODULES[1], **states(batch_of(3)))

    with tap(lambda seen: mine.append(seen.module), pre=True):
        thread = Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert TAP.wants_pre and TAP.observer is not None
        TAP.observe(MODULES[0], **states(batch_of(3)))
    assert (mine, theirs, wanted) == ([MODULES[0]], [MODULES[1]], [False])
    assert TAP.observer is None and not TAP.wants_pre


def test_a_tap_can_be_set_aside():
    shown: list[torch.nn.Module] = []
    with tap(lambda seen: shown.append(seen.module), pre=True):
        with set_aside(), tap(lambda seen: None):
            TAP.observe(MODULES[0], **states(batch_of(3)))
            assert not TAP.wants_pre
        TAP.observe(MODULES[1], **states(batch_of(3)))
        assert TAP.wants_pre
    assert shown == [MODULES[1]]


class NotingTransfer(HostTransfer):
    """Notes what was asked for which device: how many indices."""

    def __init__(self) -> None:
        self.asked: list[tuple[torch.device, int]] = []

    def upload(self, indices: np.ndarray, device: torch.device) -> torch.Tensor:
        self.asked.append((device, len(indices)))
        return super().upload(indices, device)


def test_each_device_of_a_spread_out_model_gets_the_indices_once_a_batch_and_the_heads_once():
    first, other = torch.device("meta"), torch.device("cpu")
    transfer = NotingTransfer()
    layer_of = {module: number for number, module in enumerate(MODULES)}
    plan = Wanted(SELECTION, geometry(), layer_of, transfer, first)
    heads = [(other, len(SELECTION.heads[2, kind])) for kind in ("q", "q_pre", "v")]
    for n_tokens, more in ((12, heads), (20, [])):
        batch = batch_of(n_tokens)
        transfer.asked.clear()
        observer = Observer(batch, draw(Picker(All(), 0), SELECTION, batch), plan)
        indices = len(SELECTION.draws) * n_tokens
        assert transfer.asked == [(first, indices)]
        with tap(observer, pre=True):
            for module in MODULES:
                TAP.observe(module, **states(batch))
        assert transfer.asked == [(first, indices), (other, indices), *more]
        assert observer.vectors.keys() == SELECTION.heads.keys()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda shown: [*shown, shown[0]], "layer 0 shows its q twice"),
        (lambda shown: [{**shown[0], "k": shown[0]["k"][:, :, :-1]}, *shown[1:]], "layer 0 shows its k as .* wanted"),
        (lambda shown: [{**shown[0], "q": shown[0]["q"][:1]}, *shown[1:]], "layer 0 shows its q as .* wanted"),
    ],
)
def test_what_was_proven_at_start_up_must_hold_for_each_batch(change: Callable[[list], list], complaint: str):
    batch = batch_of(12, 9)
    plan = Wanted(SELECTION, geometry(), {MODULES[0]: 0}, HostTransfer(), torch.device("cpu"))
    observer = Observer(batch, draw(Picker(All(), 0), SELECTION, batch), plan)
    observer.stops = False
    with pytest.raises(CaptureError, match=complaint), tap(observer):
        for layer_states in change([states(batch)]):
            TAP.observe(MODULES[0], **layer_states)
