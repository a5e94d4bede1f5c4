"""What a call says about its rows: a table of calls, with the pieces they hold or the line that refuses them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sniffer.errors import CaptureError
from sniffer.notebook.batch import CallBatch
from sniffer.notebook.call import Call, arguments, earlier_tokens, read
from sniffer.notebook.pieces import Begun, Piece, claims, claims_after, last_of, pieces_after, pieces_of
from sniffer.notebook.positions import FARTHEST
from sniffer.types import Picks

IDS = torch.arange(20).view(2, 10)
ONES, RIGHT, LEFT = (torch.ones(2, 10, dtype=torch.long) for _ in range(3))
RIGHT[1, 6:] = 0
LEFT[1, :4] = 0
NOTHING_REAL = ONES.clone()
NOTHING_REAL[1] = 0
HOLE = ONES.clone()
HOLE[0, 5] = 0
COLUMNS = torch.arange(10)[None]
CAUSAL = torch.ones(10, 10, dtype=torch.bool).tril()


def by_pair(mask: Tensor, seen: Tensor = CAUSAL) -> Tensor:
    """A mask of pairs, (batch, 1, seq, keys), as transformers makes one of a mask of tokens."""
    return seen[None, None] & mask[:, None, None].bool()


def added(mask: Tensor) -> Tensor:
    """The same in numbers to add to scores."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def rows(*pieces: tuple[int, int, int, int]) -> tuple[Piece, ...]:
    return tuple(Piece(*piece) for piece in pieces)


WHOLE = rows((0, 0, 0, 10), (1, 0, 0, 10))
CUT = rows((0, 0, 0, 10), (1, 0, 0, 6))
PACKED = torch.tensor([[*range(6), *range(4)], [*range(10)]])
COUNTED_FROM_TOKENS = (LEFT.cumsum(1) - 1).clamp(min=0)

PLAIN: dict[str, tuple[dict[str, Any], tuple[Piece, ...]]] = {
    "nothing": ({}, WHOLE),
    "ones": ({"mask": ONES}, WHOLE),
    "right": ({"mask": RIGHT}, CUT),
    "right, bool": ({"mask": RIGHT.bool()}, CUT),
    "right, float": ({"mask": RIGHT.float()}, CUT),
    "a row of padding": ({"mask": NOTHING_REAL}, rows((0, 0, 0, 10), (1, 0, 0, 0))),
    "pairs": ({"mask": by_pair(ONES)[:1]}, WHOLE),
    "pairs, right": ({"mask": by_pair(RIGHT)}, CUT),
    "pairs, right, added": ({"mask": added(by_pair(RIGHT))}, CUT),
    "pairs, every head": ({"mask": by_pair(RIGHT).expand(2, 4, 10, 10)}, CUT),
    "pairs, room for more": ({"mask": torch.nn.functional.pad(by_pair(RIGHT), (0, 6))}, CUT),
    "pairs, a window": ({"mask": by_pair(RIGHT, CAUSAL & ~CAUSAL.tril(-3))}, CUT),
    "by name": ({"mask": {"full_attention": by_pair(RIGHT), "sliding_attention": None, "linear": RIGHT}}, CUT),
    "by name, none": ({"mask": {"full_attention": None}}, WHOLE),
    "left, counted": (
        {"mask": LEFT, "position_ids": COUNTED_FROM_TOKENS},
        rows((0, 0, 0, 10), (1, 4, 0, 6)),
    ),
    "pairs, left, counted": (
        {"mask": by_pair(LEFT), "position_ids": COUNTED_FROM_TOKENS},
        rows((0, 0, 0, 10), (1, 4, 0, 6)),
    ),
    "left": ({"mask": LEFT}, rows((0, 0, 0, 10), (1, 4, 4, 6))),
    "pairs, left": ({"mask": by_pair(LEFT)}, rows((0, 0, 0, 10), (1, 4, 4, 6))),
    "left, counted by the model": ({"mask": LEFT, "counts": lambda: True}, rows((0, 0, 0, 10), (1, 4, 0, 6))),
    "columns": ({"position_ids": COLUMNS}, WHOLE),
    "columns, one axis": ({"position_ids": COLUMNS[0]}, WHOLE),
    "columns, three axes": ({"position_ids": COLUMNS.expand(3, 2, 10)}, WHOLE),
    "three axes that differ in padding": (
        {"mask": RIGHT, "position_ids": COLUMNS * RIGHT + torch.arange(3)[:, None, None] * (1 - RIGHT)},
        CUT,
    ),
    "offset": ({"position_ids": COLUMNS + 100}, rows((0, 0, 100, 10), (1, 0, 100, 10))),
    "packed": ({"position_ids": PACKED}, rows((0, 0, 0, 6), (0, 6, 0, 4), (1, 0, 0, 10))),
    "packed, first one cut": (
        {"position_ids": torch.tensor([[7, 8, 9, *range(7)], [*range(10)]])},
        rows((0, 0, 7, 3), (0, 3, 0, 7), (1, 0, 0, 10)),
    ),
    "padding has no positions": ({"mask": RIGHT, "position_ids": COLUMNS * RIGHT}, CUT),
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hole": ({"mask": HOLE}, "row 0 of this call has padding between its tokens"),
    "another shape": (
        {"mask": ONES[:, :8]},
        r"attention_mask has the shape \(2, 8\), for input_ids of shape \(2, 10\)",
    ),
    "weights": ({"mask": ONES * 0.5}, "other values than 0 and 1"),
    "no tensor": ({"mask": [1, 1]}, "attention_mask is a list"),
    "another kind": ({"mask": SimpleNamespace(shape=(2, 1, 10, 10))}, "attention_mask is a SimpleNamespace"),
    "pairs, other shape": ({"mask": by_pair(ONES)[:, :, :8]}, r"has the shape \(2, 1, 8, 10\)"),
    "pairs, all": ({"mask": torch.ones(2, 1, 10, 10, dtype=torch.bool)}, "see others than those just before them"),
    "pairs, gap": (
        {"mask": by_pair(ONES, CAUSAL & ~(CAUSAL.tril(-3) & ~CAUSAL.tril(-5)))},
        "see others than those just before them",
    ),
    "pairs, padding seen": ({"mask": by_pair(ONES) & ~torch.eye(10, dtype=torch.bool).tril()}, "see others"),
    "pairs, beyond the call": ({"mask": torch.nn.functional.pad(by_pair(ONES), (0, 2), value=True)}, "see others"),
    "pairs, biased": ({"mask": added(by_pair(ONES)) - 0.5}, "adds to scores"),
    "pairs, other heads": ({"mask": torch.cat([by_pair(ONES), by_pair(RIGHT)], 1)}, "differs from head to head"),
    "pairs, whole numbers": ({"mask": by_pair(ONES).long()}, "adds to scores"),
    "names that disagree": ({"mask": {"a": by_pair(RIGHT), "b": by_pair(ONES)}}, "disagree on what is padding"),
    "jump": ({"position_ids": COLUMNS + 5 * (COLUMNS > 6)}, "position_ids go from 6 to 12 in row 0"),
    "anew, not at 0": ({"position_ids": COLUMNS % 4 + 1}, "go from 4 to 1 in row 0"),
    "standing": ({"position_ids": COLUMNS * 0 + 3}, "go from 3 to 3"),
    "negative": ({"position_ids": COLUMNS - 1}, r"reach outside \[0,"),
    "far": ({"position_ids": COLUMNS + FARTHEST}, r"reach outside \[0,"),
    "fractions": ({"position_ids": COLUMNS * 0.5}, "no tensor of whole numbers"),
    "bools": ({"position_ids": COLUMNS > 3}, "no tensor of whole numbers"),
    "a list": ({"position_ids": list(range(10))}, "no tensor of whole numbers"),
    "positions of another shape": ({"position_ids": COLUMNS[:, :8]}, r"position_ids have the shape \(1, 8\)"),
    "axes that differ": (
        {"position_ids": torch.stack([COLUMNS, COLUMNS // 2, COLUMNS])},
        "several positions, as for images",
    ),
}


@pytest.mark.parametrize("case", PLAIN)
def test_what_is_plain_becomes_pieces(case: str):
    said, pieces = PLAIN[case]
    assert pieces_of(Call(IDS, **said)) == pieces


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_is_refused_in_one_line(case: str):
    said, complaint = REFUSED[case]
    with pytest.raises(CaptureError, match=complaint) as refusal:
        pieces_of(Call(IDS, **said))
    assert "\n" not in str(refusal.value)


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(1, 5), max_size=3), st.integers(0, 4)), min_size=1))
def test_pieces_are_the_documents_that_a_row_was_made_of(made: list[tuple[int, list[int], int]]):
    """Rows of padding, documents one after the other, and padding again."""
    width = max(left + sum(lengths) + right for left, lengths, right in made) + 1
    mask, positions, expected = (np.zeros((len(made), width), dtype=np.int64) for _ in range(2)), None, []
    mask, positions = mask
    for row, (left, lengths, _) in enumerate(made):
        start = left
        for length in lengths:
            mask[row, start : start + length] = 1
            positions[row, start : start + length] = np.arange(length)
            expected.append(Piece(row, start, 0, length))
            start += length
        if not lengths:
            expected.append(Piece(row, 0, 0, 0))
    call = Call(torch.from_numpy(mask), torch.from_numpy(mask), torch.from_numpy(positions))
    assert pieces_of(call) == tuple(expected)


def test_the_model_has_to_prove_what_it_is_told():
    def of(**said: Any) -> set[str]:
        call = Call(IDS, **said)
        return set(claims(call, pieces_of(call)))

    assert of() == of(mask=RIGHT) == of(position_ids=COLUMNS) == of(mask=RIGHT, position_ids=COLUMNS * RIGHT) == set()
    assert of(position_ids=COLUMNS, stated=True) == {"stated"}
    assert of(position_ids=COLUMNS + 1, stated=True) == {"positions"}
    assert of(position_ids=PACKED) == {"packed"}
    assert of(position_ids=COLUMNS + 1) == {"positions"}
    assert of(mask=LEFT) == {"shifted"} and of(mask=LEFT, counts=lambda: True) == {"counted"}
    assert of(mask=LEFT, position_ids=COUNTED_FROM_TOKENS) == {"left"}
    assert of(mask=LEFT, position_ids=COUNTED_FROM_TOKENS + 3) == {"left", "positions"}
    for said in ({"mask": ONES}, {"cache": object()}):
        with pytest.raises(CaptureError, match="documents there see each other"):
            of(position_ids=PACKED, **said)


class Forward:
    """Of a model, with the arguments of any family."""

    def __call__(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, *, use_cache=None, **more
    ): ...


def test_arguments_come_by_place_and_by_name():
    cache = object()
    named = {"input_ids": IDS, "attention_mask": RIGHT, "cache": cache}
    assert arguments(Forward().__call__, (IDS, RIGHT, None, cache), {"use_cache": None}) == named
    assert arguments(Forward().__call__, (), {**named, "position_ids": None}) == named
    assert arguments(Forward().__call__, (IDS,), {"labels": IDS}) == {"input_ids": IDS, "labels": IDS}
    # The forward itself will say that this does not fit.
    assert arguments(Forward().__call__, (IDS,), {"input_ids": RIGHT}) == {"input_ids": RIGHT}


VECTORS = torch.zeros(2, 10, 4)


@pytest.mark.parametrize(
    ("inner", "outer", "expected"),
    [
        ({"input_ids": IDS, "attention_mask": RIGHT}, None, (IDS, RIGHT, False)),
        ({"input_ids": IDS, "attention_mask": LEFT}, {"input_ids": IDS, "attention_mask": RIGHT}, (IDS, RIGHT, True)),
        ({"input_ids": IDS, "attention_mask": LEFT}, {"input_ids": IDS}, (IDS, None, True)),
        ({"inputs_embeds": VECTORS, "attention_mask": LEFT}, {"input_ids": IDS}, (IDS, None, True)),
        ({"input_ids": IDS, "attention_mask": LEFT}, {"input_ids": IDS + 1}, (IDS, LEFT, False)),
        ({"input_ids": IDS, "attention_mask": LEFT}, {"inputs_embeds": VECTORS}, (IDS, LEFT, False)),
    ],
    ids=["alone", "around", "around, no mask", "looks up itself", "other tokens", "vectors"],
)
def test_the_outer_call_counts_where_it_gave_the_tokens(inner: Any, outer: Any, expected: Any):
    call = read({**inner, "position_ids": COLUMNS}, outer)
    assert call.position_ids is COLUMNS and call.stated != call.whole
    assert (call.tokens.tolist(), call.mask is expected[1], call.whole) == (expected[0].tolist(), True, expected[2])


@pytest.mark.parametrize(
    ("inner", "outer", "complaint"),
    [
        ({}, None, "no input_ids"),
        ({"inputs_embeds": VECTORS}, None, "no input_ids"),
        ({"inputs_embeds": VECTORS}, {"inputs_embeds": VECTORS}, "no input_ids"),
        ({"input_ids": IDS[0]}, None, "no input_ids of shape"),
        ({"inputs_embeds": VECTORS[:, :8]}, {"input_ids": IDS}, r"makes vectors for \(2, 8\) tokens"),
        ({"input_ids": IDS, "cu_seq_lens_q": IDS[0]}, None, "packs documents by cu_seq_lens_q"),
    ],
)
def test_calls_without_tokens_are_refused(inner: Any, outer: Any, complaint: str):
    with pytest.raises(CaptureError, match=complaint):
        read(inner, outer)


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past"])
def test_a_cache_goes_by_several_names(name: str):
    cache = SimpleNamespace(get_seq_length=lambda: torch.tensor(7))
    assert read({"input_ids": IDS, name: cache}).cache is cache
    assert earlier_tokens(cache) == 7 and earlier_tokens(None) == 0
    with pytest.raises(CaptureError, match=r"a cache \(tuple\) that does not say how many tokens it holds"):
        earlier_tokens(((VECTORS, VECTORS),))


def failing() -> int:
    raise ValueError("no attention in here")


def test_a_cache_that_fails_to_say_is_refused():
    with pytest.raises(CaptureError, match="does not say"):
        earlier_tokens(SimpleNamespace(get_seq_length=failing))


@pytest.mark.parametrize("case", ["packed, first one cut", "pairs, left, counted", "right"])
def test_picks_lie_where_their_piece_lies(case: str):
    said, pieces = PLAIN[case]
    grid = IDS.numpy().astype(np.int32)
    batch = CallBatch.of(grid, pieces_of(Call(IDS, **said)), range(len(pieces)))
    whole: Callable[..., np.ndarray] = lambda of: np.concatenate([of(n, piece) for n, piece in enumerate(pieces)])  # noqa: E731
    picks = Picks(
        rows=whole(lambda n, piece: np.full(piece.n_tokens, n, dtype=np.int32)),
        positions=whole(lambda n, piece: np.arange(piece.n_tokens, dtype=np.int32) + np.int32(piece.first_position)),
        buckets=np.zeros(sum(piece.n_tokens for piece in pieces), dtype=np.int32),
    )
    cells = [(p.row, p.first_column + n) for p in pieces for n in range(p.n_tokens)]
    assert batch.cells(picks).tolist() == [row * 10 + column for row, column in cells]
    assert (batch.n_rows, batch.seq_len, batch.padded_tokens) == (2, 10, 20)
    assert batch.tokens(picks).tolist() == [int(IDS[cell]) for cell in cells]
    assert [document.token_ids.tolist() for document in batch.documents] == [
        IDS[p.row, p.first_column : p.first_column + p.n_tokens].tolist() for p in pieces
    ]


BEGUN = [Begun(7, 6, 0, 6), Begun(8, 2, 4, 6)]
"""Two rows behind six columns, the second one padded on the left with four."""

BOTH = torch.cat([torch.tensor([[1] * 6, [0] * 4 + [1] * 2]), ONES[:, :3]], 1)
BEHIND = torch.tensor([[6, 7, 8], [2, 3, 4]])
AHEAD = torch.ones(9, 12, dtype=torch.bool).tril()[6:] & torch.nn.functional.pad(BOTH, (0, 3))[:, None, None].bool()
WINDOW = torch.ones(9, 9, dtype=torch.bool).tril() & ~torch.ones(9, 9, dtype=torch.bool).tril(-3)
GONE_ON = rows((0, 0, 6, 3), (1, 0, 2, 3))

GOES_ON: dict[str, tuple[dict[str, Any], tuple[Piece, ...]]] = {
    "mask": ({"mask": BOTH, "position_ids": BEHIND}, GONE_ON),
    "pairs, room for more": ({"mask": AHEAD, "position_ids": BEHIND}, GONE_ON),
    "pairs, a window's last columns": (
        {"mask": (WINDOW[6:] & BOTH[:, None, None].bool())[..., 4:], "position_ids": BEHIND},
        GONE_ON,
    ),
    "a row that has ended": (
        {"mask": BOTH * torch.tensor([[1], [1]]) * torch.tensor([[1] * 9, [1] * 6 + [0] * 3]), "position_ids": BEHIND},
        rows((0, 0, 6, 3), (1, 0, 2, 0)),
    ),
}

DOES_NOT: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({"position_ids": BEHIND}, "goes on with rows that were padded, and has no attention_mask"),
    "mask of the call alone": ({"mask": BOTH[:, 6:], "position_ids": BEHIND}, "behind 6 in its cache"),
    "mask that says otherwise": ({"mask": torch.ones_like(BOTH), "position_ids": BEHIND}, "says otherwise of tokens"),
    "no positions": ({"mask": BOTH}, "row 1 of this call goes on at position 6, and its last token was at 1"),
    "anew": ({"mask": BOTH, "position_ids": BEHIND % 6}, "goes on at position 0, and its last token was at 5"),
    "jump": ({"mask": BOTH, "position_ids": BEHIND * 2 - BEHIND[:, :1]}, "position_ids jump within row 0"),
    "padding before": (
        {"mask": BOTH * torch.tensor([1] * 6 + [0, 1, 1]), "position_ids": BEHIND},
        "row 0 of this call goes on behind padding",
    ),
    "pairs, the future": ({"mask": torch.ones_like(AHEAD), "position_ids": BEHIND}, "see others than those just"),
    "pairs, a gap": (
        {"mask": AHEAD & (torch.arange(12) != 5), "position_ids": BEHIND},
        "see others than those just before them",
    ),
}


@pytest.mark.parametrize("case", GOES_ON)
def test_a_call_goes_on_where_its_rows_had_ended(case: str):
    said, pieces = GOES_ON[case]
    call = Call(IDS[:, :3], stated=True, **said)
    assert pieces_after(call, BEGUN, 6) == pieces
    assert set(claims_after(call, BEGUN)) == {"cached_left"} and set(claims_after(call, BEGUN[:1])) == {"cached_stated"}
    after = [row.after(piece, 6, 5) for row, piece in zip(BEGUN, pieces, strict=True)]
    assert after[0] == Begun(5, 9, 0, 9) and after[1] == (
        Begun(5, 5, 4, 9) if pieces[1].n_tokens else Begun(5, 2, 4, 6)
    )


@pytest.mark.parametrize("case", DOES_NOT)
def test_or_it_is_refused_in_one_line(case: str):
    said, complaint = DOES_NOT[case]
    with pytest.raises(CaptureError, match=complaint) as refusal:
        pieces_after(Call(IDS[:, :3], **said), BEGUN, 6)
    assert "\n" not in str(refusal.value)


def test_a_row_of_padding_begins_later():
    """As the first chunks of a prompt that is padded on the left."""
    empty = Begun(3, 0, 0, 0)
    mask = torch.tensor([[0, 0, 0, 0, 1, 1]])
    (piece,) = pieces_after(Call(IDS[:1, :3], mask=mask, position_ids=torch.tensor([[0, 0, 1]])), [empty], 3)
    assert piece == Piece(0, 1, 0, 2) and empty.after(piece, 3, 3) == Begun(3, 2, 4, 6)


def test_a_model_that_counts_itself_needs_no_positions():
    call = Call(IDS[:, :3], mask=BOTH, counts=lambda: True)
    assert pieces_after(call, BEGUN, 6) == GONE_ON and set(claims_after(call, BEGUN)) == {"cached_counted"}
    begins = Call(IDS[:1, :3], mask=torch.tensor([[0, 0, 0, 0, 1, 1]]), counts=lambda: True)
    assert pieces_after(begins, [Begun(3, 0, 0, 0)], 3) == (Piece(0, 1, 0, 2),)


def test_a_mask_of_all_that_a_static_cache_has_room_for_is_cut():
    cache = SimpleNamespace(get_seq_length=lambda: 0, get_max_length=lambda: 12)
    for name, mask in {"room": torch.nn.functional.pad(LEFT, (0, 2)), "told": torch.ones(2, 12)}.items():
        found = read({"input_ids": IDS, "attention_mask": mask, "cache": cache}).mask
        assert found.equal(LEFT if name == "room" else mask)


def test_what_is_new_of_rows_that_are_repeated():
    begun = [Begun(1, 9, 0, 9), Begun(2, 5, 4, 9)]
    assert last_of(rows((0, 0, 0, 10), (1, 4, 0, 6)), begun) == rows((0, 9, 9, 1), (1, 9, 5, 1))
    for wrong in (rows((0, 0, 0, 10), (1, 3, 0, 7)), rows((0, 0, 0, 10), (1, 4, 1, 6)), rows((0, 0, 0, 10))):
        with pytest.raises(CaptureError, match="repeats"):
            last_of(wrong, begun)
