"""What a row holds, a text, token ids or a chat, as the token ids that go through the model.

Texts have special tokens as the dataset wants them: `auto` has what the model's tokenizer adds, `add` a token of the
beginning also where it adds none, `none` nothing. A text that brings a beginning of its own, such as a chat rendered to
text, gets no second one: attention sinks are at the first position, and no model was trained with two of them. Token
ids are what they are, and a chat has what its template says.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from sniffer.dataset.roles import TEMPLATE, WITHOUT_ROLES, spans_of
from sniffer.dataset.spans import sections_of
from sniffer.errors import CheckpointError, DatasetError, first_line
from sniffer.types import (
    ASSISTANT,
    NONE,
    PROMPT,
    Answer,
    Chat,
    Checkpoint,
    Content,
    Dataset,
    Names,
    SectionedText,
    SectionedTokens,
    Sections,
    Tokenize,
    has_sections,
)


class ChatKeys(NamedTuple):
    """What the configuration says of chats: the key that asks for them, that of a template, and what does without."""

    asked: str = "dataset.messages_column"
    template: str = "dataset.chat.template"
    without_chats: str | None = None
    without_roles: str = WITHOUT_ROLES


CHAT_KEYS = ChatKeys()

TAGS = ("<think>", "</think>")
"""Around thoughts, in templates that know of any; they are told where each is one token."""


@dataclass
class Encoder:
    """From texts to token ids.

    `template`: of chats, if there are any; the tokenizer's own where it is None. `begun`: texts so far that brought a
    beginning of their own, and would have got a second one. `sections`: documents have some; `by_characters`: told by
    the characters of their texts. `chat_keys`: those of the configuration, for messages.
    `prompts`: a model is to go on with the documents.
    """

    tokenize: Tokenize
    special_tokens: str = "auto"
    chats: bool = False
    template: str | None = None
    begun: int = 0
    sections: bool = False
    by_characters: bool = False
    chat_keys: ChatKeys = CHAT_KEYS
    prompts: bool = False

    def __post_init__(self) -> None:
        if self.special_tokens != "auto":
            self._asked("without_special", f"dataset.special_tokens={self.special_tokens}")
        if self.special_tokens == "add" and self._beginning is None:
            raise CheckpointError("dataset.special_tokens=add: the model's tokenizer has no token for a beginning")
        if self.chats:
            self._require_template()
        if self.by_characters and not getattr(self.tokenize, "has_offsets", False):
            raise CheckpointError(
                "sections of a text need a tokenizer that says which characters its tokens stand for, and this one, "
                "written in Python, does not: name a fast one with model.tokenizer, give token ids with "
                "dataset.tokens_column and dataset.labels_column, or chats with dataset.chat.sections=false"
            )

    @classmethod
    def of(cls, dataset: Dataset, tokenize: Tokenize, *, prompts: bool = False) -> Encoder:
        """As the dataset wants it; one of a user's own may not have the keys.

        Raises:
            CheckpointError: the tokenizer cannot do what that asks for.
        """
        chat = getattr(dataset, "chat_format", None)
        # Of texts that are packed, each is a section.
        sections = has_sections(dataset) and getattr(dataset, "pack_to", None) is None
        by_characters = sections and getattr(dataset, "tokens_column", None) is None
        how = getattr(dataset, "special_tokens", "auto")
        return cls(
            tokenize,
            how,
            chat is not None,
            None if chat is None else chat.text(),
            sections=sections,
            by_characters=by_characters,
            chat_keys=getattr(dataset, "chat_keys", CHAT_KEYS),
            prompts=prompts,
        )

    def encoded(self, content: Content, name: str = "") -> tuple[Int32[np.ndarray, " n_tokens"], Sections | None]:
        """The token ids of a document, and where its dataset has sections, theirs.

        Raises:
            DatasetError: as `ids`; or the sections cannot be told for sure.
        """
        if isinstance(content, SectionedTokens):
            return content.token_ids, content.sections
        if isinstance(content, SectionedText):
            ids = self.ids(content.text, name)
            return ids, self._sections_of(content, ids, name)
        content = asking(content, name) if self.prompts and isinstance(content, Chat) else content
        ids = self.ids(content, name)
        if isinstance(content, Chat) and self.sections:
            return ids, self._sections_of_roles(content, ids, name)
        if self.prompts and not self.sections:
            return ids, Sections.one(PROMPT, len(ids))
        return ids, Sections.one(NONE, len(ids)) if self.sections else None

    def ids(self, content: Content, name: str = "") -> Int32[np.ndarray, " n_tokens"]:
        """The token ids of a document; `name` is for messages.

        Raises:
            DatasetError: a chat's template refuses it.
        """
        if isinstance(content, SectionedText | SectionedTokens):
            return self.encoded(content, name)[0]
        if isinstance(content, Chat):
            return np.asarray(self._of_chat(content, name), dtype=np.int32)
        return np.asarray(self._of_text(content) if isinstance(content, str) else content, dtype=np.int32)

    def separator(self, wanted: Any) -> int | None:
        """The token that `dataset.pack_separator` means: eos, none, or a token id.

        Raises:
            CheckpointError: the tokenizer has no end of texts.
        """
        if wanted == "none":
            return None
        found = getattr(self.tokenize, "ending", None) if wanted == "eos" else int(wanted)
        if found is None:
            raise CheckpointError(
                "dataset.pack_separator=eos: no tokenizer here has a token that ends a text: set "
                "dataset.pack_separator=none, or to the id of a token"
            )
        return int(found)

    def describe(self) -> dict[str, str]:
        """For the manifest: what the tokenizer says of itself, which a plain function does not; the chat template."""
        described: dict[str, str] = getattr(self.tokenize, "describe", dict)()
        if not self.chats:
            return described
        return {**described, "chat_template": hashlib.sha256(self._require_template().encode()).hexdigest()}

    @property
    def answer(self) -> Answer:
        """How what a model writes after these documents is named: of chats by their template's tags, if it has any."""
        if not (self.chats and self.sections):
            return Answer()
        template = self._require_template()
        tags = [self._asked("without_special", self.chat_keys.asked)(tag) for tag in TAGS if tag in template]
        if len(tags) != len(TAGS) or any(len(tag) != 1 for tag in tags):
            return Answer(ASSISTANT)
        return Answer(ASSISTANT, (int(tags[0][0]), int(tags[1][0])))

    def _of_text(self, text: str) -> Any:
        if not text.strip():
            return ()
        if self.special_tokens == "none":
            return self._asked("without_special", "dataset.special_tokens=none")(text)
        ids, beginning = self.tokenize(text), self._beginning
        if beginning is None:
            return ids
        if list(ids[:2]) == [beginning, beginning] and self._adds_one(text, len(ids)):
            self.begun += 1
            return ids[1:]
        lacks = self.special_tokens == "add" and list(ids[:1]) != [beginning]
        return np.concatenate([[beginning], ids]) if lacks else ids

    def _sections_of(self, content: SectionedText, ids: Int32[np.ndarray, " n_tokens"], name: str) -> Sections:
        """By the characters that tokens stand for, once those are shown to be of these very tokens."""
        if not len(ids):
            return Sections.one(NONE, 0)
        found = self._offsets(content.text, self.special_tokens != "none")
        if len(ids) == len(found[0]) - 1:  # a beginning before that of the text was left out
            found = found[:, 1:]
        elif len(ids) == len(found[0]) + 1:  # one was put before it
            found = np.concatenate([[[ids[0]], [0], [0]], found], axis=1)
        return self._by_offsets(found, ids, content, name)

    def _sections_of_roles(self, chat: Chat, ids: Int32[np.ndarray, " n_tokens"], name: str) -> Sections:
        """Those of the rendered chat, whose tokens are those of the template to the last one."""
        render = self._asked("rendered", self.chat_keys.asked)
        text, spans = spans_of(chat, render, name, self.chat_keys.without_roles)
        found = self._by_offsets(self._offsets(text, False), ids, SectionedText(text, spans), name)
        names = found.names
        return Sections.of(Names.of([known if known != NONE else TEMPLATE for known in names.known], names.codes))

    def _offsets(self, text: str, special: bool) -> Int[np.ndarray, "3 n_tokens"]:
        found: Int[np.ndarray, "3 n_tokens"] = self._asked("offsets", "sections")(text, special)
        return found

    def _by_offsets(
        self, found: Int[np.ndarray, "3 n_tokens"], ids: Int32[np.ndarray, " n_tokens"], text: SectionedText, name: str
    ) -> Sections:
        if not np.array_equal(found[0], ids):
            raise DatasetError(
                f"document {name!r}: its tokenizer makes other tokens where it says which characters they stand for, "
                "so that sections cannot be told: name another with model.tokenizer"
            )
        return sections_of(found[1], found[2], text.spans, text.text, f"document {name!r}")

    def _of_chat(self, chat: Chat, name: str) -> Any:
        try:
            return self._asked("chat", self.chat_keys.asked)(chat)
        except Exception as error:  # of a template: any
            raise DatasetError(
                f"document {name!r}: the chat template refuses it: {first_line(error)}; mend the chat, or give another "
                f"template with {self.chat_keys.template}{self._or_without}"
            ) from error

    def _adds_one(self, text: str, n_tokens: int) -> bool:
        """Whether the tokenizer put a beginning before that of the text; else both are the text's own."""
        return len(self._asked("without_special", "a beginning")(text)) < n_tokens

    def _require_template(self) -> str:
        try:
            return str(self._asked("template", self.chat_keys.asked)(self.template))
        except ValueError as error:
            raise CheckpointError(
                f"{self.chat_keys.asked}: the model's tokenizer has no such chat template: give one with "
                f"{self.chat_keys.template}=FILE{self._or_without} ({first_line(error)[:100]})"
            ) from error

    @property
    def _or_without(self) -> str:
        return "" if self.chat_keys.without_chats is None else f", or take {self.chat_keys.without_chats}"

    @property
    def _beginning(self) -> int | None:
        return getattr(self.tokenize, "beginning", None)

    def _asked(self, method: str, by: str) -> Any:
        found = getattr(self.tokenize, method, None)
        if found is None:
            raise CheckpointError(f"{by}: the model's tokenizer is a plain function, which cannot be asked for that")
        return found


def asking(chat: Chat, name: str) -> Chat:
    """A chat whose next words are the assistant's.

    Raises:
        DatasetError: it has its answer already, or is left open by somebody else.
    """
    last = chat.messages[-1].get("role")
    if chat.continue_final and last != ASSISTANT:
        raise DatasetError(
            f"document {name!r}: its last message is of {last!r}, and dataset.chat.continue_final has a model go on "
            "with it: only messages of the assistant are gone on with; set dataset.chat.continue_final=false"
        )
    if not chat.continue_final and last == ASSISTANT:
        raise DatasetError(
            f"document {name!r} ends with an answer of the assistant: leave it out of the data, or set "
            "dataset.chat.continue_final=true to have the model go on with it"
        )
    return replace(chat, prompts=not chat.continue_final)


def tokenizer_for(dataset: Dataset, model: Checkpoint) -> tuple[Tokenize, int]:
    """A tokenize function, and the id to pad with; token ids need none, and a model may have none then.

    Raises:
        CheckpointError: there is no tokenizer.
    """
    if getattr(dataset, "tokens_column", None) is not None:
        return _no_text, 0
    # A checkpoint class of a user's own may have the name that early releases asked for.
    load = getattr(model, "load_tokenizer", None) or model.tokenizer  # type: ignore[attr-defined]
    found: tuple[Tokenize, int] = load()
    return found


def _no_text(text: str) -> Any:
    raise AssertionError(f"token ids are no text: {text!r:.40}")
