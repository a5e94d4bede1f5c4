"""Where a checkpoint is: an embedded model, a local folder, the hub's cache, or the hub itself.

Asked in that order, and the hub last and briefly: loading a hub id without network takes transformers half
a minute of retries to fail, while one question to the hub is answered, or refused, at once. A snapshot
that is complete in the local cache is used as it is, so that a run does not change because `main` moved.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Thread

from sniffer.errors import CheckpointError, first_line

from . import embedded

EMBEDDED = "embedded:"
PATIENCE_S = 2.0
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
ADAPTER = "adapter_config.json"
"""Transformers puts an adapter on the weights beside it, wherever the package peft is installed, and only there."""


def locate(checkpoint: str, revision: str | None, gguf_file: str | None = None) -> str:
    """A folder, or a hub id that has been found accessible, as from_pretrained takes it.

    `gguf_file` names a file that holds weights, config and tokenizer in one, in place of all others.

    Raises:
        CheckpointError: there is no such folder, it has no config, it has an adapter that would be left out, or the
            hub denies or does not answer.
    """
    folder = on_disk(checkpoint, revision, gguf_file)
    if folder is not None and (gguf_file is not None or _has_weights(folder)):
        _refuse_lost_adapter(folder)
        return str(folder)
    if folder is not None and not is_hub_id(checkpoint):
        raise CheckpointError(f"{folder} has a config but not all its weights (looked for {', '.join(WEIGHTS)})")
    ask_hub(checkpoint, revision)
    return checkpoint


def on_disk(checkpoint: str, revision: str | None, gguf_file: str | None = None) -> Path | None:
    """The folder of a checkpoint if it is on this machine; None for a hub id that is not cached.

    Raises:
        CheckpointError: it names a folder that is missing or is no checkpoint.
    """
    needed = gguf_file or "config.json"
    if checkpoint.startswith(EMBEDDED):
        return embedded.path(checkpoint.removeprefix(EMBEDDED))
    if not is_hub_id(checkpoint):
        return _folder(Path(checkpoint).expanduser(), needed)
    return cached(checkpoint, revision, needed)


def tokenizer_source(name: str) -> str:
    """A folder with a tokenizer, or a hub id that has been found accessible, as from_pretrained takes it.

    Raises:
        CheckpointError: there is no such folder, or the hub denies or does not answer.
    """
    if name.startswith(EMBEDDED):
        return str(embedded.path(name.removeprefix(EMBEDDED)))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder)
    if not is_hub_id(name):
        raise CheckpointError(f"model.tokenizer={name} is neither a local folder nor a hub id like owner/name")
    if cached(name, None, "tokenizer_config.json") is None:
        ask_hub(name, None)
    return name


def fetched_adapter(name: str) -> Path:
    """The local copy of an adapter of the hub, fetched now.

    Raises:
        CheckpointError: it cannot be had.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        _within(PATIENCE_S, lambda: HfApi().model_info(name, timeout=PATIENCE_S))
        folder = Path(snapshot_download(name, allow_patterns=["adapter_*"]))
    except Exception as error:  # of the network, of the hub: any
        raise CheckpointError(
            f"model.adapter={name} cannot be had from the hub ({first_line(error) or type(error).__name__}): check the "
            "name and the network, or give a local folder"
        ) from error
    if not (folder / ADAPTER).is_file():
        raise CheckpointError(f"model.adapter={name} has no {ADAPTER} on the hub: it is no adapter")
    return folder


def _refuse_lost_adapter(folder: Path) -> None:
    """Refuses a checkpoint with an adapter that transformers would leave out without a word."""
    if (folder / ADAPTER).exists() and find_spec("peft") is None:
        raise CheckpointError(
            f"{folder} has an adapter ({ADAPTER}), which is applied only where peft is installed: pip install peft, or "
            f"point model.checkpoint at the model without it"
        )


@lru_cache
def ask_hub(checkpoint: str, revision: str | None) -> None:
    """Asks the hub, within seconds, whether a model is there and may be read.

    Raises:
        CheckpointError: it is gated, not found, an adapter, or there is no network, and what to do about it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    instead = "or set model.checkpoint=/local/folder, or model.weights=random to use the architecture alone"
    if constants.is_offline_mode():
        raise CheckpointError(f"{checkpoint} is not in the local cache and HF_HUB_OFFLINE is set: unset it, {instead}")

    files: list[str] = []

    def question() -> None:
        found = HfApi().model_info(checkpoint, revision=revision, timeout=PATIENCE_S)
        files.extend(one.rfilename for one in getattr(found, "siblings", None) or ())
        HfApi().auth_check(checkpoint)

    try:
        _within(PATIENCE_S, question)
    except GatedRepoError as error:
        raise CheckpointError(
            f"{checkpoint} is gated: accept its licence at {constants.ENDPOINT}/{checkpoint} and run"
            f" `hf auth login`, {instead}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{checkpoint} has no revision {revision!r} on the hub: check model.revision") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{checkpoint} is not found on the hub, or is private: check the name, run `hf auth login`, {instead}"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{checkpoint!r} is neither a local folder nor a hub id like owner/name") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "no status")
        raise CheckpointError(f"the hub answered {status} for {checkpoint}: try again later, {instead}") from error
    except Exception as error:  # the HTTP library below huggingface_hub has changed before, and will again
        raise CheckpointError(
            f"no network: the hub could not be asked for {checkpoint} ({str(error).strip() or type(error).__name__}):"
            f" connect, {instead}"
        ) from error
    if ADAPTER in files:
        raise CheckpointError(
            f"{checkpoint} has an adapter ({ADAPTER}), which transformers would put on another checkpoint: download "
            f"both into one folder, or point model.checkpoint at a model without it"
        )


def _within(seconds: float, question: Callable[[], object]) -> None:
    """Runs a question in a thread, since a name server that stays silent knows no timeout."""
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            question()
        except BaseException as error:
            failures.append(error)

    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if failures:
        raise failures[0]


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, with every shard that an index file names."""
    shards = {
        name
        for index in folder.glob("*.index.json")
        for name in json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values()
    }
    return any(any(folder.glob(pattern)) for pattern in WEIGHTS) and all((folder / name).exists() for name in shards)


def is_hub_id(checkpoint: str) -> bool:
    """Whether a name can only be meant for the hub: no such path exists, and it does not look like one."""
    looks_local = checkpoint.startswith(("/", "./", "../", "~")) or checkpoint in (".", "..")
    return not looks_local and not Path(checkpoint).exists() and not checkpoint.startswith(EMBEDDED)


def _folder(folder: Path, needed: str) -> Path:
    if not folder.exists():
        raise CheckpointError(f"no such folder: {folder} (model.checkpoint takes a folder or a hub id)")
    if not (folder / needed).is_file():
        if (folder / ADAPTER).is_file():
            raise CheckpointError(
                f"{folder} holds an adapter alone: give its base as model.checkpoint, and model.adapter={folder}"
            )
        raise CheckpointError(f"{folder} has no {needed}: point model.checkpoint at a checkpoint's own folder")
    return folder


def cached(checkpoint: str, revision: str | None, needed: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(checkpoint, needed, revision=revision)
    except HFValidationError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{needed!r} is no file of {checkpoint}: {first_line(error)}") from error
    return Path(found).parent if isinstance(found, str) else None
