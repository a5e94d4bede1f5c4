"""Which token comes next, where a text ends, and which sections it has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sniffer.errors import CaptureError, ConfigError
from sniffer.forward.generation.choosing import drawn, next_tokens, number_of
from sniffer.forward.generation.continuing import Texts, left_padded, require_one_class
from sniffer.forward.generation.difference import difference
from sniffer.forward.generation.request import Continuing, GenerateConfig
from sniffer.process.clock import Clock
from sniffer.types import Answer, Difference, Document, Generated, LengthClasses, Names, Sections, TokenBatch

LOGITS = np.array([0.3, 2.0, -1.0, 1.5, 0.0, 1.9])


def document(number: int, *tokens: int) -> Document:
    ids = np.array(tokens, dtype=np.int32)
    return Document(number, f"doc-{number}", ids, False, sections=Sections.one("prompt", len(ids)))


def shares(how: GenerateConfig, n: int = 20_000) -> np.ndarray:
    """How often each token is drawn, over numbers that are evenly spread."""
    found = [drawn(LOGITS, how, (one + 0.5) / n) for one in range(n)]
    return np.bincount(found, minlength=len(LOGITS)) / n


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, range(6)),
        ({"temperature": 0.5}, range(6)),
        ({"top_k": 2}, [1, 5]),
        ({"top_p": 0.5}, [1, 5]),  # 0.35 and 0.32 of the probability: the first alone has less than half
        ({"top_p": 0.3}, [1]),
        ({"top_k": 4, "top_p": 0.9, "temperature": 2.0}, [0, 1, 3, 5]),
        ({"top_p": 1.0}, range(6)),
    ],
)
def test_tokens_are_drawn_by_the_softmax_of_those_that_are_kept(options: dict, kept: list[int]):
    how = GenerateConfig(method="sample", **options)
    weights = np.zeros(len(LOGITS))
    weights[list(kept)] = np.exp(LOGITS[list(kept)] / how.temperature)
    assert np.allclose(shares(how), weights / weights.sum(), atol=1e-3)


def test_a_draw_belongs_to_the_document_and_the_position():
    how, logits = GenerateConfig(method="sample", seed=3), torch.tensor(np.tile(LOGITS, (3, 1)))
    some = [document(n, *range(n + 2)) for n in (4, 5, 9)]
    together = next_tokens(logits, how, some, 7)
    alone = [next_tokens(logits[:1], how, [one], 7)[0] for one in some]
    assert together.tolist() == alone
    # Equal positions of a document, however many of them are the prompt's.
    longer = document(4, *range(8))
    assert number_of(3, some[0], 6 + 7) == number_of(3, longer, 8 + 5)
    numbers = [number_of(seed, one, place) for seed in (0, 3) for one in some for place in range(50)]
    assert len(set(numbers)) == len(numbers) and min(numbers) >= 0 and max(numbers) < 1
    assert abs(np.mean(numbers) - 0.5) < 0.1


def test_greedy_takes_the_largest_and_refuses_what_is_no_number():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -torch.inf, 1.0]])
    some = [document(1, 1), document(2, 2)]
    assert next_tokens(logits, GenerateConfig(), some, 0).tolist() == [1, 0]
    logits[1, 2] = torch.nan
    with pytest.raises(CaptureError, match="no numbers"):
        next_tokens(logits, GenerateConfig(), some, 0)


def written(wanted: list[list[int]], eos: tuple[int, ...] = (), **options: object) -> Iterator[Generated]:
    """What becomes of two prompts where the model would write these tokens."""
    prompts = TokenBatch((document(1, 50, 51, 52), document(2, 60)), pad_id=0)
    plan = Continuing(GenerateConfig(**options), eos, Answer())  # type: ignore[arg-type]
    texts = Texts(prompts, plan, lambda ids: "".join(chr(96 + one) for one in ids), Clock())
    for step in range(len(wanted[0])):
        logits = torch.nn.functional.one_hot(torch.tensor([row[step] for row in wanted]), 99).float()
        chosen = texts.choose(logits)
        if chosen is None:
            break
    batch = texts.batch()
    for before, after in zip(prompts.documents, batch.documents, strict=True):
        assert after.generated is not None and after.sections is not None
        n = before.n_tokens
        assert after.token_ids.tolist() == [*before.token_ids, *after.generated.token_ids]
        assert after.sections.spans() == [(0, n, "prompt"), (n, after.n_tokens, "generated")]
        yield after.generated


def test_texts_end_by_a_token_a_string_or_a_length():
    one, other = written([[1, 2, 9, 4, 5], [1, 1, 1, 1, 1]], eos=(9, 8), max_new_tokens=5)
    assert (one.token_ids.tolist(), one.end) == ([1, 2, 9], "eos")
    assert (other.token_ids.tolist(), other.end) == ([1] * 5, "length")
    one, other = written([[1, 2, 3, 4, 5], [3, 1, 2, 3, 9]], stop=["bc", "zz"], max_new_tokens=9)
    assert (one.token_ids.tolist(), one.end) == ([1, 2, 3], "stop")
    assert (other.token_ids.tolist(), other.end) == ([3, 1, 2, 3], "stop")


def test_a_batch_that_has_not_ended_is_no_batch():
    with pytest.raises(CaptureError, match="ended before"):
        list(written([[1, 2], [1, 2]], max_new_tokens=3))


def test_prompts_end_in_the_last_column():
    ids, mask = left_padded(TokenBatch((document(1, 5, 6, 7), document(2, 8)), pad_id=3))
    assert ids.tolist() == [[5, 6, 7], [3, 3, 8]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("prompt", "generated", "names"),
    [
        ([1, 2], [3, 4], ["answer", "answer"]),
        ([1, 2], [90, 3, 91, 4], ["thinking", "thinking", "thinking", "answer"]),
        ([1, 90], [3, 91, 4], ["thinking", "thinking", "answer"]),
        ([90, 1, 91], [3], ["answer"]),
        ([90], [3, 4], ["thinking", "thinking"]),
        ([91, 90, 91], [3, 90, 4, 91, 90], ["answer", "thinking", "thinking", "thinking", "thinking"]),
    ],
)
def test_thoughts_are_told_by_their_tags(prompt: list[int], generated: list[int], names: list[str]):
    assert Answer("assistant", (90, 91)).names(prompt, generated).array.tolist() == names
    assert Answer("assistant").names(prompt, generated).same(Names.of(["assistant"], np.zeros(len(names), np.int32)))


def test_a_document_stays_within_a_class_of_lengths():
    alike = LengthClasses(breaks=(8,))
    require_one_class(document(1, 1, 2, 3), 4, alike)
    require_one_class(document(1, *range(8)), 40, alike)
    with pytest.raises(CaptureError, match="'doc-1' has 3 tokens and may come to 8"):
        require_one_class(document(1, 1, 2, 3), 5, alike)


def test_ends_come_from_the_model_its_tokenizer_or_the_user():
    of = [Continuing.of(GenerateConfig(eos=eos), (7, 2), 5, Answer()).eos for eos in ("auto", "none", 4, [9, 3])]
    assert of == [(2, 5, 7), (), (4,), (9, 3)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "beam"}, "generate.method=beam is not one of greedy, sample"),
        ({"max_new_tokens": 0}, "must be 1 or more"),
        ({"temperature": 0.0}, "generate.temperature=0.0 must be more than 0"),
        ({"temperature": float("nan")}, "must be more than 0"),
        ({"top_p": 0.5}, "are for generate=sample"),
        ({"temperature": 0.5}, "are for generate=sample"),
        ({"top_p": 1.5}, "generate.top_p=1.5"),
        ({"top_k": 0}, "generate.top_k=0"),
        ({"stop": [""]}, "none of them empty"),
        ({"stop": [3]}, "must be texts"),
        ({"eos": "never"}, "is not one of auto, none, or token ids"),
        ({"eos": [-1]}, "or token ids"),
        ({"eos": True}, "or token ids"),
        ({"live": "maybe"}, "generate.live=maybe"),
    ],
)
def test_a_request_that_cannot_be_is_refused(options: dict, said: str):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        GenerateConfig(**options)


def test_differences_are_the_largest_over_all_vectors():
    one = torch.tensor([[3.0, 4.0, 1.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    other = torch.tensor([[3.0, 4.5, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0]])
    found = difference(one, other, 2)
    assert found.vectors == 4 and found.largest == 1.0 and found.relative == 1.0
    first = difference(one[:1], other[:1], 2)
    assert np.isclose(first.relative, 0.5 / np.hypot(3, 4.5)) and first.largest == 0.5
    assert first + difference(one[1:], other[1:], 2) == found == Difference() + found
    nan = torch.tensor([[torch.nan, 1.0]])
    assert difference(nan, nan, 2).largest == 0 and difference(nan, torch.ones(1, 2), 2).largest > 1e99


def test_a_live_run_waits_for_the_last_tokens_where_they_are_wanted():
    class Waiting:
        def __init__(self, waits: bool) -> None:
            self.waits, self.steps = waits, 0

        def advance(self, written: list[int]) -> None:
            assert written == [self.steps] * 2
            self.steps += 1

    logits = torch.nn.functional.one_hot(torch.tensor([5, 6]), 9).float()
    for waits in (True, False):
        prompts = TokenBatch((document(1, 7, 8), document(2, 8)), pad_id=0)
        live = Waiting(waits)
        plan = Continuing(GenerateConfig(max_new_tokens=1), (), Answer())
        texts = Texts(prompts, plan, lambda ids: "", Clock(), live)  # type: ignore[arg-type]
        first = texts.choose(logits)
        assert (first is None) != waits and live.steps == 1
        if waits:
            assert first is not None and first.tolist() == [5, 6] and texts.choose(logits) is None and live.steps == 2
        assert [one.generated.token_ids.tolist() for one in texts.batch().documents if one.generated] == [[5], [6]]
