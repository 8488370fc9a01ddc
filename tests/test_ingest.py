"""Source tables → partitions: what is there is never re-cut, two at once do no harm, and what was read is not read again."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.fingerprint import digest_of
from pipeline.partitions import Partition, list_partitions
from pipeline.sample import sample_key
from pipeline.storage import Folder
from pipeline.tables import read_parquet
from pipeline.takedown import take_down
from pipeline.tombstones import Tombstones, write_tombstones
from stages import ingest as ingest_module
from stages.ingest import ingest, ingested, preview
from stages.source import Source

CLOCK = itertools.count(1_700_000_000 * 10**9, 10**9)


@pytest.fixture
def dataset(tmp_path: Path) -> Folder:
    return Folder(url=str(tmp_path / "dataset"))


def a_list(path: Path, numbers: Iterable[int], size: int = 5, **columns: Any) -> Source:
    """A parquet list of the URLs of these numbers. Its time of change is later than that of any before it."""
    urls = [f"u://{n}" for n in numbers]
    pq.write_table(pa.table({"url": urls, "text": [f"text {u}" for u in urls], **columns}), path)
    now = next(CLOCK)
    os.utime(path, ns=(now, now))
    return Source(path=str(path), partition_size=size)


def held(dataset: Folder, partitions: Iterable[Partition]) -> list[int]:
    """The numbers that the partitions hold for their source."""
    found = []
    for p in partitions:
        absent = set(read_parquet(dataset, p.absent).column("key").to_pylist()) if p.absent else set()
        rows = read_parquet(dataset, p.parquet).to_pylist()
        assert len(rows) == p.rows
        found += [int(row["url"].removeprefix("u://")) for row in rows if row["key"] not in absent]
    return found


def record(dataset: Folder, source: Source) -> dict[str, Any]:
    spelling = source.url_column, source.text_column or "", source.empty_urls
    latest = json.loads(dataset.read(f"sources/{digest_of(source.path, *spelling)}.latest.json"))
    return json.loads(dataset.read(f"sources/{latest['digest']}.json"))


def files(dataset: Folder, folder: str = "") -> dict[str, str]:
    """Digest of every file of the dataset folder."""
    root = Path(dataset.path(folder))
    found = [p for p in sorted(root.rglob("*")) if p.is_file()]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def shape(partitions: Iterable[Partition]) -> list[tuple[int, int]]:
    return [(p.number, p.rows) for p in partitions]


def forbid(monkeypatch: pytest.MonkeyPatch, module: Any, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(module, name, lambda *a, name=name, **k: pytest.fail(f"{name} was called"))


def test_rows_become_partitions(tmp_path: Path, dataset: Folder) -> None:
    partitions = ingest(dataset, a_list(tmp_path / "a.parquet", range(12), n=list(range(12))))
    assert shape(partitions) == [(0, 5), (1, 5), (2, 2)] and partitions == list_partitions(dataset)
    rows = read_parquet(dataset, partitions[2].parquet)
    assert rows.to_pylist()[0] == {"key": sample_key("u://10"), "url": "u://10", "text": "text u://10", "n": 10}
    assert all(p.name == f"{p.number:06d}-{p.content_id[:8]}" and not p.has_shrunk for p in partitions)
    assert "format-2" in dataset.list("partitions")


def test_batches_do_not_show_in_the_partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = a_list(tmp_path / "a.parquet", [*range(30), *range(10, 40)], size=7)
    found = []
    for batch in (8192, 3, 64):
        monkeypatch.setattr("stages.source.BATCH", batch)
        dataset = Folder(url=str(tmp_path / f"batch-{batch}"))
        assert held(dataset, ingest(dataset, source)) == list(range(40))
        found.append(files(dataset))
    assert found[0] == found[1] == found[2]


def test_other_column_names_and_no_text(tmp_path: Path, dataset: Folder) -> None:
    path = tmp_path / "source.parquet"
    pq.write_table(pa.table({"URL": ["u://1"], "key": ["theirs"]}), path)
    (partition,) = ingest(dataset, Source(path=str(path), url_column="URL", text_column=None))
    assert read_parquet(dataset, partition.parquet).to_pylist() == [
        {"key": sample_key("u://1"), "url": "u://1", "text": ""}
    ]


def test_duplicates_count_once_and_the_first_text_stays(tmp_path: Path, dataset: Folder) -> None:
    path = tmp_path / "source.parquet"
    urls = ["u://1", "u://2", " u://1\t", "", "u://1", None]
    pq.write_table(pa.table({"url": urls, "text": ["first", "", "second", "", "third", ""]}), path)
    source = Source(path=str(path), partition_size=1, empty_urls="skip")
    partitions = ingest(dataset, source)
    assert [read_parquet(dataset, p.parquet).column("text").to_pylist() for p in partitions] == [["first"], [""]]
    assert record(dataset, source) == {
        "rows": 6,
        "new": 2,
        "skipped": 2,
        "duplicates": 2,
        "taken_down": 0,
        "files": ["source.parquet"],
        "partitions": {p.name: "" for p in partitions},
    }


def test_no_rows_make_no_partition(tmp_path: Path, dataset: Folder) -> None:
    source = a_list(tmp_path / "a.parquet", [])
    assert ingest(dataset, source) == preview(dataset, source) == ingested(dataset, source) == []


def test_growth_only_adds_partitions(tmp_path: Path, dataset: Folder) -> None:
    before = ingest(dataset, a_list(tmp_path / "a.parquet", range(12)))
    grown = a_list(tmp_path / "a.parquet", [*reversed(range(12, 23)), *reversed(range(12))], size=7)
    after = ingest(dataset, grown)
    assert after[:3] == before and shape(after[3:]) == [(3, 7), (4, 4)]
    assert held(dataset, after) == [*range(12), *reversed(range(12, 23))]
    assert ingest(dataset, dataclasses.replace(grown, partition_size=2)) == after


def test_an_ingest_that_died_goes_on(tmp_path: Path, dataset: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some partitions published, no record of the source: the rest follows, and nothing is there twice."""
    source, whole = a_list(tmp_path / "a.parquet", range(9), size=2), Folder(url=str(tmp_path / "whole"))
    publish, count = Folder.write, iter(range(100))

    def dying(folder: Folder, name: str, data: bytes) -> None:
        if next(count) == 3:
            raise KeyboardInterrupt
        publish(folder, name, data)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Folder, "write", dying)
        ingest(dataset, source)
    assert len(list_partitions(dataset)) == 2
    assert ingest(dataset, source) == ingest(whole, source)
    assert files(dataset, "partitions") == files(whole, "partitions")


def test_a_wrong_source_leaves_nothing(tmp_path: Path, dataset: Folder) -> None:
    path = tmp_path / "a.csv"
    path.write_text("url,text\n" + "".join(f"u://{n},t\n" for n in range(50)) + ",no url\n")
    with pytest.raises(ValueError, match=r"a.csv, row 51, column 'url': no URL"):
        ingest(dataset, Source(path=str(path), partition_size=2))
    assert not Path(dataset.url).exists()


def test_a_source_that_changes_while_it_is_read(
    tmp_path: Path, dataset: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, read = a_list(tmp_path / "a.parquet", range(9)), ingest_module.read_source

    def changing(*arguments: Any) -> Iterable[pa.Table]:
        yield from read(*arguments)
        a_list(tmp_path / "a.parquet", range(8))

    monkeypatch.setattr(ingest_module, "read_source", changing)
    with pytest.raises(ValueError, match="was changed while it was read"):
        ingest(dataset, source)
    assert not Path(dataset.url).exists()


def test_what_did_not_change_is_not_read(tmp_path: Path, dataset: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    source = a_list(tmp_path / "a.parquet", range(12))
    partitions, before = ingest(dataset, source), files(dataset)
    forbid(monkeypatch, ingest_module, "read_source", "new_listing", "read_parquet")
    with monkeypatch.context() as patched:
        forbid(patched, ingest_module, "_file_digest")
        assert ingest(dataset, source) == preview(dataset, source) == partitions and files(dataset) == before
    a_list(tmp_path / "a.parquet", range(12))  # the same bytes at another time: to be digested, no more
    assert preview(dataset, source) == partitions and files(dataset) == before
    assert ingest(dataset, source) == partitions
    forbid(monkeypatch, ingest_module, "_file_digest")
    assert ingest(dataset, source) == partitions


def test_what_the_source_no_longer_lists(tmp_path: Path, dataset: Folder) -> None:
    path = tmp_path / "a.parquet"
    before, kept = ingest(dataset, a_list(path, range(15))), files(dataset, "partitions")
    source = a_list(path, [0, 1, 3, 4, *range(5, 10)])
    foreseen, after = preview(dataset, source), ingest(dataset, source)
    keys = [sample_key("u://2")]
    absent = f"sources/absent/{before[0].name}.{digest_of(*keys)}.parquet"
    assert after == foreseen == [dataclasses.replace(before[0], absent=absent), before[1]]
    assert read_parquet(dataset, absent).to_pydict() == {"key": keys}
    assert held(dataset, after) == [0, 1, 3, 4, *range(5, 10)] and files(dataset, "partitions") == kept
    assert ingest(dataset, source) == ingested(dataset, source) == after
    assert len(dataset.list("sources/absent")) == 1
    several = ingest(dataset, a_list(path, [12, 20]))
    assert held(dataset, several) == [12, 20] and shape(several) == [(2, 5), (3, 1)]
    gone = read_parquet(dataset, several[0].absent).column("key").to_pylist()
    assert gone == sorted(sample_key(f"u://{n}") for n in (10, 11, 13, 14))


def test_going_back_to_an_earlier_list_opens_no_partition(
    tmp_path: Path, dataset: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    before = ingest(dataset, a_list(path, range(15)))
    ingest(dataset, a_list(path, range(3, 22)))
    forbid(monkeypatch, ingest_module, "read_source", "read_parquet")
    assert ingest(dataset, a_list(path, range(15))) == before == ingested(dataset, Source(path=str(path)))


def test_the_partitions_of_another_list_are_not_this_ones(tmp_path: Path, dataset: Folder) -> None:
    one, two = a_list(tmp_path / "one.parquet", range(7)), a_list(tmp_path / "two.parquet", range(10, 17))
    first, second = ingest(dataset, one), ingest(dataset, two)
    assert shape(first) == [(0, 5), (1, 2)] and shape(second) == [(2, 5), (3, 2)]
    Path(one.path).unlink()
    assert ingested(dataset, one) == first and ingested(dataset, two) == second
    assert ingested(dataset, Source(path="never.csv")) == [*first, *second]


def test_a_partition_that_somebody_deleted_is_made_again(tmp_path: Path, dataset: Folder) -> None:
    source = a_list(tmp_path / "a.parquet", range(12))
    before = ingest(dataset, source)
    dataset.remove(before[0].parquet)
    assert ingested(dataset, source) == before[1:]
    after = ingest(dataset, source)
    assert after[:2] == before[1:] and shape(after[2:]) == [(3, 5)] and sorted(held(dataset, after)) == list(range(12))


def test_what_was_taken_down_stays_out(tmp_path: Path, dataset: Folder) -> None:
    path = tmp_path / "a.csv"
    urls = [
        "http://a.example/1",
        "http://b.example/2",
        "http://sub.b.example:80/3",
        "http://notb.example/4",
        "http://c/5",
    ]
    path.write_text("url,text\n" + "".join(f"{url},t\n" for url in [*urls, *urls]))
    write_tombstones(dataset, keys=[sample_key(urls[0])], domains=["b.example"])
    source = Source(path=str(path), partition_size=2)
    foreseen, partitions = preview(dataset, source), ingest(dataset, source)
    found = [url for p in partitions for url in read_parquet(dataset, p.parquet).column("url").to_pylist()]
    assert found == urls[3:] and [dataclasses.replace(p, content_id="") for p in partitions] == foreseen
    assert (record(dataset, source)["taken_down"], record(dataset, source)["new"]) == (3, 2)
    write_tombstones(dataset, keys=[sample_key(urls[4])])
    assert ingest(dataset, source) == partitions


def test_a_preview_is_what_comes_and_writes_nothing(tmp_path: Path, dataset: Folder) -> None:
    path = tmp_path / "a.parquet"
    source = a_list(path, range(12))
    foreseen = preview(dataset, source)
    assert shape(foreseen) == [(0, 5), (1, 5), (2, 2)] and not Path(dataset.url).exists()
    assert [dataclasses.replace(p, content_id="") for p in ingest(dataset, source)] == foreseen
    a_list(path, [*range(1, 5), *range(10, 25)], size=10)
    before = files(dataset)
    foreseen = preview(dataset, source)
    assert files(dataset) == before
    after = ingest(dataset, source)
    assert [p if p.number < 3 else dataclasses.replace(p, content_id="") for p in after] == foreseen


def meanwhile(monkeypatch: pytest.MonkeyPatch, place: str, other: Callable[[], object]) -> None:
    """Lets another builder do its whole work the first time that this one comes to `place`."""
    own, times = getattr(ingest_module, place), iter(range(100))

    def first(*arguments: Any) -> Any:
        if next(times) == 0:
            other()
        return own(*arguments)

    monkeypatch.setattr(ingest_module, place, first)


def test_two_overlapping_lists_at_once(tmp_path: Path, dataset: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """This builder has chosen its new rows when another publishes a part of them."""
    one, two = a_list(tmp_path / "one.parquet", range(12)), a_list(tmp_path / "two.parquet", range(3, 20))
    between: list[Partition] = []
    meanwhile(monkeypatch, "mark_format", lambda: between.extend(ingest(dataset, two)))
    first = ingest(dataset, one)
    assert sorted(held(dataset, first)) == list(range(12))
    second = ingest(dataset, two)  # its record spoke of rows that have gone elsewhere
    assert sorted(held(dataset, second)) == list(range(3, 20))
    everything = list_partitions(dataset)
    assert sorted(held(dataset, everything)) == list(range(20))
    assert {p.name for p in between} <= {p.name for p in everything}
    assert any(p.has_shrunk for p in everything) and len(dataset.list("partitions")) == len(everything) + 1
    assert preview(dataset, one) == first and preview(dataset, two) == second


def test_the_same_list_twice_at_once(tmp_path: Path, dataset: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    source, alone = a_list(tmp_path / "a.parquet", range(12)), Folder(url=str(tmp_path / "alone"))
    expected = ingest(alone, source)
    meanwhile(monkeypatch, "mark_format", lambda: ingest(dataset, source))
    assert ingest(dataset, source) == expected and files(dataset) == files(alone)


@pytest.mark.parametrize("place", ["mark_format", "parquet_bytes"])
@pytest.mark.parametrize("by", ["keys", "domains"])
def test_what_is_taken_down_meanwhile_stays_out(
    tmp_path: Path, dataset: Folder, monkeypatch: pytest.MonkeyPatch, place: str, by: str
) -> None:
    """The takedown has looked for it before this builder publishes it."""
    source = a_list(tmp_path / "a.parquet", range(12))
    asked = {"keys": Tombstones(keys=frozenset({sample_key("u://3"), sample_key("u://11")}))}
    asked["domains"] = Tombstones(domains=frozenset({"3", "11"}))
    meanwhile(monkeypatch, place, lambda: take_down(dataset, asked[by]))
    partitions = ingest(dataset, source)
    assert held(dataset, list_partitions(dataset)) == held(dataset, partitions) == [*range(3), *range(4, 11)]
    assert shape(partitions) == [(0, 4), (1, 5), (2, 1)] and len(dataset.list("partitions")) == 4
    assert (record(dataset, source)["new"], record(dataset, source)["taken_down"]) == (10, 2)
    assert ingest(dataset, source) == preview(dataset, source) == partitions


def test_a_takedown_between_two_partitions(tmp_path: Path, dataset: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees the first, and purges it itself; the second is published after its look."""
    source, publish, count = a_list(tmp_path / "a.parquet", range(9)), Folder.write, itertools.count()

    def meddled(folder: Folder, name: str, data: bytes) -> None:
        if next(count) == 2:
            take_down(dataset, Tombstones(keys=frozenset({sample_key("u://3"), sample_key("u://7")})))
        publish(folder, name, data)

    monkeypatch.setattr(Folder, "write", meddled)
    assert held(dataset, ingest(dataset, source)) == [0, 1, 2, 4, 5, 6, 8]
    assert held(dataset, list_partitions(dataset)) == [0, 1, 2, 4, 5, 6, 8]


def test_who_parts_two_partitions_does_not_matter(
    tmp_path: Path, dataset: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys in two partitions, as a builder leaves them that died between its publishing and its second look."""
    one, two = a_list(tmp_path / "one.parquet", range(12)), a_list(tmp_path / "two.parquet", range(3, 20), size=6)
    alone, elsewhere = Folder(url=str(tmp_path / "alone")), Folder(url=str(tmp_path / "elsewhere"))
    left = ingest(elsewhere, two)
    for folder in (dataset, alone):
        ingest(folder, one)
        for partition in left:
            folder.write(partition.parquet, elsewhere.read(partition.parquet))
    expected = ingest(alone, two)
    assert sorted(held(alone, list_partitions(alone))) == list(range(20))
    # While this one is about to read a partition, another has already put a smaller one in its place.
    meanwhile(monkeypatch, "read_parquet", lambda: ingest(dataset, two))
    assert ingest(dataset, two) == expected and sorted(held(dataset, expected)) == list(range(3, 20))
    assert files(dataset, "partitions") == files(alone, "partitions")
    assert sorted(held(dataset, ingest(dataset, one))) == list(range(12))


def test_builders_at_once_leave_every_key_in_one_partition(tmp_path: Path, dataset: Folder) -> None:
    spans = [range(0, 40), range(20, 60), range(10, 50), range(0, 60)]
    sources = [a_list(tmp_path / f"{n}.parquet", span, size=7) for n, span in enumerate(spans)]
    failed: list[Exception] = []

    def build(source: Source) -> None:
        try:
            ingest(dataset, source)
        except Exception as error:
            failed.append(error)

    builders = [threading.Thread(target=build, args=(source,)) for source in sources]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert not failed
    for source, span in zip(sources, spans):
        assert sorted(held(dataset, ingest(dataset, source))) == list(span)
    assert sorted(held(dataset, list_partitions(dataset))) == list(range(60))
