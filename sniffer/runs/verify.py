"""`runs verify RUN`: whether what a run folder holds is what the run captured, and what the law says it should.

Every file is compared with the manifest, byte for byte; every row is read, and put in its digest again. Then
the sampling decisions are drawn anew from the seed: a row that the law keeps and that is not there is
found, and so is one too many. Only the vectors themselves cannot be derived again without the model,
which is what `runs reproduce` does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from sniffer.config.build import TRUSTED, build
from sniffer.config.resolve import ROLES
from sniffer.config.saving import saved_config
from sniffer.errors import RunError, SnifferError, unbroken
from sniffer.reader.index import jobs_without_results, read_jobs
from sniffer.reader.job_folders import run_folders
from sniffer.runs.code import told_copies
from sniffer.runs.imports.told import check_places, unchecked
from sniffer.runs.law import check_law
from sniffer.runs.moments import check_moments
from sniffer.runs.rows import check_part
from sniffer.runs.tokens import check_rows, check_tokens
from sniffer.sampler import Picker, picker_of
from sniffer.storage.away import away, told
from sniffer.storage.examples import read_examples
from sniffer.storage.integrity import damage, foreign, leftovers
from sniffer.storage.layout import RunFolder
from sniffer.storage.lock import is_held
from sniffer.storage.manifest import Manifest
from sniffer.storage.model_config import lost_model_config
from sniffer.storage.remote import at_hand
from sniffer.storage.same_run import differences
from sniffer.storage.schema import Example, Part, generated_in
from sniffer.storage.tokens import TokenTable
from sniffer.storage.untrusted import read_yaml
from sniffer.terminal.printing import line
from sniffer.types import Rows


def verify(folder: Path, trusted: Sequence[str] = ()) -> tuple[Manifest, list[str]]:
    """Checks a run folder.

    Args:
        trusted: prefixes of packages beside our own that the run's sampler may come from.

    Returns:
        The manifest, and what is wrong, one line each; nothing if all is well.

    Raises:
        RunError: there is no readable manifest, or the run is still going on.
    """
    if is_held(folder):
        raise RunError(f"{folder} is still being written to: verify it when it has ended")
    manifest, wrong = Manifest.recover(folder)
    twin = _twin(folder)
    # A kill leaves the twin of a small file a step behind, or ahead: that is no damage, and resume puts it right.
    stopped = "running" in (manifest.status, twin.status if twin else None)
    problems = [wrong] if wrong else [*_compare_twin(folder, manifest, twin, stopped)]
    problems += _configuration(folder, manifest)
    if wrong := lost_model_config(folder, manifest):
        problems.append(f"{RunFolder.MODEL_CONFIG}: {wrong}; resume writes it again")
    examples, wrong_examples = _examples(folder, manifest, stopped)
    problems += wrong_examples
    tokens, wrong_tokens = check_tokens(folder, manifest, examples)
    problems += wrong_tokens
    problems += _parts(folder, manifest, examples, tokens, trusted)
    problems += [f"{path}: no file of this run; remove it" for path in foreign(folder, manifest)]
    if manifest.status == "complete" and not stopped:
        problems += [f"{path}: left by a killed session; resume removes it" for path in leftovers(folder, manifest)]
        problems += [f"{part.path}: still pending in a complete run" for part in manifest.pending]
    return manifest, problems


def _twin(folder: Path) -> Manifest | None:
    try:
        return Manifest.load(folder, parts_must_exist=False, path=RunFolder.MANIFEST_TWIN)
    except RunError:
        return None


def _compare_twin(folder: Path, manifest: Manifest, twin: Manifest | None, stopped: bool) -> Iterator[str]:
    if twin is None and not (stopped and not (folder / RunFolder.MANIFEST_TWIN).exists()):
        first, second = RunFolder.MANIFESTS
        yield f"{second}: is missing or damaged; {first} is whole, and resume writes it again"
    if twin is not None and twin != manifest and not stopped:
        yield f"{RunFolder.MANIFEST_TWIN}: is not a copy of {RunFolder.MANIFEST}; resume writes it again"


def _configuration(folder: Path, manifest: Manifest) -> Iterator[str]:
    if not manifest.config:
        return
    try:
        if saved_config(folder) != manifest.config:
            yield "config.yaml: is missing, or not what the run was made with; resume --restore puts it back"
    except SnifferError as error:
        yield str(error)
    try:
        rerun = read_yaml(folder / RunFolder.RERUN)
        del rerun["defaults"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        rerun = None
    if rerun != manifest.config:
        yield "rerun.yaml: is missing, or not what the run was made with; resume --restore puts it back"


def _examples(folder: Path, manifest: Manifest, stopped: bool) -> tuple[dict[int, Example], list[str]]:
    """The committed documents, and what is wrong with the file that lists them."""
    record = manifest.examples
    if record is None:
        return {}, [] if not manifest.parts else [f"{RunFolder.MANIFEST}: names parts, but no examples.parquet"]
    wrong, wrong_twin = (damage(folder, replace(record, path=path)) for path in (record.path, RunFolder.EXAMPLES_TWIN))
    problems = []
    if wrong and (wrong_twin or not stopped):
        problems.append(f"{record.path}: {wrong}" + ("" if wrong_twin else "; its twin is whole: resume puts it back"))
    if wrong_twin and not wrong and not stopped:
        problems.append(f"{RunFolder.EXAMPLES_TWIN}: {wrong_twin}; resume writes it again")
    if wrong and wrong_twin:
        return {}, problems
    path = RunFolder.EXAMPLES_TWIN if wrong else record.path
    try:
        examples = read_examples(folder / path, record)
    except (OSError, ValueError) as error:
        return {}, [*problems, f"{path}: {unbroken(error)}"]
    return examples, problems + _counts(manifest, examples)


def _counts(manifest: Manifest, examples: Mapping[int, Example]) -> list[str]:
    found = {
        "examples": len(examples),
        "truncated": sum(example.truncated for example in examples.values()),
        "tokens": sum(example.n_tokens for example in examples.values()),
        **({} if manifest.generation is None else {"generated": generated_in(examples.values())}),
    }
    begun = sum(example.first_position > 0 for example in examples.values())
    branches = manifest.dataset.get("branches", 0)
    return [
        f"{RunFolder.MANIFEST}: counts {manifest.counts[name]:,} {name}, but examples.parquet has {count:,}"
        for name, count in found.items()
        if manifest.counts.get(name, count) != count
    ] + (
        []
        if begun == branches
        else [f"{RunFolder.MANIFEST}: tells of {branches} branches, but examples.parquet has {begun}"]
    )


def _parts(
    folder: Path, manifest: Manifest, examples: Mapping[int, Example], tokens: TokenTable, trusted: Sequence[str]
) -> Iterator[str]:
    picker = None if manifest.imported else _picker(manifest, trusted)
    yield from check_moments(folder, manifest, examples, picker)
    gone = {part.path for part in away(folder, manifest)}
    for layer, kinds in manifest.selection.items():
        for kind in kinds:
            parts = [part for part in manifest.parts if (part.layer, part.kind) == (layer, kind)]
            waiting = [part for part in manifest.pending if (part.layer, part.kind) == (layer, kind)]
            read = {part.path: _read(folder, manifest, part) for part in (*parts, *waiting) if part.path not in gone}
            yield from (line for _, lines in read.values() for line in lines)
            rows = [found for part in parts if (found := read.get(part.path, (None,))[0]) is not None]
            if len(rows) == len(parts) and examples:
                if picker is None:
                    yield from check_places(examples, layer, kind, Rows.joined(rows))
                else:
                    yield from check_law(picker, examples, layer, kind, Rows.joined(rows))
                yield from check_rows(tokens, layer, kind, Rows.joined(rows))


def _read(folder: Path, manifest: Manifest, part: Part) -> tuple[Rows | None, list[str]]:
    """Where a part's rows are from, and what is wrong with it; None where it cannot be trusted."""
    try:
        with at_hand(folder, part.path) as place:
            if wrong := damage(place, part):
                return None, [f"{part.path}: {wrong}"]
            rows, problems = check_part(place, manifest, part)
    except OSError as error:
        return None, [f"{part.path}: cannot be fetched ({error.strerror})"]
    return (None if problems else rows), problems


def _picker(manifest: Manifest, trusted: Sequence[str]) -> Picker:
    sampler = build(manifest.sampler_fields, "sampler", (*TRUSTED, *trusted), ROLES["sampler"])
    return picker_of(sampler, manifest.seed)


def verify_all(place: Path, trusted: Sequence[str] = ()) -> int:
    """Verifies a run, or every run of a sweep and that no job or shard is missing; prints, and returns the exit code.

    Raises:
        RunError: it is neither.
    """
    runs, lost = _runs_at(place), jobs_without_results(place)
    if not runs and not lost:
        Manifest.recover(place)  # says why it is none
    wrong = 0
    manifests = []
    for folder in runs:
        manifest, problems = verify(folder, trusted)
        manifests.append(manifest)
        wrong += len(problems)
        for problem in problems:
            line(f"{_name(folder, place)}: {problem}" if len(runs) > 1 else problem)
        for note in (*told_copies(manifest, trusted), *unchecked(manifest)):
            line(f"{_name(folder, place)}: {note}")
        line(_verdict(folder, manifest, len(problems)))
    for missing in (*lost, *missing_shards(manifests), *unequal_shards(manifests)):
        wrong += 1
        line(missing)
    return 1 if wrong else 0


def _name(folder: Path, place: Path) -> str:
    return folder.name if folder == place else folder.relative_to(place).as_posix()


def _runs_at(place: Path) -> list[Path]:
    """A run; or all runs below a folder, and those that a sweep has put too deep to be found by chance."""
    found = run_folders(place)
    if found == [place]:
        return found
    return list(dict.fromkeys([*found, *(place / job.name for job in read_jobs(place) if job.rows is not None)]))


MODEL = ("checkpoint", "revision", "gguf_file", "weights", "seed", "dtype", "config_overrides")
"""What tells one model from another, wherever its jobs ran."""


def missing_shards(manifests: Sequence[Manifest]) -> list[str]:
    """Which shards the runs of a sweep lack, where they are shards of one dataset."""
    found: dict[str, dict[int, set[int]]] = {}
    for manifest in manifests:
        shard = manifest.dataset.get("shard", {})
        key = json.dumps(_but_shard(manifest), sort_keys=True, default=str)
        found.setdefault(key, {}).setdefault(shard.get("count", 1), set()).add(shard.get("index", 0))
    return [line for counts in found.values() for count, there in counts.items() for line in _lacking(count, there)]


SHOWN = 20
"""Missing shards that are named one by one; a manifest may claim any number of them."""


def _lacking(count: int, there: set[int]) -> Iterator[str]:
    for index in islice((index for index in range(count) if index not in there), SHOWN):
        yield f"shard {index} of {count} is missing"
    more = count - sum(0 <= index < count for index in there) - SHOWN
    if more > 0:
        yield f"and {more:,} more of the {count:,} shards are missing"


ALIKE = {"model": ("files", "adapter", "put_on", "quantization", "tokenizer"), "backbone": ("code", "packages")}
"""What shards of one dataset must have in common to be of one model."""


def unequal_shards(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Shards of one dataset that were not made by the same model."""
    first: dict[str, Manifest] = {}
    for manifest in (one for one in manifests if one.dataset.get("shard", {}).get("count", 1) > 1):
        other = first.setdefault(json.dumps(_but_shard(manifest), sort_keys=True, default=str), manifest)
        if found := differences(_made_by(other), _made_by(manifest)):
            numbers = [one.dataset["shard"].get("index", 0) for one in (other, manifest)]
            yield f"shards {numbers[0]} and {numbers[1]} are not of the same model: {'; '.join(found)}"


def _made_by(manifest: Manifest) -> dict[str, Any]:
    whole = manifest.as_json()
    return {key: {name: whole[key][name] for name in names if name in whole[key]} for key, names in ALIKE.items()}


def _but_shard(manifest: Manifest) -> dict[str, Any]:
    """What shards of one dataset have in common."""
    dataset = {name: value for name, value in manifest.dataset.items() if name not in ("shard", "documents")}
    model = {name: manifest.model.get(name) for name in MODEL}
    return {
        "model": model,
        "dataset": dataset,
        "sampler": manifest.sampler_fields,
        "seed": manifest.seed,
        "selection": manifest.selection,
    }


def _verdict(folder: Path, manifest: Manifest, problems: int) -> str:
    documents = manifest.examples.rows if manifest.examples else 0
    what = f"{manifest.rows:,} rows of {documents:,} documents in {len(manifest.parts):,} parts"
    if problems:
        return f"{folder}: {problems} {'thing is' if problems == 1 else 'things are'} wrong ({what})"
    state = "complete" if manifest.status == "complete" else "not complete, but right as far as it goes"
    if gone := away(folder, manifest):
        reads = f"`python -m sniffer.runs verify {quote(str(manifest.parts_at))}` reads all of it"
        return f"{folder}: right as far as it is here ({state}): {what}; {told(manifest, gone)}: {reads}"
    return f"{folder}: {state}: {what}, digest {manifest.digest}"
