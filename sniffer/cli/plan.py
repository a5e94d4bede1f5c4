"""`plan=true`: what a run would need, before any hour of a GPU is spent. No weights are read or made.

The shapes come from the model's outline, the number of vectors from the sampler's law, the lengths from the documents.
Where both dataset.max_examples and dataset.max_tokens are given, the documents stay unread, and each counts as that
long: the most that the run can need. Hours follow from a speed, which has to be measured: given as tokens per
second, or taken from an earlier run of the same model on the same machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sniffer.config.schema import Config, PlanConfig
from sniffer.dataset.batching import ELSEWHERE
from sniffer.dataset.kept import check_kept
from sniffer.dataset.packing import most_lengths as packs
from sniffer.dataset.source import Shard
from sniffer.dataset.tokenizing import spans
from sniffer.engine.generating import check_generation, loaded_by
from sniffer.engine.lengths import longest_document, new_tokens, token_limit
from sniffer.errors import ConfigError, RunError
from sniffer.forward.attention.layout import layout_of
from sniffer.forward.estimate import Estimate, estimate, largest_forward, peak_ram, stored_bytes
from sniffer.forward.selection import Selection, check_request, select
from sniffer.sampler import picker_of
from sniffer.storage.manifest import Manifest
from sniffer.terminal.printing import facts_table
from sniffer.terminal.tables import show_table
from sniffer.types import Dataset, Outline, Sections, WorkingMemory, by_number
from sniffer.words import duration, size


@dataclass(frozen=True)
class Needs:
    """What a run would need. `read`: the lengths are those of the documents, not the most they may be."""

    outline: Outline
    selection: Selection
    lengths: Sequence[int]
    read: bool
    expected: Estimate
    ram: float
    parts: int
    speed: float | None
    forward: WorkingMemory | None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def weights(self) -> int:
        """Bytes of the backbone."""
        return self.outline.weights

    @property
    def least_ram(self) -> float:
        """Bytes of captured rows that no memory limit can avoid."""
        return peak_ram(self.expected, 0)


def tell(config: Config) -> None:
    """Prints the plan of a run, as the key `plan` asks for it."""
    show_table(facts_table("what the run would need", facts(needs(config, config.plan or PlanConfig()))))


def needs(config: Config, asked: PlanConfig) -> Needs:
    """Works out what a run of this configuration would need.

    Raises:
        SnifferError: as the run itself would before its model loads.
    """
    check_kept(config.sampler.keep_sections, config.dataset, generates=config.generate is not None)
    check_generation(config)
    speed, limits = speed_of(asked), loaded_by(config).limits()
    check_request(config.capture, limits)
    token_limit(config, limits)  # refuses more positions than there are
    outline = config.model.outline()
    selection = select(outline.geometry, config.capture, outline.pre_missing)
    picker = picker_of(config.sampler, config.seed)
    attention = layout_of(config.capture, picker, longest_document(config, limits))
    geometry = by_number(outline.geometry if attention is None else map(attention.of_layer, outline.geometry))
    most = most_lengths(config.dataset)
    read = most is None if asked.read is None else asked.read
    if not read and most is None:
        raise ConfigError("plan.read=false needs dataset.max_examples and dataset.max_tokens: give both")
    if read or most is None:
        lengths, sections = read_lengths(config)
    else:
        # Which tokens are of a section that is kept is not known: at most all of them.
        kept = config.sampler.keep_sections[:1]
        lengths, sections = most, [Sections.one(name, n) for n in most for name in kept]
    if new := new_tokens(config):
        # Where they end is not known: at the latest after so many.
        read, lengths = False, [n + new for n in lengths]
    batch = config.batch.max_tokens or ELSEWHERE
    stored = stored_bytes(config.output.compression, outline.dtype)
    known = lengths or [1], len(lengths), outline.itemsize, batch, stored, sections
    expected = estimate(picker, selection, geometry, *known, config.capture.moments.layout)
    limit = config.output.memory_limit or math.inf
    commits = math.ceil(len(lengths) / (config.output.checkpoint_every or max(1, len(lengths))))
    rounds = max(1, commits, math.ceil(expected.ram_bytes / limit))
    ram = peak_ram(expected, limit)
    forward = largest_forward(config.model, lengths, batch)
    return Needs(outline, selection, lengths, read, expected, ram, rounds * len(selection.heads), speed, forward)


def most_lengths(dataset: Dataset) -> list[int] | None:
    """The lengths of this worker's documents if there are as many texts as may be, each as long as it may be.

    None where there is no such bound: a dataset of a user's own may not even have the keys.
    """
    examples, longest = getattr(dataset, "max_examples", None), dataset.max_tokens
    if examples is None or longest is None:
        return None
    shard, window = getattr(dataset, "shard", Shard()), getattr(dataset, "window", None) or longest
    if (pack_to := getattr(dataset, "pack_to", None)) is not None:
        return packs(examples, longest, pack_to)[shard.index :: shard.count]
    stride = getattr(dataset, "stride", None) or window
    lengths = [end - start for start, end in spans(longest, window, stride)]
    return lengths * len(range(shard.index, examples, shard.count))


def read_lengths(config: Config) -> tuple[list[int], list[Sections | None]]:
    """The tokens of each document, read, tokenised and cut as the run would, and their sections.

    Raises:
        DatasetError: the documents cannot be read.
        CheckpointError: there is no tokenizer.
    """
    from sniffer.capture import documents

    found = [(document.n_tokens, document.sections) for document in documents(config)]
    return [n for n, _ in found], [sections for _, sections in found]


def speed_of(asked: PlanConfig) -> float | None:
    """Tokens per second, where there is a measurement.

    Raises:
        RunError: there is no such run, or it has done nothing.
    """
    return asked.tokens_per_second if asked.run is None else measured_speed(Path(asked.run))


def measured_speed(run: Path) -> float:
    """Tokens per second of an earlier run, all of its inference counted.

    Raises:
        RunError: there is no such run, or it has done nothing.
    """
    manifest = Manifest.load(run.expanduser(), parts_must_exist=False)
    tokens, seconds = manifest.counts.get("tokens", 0), manifest.timings.get("inference", 0.0)
    if not tokens or not seconds:
        raise RunError(f"{run} has no speed to take: it captured nothing; name a run that is complete")
    return tokens / seconds


def on_device(needs: Needs) -> str:
    """Weights, and what the largest batch takes beside them."""
    if needs.forward is None:
        return f"unknown beside the weights: find out with one forward of {max(needs.lengths, default=0):,} tokens"
    forward, gathered = needs.forward, needs.expected.batch_bytes
    total = needs.weights + forward.peak + gathered
    mask = f", of which a mask of tokens x tokens {size(forward.mask)}" if forward.mask else ""
    batch = f"{forward.rows} x {forward.tokens:,} tokens"
    apart = "" if needs.outline.quantization is None else "; what dequantising a layer takes is unknown, and not in it"
    return f"{size(total)}: weights, {size(forward.peak)} for a batch of {batch}{mask}, {size(gathered)} of rows{apart}"


def weights(needs: Needs) -> str:
    outline = needs.outline
    said = f"{size(needs.weights)}: {outline.parameters:,} parameters in {outline.dtype}"
    return said if outline.quantization is None else f"about {said}, linear layers by {outline.quantization}"


def heads(needs: Needs) -> str:
    """Of a layer, by kind, as the model has them; where layers differ, each sort of them."""
    sorts: dict[str, int] = {}
    for layer in by_number(needs.outline.geometry).values():
        if kinds := needs.selection.kinds_of(layer.layer):
            sort = ", ".join(f"{layer.heads[kind]} {kind} of {layer.dims[kind]}" for kind in kinds)
            sorts[sort] = sorts.get(sort, 0) + 1
    found = "; ".join(sort if len(sorts) == 1 else f"{n} layers with {sort}" for sort, n in sorts.items())
    note = needs.selection.note
    return found if note is None else f"{found}; {note}"


def facts(needs: Needs) -> dict[str, str]:
    """The plan in words."""
    outline, expected, n, longest = needs.outline, needs.expected, len(needs.lengths), max(needs.lengths, default=0)
    most = "" if needs.read else "at most "
    if needs.speed is None:
        hours = "unknown: measure with a short run, then plan={run: RUN} or plan={tokens_per_second: N}"
    else:
        hours = f"{most}{duration(needs.tokens / needs.speed)} at {needs.speed:,.0f} tokens/s"
    return {
        "weights": weights(needs),
        "on the device": on_device(needs),
        "layers": f"{len(needs.selection.layers)} of {len(outline.geometry)}",
        "heads": heads(needs),
        "documents": f"{n:,}, the longest of {longest:,} tokens"
        if needs.read
        else f"{n:,} of at most {longest:,} tokens",
        "forward tokens": f"{needs.tokens:,}, at most a twentieth more with padding"
        if needs.read
        else f"{most}{needs.tokens:,}",
        "vectors": f"{most}{expected.vectors:,.0f}, give or take the draw"
        f" ({', '.join(f'{kind} {rows:,.0f}' for kind, rows in expected.rows.items())})",
        "on disk": f"{most}{size(expected.file_bytes)} in about {needs.parts:,} files",
        "RAM for vectors": f"{most}{size(needs.ram)}; output.memory_limit can take it down to {size(needs.least_ram)}",
        "time": hours,
    }
