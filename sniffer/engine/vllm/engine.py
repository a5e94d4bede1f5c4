"""The engine and its one worker, in this process: it has the model in transformers first, then vLLM."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch

from sniffer.config.schema import Config
from sniffer.engine.base import Plan, describe_device
from sniffer.engine.engine import Engine
from sniffer.engine.facts import Facts
from sniffer.engine.generating import decoder_of, loaded_by
from sniffer.engine.lengths import longest_document
from sniffer.engine.local import LocalPool
from sniffer.engine.reports import Report
from sniffer.engine.vllm.before import known_before
from sniffer.engine.vllm.draws import Draws
from sniffer.engine.vllm.model import VllmModel
from sniffer.engine.vllm.prove import prove, shown_by
from sniffer.engine.vllm.request import check_vllm
from sniffer.engine.worker import Worker
from sniffer.errors import UnsupportedModelError
from sniffer.forward.generation.continuing import Texts
from sniffer.forward.generation.live import LiveRows, places_of, possible_places
from sniffer.forward.observer import draw
from sniffer.forward.selection import select
from sniffer.process.memory import available_memory, let_go
from sniffer.terminal.progress import write_progress
from sniffer.types import KIND, TokenBatch

log = logging.getLogger(__name__)


class VllmEngine(Engine):
    """Has vLLM run every batch, one after the other; within a batch, vLLM schedules."""

    def __init__(self, config: Config) -> None:
        """Raises ConfigError for what vLLM cannot be asked for."""
        check_vllm(config)
        super().__init__(size=1, per_node=1, start_timeout=float("inf"))
        self._worker: VllmWorker | None = None

    def pool(self, config: Config, folder: Path) -> LocalPool:
        return LocalPool(lambda: self._made(config, folder))

    def _made(self, config: Config, folder: Path) -> VllmWorker:
        self._worker = VllmWorker(config, folder)
        return self._worker

    def close(self) -> None:
        super().close()
        if self._worker is not None:
            self._worker.close()


class VllmWorker(Worker):
    """A worker whose forward passes are vLLM's. Picks, rows and parts are as any worker's."""

    backbone: Any

    def __init__(self, config: Config, folder: Path) -> None:
        super().__init__(loaded_by(config), folder, progress=write_progress)
        self._config = config
        self._draws = config.generate is not None and config.generate.method == "sample"
        self.model: VllmModel | None = None

    def open(self) -> Facts:
        """Loads the model in transformers, for its facts; then in vLLM, and proves that it is the same.

        Raises:
            UnsupportedModelError: it is not, or cannot be watched there.
            SnifferError: as `Worker.open`.
        """
        facts = super().open()
        if facts.lengths.as_json():
            raise UnsupportedModelError(
                "this model turns positions by other angles in texts of another length, and vLLM by the same in all: "
                "choose engine=local"
            )
        longest = longest_document(self._config, self.checkpoint.limits())
        geometry, missing = known_before(facts.geometry, facts.rope, facts.pre_missing)
        select(geometry, self._config.capture, missing)  # what is not there is said before vLLM loads
        pre = any(KIND[kind].pre for kind in self._config.capture.kinds)
        shown = shown_by(self.backbone, geometry, longest, pre=pre)
        del self.backbone
        let_go()
        longest = None if longest is None else max(longest, shown.batch.seq_len)
        self.model = self.backbone = VllmModel(self.checkpoint, self._config.engine, facts, longest, draws=self._draws)
        apart = prove(self.model, shown)
        log.info("vLLM's q, k and v are those of transformers in a probe, up to %.1e of their lengths", apart)
        log.info("vLLM runs without compiled graphs (enforce_eager), which costs speed where texts are short")
        return replace(
            facts,
            device=self.model.device,
            described=describe_device(self.model),
            geometry=self.model.geometry,
            backbone=self.model.describe(),
            pre_missing=self.model.pre_missing,
            threads=torch.get_num_threads(),
            available=available_memory(),
            resident=psutil.Process().memory_info().rss,
            device_free=None,
            pads=True,
        )

    def begin(self, plan: Plan) -> None:
        super().begin(plan)
        self._decode = decoder_of(self.checkpoint, plan.continuing)
        heads = plan.selection.heads
        self._heads = {pair: those for pair, those in heads.items() if not KIND[pair[1]].statistics}

    @torch.inference_mode()
    def run(self, batch: TokenBatch, done: Mapping[tuple[int, str], Collection[int]]) -> Report:
        rows = self._captured(batch) if self.plan.continuing is None else self._continued(batch)
        self.passes.take(rows, done)
        self._keep(leave=1)
        return self.report()

    def _captured(self, batch: TokenBatch) -> LiveRows:
        """Texts as they are, each once through the model."""
        assert self.model is not None
        with self.clock.stage("sample"):
            picks = draw(self.plan.picker, self.plan.selection, batch)
        places = {pair: places_of(drawn) for pair, drawn in picks.items()}
        with self.clock.stage("forward"):
            self.model.run([one.token_ids for one in batch.documents], self._heads, places)
            vectors = self.model.take(places, [one.n_tokens for one in batch.documents])
        return LiveRows(batch, picks, vectors, self.model.seconds)

    def _continued(self, prompts: TokenBatch) -> LiveRows:
        """Prompts, and what the model writes after them."""
        assert self.model is not None and self.plan.continuing is not None
        plan, how = self.plan, self.plan.continuing.how
        places: Mapping[tuple[int, str], Any] = {}
        if how.live:
            with self.clock.stage("sample"):
                what = plan.picker, plan.selection, prompts, how.max_new_tokens, self.plan.continuing.answer
                places = possible_places(*what)
        texts = Texts(prompts, self.plan.continuing, self._decode, self.clock)

        def goes_on(row: int, token: int) -> bool:
            """The last token of a text goes through the model too, if it is captured meanwhile."""
            if texts.ends[row] is not None:
                return False
            texts.write(row, token)
            return texts.ends[row] is None or bool(how.live)

        with self.clock.stage("decode"):
            asked = [one.token_ids for one in prompts.documents]
            heads = self._heads if how.live else {}
            draws = [Draws.of(one, how) for one in prompts.documents] if self._draws else []
            self.model.run(asked, heads, places, how.max_new_tokens, goes_on, draws=draws)
        batch = texts.batch()
        if not how.live:
            return self._captured(batch)
        with self.clock.stage("sample"):
            picks = draw(plan.picker, plan.selection, batch)
        wanted = {pair: places_of(drawn) for pair, drawn in picks.items()}
        vectors = self.model.take(wanted, [one.n_tokens for one in batch.documents])
        return LiveRows(batch, picks, vectors, self.model.seconds)

    def close(self) -> None:
        if self.model is not None:
            if self.model.again:
                many = f"{self.model.again:,} tokens"
                log.info("vLLM has computed %s again for want of room: engine.kv_cache=... gives it more", many)
            self.model.close()
