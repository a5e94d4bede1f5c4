"""Needles: the sentences to be found, the question, the answer; names and numbers drawn for them; where they go.

The kinds are those of RULER (niah.py says more), the sentences our own. Names and numbers follow from a seed and the
number of an example alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from sniffer.dataset.spans import Span
from sniffer.hashing import key_of

WORDS = (
    "amber brisk calm dusty early faint gentle hollow icy jolly keen lofty mellow narrow olive pale "
    "quiet rapid silver tidy upper vivid warm young ancient bright coastal distant eager frosty golden humble",
    "anchor badger canyon dolphin ember falcon garnet harbor island jasmine kettle lantern meadow nectar orchard "
    "pebble quarry raven saddle thicket umbrella violet walnut yarrow acorn beacon cedar drum engine fiddle glacier "
    "hammock",
)
ADJECTIVES, NOUNS = (words.split() for words in WORDS)

ONE = ("The secret number of {key} is {value}.", "What is the secret number of {key}?")
SENTENCES = {
    "single": (*ONE, "The secret number of {key} is {values}."),
    "multi_key": (*ONE, "The secret number of {key} is {values}."),
    "multi_value": (
        "One of the secret numbers of {key} is {value}.",
        "What are all the secret numbers of {key}?",
        "The secret numbers of {key} are {values}.",
    ),
}
"""A needle, the question, the answer."""

MOST_NEEDLES = len(ADJECTIVES) * len(NOUNS)
LEAST_VALUE, VALUES = 1_000_000, 9_000_000


@dataclass(frozen=True)
class Task:
    """What is hidden and asked for: of `names` the first, which has all of `values`, or the first of them."""

    kind: str
    names: tuple[str, ...]
    values: tuple[int, ...]

    @classmethod
    def drawn(cls, kind: str, seed: int, number: int, needles: int) -> Task:
        """That of an example; kinds of several have so many `needles`."""
        count = 1 if kind == "single" else needles
        named = count if kind == "multi_key" else 1
        return cls(kind, tuple(drawn_names(seed, number, named)), tuple(drawn_values(seed, number, count)))

    @property
    def needles(self) -> list[tuple[str, str]]:
        """Each with its section; that of the grid's depth comes first."""
        sentence = SENTENCES[self.kind][0]
        owners = self.names if self.kind == "multi_key" else self.names * len(self.values)
        texts = [sentence.format(key=name, value=value) for name, value in zip(owners, self.values, strict=True)]
        others = "distractor" if self.kind == "multi_key" else "needle"
        return [(text, others if place else "needle") for place, text in enumerate(texts)]

    @property
    def question(self) -> str:
        return SENTENCES[self.kind][1].format(key=self.names[0])

    def answer(self, order: Iterable[int]) -> str:
        """With the numbers as the text has them: in the order of these needles."""
        asked = [self.values[place] for place in order if self.kind == "multi_value" or place == 0]
        return SENTENCES[self.kind][2].format(key=self.names[0], values=enumerated(asked))

    @property
    def n_words(self) -> int:
        """Words of needles, question and answer: the same number in all texts of a kind."""
        texts = *(text for text, _ in self.needles), self.question, self.answer(range(len(self.values)))
        return sum(len(text.split()) for text in texts)


def drawn_names(seed: int, number: int, count: int) -> list[str]:
    """So many names, no two alike; more of them begin with those that fewer have."""
    every = range(MOST_NEEDLES)
    drawn = islice(sorted(every, key=lambda one: key_of("niah name", seed, number, one)), count)
    return [f"{ADJECTIVES[one // len(NOUNS)]}-{NOUNS[one % len(NOUNS)]}" for one in drawn]


def drawn_values(seed: int, number: int, count: int) -> list[int]:
    """So many numbers of seven digits, no two alike; more of them begin with those that fewer have."""
    found: dict[int, None] = {}
    place = 0
    while len(found) < count:
        found[LEAST_VALUE + key_of("niah number", seed, number, place) % VALUES] = None
        place += 1
    return list(found)


def drawn_depth(seed: int, number: int, place: int) -> float:
    """Where a needle is that has no depth of the grid, from 0 to 1."""
    return key_of("niah depth", seed, number, place) / (1 << 64)


def enumerated(values: Sequence[int]) -> str:
    """As a sentence has them: 1, 2 and 3."""
    *most, last = map(str, values)
    return f"{', '.join(most)} and {last}" if most else last


def with_needles(hay: str, needles: Iterable[tuple[int, str, str]]) -> tuple[str, list[Span]]:
    """Hay with (place, text, section) put behind so many of its characters, in order; and the sections.

    All of the text belongs to one: a blank to what follows it, as tokenizers have it.
    """
    text, spans, begin = "", [], 0
    for cut, needle, section in [*needles, (len(hay), "", "")]:
        for piece, name, is_apart in ((hay[begin:cut], "hay", begin == 0), (needle, section, True)):
            if piece:
                piece = f" {piece}" if is_apart and text else piece
                spans.append((len(text), len(text) + len(piece), name))
                text += piece
        begin = cut
    return text, spans
