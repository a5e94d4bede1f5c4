"""What a run chooses itself where its configuration says null, and then says in its folder, to be had again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sniffer.config.saving import save_plain, saved_config
from sniffer.config.schema import Config
from sniffer.forward.budget import fitting
from sniffer.words import size

log = logging.getLogger(__name__)


def with_batch_tokens(
    config: Config,
    folder: Path,
    lengths: Sequence[int],
    device_free: int,
    available: float,
    rows_bytes: Callable[[Config], float],
) -> Config:
    """With batch.max_tokens as the free memory of a GPU has it, where it is null and that can be told.

    Args:
        lengths: tokens of the documents read so far.
        device_free: bytes of the GPU; `available` those of the host.
        rows_bytes: captured rows of the largest batch under a configuration.
    """
    if config.batch.max_tokens is not None:
        return config
    # A checkpoint class of a user's own may not say.
    needs = getattr(config.model, "working_memory", lambda rows, tokens: None)

    def choice(tokens: int) -> Config:
        return replace(config, batch=replace(config.batch, max_tokens=tokens))

    tokens = fitting(lengths or [1], needs, lambda budget: rows_bytes(choice(budget)), device_free, available)
    if tokens is None:
        return config
    saved = saved_config(folder)
    save_plain(folder, {**saved, "batch": {**saved["batch"], "max_tokens": tokens}})
    log.info("batch.max_tokens=%d, by the %s that are free on the device", tokens, size(device_free))
    return choice(tokens)
