"""Tables: payload bytes come back exactly, equal rows give equal bytes, and a table that is there is whole."""

from __future__ import annotations

import multiprocessing
import os
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.fingerprint import row_digests
from pipeline.stage import Stage
from pipeline.storage import Folder
from pipeline.tables import (
    TableName,
    list_tables,
    read_payloads,
    read_table,
    tar_partition,
    writing_table,
)
from tests.small_stages import SmallConfig

INPUT = "0123456789abcdef"


class Two(Stage):
    """Two payloads, a list and a text."""

    name = "two"
    writes = pa.schema([("label", pa.string()), ("scores", pa.list_(pa.float32()))])
    payload = {"image": "jpg", "tokens": "t5.npy"}


class Plain(Stage):
    name = "plain"
    writes = pa.schema([("label", pa.string())])


def rows_of(values: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    names = ("label", "scores", "image", "tokens", "status", "reason", "made_from")
    rows = [{"key": f"{n:024x}", **dict(zip(names, v, strict=True))} for n, v in enumerate(values)]
    return [{**row, "transient": row["status"] == "failed"} for row in rows]


def write(dataset: Folder, stage: Stage, rows: list[dict[str, Any]], size: int = 100) -> TableName:
    """Publishes the rows, added in batches of `size`."""
    with writing_table(dataset, stage) as writer:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            writer.add({name: [row[name] for row in batch] for name in batch[0]})
        name = writer.finish("000000", INPUT)
        writer.publish(dataset)
        return name


def files(dataset: Folder, table: TableName) -> tuple[bytes, bytes]:
    return dataset.read(table.parquet), dataset.read(table.tar)


ONE_ROW = st.tuples(
    st.none() | st.text(max_size=12),
    st.none() | st.lists(st.floats(width=32, allow_nan=False), max_size=3),
    st.none() | st.binary(max_size=1500),
    st.none() | st.binary(max_size=40),
    st.sampled_from(["kept", "dropped", "failed"]),
    st.none() | st.sampled_from(["seen", "short"]),
    st.text("0123456789abcdef", min_size=16, max_size=16),
)
ROWS = st.lists(ONE_ROW, max_size=8).map(rows_of)
FEW = settings(max_examples=40, deadline=None)


@FEW
@given(ROWS, st.integers(1, 9))
def test_bytes_and_values_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], size: int
) -> None:
    dataset, stage = Folder(url=str(tmp_path_factory.mktemp("tables"))), Two(SmallConfig())
    name = write(dataset, stage, rows, size)
    table = read_table(dataset, name)
    assert list_tables(dataset, stage.folder, with_tar=True) == {"000000": [name]}
    kept = sum(row["status"] == "kept" for row in rows)
    assert (name.rows, name.kept, name.transient) == (len(rows), kept, sum(row["transient"] for row in rows))
    for column in ("key", "label", "scores", "status", "reason", "made_from"):
        assert table.column(column).to_pylist() == [row[column] for row in rows]
    for column in stage.payload:
        there = table.filter(table.column(f"{column}_offset").is_valid())
        assert read_payloads(dataset, name, there, column) == [r[column] for r in rows if r[column] is not None]
    with tarfile.open(dataset.path(name.tar)) as tar:
        members = tar.getmembers()
    assert len(members) == sum(row[c] is not None for row in rows for c in stage.payload)
    assert all(m.mtime == 0 and m.uname == "root" for m in members)


@FEW
@given(ROWS, st.integers(1, 9), st.integers(1, 9))
def test_equal_rows_give_equal_bytes(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], one: int, two: int
) -> None:
    datasets = [Folder(url=str(tmp_path_factory.mktemp("tables"))) for _ in range(2)]
    names = [write(dataset, Two(SmallConfig()), rows, size) for dataset, size in zip(datasets, (one, two))]
    assert names[0] == names[1] and files(datasets[0], names[0]) == files(datasets[1], names[1])


@FEW
@given(st.lists(ONE_ROW, min_size=1, max_size=5).map(rows_of), st.data())
def test_another_value_is_another_content(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], data: st.DataObject
) -> None:
    dataset, stage = Folder(url=str(tmp_path_factory.mktemp("tables"))), Two(SmallConfig())
    before = write(dataset, stage, rows)
    row = data.draw(st.sampled_from(rows))
    column = data.draw(st.sampled_from(sorted(row)))
    different = {
        "image": b"other",
        "tokens": b"other",
        "scores": [0.5, 2.0**70],
        "status": "other",
        "transient": not row["transient"],
    }.get(column, "other")
    row[column] = different
    after = write(dataset, stage, rows)
    assert after.content_id != before.content_id and after.input_id == before.input_id
    assert read_table(dataset, before).num_rows == read_table(dataset, after).num_rows


def test_no_rows_give_an_empty_table_and_a_tar_that_readers_take(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    name = write(dataset, Two(SmallConfig()), [])
    with tarfile.open(dataset.path(name.tar)) as tar:
        assert tar.getnames() == []
    assert read_table(dataset, name).num_rows == 0


def test_without_payload_there_is_no_tar(tmp_path: Path) -> None:
    dataset, row = (
        Folder(url=str(tmp_path)),
        {"key": "a", "label": "b", "status": "kept", "reason": None, "transient": False, "made_from": ""},
    )
    name = write(dataset, Plain(SmallConfig()), [row])
    assert dataset.list(name.folder) == [name.parquet.split("/")[1]]


def test_what_is_not_published_is_gone(tmp_path: Path) -> None:
    dataset, stage = Folder(url=str(tmp_path)), Two(SmallConfig())
    with pytest.raises(RuntimeError), writing_table(dataset, stage) as writer:
        row = rows_of([("a", None, b"bytes", None, "kept", None, "")])[0]
        writer.add({name: [value] for name, value in row.items()})
        raise RuntimeError("on the way")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def die_between(dataset: Folder, rows: list[dict[str, Any]], after: int) -> None:
    """Publishes, but dies at the file published after so many."""
    publish, count = Folder._publish, iter(range(10))

    def dying(folder: Folder, path: Path, name: str) -> None:
        if next(count) == after:
            os._exit(9)
        publish(folder, path, name)

    Folder._publish = dying  # type: ignore[method-assign] - in a process of its own
    write(dataset, Two(SmallConfig()), rows)


@pytest.mark.parametrize("after", [0, 1])
def test_killed_between_its_files_a_table_is_not_there(tmp_path: Path, after: int) -> None:
    rows = rows_of([("a", [1.0], b"bytes", b"more", "kept", None, "")])
    dataset, whole, stage = (
        Folder(url=str(tmp_path / "killed")),
        Folder(url=str(tmp_path / "whole")),
        Two(SmallConfig()),
    )
    process = multiprocessing.get_context("fork").Process(target=die_between, args=(dataset, rows, after))
    process.start()
    process.join(30)
    assert process.exitcode == 9 and not list_tables(dataset, stage.folder, with_tar=True)
    name = write(dataset, stage, rows)
    assert files(dataset, name) == files(whole, write(whole, stage, rows))


def test_a_damaged_table_says_so(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    name = write(dataset, Two(SmallConfig()), rows_of([("a", None, b"b", None, "kept", None, "")]))
    Path(dataset.path(name.parquet)).write_bytes(dataset.read(name.parquet)[:40])
    with pytest.raises(ValueError, match=r"is damaged .*: delete it, and the next build makes it again"):
        read_table(dataset, name)


def test_a_table_that_cannot_be_asked_for_is_not_called_damaged(tmp_path: Path) -> None:
    name = TableName(folder="two-0", partition="0-a", input_id=INPUT, content_id=INPUT, rows=0, kept=0, transient=0)
    with pytest.raises(FileNotFoundError):
        read_table(Folder(url=str(tmp_path)), name, ["key"])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_cut_tar_says_so(tmp_path: Path, elsewhere: bool) -> None:
    """Half a picture must not go on into a view."""
    dataset = Folder(url=f"memory://{tmp_path.name}{elsewhere}" if elsewhere else str(tmp_path))
    name = write(dataset, Two(SmallConfig()), rows_of([("a", None, b"b" * 900, None, "kept", None, "")]))
    dataset.write(name.tar, dataset.read(name.tar)[:1000])
    with pytest.raises(ValueError, match=r"\.tar is cut: delete it, and the next build"):
        read_payloads(dataset, name, read_table(dataset, name), "image")


def test_a_few_columns_are_read_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The funnel asks every table for two columns; embeddings beside them would be gigabytes over the network."""
    dataset = Folder(url=f"memory://{tmp_path.name}")
    name = write(dataset, Two(SmallConfig()), rows_of([("a", None, b"b", None, "kept", None, "")]))
    monkeypatch.setattr(Folder, "read", lambda *_: pytest.fail("the whole file was read"))
    assert read_table(dataset, name, ["status", "reason"]).to_pylist() == [{"status": "kept", "reason": None}]


def test_names_are_read_back() -> None:
    name = TableName(folder="f", partition="000001-ab", input_id="ab", content_id="cd", rows=5, kept=3, transient=1)
    with_tar = replace(name, tar_id="0123456789abcdef")
    for one in (name, with_tar):
        assert TableName.parse("f", one.parquet.split("/")[1]) == one
    tar = "000001-ab.0123456789abcdef.tar"
    assert with_tar.tar == f"f/{tar}" and tar_partition(tar) == "000001-ab"
    for other in ("000000.tar", "notes.tar", "000001-ab.0123456789abcdef.parquet", "a.b.c.d.tar"):
        assert tar_partition(other) is None
    for other in ("000001.ab.cd.5-3-1.tar", "manifest-3.parquet", "000001.ab.cd.parquet", "settings.json"):
        assert TableName.parse("f", other) is None


def test_a_tar_is_named_by_what_it_holds(tmp_path: Path) -> None:
    """So it stays when rows change that have nothing in it, and two tables share it."""
    dataset, stage = Folder(url=str(tmp_path)), Two(SmallConfig())
    kept, without = ("a", None, b"b", None, "kept", None, ""), ("c", None, None, None, "dropped", "why", "0" * 16)
    first = write(dataset, stage, rows_of([kept, without]))
    written = Path(dataset.path(first.tar)).stat().st_mtime_ns
    second = write(dataset, stage, rows_of([kept, (*without[:-1], "1" * 16)]))
    assert second.content_id != first.content_id and second.tar == first.tar
    assert Path(dataset.path(first.tar)).stat().st_mtime_ns == written
    others = [("a", None, b"B", None, "kept", None, ""), ("a", None, None, b"b", "kept", None, "")]
    names = {write(dataset, stage, rows_of([other])).tar for other in others}
    assert len({*names, first.tar}) == 3


VALUES = {
    "text": st.none() | st.text(max_size=5),
    "size": st.none() | st.integers(-9, 9),
    "data": st.binary(max_size=3),
    "vector": st.none() | st.lists(st.sampled_from([0.5, -2.0, 3.25]), max_size=3),
    "words": st.none() | st.lists(st.none() | st.text(max_size=2), max_size=2),
}


@FEW
@given(st.lists(st.fixed_dictionaries(VALUES), min_size=2, max_size=8))
def test_rows_have_equal_digests_where_and_only_where_they_are_equal(rows: list[dict[str, Any]]) -> None:
    schema = pa.schema(
        {
            "text": pa.string(),
            "size": pa.int32(),
            "data": pa.binary(),
            "vector": pa.list_(pa.float16()),
            "words": pa.list_(pa.string()),
        }
    )
    made = row_digests(pa.Table.from_pylist(rows, schema=schema))
    for one, digest in zip(rows, made):
        assert [other == one for other in rows] == [d == digest for d in made]
    renamed = pa.Table.from_pylist(rows, schema=schema).rename_columns(["text", "size", "other", "vector", "words"])
    assert not set(made) & set(row_digests(renamed))
