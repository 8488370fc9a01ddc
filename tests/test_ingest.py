"""Source tables → partitions: every format, every complaint, and nothing that was there ever changes."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.plan import Partition
from pipeline.sample import sample_key
from pipeline.storage import Folder
from pipeline.tables import read_parquet
from stages.ingest import Source, ingest

ROWS = [("http://a/1.jpg", "one, two"), ("http://a/2.jpg", ""), ("http://a/3.jpg", 'said "three"\nand more')]


@pytest.fixture
def dataset(tmp_path: Path) -> Folder:
    return Folder(url=str(tmp_path / "dataset"))


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    """The rows in the format that the suffix says, with a further column `n`."""
    table = pa.table({"url": [u for u, _ in rows], "text": [t for _, t in rows], "n": list(range(len(rows)))})
    quote = lambda value: '"' + str(value).replace('"', '""') + '"'  # noqa: E731
    match path.suffix:
        case ".parquet":
            pq.write_table(table, path)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        case suffix:
            between = "\t" if suffix == ".tsv" else ","
            lines = [between.join(table.column_names)]
            lines += [between.join(map(quote, row.values())) for row in table.to_pylist()]
            path.write_text("\n".join(lines) + "\n")
    return path


def read(dataset: Folder, partitions: list[Partition]) -> pa.Table:
    return pa.concat_tables([read_parquet(dataset, p.parquet) for p in partitions])


def urls(dataset: Folder, partitions: list[Partition]) -> list[str]:
    return read(dataset, partitions).column("url").to_pylist()


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_samples(tmp_path: Path, dataset: Folder, suffix: str) -> None:
    source = Source(path=str(write(tmp_path / f"source.{suffix}", ROWS)))
    rows = read(dataset, ingest(dataset, source))
    assert rows.column_names == ["key", "url", "text", "n"]
    assert list(zip(rows.column("url").to_pylist(), rows.column("text").to_pylist())) == ROWS
    assert rows.column("key").to_pylist() == [sample_key(url) for url, _ in ROWS]


def test_a_folder_is_read_file_by_file(tmp_path: Path, dataset: Folder) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    write(folder / "b.jsonl", ROWS[1:])
    write(folder / "a.parquet", ROWS[:2])
    (folder / "readme.md").write_text("no table")
    assert urls(dataset, ingest(dataset, Source(path=str(folder)))) == [u for u, _ in ROWS]


def test_other_column_names_and_no_text(tmp_path: Path, dataset: Folder) -> None:
    path = tmp_path / "source.parquet"
    pq.write_table(pa.table({"URL": ["u://1"], "key": ["theirs"]}), path)
    rows = read(dataset, ingest(dataset, Source(path=str(path), url_column="URL", text_column=None)))
    assert rows.to_pylist() == [{"key": sample_key("u://1"), "url": "u://1", "text": ""}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "link,text\nu,t\n", r"has no column 'url' \(it has: link, text\): set url_column"),
        ("a.csv", "url,alt\nu,t\n", "has no column 'text'"),
        ("a.csv", "url,text\nu,t,more\n", "cannot be read: CSV parse error"),
        ("a.jsonl", '{"url": \n', "cannot be read: JSON parse error"),
        ("a.parquet", "not parquet", "cannot be read: .*Parquet magic bytes"),
        ("a.csv", "", "cannot be read: Empty CSV file"),
        ("a.csv", "url,text,url\nu,t,v\n", "has 2 columns 'url'"),
        ("a.csv", "url,text\nu,gr\udcfcn\n", "cannot be read: .*invalid UTF8"),
        ("a.jsonl", '{"url": [1], "text": ""}\n', "cannot be read: Unsupported cast"),
        ("a.xlsx", "", "is a .xlsx file: use one of .parquet, .csv"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_in_one_line(
    tmp_path: Path, dataset: Folder, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as raised:
        ingest(dataset, Source(path=str(tmp_path / name)))
    assert "\n" not in str(raised.value) and not dataset.list("partitions")


def test_a_source_that_is_not_there(tmp_path: Path, dataset: Folder) -> None:
    with pytest.raises(FileNotFoundError, match=r"does not exist: check `source.path`"):
        ingest(dataset, Source(path=str(tmp_path / "none.csv")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no .parquet"):
        ingest(dataset, Source(path=str(tmp_path / "empty")))
    with pytest.raises(ValueError, match="partition_size must be at least 1"):
        Source(path="x.csv", partition_size=0)


def test_files_that_do_not_fit_together(tmp_path: Path, dataset: Folder) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "a.csv").write_text("url,text,n\nu://1,,1\n")
    (folder / "b.csv").write_text("url,text,n\nu://2,,one\n")
    with pytest.raises(ValueError, match=r"the files of source .* do not fit together: .*n"):
        ingest(dataset, Source(path=str(folder)))


def test_a_damaged_growth_leaves_what_was_there(tmp_path: Path, dataset: Folder) -> None:
    path = write(tmp_path / "source.csv", ROWS)
    before = ingest(dataset, Source(path=str(path)))
    path.write_text("url,text\nu,t,more\n")
    with pytest.raises(ValueError, match="cannot be read"):
        ingest(dataset, Source(path=str(path)))
    assert ingest(dataset, Source(path=str(write(path, ROWS)))) == before


def test_duplicates_count_once_and_the_first_text_stays(tmp_path: Path, dataset: Folder) -> None:
    rows = [("u://1", "first"), ("u://2", ""), (" u://1\t", "second"), ("u://1", "third")]
    partitions = ingest(dataset, Source(path=str(write(tmp_path / "source.parquet", rows)), partition_size=1))
    assert [p.rows for p in partitions] == [1, 1]
    assert read(dataset, partitions).column("text").to_pylist() == ["first", ""]


def test_rows_without_a_url_are_left_out(tmp_path: Path, dataset: Folder) -> None:
    path = tmp_path / "source.parquet"
    pq.write_table(pa.table({"url": [None, "", "  ", "\u3000", "u://1 "], "text": [None] * 5}), path)
    assert read(dataset, ingest(dataset, Source(path=str(path)))).select(["url", "text"]).to_pylist() == [
        {"url": "u://1", "text": ""}
    ]


def test_no_rows_make_no_partition(tmp_path: Path, dataset: Folder) -> None:
    path = tmp_path / "source.parquet"
    pq.write_table(pa.table({"url": pa.array([], pa.string()), "text": pa.array([], pa.string())}), path)
    assert ingest(dataset, Source(path=str(path))) == []


def test_growth_only_adds_partitions(tmp_path: Path, dataset: Folder) -> None:
    path, rows = tmp_path / "source.parquet", [(f"u://{n}", "") for n in range(23)]
    before = ingest(dataset, Source(path=str(write(path, rows[:12])), partition_size=5))
    assert [(p.name, p.rows) for p in before] == [("000000", 5), ("000001", 5), ("000002", 2)]
    grown = [*reversed(rows[12:]), *rows[3:9]]  # new first, some of the old gone, others in another order
    after = ingest(dataset, Source(path=str(write(path, grown)), partition_size=7))
    assert after[:3] == before and [p.rows for p in after[3:]] == [7, 4]
    assert sorted(urls(dataset, after)) == sorted(u for u, _ in rows)
    assert ingest(dataset, Source(path=str(path), partition_size=2)) == after


def test_an_ingest_that_died_goes_on(tmp_path: Path, dataset: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some partitions published, no record of the source: the rest follows, and nothing is there twice."""
    source = Source(
        path=str(write(tmp_path / "source.parquet", [(f"u://{n}", "") for n in range(9)])), partition_size=2
    )
    whole = Folder(url=str(tmp_path / "whole"))
    publish, count = Folder.write, iter(range(100))

    def dying(folder: Folder, name: str, data: bytes) -> None:
        if next(count) == 2:
            raise KeyboardInterrupt
        publish(folder, name, data)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Folder, "write", dying)
        ingest(dataset, source)
    assert len(dataset.list("partitions")) == 2
    assert ingest(dataset, source) == ingest(whole, source)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_keys_do_not_depend_on_the_order(
    tmp_path_factory: pytest.TempPathFactory, given_urls: list[str], random
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    shuffled = given_urls[:]
    random.shuffle(shuffled)
    found = []
    for name, order in (("one", given_urls), ("two", shuffled)):
        dataset = Folder(url=str(folder / name))
        source = Source(path=str(write(folder / f"{name}.parquet", [(u, "") for u in order])), partition_size=4)
        partitions = ingest(dataset, source)
        found.append({r["key"]: r["url"] for p in partitions for r in read_parquet(dataset, p.parquet).to_pylist()})
        assert sum(p.rows for p in partitions) == len(found[-1])
    assert found[0] == found[1]
    assert all(key == sample_key(url) for key, url in found[0].items())


def test_texts_of_digits_stay_as_they_are(tmp_path: Path, dataset: Folder) -> None:
    rows = [("http://a/1.jpg", "1.50"), ("http://a/2.jpg", "007"), ("http://a/3.jpg", "NA")]
    (tmp_path / "source.csv").write_text("url,text\n" + "".join(f"{u},{t}\n" for u, t in rows))
    found = read(dataset, ingest(dataset, Source(path=str(tmp_path / "source.csv"))))
    assert list(zip(found.column("url").to_pylist(), found.column("text").to_pylist())) == rows


def test_what_partitions_hold_is_looked_for_once_not_once_a_partition(
    tmp_path: Path, dataset: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"http://a/{n}.jpg", "") for n in range(60)]
    ingest(dataset, Source(path=str(write(tmp_path / "one.jsonl", rows[:50])), partition_size=2))
    monkeypatch.setattr("stages.ingest.pc.is_in", lambda *a, **k: pytest.fail("a look-up for each partition"))
    both = write(tmp_path / "two.jsonl", [*rows[50:], *rows[:50], *rows[50:]])
    assert urls(dataset, ingest(dataset, Source(path=str(both), partition_size=7))) == [u for u, _ in rows]
