"""Needles in haystacks: sentences with a number to be found, put into the texts of another dataset, and a question.

The kinds single, multi_key and multi_value are those of RULER (Hsieh et al., "RULER: What's the Real Context Size of
Your Long-Context Language Models?", 2024); the sentences are our own. Texts are made offline and in the same way
everywhere: example number n has the same hay, names and numbers in every cell of the grid, so that two cells differ by
their length, depth or kind alone, and a cell does not depend on which others there are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from itertools import product
from typing import Any

from sniffer.dataset.content import ChatFormat
from sniffer.dataset.encoding import ChatKeys
from sniffer.dataset.haystack import Haystack, place_at, places, texts_of
from sniffer.dataset.needles import MOST_NEEDLES, SENTENCES, Task, drawn_depth, with_needles
from sniffer.dataset.source import Shard, Source
from sniffer.dataset.spans import Span, checked_spans
from sniffer.errors import ConfigError, DatasetError
from sniffer.hashing import key_of
from sniffer.types import Chat, Content, SectionedText

DESIGN = {
    "version": 1,
    "after": "RULER (Hsieh et al. 2024): single, multi-key and multi-value retrieval; sentences of our own",
    "length": "words, as blanks separate them, of the whole document: hay, needles, question, answer",
    "hay": "the texts of dataset.hay in a ring, from a drawn sentence on, cut to what the length leaves; none twice",
    "depth": "the part of the hay's words before the needle: the nearest end of a sentence or paragraph, or where that "
    "is more than a twentieth of the hay away, the very word",
    "others": "multi_key: needles with other names, a section `distractor`; multi_value: more numbers of the name that "
    "is asked for, in the answer by their order in the text; at depths drawn from 0 to 1",
    "drawn": "hay, names, numbers and drawn depths by (dataset.seed, the example's number) alone",
}


@dataclass(frozen=True, kw_only=True)
class Niah(Source):
    """Documents of hay with needles, a question and its answer; sections hay, needle, distractor, question, answer.

    `hay`: any dataset of texts. `kinds`, `lengths` (words), `depths` (0 to 1): a grid, with so many `examples` in each
    cell; each may be one value. `needles`: in texts of several. `chat`: true for the model's chat template, or a
    template (a file, a name, a text); the answer is then the assistant's. A document's id is kind/length/depth/number.
    """

    title = "dataset=niah"
    never_cut = True

    hay: Any = field(default=None, metadata={"made": ("check", "texts", "describe")})
    seed: int = 0
    kinds: Any = field(default_factory=lambda: ["single"])
    lengths: Any = field(default_factory=lambda: [256, 1024])
    depths: Any = field(default_factory=lambda: [0, 0.25, 0.5, 0.75, 1])
    examples: int = 1
    needles: int = 4
    chat: Any = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kinds", "lengths", "depths"):
            given = getattr(self, name)
            object.__setattr__(self, name, list(given) if isinstance(given, list | tuple) else [given])
        self._check_hay()
        self._check_grid()
        if not isinstance(self.chat, bool | str) or self.chat == "":
            raise ConfigError(f"dataset.chat={self.chat!r} must be true, false, or a chat template (a file, a name)")
        if self.chat and self.special_tokens != "auto":
            raise ConfigError(f"dataset.special_tokens={self.special_tokens} is for texts: a chat has what it has")
        if self.pack_to is not None:
            raise ConfigError(
                f"dataset.pack_to={self.pack_to} makes each text a section, and those of niah have others: leave it out"
            )
        for kind, length in product(self.kinds, self.lengths):
            if length <= (alone := self._task(kind).n_words):
                raise ConfigError(
                    f"dataset.lengths has {length}, and needles, question and answer of {kind} have {alone} words "
                    f"alone: make it longer than {alone}"
                )

    def _check_hay(self) -> None:
        if self.hay is None or isinstance(self.hay, Niah):
            found = "missing" if self.hay is None else "niah itself"
            raise ConfigError(f"dataset.hay is {found}: choose a dataset of texts with dataset@dataset.hay=text")
        if getattr(self.hay, "shard", Shard()) != Shard():
            raise ConfigError("dataset.hay.shard: hay is the same for all workers: set dataset.shard")
        for key in ("max_tokens", "min_tokens", "window", "stride", "pack_to"):
            if getattr(self.hay, key, None) is not None:
                raise ConfigError(f"dataset.hay.{key} counts tokens, and hay is cut by words: leave it null")
        for key in ("tokens_column", "messages_column"):
            if getattr(self.hay, key, None) is not None:
                raise ConfigError(f"dataset.hay.{key}: hay is made of texts: give dataset.hay.text_column")

    def _check_grid(self) -> None:
        if wrong := [kind for kind in self.kinds if kind not in SENTENCES]:
            raise ConfigError(f"dataset.kinds has {wrong[0]}: choose from {', '.join(SENTENCES)}")
        if wrong := [length for length in self.lengths if isinstance(length, bool) or not isinstance(length, int)]:
            raise ConfigError(f"dataset.lengths has {wrong[0]}: wanted numbers of words")
        if wrong := [depth for depth in self.depths if not _is_depth(depth)]:
            raise ConfigError(f"dataset.depths has {wrong[0]}: wanted numbers from 0, before the hay, to 1, behind it")
        object.__setattr__(self, "depths", [float(depth) + 0.0 for depth in self.depths])
        for name in ("kinds", "lengths", "depths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"dataset.{name}={values} must have some values, each once")
        if self.examples < 1:
            raise ConfigError(f"dataset.examples={self.examples} must be 1 or more")
        if not 2 <= self.needles <= MOST_NEEDLES:
            raise ConfigError(f"dataset.needles={self.needles} must be from 2 to {MOST_NEEDLES}; kinds=single has one")

    @property
    def has_sections(self) -> bool:
        return True

    @property
    def chat_format(self) -> ChatFormat | None:
        return ChatFormat(template=None if self.chat is True else self.chat) if self.chat else None

    @property
    def chat_keys(self) -> ChatKeys:
        plain = "dataset.chat=false for plain text"
        return ChatKeys("dataset.chat", "dataset.chat", plain, without_roles=f"take {plain}")

    def check(self) -> None:
        """As any source; the hay is read, and must be long enough for the longest text."""
        super().check()
        with self._naming_hay():
            self.hay.check()
            there = len(self._haystack)
        length, kind = max(
            (length - self._task(kind).n_words, kind) for kind, length in product(self.kinds, self.lengths)
        )
        if length > there:
            raise DatasetError(
                f"{self._hay_title} has {there:,} words of hay, fewer than the {length:,} that dataset.lengths="
                f"{max(self.lengths)} of {kind} takes: none is used twice, so give more of it, or a shorter length"
            )

    def row_ids(self) -> Iterator[str]:
        return (f"{kind}/{length}/{depth!r}/{number}" for kind, length, depth, number in self._cells())

    def row_texts(self, rows: Iterable[int]) -> Iterator[Content]:
        cells = list(self._cells())
        return (self._made(*cells[row]) for row in rows)

    def some_texts(self, rows: Sequence[int]) -> Iterator[Content]:
        return self.row_texts(rows)

    def content(self, value: Any, row: int) -> Content:
        made: Content = value
        return made

    def facts(self) -> dict[str, Any]:
        parts = ("needle", "question", "answer")
        sentences = {kind: dict(zip(parts, SENTENCES[kind], strict=True)) for kind in self.kinds}
        return {"hay": self.hay.describe(), "design": {**DESIGN, "sentences": sentences}}

    def _cells(self) -> Iterator[tuple[str, int, float, int]]:
        return product(self.kinds, self.lengths, self.depths, range(self.examples))

    @property
    def _hay_title(self) -> str:
        return str(getattr(self.hay, "title", "dataset.hay"))

    @contextmanager
    def _naming_hay(self) -> Iterator[None]:
        """In messages, keys of the hay have its name."""
        keys = "|".join(one.name for one in fields(self.hay)) if is_dataclass(self.hay) else "path"
        try:
            yield
        except (ConfigError, DatasetError) as error:
            raise type(error)(re.sub(rf"\bdataset\.(?=({keys})\b)", "dataset.hay.", str(error))) from error

    @cached_property
    def _haystack(self) -> Haystack:
        return Haystack(texts_of(self.hay, self._hay_title))

    def _task(self, kind: str, number: int = 0) -> Task:
        return Task.drawn(kind, self.seed, number, self.needles)

    def _made(self, kind: str, length: int, depth: float, number: int) -> Content:
        task, name = self._task(kind, number), f"{kind}/{length}/{depth!r}/{number}"
        n_words = length - task.n_words
        hay = self._haystack.stretch(key_of("niah hay", self.seed, number), n_words)
        if found := [key for key in task.names if key in hay]:
            raise DatasetError(
                f"{self._hay_title} has {found[0]!r}, the name of a needle, in the hay of {name}: set another "
                "dataset.seed, or take other hay"
            )
        ends, between = places(hay)
        depths = [depth, *(drawn_depth(self.seed, number, place) for place in range(1, len(task.values)))]
        before = [place_at(one, n_words, between) for one in depths]
        order = sorted(range(len(before)), key=lambda place: (before[place], place))
        cuts = [int(ends[before[place] - 1]) if before[place] else 0 for place in order]
        text, spans = with_needles(hay, [(cut, *task.needles[place]) for cut, place in zip(cuts, order, strict=True)])
        text, spans = _followed(text, spans, "\n\n", task.question, "question")
        answer = task.answer(order)
        if (chat := self.chat_format) is None:
            text, spans = _followed(text, spans, "\n", answer, "answer")
            return SectionedText(text, checked_spans(spans, len(text), name))
        messages = {"role": "user", "content": text}, {"role": "assistant", "content": answer}
        parts = checked_spans(spans, len(text), name), ((0, len(answer), "answer"),)
        return Chat(messages, template=chat.text(), spans=parts)


def _followed(text: str, spans: list[Span], blank: str, more: str, name: str) -> tuple[str, list[Span]]:
    begin = len(text) + len(blank)
    return f"{text}{blank}{more}", [*spans, (begin, begin + len(more), name)]


def _is_depth(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1
