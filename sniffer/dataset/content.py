"""What the rows of a table are: texts, token ids, or chats. One column has it, and perhaps another the ids.

A chat is rendered by the model's chat template, or by one that is named, and its roles are sections (roles.py). Others
come with the rows: where several columns make up a text, from a column of spans, or from one of labels beside
token ids (labelled.py).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int32

from sniffer.dataset.choosing import matching
from sniffer.dataset.columns import require_text, type_at
from sniffer.dataset.labelled import joined, labelled, spanned
from sniffer.dataset.source import LATER, Source, require_string
from sniffer.errors import ConfigError, DatasetError, reason
from sniffer.types import Chat, Content

if TYPE_CHECKING:
    import pyarrow as pa

LARGEST_TOKEN = (1 << 31) - 1


@dataclass(frozen=True)
class ChatFormat:
    """How chats become text.

    Attributes:
        template: a file, the text of a template, or the name of one that the tokenizer has; null for its default.
        tools_column: where each chat's tools are, as JSON schemas.
        thinking: what templates with such a switch are told; null leaves it to them.
        continue_final: leaves the last message open, as if the model were still writing it.
        sections: whether tokens belong to the roles of their messages, and others to `template`.
    """

    template: str | None = None
    tools_column: str | None = None
    thinking: bool | None = None
    continue_final: bool = False
    sections: bool = True

    def text(self) -> str | None:
        """The template, or the name of one; null for the tokenizer's own.

        Raises:
            DatasetError: its file cannot be read.
        """
        if self.template is None or "{" in self.template or not (file := Path(self.template).expanduser()).suffix:
            return self.template
        try:
            return file.read_text(encoding="utf-8")
        except OSError as error:
            raise DatasetError(f"dataset.chat.template={self.template} cannot be read: {reason(error)}") from error
        except UnicodeDecodeError as error:
            raise DatasetError(f"dataset.chat.template={self.template} is not UTF-8 text: convert it") from error


@dataclass(frozen=True, kw_only=True)
class Tabular(Source):
    """A dataset that is a table. All columns are names, or paths into nested ones (columns.py).

    `tokens_column` or `messages_column` take the place of `text_column`. `where`: only rows of which this condition, in
    the SQL of polars, holds.

    A list as `text_column` has each of these columns as a section, `text_separator` between them. `spans_column` has
    those of a text as {start, end, label}, in characters, `labels_column` one for each of the token ids.
    """

    text_column: Any = "text"
    id_column: str | None = None
    tokens_column: str | None = field(default=None, metadata=LATER)
    messages_column: str | None = field(default=None, metadata=LATER)
    chat: ChatFormat = field(default_factory=ChatFormat, metadata=LATER)
    where: str | None = field(default=None, metadata=LATER)
    text_separator: str = field(default="\n\n", metadata=LATER)
    spans_column: str | None = field(default=None, metadata=LATER)
    labels_column: str | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_column is not None and self.messages_column is not None:
            raise ConfigError("dataset.tokens_column and dataset.messages_column are both set: leave one of them out")
        named = "tokens_column" if self.tokens_column is not None else "messages_column"
        if self.special_tokens != "auto" and getattr(self, named) is not None:
            given = f"dataset.special_tokens={self.special_tokens}"
            raise ConfigError(f"{given} is for texts: rows of dataset.{named} have those that they have")
        if self.messages_column is None and self.chat != ChatFormat():
            raise ConfigError("dataset.chat is for chats: say with dataset.messages_column where they are")
        self._check_sections(named if getattr(self, named) is not None else None)

    def _check_sections(self, instead: str | None) -> None:
        """Raises ConfigError where keys do not go together; `instead` is the key that takes the place of a text."""
        columns = self.text_columns
        if (
            not columns
            or not all(isinstance(name, str) and name for name in columns)
            or len(set(columns)) < len(columns)
        ):
            raise ConfigError(
                f"dataset.text_column={self.text_column} must be a column, or a list of several, each once"
            )
        if self.labels_column is not None and self.tokens_column is None:
            raise ConfigError("dataset.labels_column labels token ids: say with dataset.tokens_column where they are")
        if instead is not None and (self.spans_column is not None or len(columns) > 1):
            given = "spans_column" if self.spans_column is not None else f"text_column={list(columns)}"
            raise ConfigError(f"dataset.{given} is for texts, and dataset.{instead} takes their place: leave one out")
        if self.spans_column is not None and isinstance(self.text_column, list):
            raise ConfigError(
                "dataset.spans_column and a list as dataset.text_column both say what the sections are: leave one out"
            )
        if self.pack_to is not None and self._own_sections:
            way = "set dataset.chat.sections=false" if instead == "messages_column" else "leave one out"
            raise ConfigError(
                f"dataset.pack_to={self.pack_to} makes each text a section, and its tokens have others already: {way}"
            )

    @property
    def chat_format(self) -> ChatFormat | None:
        """How its rows become text, where they are chats."""
        return self.chat if self.messages_column is not None else None

    @property
    def text_columns(self) -> tuple[Any, ...]:
        return tuple(self.text_column) if isinstance(self.text_column, list) else (self.text_column,)

    @property
    def has_sections(self) -> bool:
        return self._own_sections or super().has_sections

    @property
    def _own_sections(self) -> bool:
        """Whether its rows say what their sections are."""
        if self.messages_column is not None:
            return self.chat.sections
        by_columns = isinstance(self.text_column, list)
        return by_columns or self.spans_column is not None or self.labels_column is not None

    @abstractmethod
    def values(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        """These columns of every row, in order, as a condition is to see them."""

    def ids_of(self, rows: Callable[..., Iterator[tuple[Any, ...]]]) -> Iterator[Any]:
        """The id of every row; what a row brings along is checked on the way.

        Args:
            rows: gives the columns of these names, of all rows.

        Raises:
            DatasetError: a row is not what it is to be.
        """
        n, identity = len(self.columns), () if self.id_column is None else (self.id_column,)
        for row, values in enumerate(rows(*self.columns, *identity)):
            self.content(values[:n], row)
            yield values[n] if identity else row

    def row_mask(self) -> Iterator[bool] | None:
        return None if self.where is None else matching(self.where, self.values)

    @property
    def columns(self) -> tuple[str, ...]:
        """Where a row's content is."""
        if self.messages_column is not None:
            tools = self.chat.tools_column
            return (self.messages_column,) if tools is None else (self.messages_column, tools)
        named = self.text_columns if self.tokens_column is None else (self.tokens_column,)
        more = self.spans_column or self.labels_column
        return named if more is None else (*named, more)

    def content(self, value: Any, row: int) -> Content:
        """What a row is, of the values of its `columns`."""
        place = f"row {row} of {self.title}"
        if self.messages_column is not None:
            messages, tools = messages_of(value[0], place), tools_of(value[1] if len(value) > 1 else None, place)
            return Chat(messages, tools, self._template, self.chat.thinking, self.chat.continue_final)
        if self.tokens_column is not None:
            ids = tokens_of(value[0], place)
            return ids if self.labels_column is None else labelled(ids, value[1], place)
        texts = value[: len(self.text_columns)]
        for text in texts:
            require_string(text, row, self.title)
        if isinstance(self.text_column, list):
            return joined(dict(zip(self.text_columns, texts, strict=True)), self.text_separator)
        return str(value[0]) if self.spans_column is None else spanned(value[0], value[1], place)

    def require_types(self, schema: pa.Schema, place: str) -> None:
        """Raises DatasetError where columns of an Arrow table cannot be what they are to be, before a row is read."""
        import pyarrow as pa

        structs, integers = pa.types.is_struct, pa.types.is_integer
        named: tuple[tuple[str, str, Callable[[pa.DataType], bool]], ...] = (
            ("messages_column", "messages", structs),
            ("tokens_column", "ids", integers),
            ("spans_column", "spans", structs),
            ("labels_column", "labels", lambda kind: integers(kind) or "string" in str(kind)),
        )
        if self.messages_column is None and self.tokens_column is None:
            for column in self.text_columns:
                require_text(schema, column, place)
        for key, wanted, fits in named:
            column = getattr(self, key)
            found = None if column is None else type_at(schema, column, place)
            inner = getattr(found, "value_type", None)
            if column is not None and (inner is None or not (fits(inner) or pa.types.is_null(inner))):
                raise DatasetError(
                    f"{place}: the column {column!r} is of type {found}, not lists of {wanted}: set dataset.{key}"
                )

    @cached_property
    def _template(self) -> str | None:
        return self.chat.text()


def tokens_of(value: Any, place: str) -> Int32[np.ndarray, " n_tokens"]:
    """Token ids out of a row.

    Raises:
        DatasetError: it is no list of them.
    """
    if not isinstance(value, list | np.ndarray):
        found = "null" if value is None else f"a {type(value).__name__}"
        raise DatasetError(f"{place} has {found} where its token ids should be: wanted a list of integers")
    for at, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token <= LARGEST_TOKEN:
            raise DatasetError(f"{place} has {token!r} at position {at} of its token ids: wanted integers from 0")
    return np.asarray(value, dtype=np.int32)


def messages_of(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    """The messages out of a row; what is null in one counts as absent.

    Raises:
        DatasetError: there are none, or one has no role, or neither content nor calls of tools.
    """
    if not isinstance(value, list) or not value:
        found = "no messages" if value is None or value == [] else f"a {type(value).__name__} where they should be"
        raise DatasetError(f"{place} has {found}: wanted a list of messages, each with role and content")
    for number, message in enumerate(value):
        known = _present(message)
        if not isinstance(known.get("role"), str) or not {"content", "tool_calls"} & known.keys():
            found = f"has {', '.join(known)}" if known else "is empty" if message == {} else f"is {message!r:.40}"
            raise DatasetError(f"{place}: message {number} {found}: wanted role and content")
    return tuple(map(_present, value))


def tools_of(value: Any, place: str) -> tuple[Mapping[str, Any], ...] | None:
    """The tools out of a row; None where it has none.

    Raises:
        DatasetError: they are no list of JSON schemas.
    """
    if value is None or value == []:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(tool, dict) for tool in value):
        raise DatasetError(
            f"{place} has a {type(value).__name__} where its tools should be: wanted a list of JSON schemas"
        )
    return tuple(value)


def _present(message: Any) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None} if isinstance(message, Mapping) else {}
