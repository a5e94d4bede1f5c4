"""The main job, start to end: from documents to a committed run folder. Its loop is `capture_all`.

A worker, in this process or on a cluster (engine/worker.py), does this with a batch: picks are drawn on the CPU, the
backbone runs once with the tap open, the accumulator keeps the picked rows. Then it writes parts, and the store
(storage/store.py) has the manifest name them.

The same path takes up an earlier, stopped session: what it has on disk (storage/on_disk.py) is not captured again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from sniffer.config.choosing import with_batch_tokens
from sniffer.config.saving import save_plain
from sniffer.config.schema import Config
from sniffer.dataset.batching import batch_tokens
from sniffer.dataset.encoding import Encoder, tokenizer_for
from sniffer.dataset.feed import Feed
from sniffer.dataset.kept import check_kept, require_kept, unkept
from sniffer.dataset.source import Shard
from sniffer.dataset.tokenizing import Tokenizer
from sniffer.engine.base import Plan, dtype_name
from sniffer.engine.beginning import first_manifest
from sniffer.engine.crew import Crew
from sniffer.engine.engine import Engine
from sniffer.engine.facts import Facts
from sniffer.engine.generating import EACH_APART, check_generation, continuing_of, loaded_by, with_new
from sniffer.engine.lengths import longest_document, new_tokens, pack_of, token_limit, window_of
from sniffer.engine.local import LocalEngine
from sniffer.engine.model_cache import Load, load_anew
from sniffer.engine.shift import Shift
from sniffer.errors import IN_A_FORWARD, CaptureError, DatasetError, device_trouble
from sniffer.forward.attention.layout import check_attention, layout_of
from sniffer.forward.estimate import (
    Room,
    commit_bytes,
    device_warning,
    estimate,
    largest_forward,
    refuse_if_too_large,
    stored_bytes,
)
from sniffer.forward.moments.request import check_moments
from sniffer.forward.selection import check_request, select
from sniffer.process.clock import Clock
from sniffer.process.devices import device_line
from sniffer.process.memory import let_go
from sniffer.process.stop import Stop, Stopped
from sniffer.sampler import picker_of
from sniffer.storage.following import following, mirror_of
from sniffer.storage.model_config import with_model_config
from sniffer.storage.same_run import Earlier
from sniffer.storage.store import Store
from sniffer.terminal.progress import capture_progress, waiting_for
from sniffer.terminal.summary import estimate_line, remarks, resume_line, show_summary
from sniffer.types import Document, ModelLimits, by_number, has_sections
from sniffer.words import one_line

log = logging.getLogger(__name__)


def run(config: Config, folder: Path, earlier: Earlier | None = None, load: Load = load_anew) -> None:
    """Captures what `config` asks for into `folder`, which the caller holds (storage/lock.py).

    Args:
        earlier: the session of this run that is to be taken up, or extended; without one the folder holds no
            results yet.
        load: how to come by the model; jobs of a sweep hand it on.

    Raises:
        SnifferError: in one line, what is wrong and what to do; before the model loads where that can
            be known.
        Stopped: a signal came. As after every exception, what was captured until then is on disk.
    """
    clock = Clock()
    earlier = earlier or Earlier()
    with Stop() as stop, closing(engine_for(config, load)) as engine:
        with clock.stage("load"), waiting_for("reading text, loading the model"), stop.at_once():
            limits = check(config)
            mirror = mirror_of(folder, config.output.mirror, earlier.manifest, keep=config.output.keep_local)
            tokenize, pad_id = tokenizer_for(config.dataset, config.model)
            longest = token_limit(config, limits)
            breaks, new = config.batch.breaks or (), new_tokens(config)
            feed = Feed(config.dataset, tokenize, pad_id, max_tokens=longest, breaks=breaks, new_tokens=new)
            try:
                if limits.vocabulary is not None and getattr(config.dataset, "tokens_column", None) is not None:
                    feed.fit(limits.vocabulary)
                model = engine.open(config, folder)
                log.info("%s", device_line(model.described, model.backbone, model.threads))
                feed.fit(model.vocabulary)
                room = engine.room(model, config.output.memory_limit)
                planned = partial(
                    make_plan, model=model, feed=feed, room=room, longest=longest_document(config, limits)
                )
                if earlier.manifest is None and model.device_free is not None:
                    lengths = [document.n_tokens + feed.new_tokens for document in feed.first.documents]
                    known = lengths, model.device_free, room.available
                    config = with_batch_tokens(config, folder, *known, lambda it: planned(it).expected.batch_bytes)
                plan = planned(config)
                log.info("%s", estimate_line(plan.expected))
                if plan.selection.note is not None:
                    log.warning("%s", plan.selection.note)
                warn_of_device(config, model, plan, feed)
                passing = None if config.output.keep_local else passing_bytes(plan, feed)
                refuse_if_too_large(plan.expected, folder, room, on_disk=earlier.bytes, passing=passing)
                fresh = first_manifest(config, plan, folder, model, feed.encoder.describe())
                manifest = with_model_config(folder, earlier.continued(fresh), model.model_config)
                if earlier.extended is not None:
                    save_plain(folder, earlier.extended)
            except BaseException:
                feed.close()
                raise
        with following(mirror) as saved:
            store = Store(
                folder,
                manifest,
                plan.picker,
                plan.dtype,
                compression=plan.compression,
                on_disk=earlier.on_disk,
                tokens=config.output.tokens,
                saved=saved,
            )
            try:
                capture_and_write(engine.crew, plan, feed, store, clock, stop)
            except (Exception, KeyboardInterrupt):
                log.warning("%s", resume_line(folder, store.manifest))
                raise
    fixed = "window" if window_of(config) is not None else "pack_to" if pack_of(config) is not None else None
    sections = (example.sections for example in store.examples.values())
    for remark in (*remarks(store.manifest.counts, longest, fixed), *unkept(config.sampler.keep_sections, sections)):
        log.warning("%s", remark)
    show_summary(folder, store.manifest, plan.picker)
    stop.check()


def engine_for(config: Config, load: Load) -> Engine:
    """What runs the model; `load` is how this process would come by it."""
    if config.engine.name == "local":
        return LocalEngine(load)
    if config.engine.name == "vllm":
        from sniffer.engine.vllm.engine import VllmEngine

        return VllmEngine(config)
    from sniffer.engine.ray import RayEngine

    return RayEngine(config.engine)


def capture_and_write(crew: Crew, plan: Plan, feed: Feed, store: Store, clock: Clock, stop: Stop) -> None:
    """Captures all documents and writes what is captured, also when something stops it."""
    interruption: BaseException | None = None
    with capture_progress(feed.expected_documents, feed.expected_tokens) as progress:
        shift = Shift(crew, plan, store, clock, progress, stop.check)
        try:
            store.begin()
            with clock.stage("inference"):
                capture_all(shift, plan, feed, store, clock, stop)
        except (Exception, Stopped) as error:
            # What was captured so far is worth keeping: it is written below, then the error goes on its way.
            interruption = explained(error)
    clock.add("inference", -clock.seconds.get("commit", 0.0))
    feed.close()
    try:
        with clock.stage("write"):
            if interruption is None:
                shift.finish()
            else:
                shift.rescue()
            crew.close()
            store.complete(last=interruption is None)
    except Exception as error:
        interruption = interruption or explained(error)
    try:
        store.close(feed.counts.left_out(), clock.seconds, interruption)
    except Exception as error:
        interruption = interruption or explained(error)
        # What failed once may go well the second time; else the folder is as after a kill.
        with suppress(Exception):
            store.close(feed.counts.left_out(), clock.seconds, interruption)
    if interruption is not None:
        raise interruption


def capture_all(shift: Shift, plan: Plan, feed: Feed, store: Store, clock: Clock, stop: Stop) -> None:
    """The loop: every batch through a model, unless its rows are on disk already."""
    for batch in stop.each(feed.batches(plan.batch_tokens, plan.lengths)):
        if store.lacks(batch):
            shift.capture(batch)
        else:
            shift.pass_over(batch)
        with clock.stage("commit"):
            shift.relieve()
    shift.drain()


def explained(error: BaseException) -> BaseException:
    """What a device or the disk refuses, as one line; any other error as it is."""
    if isinstance(error, OSError) and error.filename:
        told = CaptureError(one_line(error))
        told.__cause__ = error
        return told
    trouble = device_trouble(error, "in a forward, or as rows were written", IN_A_FORWARD)
    if trouble is not None:
        let_go(error)  # of what the forward had made, so that there is room to write what was captured
    return trouble or error


def check(config: Config) -> ModelLimits:
    """Meets everything that can be known to be wrong before the model loads."""
    generates = config.generate is not None
    check_kept(config.sampler.keep_sections, config.dataset, generates=generates)
    check_attention(config.capture, config.model, config.dataset, generates=generates)
    check_moments(config.capture.moments, config.dataset, generates=generates)
    check_generation(config)
    config.dataset.check()
    limits = loaded_by(config).limits()
    check_request(config.capture, limits)
    return limits


def documents(config: Config) -> Iterator[Document]:
    """The documents that a run of this configuration would have, in order, read anew; before a model goes on with them.

    Raises:
        SnifferError: as a run before its model loads.
    """
    config.dataset.check()
    tokenize, _ = tokenizer_for(config.dataset, config.model)
    tokenizer = Tokenizer(tokenize, token_limit(config, config.model.limits()))
    return tokenizer.encoded(config.dataset, Encoder.of(config.dataset, tokenize, prompts=config.generate is not None))


def make_plan(config: Config, model: Facts, feed: Feed, room: Room, longest: int | None = None) -> Plan:
    """Resolves the request against the model and expects its size from the documents read so far.

    `longest`: tokens that no document has more than; None where nothing says so.

    Raises:
        ConfigError: the selection names what the model does not have.
        DatasetError: there is no text to capture from.
    """
    selection = select(model.geometry, config.capture, model.pre_missing)
    picker = picker_of(config.sampler, config.seed)
    attention = layout_of(config.capture, picker, longest)
    geometry = by_number(model.geometry if attention is None else map(attention.of_layer, model.geometry))
    continuing = continuing_of(config, model, feed.encoder.tokenize, feed.encoder.answer)
    to_come = () if continuing is None else continuing.answer.known
    require_kept(config.sampler.keep_sections, config.dataset, feed.first, to_come)
    lengths, sections = with_new(feed.first.documents, continuing)
    # A shard of few documents may be left without any; of texts that are packed there are fewer than texts.
    shard = getattr(config.dataset, "shard", Shard())
    if not lengths and len(config.dataset) and not (pack_of(config) is not None and shard.index):
        empty, short = feed.counts.skipped_empty, feed.counts.skipped_short
        few = f", {short} documents shorter than dataset.min_tokens" if short else ""
        raise DatasetError(f"no text to capture from: {'all ' * (not short)}{empty} texts are empty{few}")
    batch = batch_tokens(config.batch.max_tokens, model.device.type)
    documents, dtype, compression = feed.expected_documents, dtype_name(model.dtype), config.output.compression
    stored, moments = stored_bytes(compression, dtype), config.capture.moments.layout
    known = lengths or [1], documents, model.dtype.itemsize, batch, stored, sections
    expected = estimate(picker, selection, geometry, *known, moments)
    alike = model.lengths if continuing is None or model.pads else EACH_APART
    lasting = alike, config.output.checkpoint_every, room.limit, attention, longest or 0
    what = *lasting, has_sections(config.dataset, generates=continuing is not None), moments, continuing
    return Plan(geometry, selection, picker, expected, batch, dtype, compression, *what)


def passing_bytes(plan: Plan, feed: Feed) -> float:
    """What is on disk at a time of a run whose parts leave for its mirror, as long as that keeps up."""
    return commit_bytes(plan.expected, feed.expected_documents, plan.checkpoint_every, plan.memory_limit)


def warn_of_device(config: Config, model: Facts, plan: Plan, feed: Feed) -> None:
    """Says before the first forward where the largest one may not fit, as far as is known of the documents by then."""
    if model.device_free is None:
        return
    lengths = [document.n_tokens + feed.new_tokens for document in feed.first.documents]
    needed = largest_forward(config.model, lengths, plan.batch_tokens)
    if needed is not None and (line := device_warning(needed, plan.expected.batch_bytes, model.device_free)):
        log.warning("%s", line)
