"""Datasets of the Hugging Face hub."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from sniffer.dataset.columns import column_of, value_at
from sniffer.dataset.content import Tabular
from sniffer.dataset.files import file_facts, n_bytes
from sniffer.dataset.source import LATER
from sniffer.errors import DatasetError, first_line


@dataclass(frozen=True, kw_only=True)
class Hub(Tabular):
    """A dataset on the Hugging Face hub, or any other that `datasets.load_dataset` takes by name.

    With HF_HUB_OFFLINE=1 the copy in the local cache is used. `streaming`: rows are read as they are wanted, instead of
    the whole split being downloaded and prepared first; those up to the last that is taken are read twice, since all is
    checked before the model loads. Null: where `max_examples` takes the first ones, or the split is larger than the
    disk has room for.
    """

    home: ClassVar[str] = "sniffer.tables"

    name: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool | None = field(default=None, metadata=LATER)

    @property
    def title(self) -> str:
        return f"{self.name} ({self.split})"

    @cached_property
    def streams(self) -> bool:
        """Whether rows are read as they are wanted: as told, or as it suits."""
        if self.streaming is not None:
            return self.streaming
        if self._commit is None and not Path(self.name).expanduser().exists():  # offline: the copy in the cache
            return False
        # A sample is drawn of all rows, which would all be read, and those that are drawn again.
        first_ones = self.max_examples is not None and self.shuffle_seed is None
        return first_ones or self._needed_bytes > disk_free()

    @property
    def _needed_bytes(self) -> int:
        """What preparing the split would take of this disk, as far as it says; of a local folder, what its files do."""
        import datasets

        try:
            builder = datasets.load_dataset_builder(self.name, self.config, revision=self._commit or self.revision)
        except Exception:  # of `datasets`: any; loading will say what is wrong
            return 0
        if Path(builder.cache_dir).exists():  # it is prepared already
            return 0
        split = (builder.info.splits or {}).get(self.split)
        known = split.num_bytes if split is not None and split.num_bytes else builder.info.dataset_size
        return int(known or (n_bytes(sorted(self._data_files())) if Path(self.name).expanduser().is_dir() else 0))

    def row_ids(self) -> Iterator[Any]:
        self.require_types(self._table.features.arrow_schema, self.title)
        if self.streams:  # how many rows there are, a stream tells by ending
            return self.ids_of(self.values)
        if self.id_column is None:
            return iter(range(len(self._table)))
        return (identity for (identity,) in self.values(self.id_column))

    def row_texts(self, rows: range) -> Iterator[Any]:
        return self._values(rows, *self.columns)

    def some_texts(self, rows: Sequence[int]) -> Iterator[Any]:
        return super().some_texts(rows) if self.streams else self._values(rows, *self.columns)

    def values(self, *columns: str) -> Iterator[tuple[Any, ...]]:
        return self._values(range(sys.maxsize) if self.streams else range(len(self._table)), *columns)

    def _values(self, rows: Sequence[int], *paths: str) -> Iterator[tuple[Any, ...]]:
        roots = [column_of(path, self._table.column_names, self.title) for path in paths]
        table = self._table.select_columns(list(dict.fromkeys(roots)))
        for row in self._streamed(table, rows) if isinstance(rows, range) and self.streams else table.select(rows):
            yield tuple(value_at(row[root], path, root, self.title) for path, root in zip(paths, roots, strict=True))

    def _streamed(self, table: Any, rows: range) -> Iterator[Any]:
        try:
            yield from islice(table, rows.start, rows.stop, rows.step)
        except Exception as error:  # of the network, of a file's format: any
            raise DatasetError(f"{self.title} cannot be read on: {first_line(_innermost(error))}") from error

    def facts(self) -> dict[str, Any]:
        """The commit; of a local folder, and of a cached copy that names none, what its files hold."""
        if self.streams:  # to hash a local folder would be to read it
            files = [] if self._commit else self._files
            return {"commit": self._commit, **({"files": len(files), "bytes": n_bytes(files)} if files else {})}
        commit = self._commit or self._cached_commit
        return {"commit": commit, **({} if commit else file_facts(self._files))}

    @property
    def _cached_commit(self) -> str | None:
        """The commit that `datasets` has in the path of its own copy; a local folder has none."""
        homes = {Path(file["filename"]).parent.name for file in self._table.cache_files}
        commits = [home for home in homes if re.fullmatch(r"[0-9a-f]{40}", home)]
        return commits[0] if len(commits) == 1 == len(homes) else None

    @property
    def _files(self) -> list[Path]:
        """A local folder's data files and what it says of them; else those of the cached copy."""
        folder = Path(self.name).expanduser()
        if not folder.is_dir():
            return [] if self.streams else sorted(Path(file["filename"]) for file in self._table.cache_files)
        about = {folder / name for name in ("README.md", "dataset_infos.json")}
        return sorted(file for file in self._data_files() | about if file.is_file())

    def _data_files(self) -> set[Path]:
        """A local folder's."""
        import datasets

        named = datasets.load_dataset_builder(self.name, self.config).config.data_files or {}
        return {Path(file) for listed in named.values() for file in listed}

    @cached_property
    def _table(self) -> Any:
        commit = self._commit
        import datasets

        revision, how = commit or self.revision, {"streaming": True} if self.streams else {}
        try:
            table = datasets.load_dataset(self.name, self.config, split=self.split, revision=revision, **how)
            return table._resolve_features() if self.streams and table.features is None else table
        except Exception as error:
            reason = first_line(_innermost(error))
            raise DatasetError(f"{self.title} cannot be loaded: {reason}") from error

    @cached_property
    def _commit(self) -> str | None:
        """The commit to load; None for a local folder, or when the cache is to be used."""
        return None if Path(self.name).expanduser().exists() else hub_commit(self.name, self.revision)


def disk_free() -> int:
    """Bytes that are left where `datasets` prepares what it loads."""
    import datasets

    place = Path(datasets.config.HF_DATASETS_CACHE)
    return shutil.disk_usage(next(folder for folder in (place, *place.parents) if folder.is_dir())).free


def hub_commit(name: str, revision: str | None) -> str | None:
    """Asks the hub whether a dataset may be read, and for its commit; None if told to stay offline.

    Raises:
        DatasetError: gated, not found, or no network; at once, where loading would try for half a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = HfApi()
    try:
        hub.auth_check(name, repo_type="dataset")
        return hub.dataset_info(name, revision=revision, timeout=10).sha
    except OfflineModeIsEnabled:
        return None
    except GatedRepoError as error:
        problem = f"is gated: accept its terms on https://huggingface.co/datasets/{name}, then run `hf auth login`"
        raise DatasetError(f"the dataset {name} {problem}") from error
    except RevisionNotFoundError as error:
        raise DatasetError(f"the dataset {name} has no revision {revision}: check dataset.revision") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        problem = "is not on the hub, or private: check dataset.name, or run `hf auth login`"
        raise DatasetError(f"the dataset {name} {problem}") from error
    except Exception as error:  # whichever HTTP library the hub's client is built on
        problem = f"no network to the hub ({first_line(error)})"
        raise DatasetError(
            f"{problem}: connect, set HF_HUB_OFFLINE=1 to use a cached copy of {name}, or choose local text"
        ) from error


def _innermost(error: BaseException) -> BaseException:
    """`datasets` wraps what went wrong; the first cause is what a person can act on."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error
