"""Reading source tables: every format alike, in order, in batches; and every complaint names file, row and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages import source as source_module
from stages.source import Source, read_source

ROWS = [("http://a/1.jpg", "one, two"), ("http://a/2.jpg", ""), ("http://a/3.jpg", 'said "three"\nand more')]


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


def read(source: Source) -> pa.Table:
    """Both readings, as an ingest does them."""
    schema = list(read_source(source))[-1].schema
    return pa.concat_tables(read_source(source, schema))


def complaint(source: Source) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        read(source)
    assert "\n" not in str(raised.value) and raised.value.__cause__ is None
    return str(raised.value)


def bad_text(values: list[bytes]) -> pa.Array:
    """Bytes that claim to be text, as writers that do not look put them into parquet files."""
    return pa.Array.from_buffers(pa.string(), len(values), pa.array(values, pa.binary()).buffers())


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two rows, blocks of some."""
    monkeypatch.setattr(source_module, "BATCH", 2)
    monkeypatch.setattr(source_module, "BLOCK", 64)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows_in_their_order(tmp_path: Path, small_pieces: None, suffix: str) -> None:
    rows = [(f"u://{n}", f"text {n}, more") for n in range(50)]
    source = Source(path=str(write(tmp_path / f"source.{suffix}", rows)))
    found = read(source)
    assert found.column_names == ["url", "text", "n"]
    assert list(zip(found.column("url").to_pylist(), found.column("text").to_pylist())) == rows
    assert [int(n) for n in found.column("n").to_pylist()] == list(range(50))
    assert len(list(read_source(source))) > 10


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_quotes_and_line_breaks_in_texts(tmp_path: Path, suffix: str) -> None:
    found = read(Source(path=str(write(tmp_path / f"source.{suffix}", ROWS))))
    assert list(zip(found.column("url").to_pylist(), found.column("text").to_pylist())) == ROWS


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", ROWS[1:])
    write(tmp_path / "a.parquet", ROWS[:2])
    (tmp_path / "readme.md").write_text("no table")
    (tmp_path / ".c.csv").write_text("no table either")
    assert read(Source(path=str(tmp_path))).column("n").to_pylist() == [0, 1, 0, 1]


def test_separated_files_say_nothing_of_types_so_all_is_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("url,text,n\nu://1,1.50,7\nu://2,007,\nu://3,NA,seven\n")
    found = read(Source(path=str(tmp_path / "a.csv")))
    assert found.column("text").to_pylist() == ["1.50", "007", "NA"]
    assert found.column("n").to_pylist() == ["7", "", "seven"]


def test_columns_of_jsonl_may_come_late_and_widen(tmp_path: Path, small_pieces: None) -> None:
    rows: list[dict[str, Any]] = [
        {"url": f"u://{n}", "text": "as it is", "n": n, "day": "2020-01-02"} for n in range(9)
    ]
    rows += [{"url": "u://9", "n": 0.5, "late": {"a": 1}}, {"url": "u://10", "day": "soon", "late": {"b": "x"}}] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = read(Source(path=str(tmp_path / "a.jsonl")))
    assert found.num_rows == len(rows) and found.column("n").to_pylist()[8:10] == [8.0, 0.5]
    assert found.column("day").to_pylist()[7:11] == ["2020-01-02", "2020-01-02", None, "soon"]
    assert found.column("late").to_pylist()[8:11] == [None, {"a": 1, "b": None}, {"a": None, "b": "x"}]
    assert found.column("text").to_pylist()[8:10] == ["as it is", ""]


def test_text_in_all_its_parquet_types(tmp_path: Path) -> None:
    kinds = (pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int8(), pa.string()), pa.null())
    for spot, kind in enumerate(kinds):
        texts = pa.nulls(2) if kind == pa.null() else pa.array(["é", None]).cast(kind)
        pq.write_table(pa.table({"url": [f"u://{spot}", "v"], "text": texts}), tmp_path / f"{spot}.parquet")
    found = read(Source(path=str(tmp_path)))
    assert found.column("text").to_pylist() == ["é", ""] * 4 + ["", ""]


def test_urls_are_trimmed_and_rows_without_one_are_refused_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"link": ["u://1 ", None, "", "  ", "\u3000"], "text": [None] * 5}), path)
    said = complaint(Source(path=str(path), url_column="link"))
    assert (
        said
        == f"source {path}, row 2, column 'link': no URL: correct the row, or set empty_urls to 'skip' to leave such rows out"
    )
    found = read(Source(path=str(path), url_column="link", empty_urls="skip"))
    assert found.column("url").to_pylist() == ["u://1", "", "", "", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"link,text\nu,t\n", " has no column 'url' (it has: link, text): set url_column or text_column"),
        ("a.csv", b"url,alt\nu,t\n", " has no column 'text' (it has: url, alt): set"),
        ("a.csv", b"url,text,url\nu,t,v\n", " has 2 columns 'url'"),
        ("a.csv", b"x", " cannot be read: CSV parse error: Empty CSV file or block"),
        ("a.csv", b"", " is empty: write it again"),
        ("a.csv", b"url,text\nu,t\nu,t,more\n", ", row 2: cannot be read: Expected 2 columns, got 3: correct the row"),
        ("a.csv", b"url,text\n" + b"u,t\n" * 60 + b"u,t,more\n", ", row 61: cannot be read: Expected 2 columns, got 3"),
        ("a.csv", b"url,text\nu,t\n\nu,gr\xfcn\n", ", row 2, column 'text': is not UTF-8: write the source as UTF-8"),
        ("a.csv", b"url,text\nu,t\n,t\n", ", row 2, column 'url': no URL"),
        ("a.csv", "url,text\nu,t\n".encode("utf-16"), " is UTF-16: write the file as UTF-8"),
        ("a.csv", b"url,t\xe9xt\nu,t\n", " has column names that are not UTF-8: write the file as UTF-8"),
        ("a.csv", b'url,text\nu,t\n"u,t\n' + b"u,t\n" * 40, ", row 2: is longer than"),
        ("a.jsonl", b"x", ", row 1: cannot be read: Invalid value: correct the line"),
        ("a.jsonl", b"\n\n", " holds no row"),
        ("a.jsonl", b'{"url":"u","text":""}\n\n{"url": \n', ", row 2: cannot be read: Invalid value: correct the line"),
        ("a.jsonl", b'{"url":"u","text":""}\n["u"]\n', ", row 2: array, where object belongs: write all rows alike"),
        ("a.jsonl", b'{"url":"u","text":""}\n{"url":7,"text":""}\n', ", row 2, column 'url': number, where string belongs"),
        ("a.jsonl", b'{"url":"u","text":""}\n' * 9 + b'{"url":7,"text":""}\n', ", row 10, column 'url': "),
        ("a.jsonl", b'{"url":[1],"text":""}\n', ", row 1, column 'url': list<item: int64>, where text belongs"),
        ("a.jsonl", b'{"url":"u","text":null}\n{"url":"u","text":5}\n', ", row 2, column 'text': int64, where text belongs"),
        ("a.jsonl", b'{"url":"u","text":"","n":1}\n' * 9 + b'{"url":"u","text":"","n":"x"}\n', ", row 10, column 'n': string"),
        ("a.jsonl", b'{"url":"u","text":"\xff"}\n', ", row 1, column 'text': is not UTF-8"),
        ("a.jsonl", b'{"url":"u","url":"v"}\n', ", row 1: cannot be read: Column(/url) was specified twice"),
        ("a.jsonl", b'{"link":"u"}\n', " has no column 'url' (it has: link)"),
        ("a.parquet", b"x", " cannot be read: Parquet file size is 1 bytes"),
        ("a.parquet", b"not parquet, but long enough", " cannot be read: Parquet magic bytes not found"),
        ("a.xlsx", b"", " is a .xlsx file: use one of .parquet, .csv, .tsv, .jsonl"),
        ("a", b"", " is a nameless file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, small_pieces: None, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert f"source {path}{message}" in complaint(Source(path=str(path)))


def test_parquet_columns_that_hold_something_else(tmp_path: Path, small_pieces: None) -> None:
    path = tmp_path / "a.parquet"
    rest = [""] * 5
    texts = [b"a", b"b", b"c", b"\xff", b"e"]
    for columns, message in [
        ({"url": bad_text(texts), "text": rest}, "row 4, column 'url': is not UTF-8"),
        ({"url": pa.array(texts), "text": rest}, "row 4, column 'url': is not UTF-8"),
        ({"url": list("abcde"), "text": rest, "n": bad_text(texts)}, "row 4, column 'n': is not UTF-8"),
        ({"url": list("abcde"), "text": rest, "n": pa.StructArray.from_arrays([bad_text(texts)], ["x"])}, "row 4, column 'n'"),
        ({"url": [None, None, None, 3, 4], "text": rest}, "row 4, column 'url': int64, where text belongs"),
    ]:  # fmt: skip
        pq.write_table(pa.table(columns), path)
        assert f"source {path}, {message}" in complaint(Source(path=str(path), empty_urls="skip"))


def test_a_parquet_file_that_is_damaged_within(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [(f"u://{n}", "t" * 50) for n in range(1000)])
    data = bytearray(path.read_bytes())
    data[200:400] = bytes(200)
    path.write_bytes(data)
    assert f"source {path} cannot be read: " in complaint(Source(path=str(path)))


def test_what_is_not_there(tmp_path: Path) -> None:
    assert "none.csv does not exist: check `source.path`" in complaint(Source(path=str(tmp_path / "none.csv")))
    (tmp_path / "empty").mkdir()
    assert "empty holds no .parquet, .csv, .tsv, .jsonl file" in complaint(Source(path=str(tmp_path / "empty")))
    (tmp_path / "folder" / "a.parquet").mkdir(parents=True)
    assert "a.parquet is a folder: move its files into" in complaint(Source(path=str(tmp_path / "folder")))


def test_files_of_a_folder_that_do_not_fit_together(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS)
    write(tmp_path / "b.csv", ROWS)
    said = f"source {tmp_path}/b.csv, column 'n': string does not fit together with the rows before, which have int64"
    assert said in complaint(Source(path=str(tmp_path)))


def test_settings_that_are_none() -> None:
    with pytest.raises(ValueError, match="partition_size must be at least 1"):
        Source(path="x.csv", partition_size=0)
    with pytest.raises(ValueError, match="empty_urls must be one of refuse, skip, got 'Skip'"):
        Source(path="x.csv", empty_urls="Skip")  # type: ignore[arg-type]
