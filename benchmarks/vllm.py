"""What capturing adds to vLLM, which runs the embedded model: the same vLLM, in one process, watched and not.

The bare loop hands vLLM the texts of a batch and waits until all are through; ours draws the picks, does the same with
its layers watched, and takes the rows. One of the loops is the bare one again: what that varies by is the noise. It
needs vLLM (`make vllm-test` makes an environment with it), so that it runs only when it is named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from sniffer.models.backbone import Checkpoint

from benchmarks.bench import EMBEDDED, EVERY, LOG, Way, real_batch
from benchmarks.measure import Figure, both
from benchmarks.repeats import AGAIN, Spent, once, repeated
from sniffer.config.schema import EngineConfig
from sniffer.engine.facts import Facts
from sniffer.engine.vllm.model import VllmModel
from sniffer.forward.generation.live import places_of
from sniffer.forward.observer import draw
from sniffer.forward.selection import CaptureConfig, select
from sniffer.sampler import Picker

LENGTHS, PROMPTS, NEW = (512, 512, 384, 384), (96, 90, 84, 80, 76, 72, 68, 64), 32
LIMITS = {LOG.name: 1 / 0.95}


def measure(repeats: int) -> list[Figure]:
    model = loaded()
    return [
        *ways(model, LENGTHS, 0, repeats, f"{sum(LENGTHS):,} tokens in {len(LENGTHS)} texts"),
        *ways(model, PROMPTS, NEW, repeats, f"generating {NEW} tokens after {len(PROMPTS)} prompts"),
    ]


def loaded() -> VllmModel:
    checkpoint = Checkpoint(EMBEDDED, dtype="float32", device="cpu")
    backbone = checkpoint.load()
    facts = Facts(
        geometry=backbone.geometry,
        dtype=backbone.dtype,
        device=backbone.device,
        pre_missing=backbone.pre_missing,
        vocabulary=backbone.vocabulary,
        lengths=backbone.lengths,
        backbone={},
        described={},
        model={},
        versions={},
        threads=torch.get_num_threads(),
        process=0,
        available=0,
        resident=0,
    )
    return VllmModel(checkpoint, EngineConfig("vllm"), facts, max(LENGTHS))


def ways(model: VllmModel, lengths: tuple[int, ...], new: int, repeats: int, at: str) -> list[Figure]:
    """Time over that of the same vLLM with nothing captured."""
    batch = real_batch(lengths)
    texts = [one.token_ids for one in batch.documents]

    def run(way: Way | None) -> None:
        if way is None:
            model.run(texts, {}, {}, new)
            return
        selection = select(model.geometry, CaptureConfig(kinds=list(way.kinds)))
        picks = draw(Picker(way.sampler, seed=0), selection, batch)
        places = {pair: places_of(drawn) for pair, drawn in picks.items()}
        model.run(texts, selection.heads, places, new)
        model.take(places, [len(text) for text in texts])

    loops: dict[str, Callable[[], Spent]] = {AGAIN: partial(once, partial(run, None))}
    loops |= {way.name: partial(once, partial(run, way)) for way in (LOG, EVERY)}
    run(None)  # the first is slower
    with torch.inference_mode():
        found = repeated(partial(once, partial(run, None)), loops, repeats).loop()
    return [
        one
        for name, shares in found.items()
        for one in both(f"{at}: {name} / vLLM alone", shares, cpu_limit=LIMITS.get(name))
    ]
