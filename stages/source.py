"""Source tables: every format in batches, in the source's order. What is wrong is said in one line: file, row, column."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

BATCH = 8192  # rows of a parquet file that are in memory at a time
BLOCK = 1 << 24  # bytes of a text file that are in memory at a time, and the most that a row of it may have
EmptyUrls = Literal["refuse", "skip"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A table of image-text pairs."""

    path: str
    """A parquet, csv, tsv or jsonl file, or a folder of them."""
    url_column: str = "url"
    """The column that holds the image's URL."""
    text_column: str | None = "text"
    """The column that holds the alt text; None if there is none."""
    empty_urls: EmptyUrls = "refuse"
    """Rows without a URL are a mistake in the source (`refuse`), or are left out and counted (`skip`)."""
    partition_size: int = 5000
    """Samples in a partition: the piece that is worked on, published and redone as one."""

    def __post_init__(self) -> None:
        if self.partition_size < 1:
            raise ValueError(f"partition_size must be at least 1, got {self.partition_size}")
        if self.empty_urls not in get_args(EmptyUrls):
            raise ValueError(f"empty_urls must be one of {', '.join(get_args(EmptyUrls))}, got {self.empty_urls!r}")

    @property
    def files(self) -> list[Path]:
        """The source's files, sorted. Raises FileNotFoundError or ValueError in one line."""
        path = Path(self.path)
        if not path.is_dir():
            if not path.exists():
                raise FileNotFoundError(f"source {path} does not exist: check `source.path` in the recipe")
            if path.suffix not in PARSERS:
                known = ", ".join(PARSERS)
                raise ValueError(f"source {path} is a {path.suffix or 'nameless'} file: use one of {known}")
            return [path]
        found = sorted(p for p in path.iterdir() if p.suffix in PARSERS and not p.name.startswith("."))
        if not found:
            raise FileNotFoundError(f"source folder {path} holds no {', '.join(PARSERS)} file: check `source.path`")
        for inner in found:
            if inner.is_dir():
                raise ValueError(f"source {inner} is a folder: move its files into {path}, or take it as `source.path`")
        return found


def read_source(source: Source, schema: pa.Schema | None = None) -> Iterator[pa.Table]:
    """The source's rows in batches of url (trimmed; empty where there is none), text and its further columns.

    A column's type can widen on the way (null to anything, whole numbers to fractions), so the last batch has the schema
    of all: with it a second reading gives all batches alike. Raises ValueError or FileNotFoundError in one line.
    """
    schema = schema or pa.schema([("url", pa.string()), ("text", pa.string())])
    for path in source.files:
        row = 0  # 0-based in here, 1-based for those who are told
        for raw in _parsed(path):
            table = _named(raw, path, row, source)
            schema = _widened(schema, table, path, row)
            yield _cast(table, schema, path)
            row += table.num_rows


def _wrong(path: Path, what: str, *, row: int | None = None, column: str | None = None) -> ValueError:
    """The one line: which file, which row of it (given from 0, told from 1), which column, what is wrong and what to do."""
    place = "" if row is None else f", row {row + 1}"
    place += "" if column is None else f", column {column!r}"
    return ValueError(f"source {path}{place}{':' if place else ''} {what}")


def _parsed(path: Path) -> Iterator[pa.Table]:
    """The file's rows with the columns as it has them."""
    row = 0
    try:
        with path.open("rb") as file:
            head = file.read(2)
        if not head:
            raise _wrong(path, "is empty: write it again, or take it out of the source")
        if head in (b"\xff\xfe", b"\xfe\xff"):
            raise _wrong(path, "is UTF-16: write the file as UTF-8")
        for table in PARSERS[path.suffix](path):
            yield table
            row += table.num_rows
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise _unreadable(path, row, error) from None


def _unreadable(path: Path, done: int, error: Exception) -> ValueError:
    """What a parser complained of, after so many rows, in our words where it can be placed."""
    said = str(error).splitlines()[0]
    if changed := re.search(r"Column\(/?(.*?)\) changed from (\w+) to (\w+) in row (\d+)", said):
        column, was, now, row = changed.groups()
        what = f"{now}, where {was} belongs: write all rows alike"
        return _wrong(path, what, row=done + int(row), column=column or None)
    if broken := re.search(r"(?:JSON parse error: )?(.*?)\.? in row (\d+)$", said):
        return _wrong(path, f"cannot be read: {broken[1]}: correct the line", row=done + int(broken[2]))
    if cut := re.search(r"Row #(\d+): (Expected \d+ columns, got \d+)", said):
        what = f"cannot be read: {cut[2]}: correct the row, or put quotes around values with separators"
        return _wrong(path, what, row=int(cut[1]) - 2)  # it counts from 1, and the line of names too
    if "straddling" in said:
        return _wrong(path, f"is longer than {BLOCK >> 20} MiB: close the quote that is open in it", row=done)
    if isinstance(error, UnicodeDecodeError):
        return _wrong(path, "has column names that are not UTF-8: write the file as UTF-8")
    after = f" after row {done}" if done else ""
    return _wrong(path, f"cannot be read{after}: {said}: write it again, or take it out of the source")


def _parse_parquet(path: Path) -> Iterator[pa.Table]:
    # The buffer: else the column chunks of a whole row group would be in memory.
    with pq.ParquetFile(path, buffer_size=1 << 20) as file:
        yield file.schema_arrow.empty_table()
        for batch in file.iter_batches(BATCH):
            yield pa.Table.from_batches([batch])


def _parse_separated(path: Path) -> Iterator[pa.Table]:
    """All columns as text: such a file says nothing of types, and guessed from its first rows 1.50 would lose its nought."""
    reading = pyarrow.csv.ReadOptions(use_threads=False, block_size=BLOCK)  # with threads, errors name no row
    delimiter = "\t" if path.suffix == ".tsv" else ","
    parsing = pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    with pyarrow.csv.open_csv(path, read_options=reading, parse_options=parsing) as file:
        names = file.schema.names
    # UTF-8 is checked for all formats alike, where the row is known.
    texts = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), check_utf8=False)
    with pyarrow.csv.open_csv(path, read_options=reading, parse_options=parsing, convert_options=texts) as file:
        yield file.schema.empty_table()
        for batch in file:
            yield pa.Table.from_batches([batch])


def _parse_jsonl(path: Path) -> Iterator[pa.Table]:
    """Block by block, because Arrow's own stream keeps to the types of its first block."""
    names: list[str] = []
    with path.open("rb") as file:
        while lines := file.readlines(BLOCK):
            data = b"".join(lines)
            if not data.strip():
                continue
            table = _parse_block(data, [])
            # Strings that look like dates become dates; they are to stay as they are written.
            dates = [field.name for field in table.schema if pa.types.is_temporal(field.type)]
            table = _parse_block(data, dates) if dates else table
            for name in names:
                if name not in table.column_names:  # a column that no row of this block has is still one of the file's
                    table = table.append_column(name, pa.nulls(table.num_rows))
            names = table.column_names
            yield table
    if not names:
        raise _wrong(path, "holds no row: write it again, or take it out of the source")


def _parse_block(data: bytes, texts: list[str]) -> pa.Table:
    reading = pyarrow.json.ReadOptions(
        use_threads=False, block_size=len(data) + 1
    )  # one piece, so rows count from its first
    parsing = pyarrow.json.ParseOptions(explicit_schema=pa.schema([(name, pa.string()) for name in texts]))
    return pyarrow.json.read_json(pa.BufferReader(data), read_options=reading, parse_options=parsing)


PARSERS: dict[str, Callable[[Path], Iterator[pa.Table]]] = {
    ".parquet": _parse_parquet,
    ".csv": _parse_separated,
    ".tsv": _parse_separated,
    ".jsonl": _parse_jsonl,
}


def _named(table: pa.Table, path: Path, row: int, source: Source) -> pa.Table:
    """The columns under our names, checked."""
    for column in filter(None, (source.url_column, source.text_column)):
        found = table.column_names.count(column)
        if found != 1:
            have = ", ".join(table.column_names)
            what = f"has {found} columns" if found else "has no column"
            raise _wrong(path, f"{what} {column!r} (it has: {have}): set url_column or text_column")
    urls = pc.utf8_trim_whitespace(_text(table, source.url_column, path, row))
    empty = pc.equal(urls, "")
    if source.empty_urls == "refuse" and (spot := pc.index(empty, True).as_py()) >= 0:
        what = "no URL: correct the row, or set empty_urls to 'skip' to leave such rows out"
        raise _wrong(path, what, row=row + spot, column=source.url_column)
    text = _text(table, source.text_column, path, row) if source.text_column else pa.repeat("", len(urls))
    taken = {source.url_column, source.text_column, "key", "url", "text"}
    columns = {"url": urls, "text": text}
    for name in table.column_names:
        if name not in taken and table.column_names.count(name) == 1:
            columns[name] = _checked(table.column(name), path, row, name)
    return pa.table(columns)


def _text(table: pa.Table, name: str, path: Path, row: int) -> pa.ChunkedArray:
    """A column of text, empty where there is none."""
    column = _checked(table.column(name), path, row, name)
    kind, there = column.type, pc.index(column.is_valid(), True).as_py()
    if there < 0:
        return pa.chunked_array([pa.repeat("", len(column))], pa.string())
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _tried(column, lambda c: c.cast(pa.string()), path, row, name).fill_null("")
    if not any(is_kind(kind) for is_kind in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)):
        raise _wrong(path, f"{kind}, where text belongs: write the column as text", row=row + there, column=name)
    return column.cast(pa.string()).fill_null("")


def _checked(column: pa.ChunkedArray, path: Path, row: int, name: str) -> pa.ChunkedArray:
    """The column, without a dictionary, after a look at all its values: Arrow reads bytes that are no UTF-8 as text."""

    def check(part: pa.ChunkedArray) -> pa.ChunkedArray:
        plain = part.cast(part.type.value_type) if pa.types.is_dictionary(part.type) else part
        plain.validate(full=True)
        return plain

    return _tried(column, check, path, row, name)


def _tried(
    column: pa.ChunkedArray, work: Callable[[pa.ChunkedArray], pa.ChunkedArray], path: Path, row: int, name: str
) -> pa.ChunkedArray:
    """The work done on the column; where it fails for its values, the first such row is looked for and named."""
    try:
        return work(column)
    except pa.ArrowInvalid as error:
        said = str(error)
    for spot in range(len(column)):
        try:
            work(column.take([spot]))
        except pa.ArrowInvalid:
            break
    what = "is not UTF-8: write the source as UTF-8" if "UTF8" in said else f"cannot be read: {said.splitlines()[0]}"
    raise _wrong(path, what, row=row + spot, column=name)


def _widened(schema: pa.Schema, table: pa.Table, path: Path, row: int) -> pa.Schema:
    """The schema with this batch's columns. Raises ValueError where a column cannot be of both its types."""
    for field in table.schema:
        spot = schema.get_field_index(field.name)
        if spot < 0:
            schema = schema.append(field)
        elif field.type != schema.field(spot).type:
            old = schema.field(spot).type
            try:
                both = pa.unify_schemas(
                    [pa.schema([(field.name, t)]) for t in (old, field.type)], promote_options="permissive"
                )
            except pa.ArrowException:
                there = pc.index(table.column(field.name).is_valid(), True).as_py()
                what = (
                    f"{field.type} does not fit together with the rows before, which have {old}: write all rows alike"
                )
                raise _wrong(path, what, row=row + there if there >= 0 else None, column=field.name) from None
            schema = schema.set(spot, both.field(0))
    return schema


def _cast(table: pa.Table, schema: pa.Schema, path: Path) -> pa.Table:
    """The batch with all columns of the schema."""
    columns = []
    for field in schema:
        if field.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        column = table.column(field.name)
        # Whole numbers beyond 2^53 lose their last digits beside fractions, as in every reader of JSON.
        safe = not pa.types.is_floating(field.type)
        try:
            columns.append(column.cast(field.type, safe=safe))
        except pa.ArrowException as error:
            what = f"does not fit together with the rows before: {str(error).splitlines()[0]}: write all rows alike"
            raise _wrong(path, what, column=field.name) from None
    return pa.table(columns, schema=schema)
