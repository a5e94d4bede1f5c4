"""`runs publish RUN REPO`: a run as a dataset on the Hugging Face hub, with a card that explains it.

What is pushed is a run folder too: `open_run` reads a downloaded snapshot; or a file for each layer, head and kind, as
`runs export` writes them. Published again, a run takes the place of the earlier one, in one commit. Local paths in the
configuration and the manifest are cut down to their last part, since they may tell more than the publisher means to
(private.py).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from sniffer.config.saving import save_plain
from sniffer.errors import RunError, unbroken
from sniffer.reader.run import Run
from sniffer.runs.card import HEADS, RUN, Place, card
from sniffer.runs.export import write_heads
from sniffer.runs.private import public, refuse_private, without_paths
from sniffer.storage.documents import refuse_repeated
from sniffer.storage.integrity import damage
from sniffer.storage.layout import RunFolder
from sniffer.storage.made_folder import made
from sniffer.storage.manifest import Manifest
from sniffer.storage.model_config import read_model_config, with_model_config
from sniffer.terminal.sections import by_section
from sniffer.types import KIND

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

CHANGED_MEANWHILE = 412
"""Of HTTP: what a request rests on is no longer so."""


def assemble(
    folder: Path,
    target: Path,
    repo: str,
    text_licence: str | None = None,
    *,
    tokens: bool = False,
    branch: str | None = None,
    layout: str = RUN,
) -> None:
    """Writes the folder that would be pushed; what fails leaves nothing of it.

    Args:
        tokens: whether the token ids of the documents, from which their texts follow, are to be in it.
        branch: of the repository, which the card then points at; None for the main one.
        layout: of the files: "run", or "heads" for one of each layer, head and kind.

    Raises:
        RunError: the repository or the branch cannot be named so, the target exists, or the run is not complete and
            whole.
    """
    place = Place(repo, branch, layout)
    _check_names(place)
    if tokens and layout == HEADS:
        raise RunError("files of heads have no place for token ids: publish without --with-tokens, or without --layout")
    manifest = Manifest.load(folder)
    if manifest.status != "complete":
        raise RunError(f"{folder} is {manifest.status}: `python -m sniffer.runs resume {folder}` completes it first")
    if manifest.generation is not None and not tokens and layout == RUN:
        raise RunError(
            f"{folder} has texts that a model wrote, as token ids in {RunFolder.EXAMPLES}: publish it --with-tokens, "
            "if all of its texts may be read by anyone"
        )
    if target.exists() and any(target.iterdir()):
        raise RunError(f"{target} holds something already: choose another folder with --to")
    shown = public(manifest, tokens=tokens)
    with made(target):
        shown = (_fill_heads if layout == HEADS else _fill)(target, folder, manifest, shown)
        text = card(shown, place, text_licence, by_section(folder, manifest))
        (target / RunFolder.CARD).write_text(text, encoding="utf-8")
        refuse_private(target, [name for name in WRITTEN if (target / name).exists()], folder, manifest)


WRITTEN = (RunFolder.MANIFEST, RunFolder.MODEL_CONFIG, RunFolder.CONFIG, RunFolder.RERUN, RunFolder.CARD)
"""What is not as it is in the run."""


def _fill(target: Path, folder: Path, manifest: Manifest, shown: Manifest) -> Manifest:
    """All of a run folder but the card; returns what its manifest says."""
    for record in shown.files():
        if wrong := damage(folder, record):
            raise RunError(f"{record.path} {wrong}: `python -m sniffer.runs resume {folder}` mends it")
        _link(folder / record.path, target / record.path)
    refuse_repeated(folder, manifest.parts)
    if manifest.examples is not None:
        _link(folder / manifest.examples.path, target / RunFolder.EXAMPLES_TWIN)
    if manifest.model_config is not None:
        values = read_model_config(folder, manifest)
        shown = with_model_config(target, shown, without_paths(values))
    shown.save(target)
    if shown.config:
        save_plain(target, shown.config)
    return shown


def _fill_heads(target: Path, folder: Path, manifest: Manifest, shown: Manifest) -> Manifest:
    """The files of all heads, and the documents; returns what the card is to tell of."""
    if not write_heads(Run(folder, manifest), target):
        raise RunError(f"{folder} has no vectors to be put into files of heads: publish it without --layout")
    record = manifest.examples
    if record is not None and (wrong := damage(folder, record)):
        raise RunError(f"{record.path} {wrong}: `python -m sniffer.runs resume {folder}` mends it")
    # The tokens that a model wrote would be in it.
    if record is not None and manifest.generation is None:
        _link(folder / record.path, target / RunFolder.EXAMPLES)
    return replace(shown, parts=tuple(part for part in shown.parts if not KIND[part.kind].statistics))


def push(folder: Path, repo: str, *, private: bool = False, branch: str | None = None, **told: Any) -> str:
    """Pushes a run to the hub that huggingface_hub is set up for; returns its address.

    Args:
        branch: of the repository, which is made if it is not there; None for the main one.
        told: as `assemble` takes it.

    Raises:
        RunError: as `assemble`; or the hub refused or could not be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    with TemporaryDirectory(dir=folder.parent, prefix=".publishing-") as scratch:
        assemble(folder, Path(scratch), repo, branch=branch, **told)
        try:
            address = api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
            if branch is not None:
                api.create_branch(repo, repo_type="dataset", branch=branch, exist_ok=True)
            before = api.dataset_info(repo, revision=branch)
            there = [file.rfilename for file in before.siblings or ()]
            api.create_commit(
                repo,
                replacing(Path(scratch), there),
                repo_type="dataset",
                revision=branch,
                commit_message="Vectors captured with qk-sniffer",
                parent_commit=before.sha,  # refused by the hub, if somebody else pushes at the same time
            )
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", "no status")
            if status == CHANGED_MEANWHILE:
                raise RunError(f"somebody else has pushed to {repo} in the meantime: publish it again") from error
            raise RunError(
                f"the hub answered {status} for {repo}: run `hf auth login` with a token that may write"
            ) from error
        except Exception as error:  # the HTTP library below huggingface_hub has changed before, and will again
            reason = unbroken(error) or type(error).__name__
            raise RunError(f"could not push to {repo} ({reason}): --dry-run writes what would be pushed") from error
    return str(address) if branch is None else f"{address}/tree/{quote(branch, safe='/')}"


def replacing(folder: Path, there: Iterable[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What one commit has to do, so that a repository holds this run and no rows of an earlier one.

    Readers see all of it or nothing. Files under names that no run of ours writes are their owner's, and stay.

    Args:
        there: the paths in the repository.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = list(there)
    files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    # Others may have a config.yaml of their own; beside a manifest it is of a run.
    ours = RunFolder.REPLACED if RunFolder.MANIFEST in there else RunFolder.DOCUMENTS
    stale = [path for path in there if path not in files and (path in ours or _is_numbered(path))]
    return [
        *(CommitOperationDelete(path, is_folder=False) for path in stale),
        *(CommitOperationAdd(path, file) for path, file in files.items()),
    ]


def _is_numbered(path: str) -> bool:
    return RunFolder.is_numbered_file(path) or RunFolder.is_head(path)


BRANCH = re.compile(r"(?!refs/)(?!.*(\.\.|//|/\.|\.lock(/|$)))\w(?:[\w./+-]{0,200}[\w+-])?", re.ASCII)
"""Names that git takes, and that are nothing but a name wherever they are written."""


def _check_names(place: Place) -> None:
    repo, branch = place.repo, place.branch
    if branch is not None and BRANCH.fullmatch(branch) is None:
        raise RunError(f"{branch!r} is no name for a branch: use letters, digits, -, _, . and / between them")
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RunError(f"{repo!r} is no name for a repository: use owner/name") from error


def _link(source: Path, target: Path) -> None:
    """A second name where the file system can, a copy where it cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
