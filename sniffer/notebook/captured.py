"""What has been captured in a notebook, held in memory and read as a run is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from sniffer.errors import RunError
from sniffer.forward.accumulator import Accumulator
from sniffer.forward.columns import Columns
from sniffer.forward.moments.counting import MomentsPlan
from sniffer.forward.selection import Selection
from sniffer.notebook.batch import CallRows
from sniffer.notebook.caches import nothing
from sniffer.notebook.history import Branch
from sniffer.notebook.missed import Missed
from sniffer.notebook.saving import Told, save_run
from sniffer.notebook.summed import Summed
from sniffer.notebook.tables import rows_frame, statistics_frame
from sniffer.notebook.texts import Texts
from sniffer.reader.vectors import Pairs, Vectors, probabilities
from sniffer.sampler import Picker
from sniffer.types import ATTENTION, KIND, Column, Document, Moments, Rows, Sections, by_number, columns_of

if TYPE_CHECKING:
    import polars as pl


class Captured:
    """What has been captured so far.

    Attributes:
        geometry: the model's attention layers; `selection` is what is kept of them.
        branches: documents that part from another one, as beams do from their prompt.
        missed: counts what was not captured; `notes` says so.
    """

    def __init__(
        self,
        model: Told,
        selection: Selection,
        picker: Picker,
        names: Mapping[int, str],
        moments: MomentsPlan | None = None,
    ) -> None:
        """`names`: texts that ids stand for; `moments`: what is summed over all positions, if anything."""
        self.geometry = by_number(model.geometry)
        self.selection = selection
        self.branches: dict[int, Branch] = {}
        self.missed = Missed()
        self._partial: Captured | None = None
        self.settle: Callable[[], None] = nothing
        self._model, self._picker, self._names = model, picker, names
        self._texts = Texts()
        self._accumulator = Accumulator(selection)
        self._summed = None if moments is None else Summed(moments)

    def __repr__(self) -> str:
        rows = ", ".join(f"{count:,} {kind}" for kind, count in self.rows.items())
        return f"Captured({'; '.join([f'{self.documents:,} documents', f'rows: {rows}', *self.notes])})"

    @property
    def documents(self) -> int:
        """How many there are, branches not counted."""
        return len(self._texts.keys() - self.branches.keys())

    @property
    def partial(self) -> Captured | None:
        """What layers had shown of the last call that raised an error, or was interrupted, under the ids that its
        documents would have had; None where none has."""
        self.settle()
        return self._partial

    @property
    def rows(self) -> dict[str, int]:
        """How many, by kind."""
        self.settle()
        return dict(self._accumulator.rows)

    @property
    def passed_over(self) -> int:
        """Calls that go on with a cache which was filled before sniff listened, or by others."""
        return self.missed.passed_over

    @property
    def notes(self) -> list[str]:
        """What was not captured, or not as one might think."""
        self.settle()
        notes = self.missed.notes()
        return notes if notes or self._texts else ["no call of this model was made"]

    def tokens(self, example_id: int) -> np.ndarray:
        """The token ids of a document, int32; of a branch, those behind the position where it parts.

        Raises:
            RunError: there is no such document.
        """
        self.settle()
        if example_id not in self._texts:
            raise RunError(f"no document {example_id} was captured: there are {list(self._texts)[:8]} ...")
        return self._texts[example_id].token_ids

    def vectors(self, *, layer: int, head: int, kind: str = "q") -> Vectors:
        """One head's vectors, as `run.vectors` of a run gives them.

        Raises:
            RunError: the layer, kind or head was not captured.
        """
        if kind in KIND and KIND[kind].statistics:
            raise RunError(
                f"kind {kind} has no vectors: captured.attention(layer={layer}, q_head={head}) has its columns"
            )
        columns, states = self._head(layer, head, kind)
        order = columns.rows.order
        rows = columns.rows[order]
        return Vectors(states[order], rows, self._probability(kind, rows))

    def attention(self, *, layer: int, q_head: int) -> pl.DataFrame:
        """What the sampled queries of one head do with their keys, as `run.attention` of a run gives it.

        Raises:
            RunError: the layer, the head or statistics of attention were not captured.
        """
        if self._model.attention is None:
            raise RunError("no statistics of attention were asked for: sniff with attention='all', or some of them")
        columns, values = self._head(layer, q_head, ATTENTION)
        order = columns.rows.order
        return statistics_frame(columns.rows[order], self._columns(layer, ATTENTION), values[order])

    def pairs(self, *, layer: int, q_head: int, key_kind: str = "k", query_kind: str = "q") -> Pairs:
        """Queries and the keys that they are compared with at the same positions, as `run.pairs` of a run.

        Raises:
            RunError: the layer, a kind or a head was not captured, or the kinds make no pair.
        """
        if any(kind in KIND and KIND[kind].draw != draw for kind, draw in ((query_kind, "q"), (key_kind, "k"))):
            raise RunError(
                f"pairs of query_kind={query_kind!r} and key_kind={key_kind!r} make no sense: "
                "take q or q_pre for the first, and k, v or k_pre for the second"
            )
        queries = self.vectors(layer=layer, head=q_head, kind=query_kind)
        k_head = self.geometry[layer].key_head(q_head, key_kind)
        keys = self.vectors(layer=layer, head=k_head, kind=key_kind)
        place = {at: n for n, at in enumerate(zip(keys.example_ids.tolist(), keys.positions.tolist(), strict=True))}
        found = [place.get(at) for at in zip(queries.example_ids.tolist(), queries.positions.tolist(), strict=True)]
        mine = np.array([n for n, key in enumerate(found) if key is not None], dtype=np.int64)
        theirs = np.array([key for key in found if key is not None], dtype=np.int64)
        both = queries.inclusion_probability[mine], keys.inclusion_probability[theirs]
        probability = np.minimum(*both) if self._together else both[0] * both[1]
        return Pairs(queries.vectors[mine], keys.vectors[theirs], q_head, k_head, queries.rows[mine], probability)

    def moments(
        self, *, layer: int, head: int, kind: str, bucket: int | None = None, section: str | None = None
    ) -> Moments:
        """What all positions of all documents sum up to, of one head, as `run.moments` of a run gives it.

        Raises:
            RunError: they were not asked for, no position has that bucket or section, or a cache has lost tokens after
                they were summed up.
        """
        self.settle()
        if self._summed is None:
            raise RunError(f"no moments were asked for: sniff with moments=[{kind!r}]")
        return self._summed.of(layer, head, kind, bucket, section)

    def scan(
        self, layers: Sequence[int] | None = None, kinds: Sequence[str] | None = None, kind: str | None = None
    ) -> pl.LazyFrame:
        """All rows, or those of some layers and kinds, with the columns of `run.scan`: a row per vector.

        Args:
            kind: one kind alone; "attention" for the statistics of attention, whose columns are other than a vector's.

        Raises:
            RunError: a layer or kind was not captured.
        """
        import polars as pl

        vectors = [one for one in self.selection.kinds if not KIND[one].statistics]
        kinds = kinds or vectors if kind is None else (kind,)
        if len({one in vectors for one in kinds}) > 1:
            raise RunError("statistics of attention have other columns than vectors: scan them with kind='attention'")
        layers = self.selection.layers if layers is None else layers
        wanted = [(layer, one) for layer in layers for one in kinds]
        frames = []
        for layer, kind in wanted:
            if (layer, kind) not in self.selection.heads:
                raise RunError(f"layer {layer}, kind {kind} was not captured: see captured.selection")
            for head in self.selection.heads[layer, kind]:
                columns, states = self._head(layer, head, kind)
                order = columns.rows.order
                named = self._columns(layer, kind)
                frames.append(rows_frame(layer, kind, head, columns.rows[order], named, states[order]))
        return pl.concat(frames).lazy()

    def save(self, folder: str | Path) -> Path:
        """Writes what was captured as a run, which `open_run` reads and `runs verify` checks; it stays here as well.

        A branch is a document there that has the tokens before it too, and rows from where it parts.

        Raises:
            RunError: there is such a folder; or what is before a document's first position is not known, so that the
                run would not have its text; or nothing was captured.
            CaptureError: it cannot be written.
        """
        self.settle()
        texts = {number: text for number, text in self._texts.items() if len(text.token_ids)}
        documents = []
        for number, text in texts.items():
            if (whole := text.whole) is None:
                raise RunError(
                    f"document {text.source_id} begins at position {text.first_position}, and what is before is not "
                    "known, where a run has whole texts: capture from position 0, or read it here"
                )
            documents.append(Document(number, text.source_id, whole.token_ids, truncated=False, sections=whole.names))
        if not documents:
            raise RunError("nothing was captured: call the model within the `with` before saving")
        begins = {number: text.first_position for number, text in texts.items() if text.first_position}
        what = self._accumulator, documents, begins, self._summed, self._texts.apart
        return save_run(Path(folder), self._model, self.selection, self._picker, *what)

    def sections_until(self, number: int, position: int) -> Sections | None:
        """Those of a document's tokens before a position; None where they have none."""
        return self._texts.sections_until(number, position)

    def clear(self) -> None:
        """Lets go of all that was captured; texts that are gone on with keep their ids, positions and branches."""
        self.settle()
        self._accumulator = Accumulator(self.selection)
        self._texts.clear()
        if self._summed is not None:
            self._summed.clear()
        self._partial = None

    def keep(self, call: CallRows, branches: Mapping[int, Branch]) -> None:
        """Takes the rows of a call."""
        if call.vectors:
            self._accumulator.add(call.batch, call.picks, call.vectors)
        if call.counting is not None and self._summed is not None:
            self._summed.take(call.counting)
        self.branches |= branches
        self._texts.apart |= call.batch.apart
        for number, branch in branches.items():
            self._texts.part(number, self._named(number), branch.parent, branch.position)
        for document in call.batch.documents:
            self._texts.add(document, self._named(document.example_id))

    def keep_partial(self, call: CallRows) -> None:
        """Takes what was shown of a call that raised an error, in the place of the one before."""
        sums, plan = {} if call.counting is None else call.counting.sums, None
        counted = {pair: heads for pair, heads in self.selection.moments.items() if pair in sums}
        shown = Selection({pair: self.selection.heads[pair] for pair in call.vectors}, counted)
        if self._summed is not None and counted:
            plan = replace(self._summed.plan, heads=counted)
        self._partial = Captured(self._model, shown, self._picker, self._names, plan)
        self._partial.keep(call, {})

    def cut(self, ends: Mapping[int, int]) -> None:
        """Lets go of what documents have from a position on."""
        self._accumulator.cut(ends)
        lost = self._texts.cut(ends)
        if self._summed is not None:
            self._summed.cut(ends, lost)

    @property
    def _together(self) -> bool:
        """Whether queries and keys share their draws."""
        return "kind" not in self._picker.sampler.seed_by

    def _named(self, number: int) -> str:
        branch = self.branches.get(number)
        if branch is None:
            return self._names.get(number, str(number))
        return f"{self._named(branch.parent)}/{branch.position}/{number}"

    def _head(self, layer: int, head: int, kind: str) -> tuple[Columns, np.ndarray]:
        """All rows of a layer and kind, in the order in which they came, and one head's vectors, float32."""
        self.settle()
        heads = self.selection.heads.get((layer, kind), ())
        if head not in heads:
            raise RunError(f"layer {layer}, kind {kind}, head {head} was not captured: see captured.selection")
        dim = self.geometry[layer].dims[kind]
        columns = self._accumulator.columns(layer, kind, dim)
        chunks = [chunk.view(-1, len(heads), dim)[:, heads.index(head)].float() for chunk in columns.vectors]
        return columns, torch.cat([torch.empty(0, dim), *chunks]).detach().numpy()

    def _columns(self, layer: int, kind: str) -> tuple[Column, ...]:
        return columns_of(self.geometry[layer], kind, self._model.attention)

    def _probability(self, kind: str, rows: Rows) -> np.ndarray:
        law = self._picker.side(KIND[kind].draw).probability_by_bucket(int(rows.position.max(initial=0)) + 1)
        return probabilities(law, rows.bucket)
