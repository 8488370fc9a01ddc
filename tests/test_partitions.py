"""Partitions by their names: in ingest order, the smallest file of each, and no folder of a newer format."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.partitions import FORMAT, Partition, list_partitions, mark_format, partition_name
from pipeline.storage import Folder


def test_of_one_partition_the_file_with_the_fewest_rows_counts(tmp_path: Path) -> None:
    """A takedown publishes what is left before it removes the rest; killed between, the rest must not come back."""
    dataset = Folder(url=str(tmp_path))
    name = partition_name(3, "cc11223344")
    whole, less = (Partition(name=name, rows=rows, content_id=i) for rows, i in ((9, "cc11223344"), (8, "dd")))
    other = Partition(name=partition_name(3, "bb"), rows=2, content_id="bb")
    for partition in (whole, other, less):
        dataset.write(partition.parquet, b"")
    assert list_partitions(dataset) == [other, less] and name == "000003-cc112233" and less.number == 3
    assert [p.has_shrunk for p in (whole, less, other)] == [False, True, False]
    assert not Partition(name=name, rows=9, content_id="").has_shrunk


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    mark_format(dataset)
    assert list_partitions(dataset) == []
    dataset.write(f"partitions/format-{FORMAT + 1}", b"")
    for ask in (list_partitions, mark_format):
        with pytest.raises(ValueError, match=rf"has dataset format-{FORMAT + 1}, this version reads format-{FORMAT}"):
            ask(dataset)


def test_only_what_is_named_as_a_partition_is_one(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path))
    partition = Partition(name=partition_name(1_000_000, "cc11223344"), rows=0, content_id="cc11223344")
    strange = ("notes.v2.final", "copy.5.abc", "000001-aa.x.c", "000001-aa.5.C", "000001-aa.5", "000001-aa.5.c.d")
    for name in (partition.parquet, *(f"partitions/{name}.parquet" for name in strange)):
        dataset.write(name, b"")
    assert list_partitions(dataset) == [partition]
