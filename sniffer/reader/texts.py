"""What the documents of a run said: their token ids, and, with the tokenizer, texts and tokens as strings.

The tokenizer is the one that the run's configuration names, where that is at hand; one that does not do what the run's
did is refused, since the texts would be others. Any tokenizer of transformers can be given in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import polars as pl

from sniffer.config.build import build
from sniffer.config.resolve import ROLES
from sniffer.errors import RunError, SnifferError, unbroken
from sniffer.storage.manifest import Manifest
from sniffer.storage.tokens import Tokens, TokenTable, read_tokens


@runtime_checkable
class Decoder(Protocol):
    """Token ids to text; tokenizers of transformers are some."""

    def __len__(self) -> int: ...

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...


def tokens_of(folder: Path, manifest: Manifest, example_id: int | None = None) -> TokenTable:
    """The token ids of one document, or of all.

    Raises:
        RunError: the run has not kept them, has no such document, or a file cannot be read.
    """
    if not manifest.tokens:
        raise RunError(
            f"{folder} has no token ids: output.tokens=false, published without them, imported, or made by an early "
            "release"
        )
    try:
        table = read_tokens(folder, manifest.tokens, example_id)
    except (OSError, ValueError) as error:
        raise RunError(
            f"could not read the token ids of {folder}: {unbroken(error)}; `python -m sniffer.runs verify {folder}` "
            "tells more"
        ) from error
    if example_id is not None and not len(table):
        raise RunError(f"{example_id} is no document of {folder}: its examples() lists them")
    return table


def texts_of(
    table: TokenTable, example_ids: Iterable[int] | None, tokenizer: Decoder, *, special_tokens: bool
) -> dict[int, str]:
    """Texts by document; raises RunError for a document that has no token ids."""
    texts: dict[int, str] = {}
    for example_id in table.example_ids.tolist() if example_ids is None else map(int, example_ids):
        token_ids = table.of(example_id)
        if token_ids is None:
            raise RunError(f"{example_id} is no document with token ids in this run: its examples() lists them")
        texts[example_id] = tokenizer.decode(
            token_ids.tolist(), skip_special_tokens=not special_tokens, clean_up_tokenization_spaces=False
        )
    return texts


def with_token(frame: pl.LazyFrame, tokenizer: Decoder) -> pl.LazyFrame:
    """A scan with a column `token` more: each row's token as the tokenizer's vocabulary spells it."""
    ids = np.arange(len(tokenizer), dtype=np.int32)
    spelled = pl.Series("token", tokenizer.convert_ids_to_tokens(ids.tolist()), dtype=pl.String)
    return frame.with_columns(
        pl.col("token_id").replace_strict(pl.Series(ids), spelled, default=None, return_dtype=pl.String).alias("token")
    )


def tokenizer_of(manifest: Manifest) -> Decoder:
    """The tokenizer that the run was made with.

    Raises:
        RunError: it is not at hand, would run code of its own, or does something else now.
    """
    model, then = manifest.config.get("model"), manifest.model.get("tokenizer")
    give = "give one of transformers with tokenizer=..."
    if not isinstance(then, dict):
        raise RunError(f"this run was made without a tokenizer, or by an early release that did not record it: {give}")
    if not isinstance(model, dict) or model.get("trust_remote_code"):
        raise RunError(f"the tokenizer of this run may run code of its own: {give}")
    try:
        found: Any = build(model, "model", role=ROLES["model"]).load_tokenizer()[0]
    except SnifferError as error:
        raise RunError(f"the tokenizer of this run is not at hand ({error}): {give}") from error
    now = found.describe()
    if now["sha256"] != then.get("sha256"):
        raise RunError(
            f"the tokenizer of {then.get('source', model.get('checkpoint'))} is not what it was when the run was made: "
            f"{give}, which is taken as it is"
        )
    decoder: Decoder = found
    return decoder


def same_everywhere(found: Sequence[tuple[str, Tokens]], what: str) -> Tokens:
    """The token ids that all jobs have of one document.

    Raises:
        RunError: no job has it, or they have it otherwise.
    """
    if not found:
        raise RunError(f"{what} is no document of any job that kept its token ids")
    (first, tokens), others = found[0], found[1:]
    for name, other in others:
        if not np.array_equal(tokens, other):
            raise RunError(f"{what} has other tokens in job {name} than in job {first}: ask sweep.runs[{first!r}]")
    return tokens
