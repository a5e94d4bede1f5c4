"""Laws of the samplers: the seed's formulas, and decisions that belong to positions alone."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sniffer.errors import ConfigError
from sniffer.hashing import GOLDEN, key_of, mix64_int
from sniffer.sampler import All, LogUniform, Picker, Sampler, Uniform, describe
from sniffer.sampler.base import check_sampler
from sniffer.types import Document, TokenBatch

SAMPLERS = [
    LogUniform(base_rate=20.0, min_bucket_size=16),
    Uniform(base_rate=7.0, bucket_size=64),
    All(bucket_size=32),
]


def document(n_tokens: int, example_id: int = 5) -> Document:
    return Document(example_id, str(example_id), np.arange(n_tokens, dtype=np.int32), truncated=False)


def kept(sampler: Sampler, n_tokens: int, *, seed: int = 0, example: int = 5, layer: int = 3, draw: str = "q"):
    return Picker(sampler, seed).positions(document(n_tokens, example), layer, draw).tolist()


@given(st.integers(0, 2**40), st.sampled_from([1, 2, 128, 4096]))
def test_log_uniform_is_the_formula(position: int, min_bucket_size: int):
    sampler = LogUniform(base_rate=50.0, min_bucket_size=min_bucket_size)
    bucket = max(int(math.log2(min_bucket_size)), (position + 1).bit_length() - 1)
    positions = np.array([position])
    assert sampler.bucket(positions).tolist() == [bucket]
    assert sampler.probability(positions).tolist() == [min(1.0, 50.0 / 2**bucket)]


@given(st.integers(0, 2**30), st.integers(1, 5000), st.floats(0, 1e4))
def test_uniform_and_all_are_the_formulas(position: int, bucket_size: int, base_rate: float):
    positions = np.array([position])
    uniform = Uniform(base_rate=base_rate, bucket_size=bucket_size)
    assert uniform.bucket(positions).tolist() == [position // bucket_size]
    assert uniform.probability(positions).tolist() == [min(1.0, base_rate / bucket_size)]
    everything = All(bucket_size=bucket_size)
    assert everything.bucket(positions).tolist() == [position // bucket_size]
    assert everything.probability(positions).tolist() == [1.0]


def test_log_uniform_buckets_are_exact_where_float32_logarithms_are_not():
    edges = np.array([2**e + d for e in range(15, 40) for d in (-2, -1, 0)])
    assert LogUniform().bucket(edges).tolist() == [max(7, (int(p) + 1).bit_length() - 1) for p in edges]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_picks_lie_within_the_document_in_order_and_carry_their_bucket(sampler: Sampler):
    batch = TokenBatch((document(700, 1), document(3, 2), document(1500, 3)), pad_id=0)
    picks = Picker(sampler, 0).pick(batch, 2, "k")
    assert len(picks) > 0
    for row, member in enumerate(batch.documents):
        positions = picks.positions[picks.rows == row]
        assert (positions >= 0).all() and (positions < member.n_tokens).all()
        assert (np.diff(positions) > 0).all()
    assert (np.diff(picks.rows) >= 0).all()
    assert (picks.buckets == sampler.bucket(picks.positions.astype(np.int64))).all()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
@given(cut=st.integers(1, 3000))
@settings(max_examples=20, deadline=None)
def test_truncation_only_cuts(sampler: Sampler, cut: int):
    assert kept(sampler, cut) == [position for position in kept(sampler, 3000) if position < cut]


def by_definition(sampler: Sampler, seed: int, member: Document, layer: int, draw: str) -> list[int]:
    """Position by position, with Python's integers: the hash of a position, below its probability."""
    named = [("example", member.example_id), ("layer", layer), ("kind", draw)]
    key = key_of(seed, *(part for pair in named if pair[0] in sampler.seed_by for part in pair))
    found = []
    for position in range(member.first_position, member.first_position + member.n_tokens):
        (probability,) = sampler.probability(np.array([position]))
        number = mix64_int(mix64_int((position + 1) * GOLDEN) ^ key)
        if probability >= 1 or number < math.ceil(Fraction(probability) * 2**64):
            found.append(position)
    return found


@pytest.mark.parametrize(
    "sampler",
    [
        *SAMPLERS,
        Uniform(base_rate=0.0),
        LogUniform(base_rate=0.01, min_bucket_size=1),
        Uniform(base_rate=9.0, bucket_size=32, seed_by=["layer"]),
        LogUniform(seed_by=[], base_rate=30.0),
    ],
)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    first=st.sampled_from([0, 0, 40]),
    layer=st.integers(0, 5),
    draw=st.sampled_from(["q", "k"]),
)
@settings(max_examples=12, deadline=None)
def test_a_batch_is_drawn_as_its_documents_are_by_definition(sampler: Sampler, lengths, first: int, layer: int, draw):
    documents = tuple(
        replace(document(n, 2**62 + number), first_position=first if number % 2 else 0)
        for number, n in enumerate(lengths)
    )
    picks = Picker(sampler, 7).pick(TokenBatch(documents, pad_id=0), layer, draw)
    for row, member in enumerate(documents):
        assert picks.positions[picks.rows == row].tolist() == by_definition(sampler, 7, member, layer, draw)
    assert (np.diff(picks.rows) >= 0).all()


def test_a_picker_that_has_drawn_goes_to_another_process():
    picker, batch = Picker(SAMPLERS[0], 0), TokenBatch((document(900), document(100, 8)), pad_id=0)
    here = picker.pick(batch, 1, "q")
    there = pickle.loads(pickle.dumps(picker)).pick(batch, 1, "q")
    assert here.positions.tolist() == there.positions.tolist() and len(here)


def test_batch_mates_change_nothing():
    picker = Picker(SAMPLERS[0], 0)
    alone = picker.pick(TokenBatch((document(900),), pad_id=0), 1, "q")
    together = picker.pick(TokenBatch((document(2000, 8), document(900)), pad_id=0), 1, "q")
    assert together.positions[together.rows == 1].tolist() == alone.positions.tolist()


@pytest.mark.parametrize("make", [LogUniform, Uniform])
def test_rates_nest(make):
    rates = [0.0, 0.5, 1.0, 2.0, 64.0, 500.0]
    samples = [set(kept(make(base_rate=rate), 20_000)) for rate in rates]
    assert samples[0] == set()
    for smaller, larger in zip(samples, samples[1:], strict=False):
        assert smaller < larger


def test_every_part_of_the_seed_matters():
    base = kept(SAMPLERS[0], 2000)
    for change in ({"seed": 1}, {"example": 6}, {"layer": 4}, {"draw": "k"}):
        assert kept(SAMPLERS[0], 2000, **change) != base


def test_seed_by_shares_positions_across_what_it_leaves_out():
    def sampler(*parts: str) -> LogUniform:
        return LogUniform(base_rate=20.0, seed_by=list(parts))

    without_kind = sampler("example", "layer")
    assert kept(without_kind, 2000, draw="q") == kept(without_kind, 2000, draw="k")
    assert kept(without_kind, 2000, layer=1) != kept(without_kind, 2000, layer=2)
    without_layer = sampler("example", "kind")
    assert kept(without_layer, 2000, layer=1) == kept(without_layer, 2000, layer=2)
    assert kept(without_layer, 2000, draw="q") != kept(without_layer, 2000, draw="k")


def test_frequencies_match_the_probabilities():
    """Over many documents the picks of each bucket stay within 5 standard deviations of the law."""
    sampler = LogUniform(base_rate=8.0, min_bucket_size=16)
    picker = Picker(sampler, 0)
    n_tokens, n_documents = 4000, 400
    counts = np.zeros(n_tokens)
    for example in range(n_documents):
        counts[picker.positions(document(n_tokens, example), 0, "q")] += 1
    positions = np.arange(n_tokens)
    buckets, probabilities = sampler.bucket(positions), sampler.probability(positions)
    for bucket in np.unique(buckets):
        inside = buckets == bucket
        expected = n_documents * probabilities[inside].sum()
        variance = n_documents * (probabilities * (1 - probabilities))[inside].sum()
        assert abs(counts[inside].sum() - expected) <= 5 * math.sqrt(variance)


def test_neighbouring_draws_are_uncorrelated():
    picker = Picker(Uniform(base_rate=1.0, bucket_size=2), 0)
    n_tokens = 50_000

    def indicator(example: int, layer: int, draw: str) -> np.ndarray:
        mask = np.zeros(n_tokens)
        mask[picker.positions(document(n_tokens, example), layer, draw)] = 1
        return mask

    draws = [indicator(e, la, d) for e in (0, 1) for la in (0, 1) for d in ("q", "k")]
    draws.append(np.roll(draws[0], 1))
    correlations = np.corrcoef(draws)[~np.eye(len(draws), dtype=bool)]
    assert np.abs(correlations).max() < 5 / math.sqrt(n_tokens)


def test_known_positions_never_change():
    """Old configurations must keep drawing what they drew: these were recorded when the law was fixed."""
    assert kept(LogUniform(base_rate=4.0), 2048, example=17, layer=2, draw="k") == PINNED_LOG_UNIFORM
    assert kept(Uniform(base_rate=1.0), 1024, example=17, layer=2, draw="q") == PINNED_UNIFORM


PINNED_LOG_UNIFORM = [45, 136, 170, 187, 192, 353, 486, 636, 782, 834, 1007, 1106, 1115, 1361, 1627, 1915]
PINNED_UNIFORM = [89, 336, 399, 463, 980]


def test_expected_is_the_mean_of_the_law():
    sampler = LogUniform(base_rate=3.0)
    lengths = [10, 500, 5000]
    by_hand = sum(sampler.probability(np.arange(n)).sum() for n in lengths)
    assert Picker(sampler, 0).expected(lengths) == pytest.approx(by_hand)


def test_probability_by_bucket_lists_every_bucket_in_reach():
    assert Picker(LogUniform(base_rate=128.0), 0).probability_by_bucket(1023) == {7: 1.0, 8: 0.5, 9: 0.25}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LogUniform(base_rate=-1.0), "base_rate=-1.0"),
        (lambda: LogUniform(base_rate=math.nan), "base_rate=nan"),
        (lambda: Uniform(base_rate=math.inf), "base_rate=inf"),
        (lambda: LogUniform(min_bucket_size=100), "use 64 or 128"),
        (lambda: LogUniform(min_bucket_size=0), "1 or more"),
        (lambda: Uniform(bucket_size=0), "bucket_size=0"),
        (lambda: All(bucket_size=-3), "bucket_size=-3"),
        (lambda: LogUniform(min_bucket_size=2**70), "at most"),
        (lambda: Uniform(bucket_size=2**70), "at most"),
        (lambda: All(bucket_size=10**400), "at most"),
        (lambda: All(seed_by=["example", "head"]), "seed_by"),
        (lambda: All(seed_by=["kind", "kind"]), "at most once"),
    ],
)
def test_bad_values_are_refused_by_name(make, said: str):
    with pytest.raises(ConfigError, match=said):
        make()


@dataclass(frozen=True)
class EvenPositions(Sampler):
    """A user's own sampler: even positions always, odd ones never."""

    def bucket(self, positions):
        return (positions % 2).astype(np.int32)

    def probability(self, positions):
        return 1.0 - (positions % 2)


@dataclass(frozen=True)
class Lawless(Sampler):
    def bucket(self, positions):
        return np.zeros(len(positions), np.int32)

    def probability(self, positions):
        return 1 / (1.0 + positions)


def test_a_sampler_of_ones_own_needs_two_methods():
    assert kept(EvenPositions(), 9) == [0, 2, 4, 6, 8]
    assert describe(EvenPositions())["seed_by"] == ["example", "layer", "kind"]


def test_a_law_that_varies_within_a_bucket_is_refused():
    with pytest.raises(ConfigError, match="different probabilities within one bucket"):
        Picker(Lawless(), 0)


@dataclass(frozen=True)
class Answering(Sampler):
    """A user's sampler that answers as it is told to."""

    def bucket(self, positions):
        return ANSWERS[0](positions)

    def probability(self, positions):
        return ANSWERS[1](positions)


ANSWERS = [lambda p: p // 4, lambda p: np.full(len(p), 0.5)]
NOT_A_NUMBER_EACH = {
    "a scalar": lambda _: 0.5,
    "a numpy scalar": lambda _: np.float64(1),
    "None": lambda _: None,
    "text": lambda _: "0.5",
    "a list": lambda p: [0] * len(p),
    "a generator": lambda p: (0 for _ in p),
    "two dimensions": lambda p: np.zeros((len(p), 1)),
    "none": lambda _: np.zeros(()),
    "too few": lambda p: np.zeros(len(p) - 1),
    "an array of text": lambda p: np.full(len(p), "1"),
    "an array of objects": lambda p: np.full(len(p), 1, dtype=object),
    "complex numbers": lambda p: np.full(len(p), 1j),
    "dates": lambda p: p.astype("datetime64[s]"),
    "masked numbers": lambda p: np.ma.masked_greater(p, 3) * 0,
    "not a number": lambda p: np.where(p == 7, np.nan, 0.0),
    "infinity": lambda p: np.where(p == 7, np.inf, 0.0),
    "below zero": lambda p: np.where(p == 7, -1, 0),
    "an exception": lambda p: 1 // 0,
}


def refusal(monkeypatch: pytest.MonkeyPatch, bucket=None, probability=None, n_tokens: int = 1) -> str:
    """The one line that refuses a sampler with one of its methods changed."""
    monkeypatch.setattr("tests.test_sampler.ANSWERS", [bucket or ANSWERS[0], probability or ANSWERS[1]])
    with pytest.raises(ConfigError, match="sampler Answering") as caught:
        Picker(Answering(), 0).positions(document(n_tokens), 0, "q")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("method", ["bucket", "probability"])
@pytest.mark.parametrize("what", NOT_A_NUMBER_EACH)
def test_an_answer_that_is_not_a_number_each_is_refused_by_name(monkeypatch, method: str, what: str):
    assert f"{method}()" in refusal(monkeypatch, **{method: NOT_A_NUMBER_EACH[what]})


@pytest.mark.parametrize("beyond", [2**31, 2**32, 2**40 + 3, -1, -(2**32), 0.5, 1e12])
def test_a_bucket_is_itself_or_refused(monkeypatch, beyond: float):
    """In a column of 32 bits, 2^32 would be 0."""
    assert str(beyond) in refusal(monkeypatch, bucket=lambda p: np.where(p == 900, beyond, 0))


@pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.int64, np.float32, bool])
def test_whole_numbers_of_any_type_are_buckets(monkeypatch, dtype):
    monkeypatch.setattr("tests.test_sampler.ANSWERS", [lambda p: (p > 5).astype(dtype), lambda p: p > 5])
    assert kept(Answering(), 9) == [6, 7, 8]


NO_LAWS = {
    "chance": lambda p: np.random.default_rng().integers(0, 5, len(p)),
    "the place in the array": lambda p: np.arange(len(p)) // 4,
    "the length of the array": lambda p: p * 0 + len(p),
    "the last position": lambda p: p * 4 // (p.max() + 1),
    "the first position": lambda p: np.abs(p - p[0]),
    "earlier calls": lambda p: p * 0 + len(CALLS.append(1) or CALLS),
}
CALLS: list[int] = []


@pytest.mark.parametrize("what", NO_LAWS)
def test_what_depends_on_more_than_the_position_is_no_law(monkeypatch, what: str):
    """Documents of other lengths, other batches or another session would get other positions."""
    for method, answer in (("bucket", NO_LAWS[what]), ("probability", lambda p: NO_LAWS[what](p) / 5000)):
        each = {"bucket": lambda p: p} if method == "probability" else {}
        told = refusal(monkeypatch, **each, **{method: answer})
        assert f"{method}() gives" in told and "for one position" in told


def test_a_longer_table_begins_with_the_shorter_one(monkeypatch):
    asked: list[int] = []

    def bucket(positions):
        asked.append(len(positions))
        return positions * 0 + (len(asked) > 2)

    assert "bucket() gives 1 and 0 for one position" in refusal(monkeypatch, bucket=bucket, n_tokens=1500)


def test_what_an_exception_was_and_where_is_told(monkeypatch):
    told = refusal(monkeypatch, bucket=lambda p: np.linalg.inv(p))
    assert "LinAlgError" in told and "test_sampler.py line" in told


def test_a_sampler_may_write_into_its_argument(monkeypatch):
    """What it does to the positions must not reach the draw."""

    def bucket(positions):
        positions //= 64
        return positions

    monkeypatch.setattr("tests.test_sampler.ANSWERS", [bucket, lambda p: np.full(len(p), 0.5)])
    first, second = Picker(Answering(), 0), Picker(Uniform(base_rate=32.0, bucket_size=64), 0)
    assert first.positions(document(700), 0, "q").tolist() == second.positions(document(700), 0, "q").tolist()


@dataclass(frozen=True)
class Unwritable(EvenPositions):
    table: object = field(default_factory=lambda: np.arange(3))


@pytest.mark.parametrize("sampler", [Unwritable(), object(), All])
def test_what_cannot_be_recorded_or_is_no_sampler_is_refused(sampler):
    with pytest.raises(ConfigError, match="cannot be recorded|is no sampler"):
        check_sampler(sampler)


@given(st.integers(0, 62), st.floats(0, 1e300))
def test_sizes_up_to_the_largest_have_a_law(power: int, base_rate: float):
    for sampler in (
        LogUniform(base_rate=base_rate, min_bucket_size=2**power),
        Uniform(base_rate=base_rate, bucket_size=2**power),
    ):
        law = Picker(sampler, 0).probability_by_bucket(1000)
        assert all(0 <= probability <= 1 for probability in law.values())
