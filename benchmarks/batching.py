"""Documents of mixed lengths, several to a batch, against one by one: all positions captured."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from sniffer.models.backbone import Checkpoint
from sniffer.models.loaded import LoadedBackbone

from benchmarks.bench import EMBEDDED, loaded
from benchmarks.measure import Figure, Timed, both, figure
from sniffer.dataset.batching import ELSEWHERE, batches
from sniffer.dataset.packages import Pydoc
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.forward.observer import Observer, Wanted, draw
from sniffer.forward.selection import CaptureConfig, select
from sniffer.forward.transfer import transfer_for
from sniffer.sampler import All, Picker
from sniffer.tap import tap
from sniffer.types import Document, TokenBatch, by_number

N_DOCUMENTS, MAX_TOKENS = 12, 512
BUDGETS = {"four documents a batch": 4 * MAX_TOKENS, "batch.max_tokens=8192": ELSEWHERE}
LIMITS = {"four documents a batch": 1.0}


def measure(repeats: int) -> list[Figure]:
    checkpoint = Checkpoint(EMBEDDED)
    backbone = loaded("float32")
    tokenize, pad_id = checkpoint.load_tokenizer()
    documents = list(Tokenizer(tokenize, MAX_TOKENS).documents(Pydoc(max_examples=N_DOCUMENTS)))
    one_by_one = [TokenBatch((document,), pad_id) for document in documents]
    packed = {name: list(batches(documents, budget, pad_id)) for name, budget in BUDGETS.items()}
    ratios: dict[str, list[Timed]] = {name: [] for name in packed}
    _capture(backbone, one_by_one[:2])
    for _ in range(repeats):
        single = _capture(backbone, one_by_one)
        for name, these in packed.items():
            ratios[name].append(_capture(backbone, these) / single)
    found = []
    for name, these in packed.items():
        found += both(f"{name} / one a batch, mixed lengths", ratios[name], limit=LIMITS.get(name))
        found.append(figure(f"computed / real tokens, {name}", [_computed(these) / _real(documents)], limit=1.07))
    return found


@torch.inference_mode()
def _capture(backbone: LoadedBackbone, these: Sequence[TokenBatch]) -> Timed:
    selection = select(backbone.geometry, CaptureConfig())
    geometry = by_number(backbone.geometry)
    transfer = transfer_for(backbone.device)
    plan = Wanted(selection, geometry, backbone.layer_of, transfer, backbone.device)
    picker = Picker(All(), seed=0)
    wall, cpu = time.perf_counter(), time.process_time()
    for batch in these:
        observer = Observer(batch, draw(picker, selection, batch), plan)
        with tap(observer):
            backbone(torch.from_numpy(batch.input_ids()).to(backbone.device))
        transfer.end_batch()
        transfer.settle(observer.vectors)
    return Timed(time.perf_counter() - wall, time.process_time() - cpu)


def _computed(these: Sequence[TokenBatch]) -> int:
    return sum(len(batch.documents) * batch.seq_len for batch in these)


def _real(documents: Sequence[Document]) -> int:
    return int(np.sum([document.n_tokens for document in documents]))
