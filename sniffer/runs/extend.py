"""`runs resume RUN --extend`: what a complete run's dataset has more of by now is captured into the same run.

It goes through the same code as a fresh run, over all documents, and skips those that are on disk. Batches are put
together anew where the new documents begin, and the configuration comes to say so (`batch.breaks`): with it a fresh
run makes the same batches, and so the same rows to the bit. Documents that are there must come first, and be what they
were to the last token: by that the run would be refused whatever else had changed in the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sniffer.config.schema import Config
from sniffer.config.trust import Trust, build, needed_config
from sniffer.errors import RunError, unbroken
from sniffer.process.environment import versions
from sniffer.process.threads import same_threads
from sniffer.runs.imports.told import refuse_imported
from sniffer.storage.integrity import refuse_links
from sniffer.storage.layout import RunFolder
from sniffer.storage.lock import hold
from sniffer.storage.manifest import Manifest
from sniffer.storage.on_disk import is_whole, look
from sniffer.storage.ownership import never_began
from sniffer.storage.same_run import GROWN, LARGER, Earlier, as_plain, differences, refuse_other
from sniffer.storage.schema import Example
from sniffer.storage.there import find
from sniffer.storage.tokens import TokenTable, read_tokens
from sniffer.types import Document, described

MAX_EXAMPLES = "max_examples"


def extend(folder: Path, trust: Trust, max_examples: int | None = None) -> int | None:
    """Captures the documents that a complete run's dataset has beyond those of the run.

    Args:
        trust: what the saved configuration may do.
        max_examples: a larger `dataset.max_examples`; None for the one that the run has.

    Returns:
        How many documents the run has now; None where there was none to add.

    Raises:
        RunError: the run is not complete and whole, another process writes to the folder, or the documents that it has
            are not the first ones of its dataset any more.
        SnifferError: as a fresh run.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is not a folder: give the folder that a run printed")
    refuse_links(folder)
    if never_began(folder):
        raise _not_complete(folder, "was stopped before it began")
    # Says that it is no run's, before a lock is left in it.
    refuse_imported(folder, Manifest.recover(folder)[0], "extended")
    with hold(folder):
        manifest, wrong = Manifest.recover(folder)
        if wrong or manifest.status != "complete":
            raise _not_complete(folder, "has a damaged manifest" if wrong else f"is {manifest.status}")
        plain, before = needed_config(folder), manifest.as_json()
        refuse_other(differences(before, {"config": plain, "versions": versions()}))
        plain = _larger(plain, max_examples)
        _refuse_reordering(plain["dataset"])
        origin = folder / RunFolder.CONFIG
        config = build(plain, trust, origin)
        dataset = described(config.dataset, generates=config.generate is not None)
        now = as_plain({"seed": config.seed, "model": config.model.describe(), "dataset": dataset})
        refuse_other(differences(before, now, GROWN))
        found, on_disk = look(folder, manifest, find(folder, manifest, trust.url))
        if not is_whole(folder, manifest, found):
            raise _not_complete(folder, "is damaged")
        tokens = _tokens(folder, found, len(on_disk.committed), changed=differences(before, now, LARGER))
        if not has_more(config, on_disk.committed, tokens):
            return None
        plain = _broken(plain, len(on_disk.committed))

        from sniffer.capture import run

        with same_threads(manifest.threads):
            run(build(plain, trust, origin), folder, Earlier(found, on_disk, extended=plain))
    return Manifest.load(folder, parts_must_exist=False).counts["examples"]


def has_more(config: Config, known: Mapping[int, Example], tokens: TokenTable | None) -> bool:
    """Whether a dataset has documents beyond those of a run, which must be its first ones.

    Args:
        known: the documents of the run.
        tokens: their token ids; None where the data are what they were.

    Raises:
        RunError: a document is not what it was, is gone, or is new and comes before one that is there.
        SnifferError: the text cannot be read.
    """
    from sniffer.capture import documents

    missing = dict(known)
    for document in documents(config):
        then = missing.pop(document.example_id, None)
        if then is None and missing:
            other = next(iter(missing.values())).source_id
            raise RunError(
                f"document {document.source_id!r} is new and does not come after all that the run has, such as "
                f"{other!r}: --extend takes what is added at the end; have it come last, or capture into a new folder"
            )
        if then is None:
            return True
        if not is_same(document, then, tokens):
            raise RunError(
                f"document {document.source_id!r} is not what it was when it was captured: put the text back, or "
                "capture into a new folder"
            )
    if missing:
        raise RunError(
            f"{len(missing):,} documents of the run, such as {next(iter(missing.values())).source_id!r}, are not in "
            "its dataset any more: put them back, or capture into a new folder"
        )
    return False


def is_same(document: Document, then: Example, tokens: TokenTable | None) -> bool:
    """Whether a document is what a run has of it, or its prompt, to the last token where these are given."""
    if Example.of(document) != then.prompt:
        return False
    kept = None if tokens is None else tokens.of(document.example_id)
    return kept is None or kept[: document.n_tokens].tolist() == document.token_ids.tolist()


def _larger(plain: Mapping[str, Any], max_examples: int | None) -> dict[str, Any]:
    """The configuration with more documents, if it is to have them."""
    dataset = dict(plain["dataset"])
    then = dataset.get(MAX_EXAMPLES)
    if max_examples is not None:
        if then is None or max_examples < then:
            had = "takes all of its dataset" if then is None else f"was made with {then}"
            raise RunError(f"dataset.max_examples={max_examples} would be fewer documents: the run {had}")
        dataset[MAX_EXAMPLES] = max_examples
    return {**plain, "dataset": dataset}


def _broken(plain: Mapping[str, Any], documents: int) -> dict[str, Any]:
    """The configuration with batches that begin anew after so many documents."""
    batch = dict(plain["batch"])
    batch["breaks"] = sorted({*(batch.get("breaks") or ()), *([documents] if documents else [])}) or None
    return {**plain, "batch": batch}


def _refuse_reordering(dataset: Mapping[str, Any]) -> None:
    """Raises RunError where more texts change the documents of those before them, or their order."""
    for key, why in (
        ("pack_to", "more texts would be packed into its last document"),
        ("shuffle_seed", "more documents would be drawn from between those that it has"),
    ):
        if (value := dataset.get(key)) is not None:
            raise RunError(f"a run with dataset.{key}={value} cannot be extended: {why}; capture into a new folder")


def _tokens(folder: Path, manifest: Manifest, documents: int, changed: list[str]) -> TokenTable | None:
    """The token ids of all documents; None where the data have not changed, and those who have none may be believed."""
    if not changed:
        return None
    try:
        tokens = read_tokens(folder, manifest.tokens)
    except (OSError, ValueError) as error:
        raise RunError(f"the token ids of {folder} cannot be read: {unbroken(error)}") from error
    if len(tokens) < documents:
        raise RunError(
            "the data have changed, and the run keeps no token ids (output.tokens) by which its documents could be "
            "known in them: capture into a new folder"
        )
    return tokens


def _not_complete(folder: Path, state: str) -> RunError:
    return RunError(
        f"{folder} {state}: `python -m sniffer.runs resume {folder}` completes it, and then --extend adds to it"
    )
