"""The source's keys against the partitions' keys: the database agrees with the plain definitions, in little memory."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.fingerprint import digest_of
from pipeline.partitions import Partition
from pipeline.sample import sample_key
from pipeline.storage import Folder
from pipeline.tables import parquet_bytes
from stages.listing import new_listing


def column(urls: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(urls, pa.string())])


def publish(dataset: Folder, number: int, urls: list[str]) -> Partition:
    data = parquet_bytes(pa.table({"key": pa.array([sample_key(url) for url in urls], pa.string())}))
    partition = Partition(name=f"{number:06d}-x", rows=len(urls), content_id=digest_of(data))
    dataset.write(partition.parquet, data)
    return partition


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(url=str(tmp_path))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.text(min_size=1, max_size=3), max_size=8), max_size=5), st.lists(st.text(max_size=3)))
def test_all_answers_are_those_of_a_plain_loop(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[str]], listed: list[str]
) -> None:
    folder = Folder(url=str(tmp_path_factory.mktemp("listing")))
    parts = [sorted(set(part)) for part in parts]
    partitions = [publish(folder, number, part) for number, part in enumerate(parts)]
    there = {url for part in parts for url in part}
    with new_listing() as listing:
        listing.add(column(listed[:2]), 0)
        listing.add(column(listed[2:]), len(listed[:2]))
        assert listing.finish() == len(set(listed) - {""})
        listing.hold_against(folder, partitions)
        first = [n for n, url in enumerate(listed) if url and url not in there and url not in listed[:n]]
        assert listing.new_rows(frozenset())[0].tolist() == first
        rows, taken_down = listing.new_rows(frozenset(sample_key(listed[n]) for n in first[:1]))
        assert rows.tolist() == first[1:] and taken_down == len(first[:1])
        assert listing.keys_of(column(listed)).to_pylist() == [sample_key(url) for url in listed]
        earlier = [{url for part in parts[:n] for url in part} for n in range(len(parts))]
        repeated = {n: sorted(sample_key(url) for url in part if url in earlier[n]) for n, part in enumerate(parts)}
        assert {n: keys.to_pylist() for n, keys in listing.repeated()} == {n: k for n, k in repeated.items() if k}
        absent = {n: sorted(sample_key(url) for url in part if url not in listed) for n, part in enumerate(parts)}
        whole, some = listing.absent(partitions)
        assert whole == {n for n, keys in absent.items() if len(keys) == len(parts[n])}
        assert {n: k.to_pylist() for n, k in some} == {n: k for n, k in absent.items() if k and n not in whole}


def test_what_does_not_fit_into_memory_lies_on_disk_for_a_while(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with new_listing(memory="24MB", threads=1) as listing:
        for start in range(0, 600_000, 50_000):
            listing.add(column([f"u://{n % 500_000}" for n in range(start, start + 50_000)]), start)
        assert listing.finish() == 500_000
        listing.hold_against(folder, [])
        rows, taken_down = listing.new_rows(frozenset({sample_key("u://7")}))
        assert taken_down == 1 and rows.tolist() == [n for n in range(500_000) if n != 7]
        assert list(tmp_path.glob("densebridge-listing-*/*"))
    assert not list(tmp_path.iterdir())
