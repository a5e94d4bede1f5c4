"""What the rows of a table are: texts, token ids, or chats. One column has it, and perhaps another the ids.

A chat is rendered by the model's chat template, or by one that is named; which of its tokens a role wrote is not
followed yet.
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
    """

    template: str | None = None
    tools_column: str | None = None
    thinking: bool | None = None
    continue_final: bool = False

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
    """

    text_column: str = "text"
    id_column: str | None = None
    tokens_column: str | None = field(default=None, metadata=LATER)
    messages_column: str | None = field(default=None, metadata=LATER)
    chat: ChatFormat = field(default_factory=ChatFormat, metadata=LATER)
    where: str | None = field(default=None, metadata=LATER)

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
        return (self.tokens_column or self.text_column,)

    def content(self, value: Any, row: int) -> Content:
        """What a row is, of the values of its `columns`."""
        if self.messages_column is not None:
            place = f"row {row} of {self.title}"
            messages, tools = messages_of(value[0], place), tools_of(value[1] if len(value) > 1 else None, place)
            return Chat(messages, tools, self._template, self.chat.thinking, self.chat.continue_final)
        if self.tokens_column is not None:
            return tokens_of(value[0], f"row {row} of {self.title}")
        require_string(value[0], row, self.title)
        return str(value[0])

    def require_types(self, schema: pa.Schema, place: str) -> None:
        """Raises DatasetError where columns of an Arrow table cannot be what they are to be, before a row is read."""
        import pyarrow as pa

        if self.messages_column is None and self.tokens_column is None:
            require_text(schema, self.text_column, place)
            return
        found = type_at(schema, self.columns[0], place)
        inner = getattr(found, "value_type", None)
        fits = pa.types.is_struct if self.messages_column is not None else pa.types.is_integer
        if inner is None or not fits(inner):
            key, wanted = (
                ("messages_column", "messages") if self.messages_column is not None else ("tokens_column", "ids")
            )
            raise DatasetError(
                f"{place}: the column {self.columns[0]!r} is of type {found}, not lists of {wanted}: set dataset.{key}"
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
