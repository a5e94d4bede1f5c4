"""What capturing adds while the embedded model generates: eight prompts of real text side by side.

The bare loop is transformers' own greedy generation of the same model over the same prompts, padded alike, in as many
forwards: to show the vectors of the last token too it goes through the model as well, which plain generation leaves
out, so the bare loop writes a token more. Against it stand ours without a tap, and with one: at sampled positions, and
at all. One of the loops is the bare one again: what that varies by is the noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from sniffer.models.backbone import Checkpoint
from sniffer.models.kernels import allowed

from benchmarks.bench import EMBEDDED, EVERY, LOG, Way, real_batch
from benchmarks.measure import Figure, both
from benchmarks.repeats import AGAIN, Spent, once, repeated
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.generation.continuing import left_padded
from sniffer.forward.generation.request import Continuing, GenerateConfig
from sniffer.forward.generation.session import Generation
from sniffer.forward.passes import Passes
from sniffer.forward.selection import CaptureConfig, select
from sniffer.process.clock import Clock
from sniffer.process.memory import keep_freed_memory
from sniffer.sampler import Picker
from sniffer.types import Answer, Sections, TokenBatch

PROMPTS, NEW = (96, 90, 84, 80, 76, 72, 68, 64), 48
LIMITS = {LOG.name: 1.03, EVERY.name: 1.15}
UNTAPPED = "nothing captured"


def measure(repeats: int) -> list[Figure]:
    backbone = Checkpoint(EMBEDDED).with_head().load()
    keep_freed_memory(backbone.device)
    model = backbone.language_model
    assert model is not None
    whole = real_batch(PROMPTS)
    documents = (replace(one, sections=Sections.one("prompt", one.n_tokens)) for one in whole.documents)
    batch = TokenBatch(tuple(documents), whole.pad_id)

    ids, mask = (torch.from_numpy(one).to(backbone.device) for one in left_padded(batch))
    told = {"max_new_tokens": NEW + 1, "do_sample": False, "eos_token_id": None, "pad_token_id": batch.pad_id}

    def plain() -> None:
        generate: Any = model.whole.generate
        with allowed(backbone.sdpa_kernels, backbone.device):
            generate(input_ids=ids, attention_mask=mask, **told)

    def ours(way: Way | None) -> None:
        chosen = way or LOG
        selection = select(backbone.geometry, CaptureConfig(kinds=list(chosen.kinds)))
        passes = Passes(backbone, selection, Accumulator(selection), Clock())
        how = GenerateConfig(max_new_tokens=NEW + (way is None), live=way is not None)
        plan, picker = Continuing(how, (), Answer()), Picker(chosen.sampler, seed=0)
        generation = Generation(model, plan, passes, picker, selection, backbone.lengths, lambda _: "")
        if way is None:
            passes.run = lambda *_: None  # type: ignore[method-assign]
        generation.run(batch, {})
        list(passes.settle())

    loops: dict[str, Callable[[], Spent]] = {AGAIN: partial(once, plain), UNTAPPED: partial(once, partial(ours, None))}
    loops |= {way.name: partial(once, partial(ours, way)) for way in (LOG, EVERY)}
    plain()  # the first is slower
    with torch.inference_mode():
        found = repeated(partial(once, plain), loops, repeats).loop()
    at = f"generating {NEW} tokens after 8 prompts"
    return [
        one
        for name, shares in found.items()
        for one in both(f"{at}: {name} / plain transformers", shares, cpu_limit=LIMITS.get(name))
    ]
