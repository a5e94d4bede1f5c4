"""The main job, start to end: from documents to a committed run folder.

for batch in the dataset's documents:
    picks are drawn on the CPU
    the backbone runs once, with the tap open
    the accumulator keeps the picked rows
the store writes, the manifest commits

The same path takes up an earlier, stopped session: what it has on disk (kept.py) is not captured again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sniffer.accumulator import Accumulator
from sniffer.batching import Feed, batch_tokens
from sniffer.config import Config, saved_config
from sniffer.continuation import Earlier
from sniffer.errors import CaptureError, ConfigError, DatasetError, SnifferError
from sniffer.estimate import Estimate, estimate, memory_limit, refuse_if_too_large
from sniffer.loading import Load, load_anew
from sniffer.manifest import Manifest
from sniffer.observer import GatherPlan, Observer, draw
from sniffer.sampler import Picker, describe
from sniffer.selection import Selection, check_request, select
from sniffer.stop import Stop, Stopped
from sniffer.store import Store
from sniffer.tap import tap
from sniffer.terminal import capture_progress, estimate_line, resume_line, show_summary, waiting_for
from sniffer.transfer import transfer_for
from sniffer.types import Backbone, LayerGeometry, ModelLimits

log = logging.getLogger(__name__)


@dataclass
class Clock:
    """Seconds spent by stage, in the order in which the stages first ended."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@dataclass(frozen=True)
class Plan:
    """What a run will capture, resolved against the loaded model."""

    backbone: Backbone
    geometry: dict[int, LayerGeometry]
    selection: Selection
    picker: Picker
    expected: Estimate
    batch_tokens: int


def run(config: Config, folder: Path, earlier: Earlier | None = None, load: Load = load_anew) -> None:
    """Captures what `config` asks for into `folder`, which the caller holds (lock.py).

    Args:
        earlier: the stopped session of this run that is to be taken up; without one the folder holds no
            results yet.
        load: how to come by the model; jobs of a sweep hand it on.

    Raises:
        SnifferError: in one line, what is wrong and what to do; before the model loads where that can
            be known.
        Stopped: a signal came. As after every exception, what was captured until then is on disk.
    """
    clock = Clock()
    earlier = earlier or Earlier()
    with Stop() as stop:
        with clock.stage("load"), waiting_for("reading text, loading the model"), stop.at_once():
            limits = check(config)
            feed = Feed(config.dataset, *config.model.tokenizer(), max_tokens=token_limit(config, limits))
            try:
                plan = make_plan(config, load(config.model), feed)
                log.info("%s", estimate_line(plan.expected))
                limit = memory_limit(config.output.memory_limit)
                refuse_if_too_large(plan.expected, folder, limit, on_disk=earlier.bytes)
                manifest = earlier.continued(first_manifest(config, plan, folder))
            except BaseException:
                feed.close()
                raise
        store = Store(
            folder,
            manifest,
            plan.picker,
            dtype_name(plan.backbone),
            checkpoint_every=config.output.checkpoint_every,
            memory_limit=limit,
            kept=earlier.kept,
        )
        try:
            infer_and_write(plan, feed, store, clock, stop)
        except (Exception, KeyboardInterrupt):
            log.warning("%s", resume_line(folder, store.manifest))
            raise
    show_summary(folder, store.manifest, plan.picker)
    stop.check()


def infer_and_write(plan: Plan, feed: Feed, store: Store, clock: Clock, stop: Stop) -> None:
    """Runs the model over the documents and writes what is captured, also when something stops it."""
    accumulator = Accumulator(plan.selection)
    interruption: BaseException | None = None
    try:
        with clock.stage("inference"):
            infer(plan, feed, accumulator, store, clock, stop)
    except (Exception, Stopped) as error:
        # What was captured so far is worth keeping: it is written below, then the error goes on its way.
        interruption = explained(error)
    clock.add("inference", -clock.seconds.get("commit", 0.0))
    feed.close()
    try:
        with clock.stage("write"):
            store.commit(accumulator, last=interruption is None)
    except Exception as error:
        interruption = interruption or explained(error)
    store.close(feed.counts.skipped_empty, clock.seconds, interruption)
    if interruption is not None:
        raise interruption


def explained(error: BaseException) -> BaseException:
    """Running out of memory as one line; any other error as it is."""
    out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
    if isinstance(error, SnifferError) or not out_of_memory:
        return error
    told = CaptureError(
        f"out of memory ({' '.join(str(error).split())[:200] or type(error).__name__}): lower batch.max_tokens, "
        "dataset.max_tokens or output.memory_limit"
    )
    told.__cause__ = error
    return told


def check(config: Config) -> ModelLimits:
    """Meets everything that can be known to be wrong before the model loads."""
    config.dataset.check()
    limits = config.model.limits()
    check_request(config.capture, limits)
    return limits


def token_limit(config: Config, limits: ModelLimits) -> int | None:
    """The most tokens a document may have: what the user says, else what the model was made for.

    Raises:
        ConfigError: the user asks for more positions than the model has.
    """
    wanted, possible = config.dataset.max_tokens, limits.max_positions
    if wanted is not None and possible is not None and wanted > possible:
        raise ConfigError(
            f"dataset.max_tokens={wanted} is more than the model's {possible} positions: lower it, or extend the "
            f"model with 'model.config_overrides={{max_position_embeddings: {wanted}}}' and a RoPE scaling"
        )
    return wanted if wanted is not None else possible


def make_plan(config: Config, backbone: Backbone, feed: Feed) -> Plan:
    """Resolves the request against the model and expects its size from the documents read so far.

    Raises:
        ConfigError: the selection names what the model does not have.
        DatasetError: there is no text to capture from.
    """
    selection = select(backbone.geometry, config.capture, backbone.pre_missing)
    geometry = {layer.layer: layer for layer in backbone.geometry}
    picker = Picker(config.sampler, config.seed)
    lengths = [document.n_tokens for document in feed.first.documents]
    # A shard of few documents may be left without any.
    if not lengths and len(config.dataset):
        raise DatasetError(f"no text to capture from: all {feed.counts.skipped_empty} texts are empty")
    batch = batch_tokens(config.batch.max_tokens, backbone.device.type)
    documents, itemsize = feed.expected_documents, backbone.dtype.itemsize
    expected = estimate(picker, selection, geometry, lengths or [1], documents, itemsize, batch)
    return Plan(backbone, geometry, selection, picker, expected, batch)


def infer(plan: Plan, feed: Feed, accumulator: Accumulator, store: Store, clock: Clock, stop: Stop) -> None:
    """Runs every batch through the backbone; what was picked is then in the accumulator, or on disk."""
    backbone = plan.backbone
    transfer = transfer_for(backbone.device)
    gather_plan = GatherPlan(plan.selection, plan.geometry, backbone.layer_of, transfer, backbone.device)
    wants_pre = any(kind.endswith("_pre") for kind in plan.selection.kinds)
    in_flight: list[Observer] = []

    def keep(observer: Observer) -> None:
        done = store.kept.done(observer.batch, plan.selection.heads)
        accumulator.add(observer.batch, observer.picks, transfer.settle(observer.vectors), done)
        store.add_examples(observer.batch.documents)
        clock.add("capture", observer.seconds)
        progress.advance(len(observer.batch.documents), observer.batch.n_tokens, sum(accumulator.rows.values()))

    with torch.inference_mode(), capture_progress(feed.expected_documents, feed.expected_tokens) as progress:
        try:
            for batch in stop.each(feed.batches(plan.batch_tokens)):
                with clock.stage("sample"):
                    picks = draw(plan.picker, plan.selection, batch)
                if not store.kept.lacks(batch, picks, plan.selection.heads):
                    store.add_examples(batch.documents)
                    progress.advance(len(batch.documents), batch.n_tokens, sum(accumulator.rows.values()))
                    continue
                observer = Observer(batch, picks, gather_plan)
                with clock.stage("forward"), tap(observer, pre=wants_pre):
                    backbone(transfer.upload(batch.input_ids(), backbone.device))
                transfer.end_batch()
                in_flight.append(observer)
                # One batch late, so that its copies to the host overlap the next forward.
                if len(in_flight) > 1:
                    keep(in_flight.pop(0))
                    with clock.stage("commit"):
                        store.relieve(accumulator)
        except (Exception, Stopped):
            # Batches that are through the model are kept, if that is still possible.
            with suppress(Exception):
                while in_flight:
                    keep(in_flight.pop(0))
            raise
        while in_flight:
            keep(in_flight.pop(0))


def first_manifest(config: Config, plan: Plan, folder: Path) -> Manifest:
    """The manifest of a run that is about to start."""
    heads = plan.selection.heads
    return Manifest(
        status="running",
        seed=config.seed,
        model=config.model.describe(),
        dataset=config.dataset.describe(),
        sampler=describe(config.sampler),
        geometry=tuple(plan.geometry.values()),
        selection={
            layer: {kind: heads[layer, kind] for kind in plan.selection.kinds_of(layer)}
            for layer in plan.selection.layers
        },
        threads=torch.get_num_threads(),
        device=describe_device(plan.backbone),
        backbone=plan.backbone.describe(),
        config=saved_config(folder),
    )


def describe_device(backbone: Backbone) -> dict[str, str]:
    """What kind of device computed, without naming the machine."""
    device = {"type": backbone.device.type, "dtype": dtype_name(backbone)}
    if backbone.device.type == "cuda":
        device["name"] = torch.cuda.get_device_name(backbone.device)
    return device


def dtype_name(backbone: Backbone) -> str:
    return str(backbone.dtype).removeprefix("torch.")
