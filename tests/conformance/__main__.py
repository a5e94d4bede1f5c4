"""Runs the checks over every model type, in parallel, and compares the outcome with what is expected.

    python -m tests.conformance [--jobs N] [--json FILE] [--discover] [model_type ...]

Each family has two fresh processes, one of which never installs the import hook, and one more for each setting of its
config that decides whether it is covered. expected.yaml names the language models that are not covered, with the
reason; any other that fails is an error, and so is one of them that passes. further.yaml names types that are no
language models by transformers' lists and are covered all the same. A full run ends with the counts, and writes
docs/families.json and docs/families.md; --discover tries all types that are in no list.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from tests.conformance.checks import one_line, run_tapped, run_untapped
from tests.conformance.report import CHECKS, STATISTICS, render
from tests.conformance.scores import REFUSED
from tests.conformance.switches import run_switched, switches_of

PROCESSOR_S = 120
"""What a family may cost in processor time: on a busy machine it waits longer, and is not said to have failed."""
PATIENCE_S = 1800
"""The wait for one that does nothing at all."""
MEMORY_BYTES = 10 << 30
ROOT = Path(__file__).resolve().parents[2]
EXPECTED, FURTHER = (Path(__file__).with_name(name) for name in ("expected.yaml", "further.yaml"))


def model_types() -> list[str]:
    """The language models by transformers' own lists."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def further_types() -> list[str]:
    """Others that are covered."""
    return sorted(yaml.safe_load(FURTHER.read_text(encoding="utf-8")))


def unlisted_types() -> list[str]:
    return sorted(set(CONFIG_MAPPING_NAMES) - {*model_types(), *further_types()})


def check(model_type: str) -> dict[str, Any]:
    """One family: tapped, then untapped, then with other settings, each in a process of its own."""
    result = in_process(run_tapped, model_type)
    if result["outcome"] == "tapped":
        statistics = result.pop("statistics")
        other = in_process(run_untapped, model_type, result["path"], statistics["layers"])
        result["proven"], result["exact"] = statistics["reason"], other.get("exact", "none")
        same = other.get("digest") == result.pop("digest")
        result["identical"] = result.pop("quiet") or ("" if same else "output differs from the untapped model's")
        result["only"] = conditions(model_type)
    return {"model_type": model_type, **result}


def conditions(model_type: str) -> dict[str, list[Any]]:
    """The settings of the config with which alone a tapped family is covered, by key."""
    found = {}
    for key, values in in_process(switches_of, model_type)["switches"].items():
        outcomes = {value: in_process(run_switched, model_type, key, value)["outcome"] for value in values}
        possible, covered = (
            [value for value, outcome in outcomes.items() if outcome in wanted]
            for wanted in (("tapped", "refused", "failed"), ("tapped",))
        )
        if covered != possible:
            found[key] = covered
    return found


def in_process(function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    in_time, result = mine.poll(PATIENCE_S), None
    with suppress(EOFError):
        result = mine.recv() if in_time else None
    if result or not in_time:
        process.kill()
    process.join()
    return result or {"outcome": "failed", "reason": _why_silent(process.exitcode, in_time)}


def _why_silent(exit_code: int | None, in_time: bool) -> str:
    """Why a process gave no answer."""
    if not in_time:
        return f"no answer in {PATIENCE_S} s"
    if exit_code == -signal.SIGXCPU:
        return f"needs more than {PROCESSOR_S} s of processor time"
    return f"the process died ({exit_code})"


def _answer(pipe: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_S, PROCESSOR_S + 1))
    try:
        pipe.send(function(*arguments))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        pipe.send({"outcome": "failed", "reason": f"{one_line(error)} ({place})"})


def complaints(result: dict[str, Any]) -> list[str]:
    """What does not hold of a family; its whole outcome where it was not tapped."""
    if result["outcome"] != "tapped":
        return [f"{result['outcome']}: {result['reason']}"]
    wrong = [f"{name}: {result[name]}" for name in CHECKS if result[name]]
    exact = str(result.get("exact", ""))
    wrong += [f"statistics of attention are not exact: {exact}"] if exact.startswith("attention ") else []
    scores = str(result.get("scores", ""))
    wrong += [f"scores from the manifest are others: {scores}"] if scores and not scores.startswith(REFUSED) else []
    return wrong


def surprises(results: list[dict[str, Any]], expected: dict[str, str]) -> list[str]:
    """Differences from expected.yaml, in words."""
    found = []
    for result in results:
        name, complaint = result["model_type"], complaints(result)
        if complaint and name not in expected:
            found.append(f"{name} is not covered, and expected.yaml does not say so: {'; '.join(complaint)}")
        if not complaint and name in expected:
            found.append(f"{name} is covered now: take it out of {EXPECTED.name}")
    return found


def print_counts(results: list[dict[str, Any]], expected: dict[str, str]) -> None:
    others = [result for result in results if result["model_type"] in further_types()]
    results = [result for result in results if result not in others]
    outcomes = Counter(result["outcome"] for result in results)
    tapped = [result for result in results if result["outcome"] == "tapped"]
    print(f"\n{len(results)} model types of transformers {transformers.__version__}")
    print(f"  {'built':<20} {len(results) - outcomes['not built']}")
    print(f"  {'tapped':<20} {len(tapped)}")
    for name, title in CHECKS.items():
        print(f"  {title:<20} {sum(not result[name] for result in tapped)}")
    for name, title in STATISTICS.items():
        print(f"  {title:<24} {sum(result.get(name) == '' for result in tapped)}")
    print(f"  {'further types':<20} {sum(not complaints(result) for result in others)} of {len(others)}")
    print("not covered:")
    for result in [*results, *others]:
        if complaint := complaints(result):
            print(f"  {result['model_type']:<24} {expected.get(result['model_type'], '; '.join(complaint))}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="only these; all by default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="where the results go; a full run writes docs/families.json")
    parser.add_argument("--discover", action="store_true", help="all types that are in no list: which are covered?")
    options = parser.parse_args()
    expected: dict[str, str] = yaml.safe_load(EXPECTED.read_text(encoding="utf-8"))
    results = []
    with ThreadPoolExecutor(options.jobs) as pool:
        names = options.model_types or (unlisted_types() if options.discover else [*model_types(), *further_types()])
        for done in as_completed([pool.submit(check, name) for name in names]):
            result = done.result()
            results.append(result)
            print(f"{result['model_type']:<28} {'; '.join(complaints(result)) or 'ok'}", flush=True)
    results.sort(key=lambda result: result["model_type"])
    if options.discover:
        found = [result["model_type"] for result in results if not complaints(result)]
        print("covered, and not in further.yaml:", *(found or ["none"]))
        return int(bool(found))
    full = not options.model_types
    target = options.json or (ROOT / "docs" / "families.json" if full else None)
    if target is not None:
        record = {
            "transformers": transformers.__version__,
            "expected": expected,
            "further": further_types(),
            "families": results,
        }
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if full:
            target.with_suffix(".md").write_text(render(record), encoding="utf-8")
    print_counts(results, expected)
    found = surprises(results, expected)
    print(*(f"UNEXPECTED {line}" for line in found), sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
