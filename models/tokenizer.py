"""A checkpoint's tokenizer: text to token ids, and what stands for all that it does."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sniffer.errors import CheckpointError, first_line
from sniffer.types import Chat


class Tokenizer:
    """Tokenises as the checkpoint's tokenizer does, special tokens included.

    Args:
        made_by: one of transformers.
        source: what it is from, where that is not the checkpoint.
        stands_in: whether nobody has asked for that one.
    """

    def __init__(self, made_by: Any, source: str | None = None, *, stands_in: bool = False) -> None:
        self._made_by = made_by
        self._source = source
        self._stands_in = stands_in

    @classmethod
    def read(cls, place: str, named: str | None, *, stands_in: bool = False, **options: Any) -> Tokenizer:
        """From a folder or the hub; `named` as the user has named it, if at all.

        Raises:
            CheckpointError: there is none.
        """
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(place, **options), named, stands_in=stands_in)
        except Exception as error:  # tokenizers raises bare ones
            way = "" if named else "; model.tokenizer takes that of another folder or hub id"
            raise CheckpointError(f"the tokenizer of {place} cannot be loaded: {first_line(error)}{way}") from error

    def __len__(self) -> int:
        return len(self._made_by)

    @property
    def pad_id(self) -> int:
        pads = [self._made_by.pad_token_id, self._made_by.eos_token_id, 0]
        return next(int(pad) for pad in pads if pad is not None)

    @property
    def beginning(self) -> int | None:
        """The token that a text begins with: BOS, or CLS."""
        tokens = (getattr(self._made_by, name, None) for name in ("bos_token_id", "cls_token_id"))
        return next((int(token) for token in tokens if token is not None), None)

    @property
    def ending(self) -> int | None:
        """The token that ends a text."""
        found = getattr(self._made_by, "eos_token_id", None)
        return None if found is None else int(found)

    def __call__(self, text: str) -> Int[np.ndarray, " n_tokens"]:
        return np.asarray(self._made_by(text, verbose=False)["input_ids"], dtype=np.int64)

    def without_special(self, text: str) -> Int[np.ndarray, " n_tokens"]:
        return np.asarray(self._made_by(text, verbose=False, add_special_tokens=False)["input_ids"], dtype=np.int64)

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        told = {
            "skip_special_tokens": skip_special_tokens,
            "clean_up_tokenization_spaces": clean_up_tokenization_spaces,
        }
        return str(self._made_by.decode(token_ids, **told))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """As the vocabulary spells them."""
        return list(self._made_by.convert_ids_to_tokens(ids))

    @property
    def has_offsets(self) -> bool:
        """Whether it says which characters tokens stand for; those that are written in Python do not."""
        return bool(getattr(self._made_by, "is_fast", False))

    def offsets(self, text: str, special: bool) -> Int[np.ndarray, "3 n_tokens"]:
        """Token ids, the first character that each stands for, and the one after the last, all blanks counted.

        `special`: whether special tokens are added, which stand for no character.
        """
        encoding = self._untrimmed.encode(text, add_special_tokens=special)
        offsets = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return np.concatenate([np.asarray([encoding.ids], dtype=np.int64), offsets.T])

    @cached_property
    def _untrimmed(self) -> Any:
        """The same tokenizer, which leaves no blanks of a token out of its offsets, as some are set to do."""
        from tokenizers import Tokenizer as Backend

        backend = self._made_by.backend_tokenizer
        twin = Backend.from_str(json.dumps(_without_trimming(json.loads(_whole(backend)))))
        twin.encode_special_tokens = backend.encode_special_tokens
        return twin

    def template(self, wanted: str | None) -> str:
        return str(self._made_by.get_chat_template(wanted))

    def chat(self, chat: Chat) -> Int[np.ndarray, " n_tokens"]:
        encoded = self._templated(chat, return_dict=True, tokenizer_kwargs={"verbose": False})
        return np.asarray(encoded["input_ids"], dtype=np.int64)

    def rendered(self, chat: Chat) -> str:
        return str(self._templated(chat, tokenize=False))

    def _templated(self, chat: Chat, **how: Any) -> Any:
        # Families have two names for it; a template knows one of them, or none.
        told = {} if chat.thinking is None else dict.fromkeys(("enable_thinking", "thinking"), chat.thinking)
        return self._made_by.apply_chat_template(
            list(chat.messages),
            tools=None if chat.tools is None else list(chat.tools),
            chat_template=chat.template,
            continue_final_message=chat.continue_final,
            add_generation_prompt=chat.prompts,
            **how,
            **told,
        )

    def describe(self) -> dict[str, Any]:
        """For the manifest: its class, and a digest of all that it does, wherever it came from."""
        source = {} if self._source is None else {"source": self._source}
        stands_in = {"stand_in": True} if self._stands_in else {}
        return {"class": type(self._made_by).__name__, "sha256": _digest(self._made_by), **source, **stands_in}


def _digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found = hashlib.sha256(_whole(backend) if backend is not None else _parts(tokenizer))
    found.update(repr(getattr(tokenizer, "split_special_tokens", None)).encode())
    return found.hexdigest()


def _whole(backend: Any) -> bytes:
    """Normaliser, splitting, model with its vocabulary, post-processor and added tokens, as one JSON text."""
    # What each call of the tokenizer does first.
    backend.no_truncation()
    backend.no_padding()
    return str(backend.to_str()).encode()


def _without_trimming(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_trimming(value) for value in values]
    if isinstance(values, dict):
        return {key: False if key == "trim_offsets" else _without_trimming(value) for key, value in values.items()}
    return values


def _parts(tokenizer: Any) -> bytes:
    """Of a tokenizer written in Python: its vocabulary, its settings, and the files that it was read from."""
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    settings = {key: value for key, value in getattr(tokenizer, "init_kwargs", {}).items() if not _is_place(value)}
    files = [getattr(tokenizer, name, None) for name in getattr(tokenizer, "vocab_files_names", {})]
    contents = [hashlib.sha256(Path(str(file)).read_bytes()).hexdigest() for file in files if _is_place(file)]
    told = [sorted(vocabulary.items()), settings, contents, type(tokenizer).__qualname__]
    return json.dumps(told, sort_keys=True, default=str).encode()


def _is_place(value: Any) -> bool:
    return isinstance(value, (str, Path)) and Path(value).exists()
