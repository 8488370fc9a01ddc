"""Source tables → partitions: every URL that no partition holds yet joins a new one; what is there is never re-cut."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from pipeline.fingerprint import digest_of
from pipeline.plan import Partition, list_partitions
from pipeline.sample import sample_key
from pipeline.storage import Folder
from pipeline.tables import parquet_bytes, read_parquet

FORMATS = (".parquet", ".csv", ".tsv", ".jsonl")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A table of image-text pairs."""

    path: str
    """A parquet, csv, tsv or jsonl file, or a folder of them."""
    url_column: str = "url"
    """The column that holds the image's URL."""
    text_column: str | None = "text"
    """The column that holds the alt text; None if there is none."""
    partition_size: int = 5000
    """Samples in a partition: the piece that is worked on, published and redone as one."""

    def __post_init__(self) -> None:
        if self.partition_size < 1:
            raise ValueError(f"partition_size must be at least 1, got {self.partition_size}")

    @property
    def files(self) -> list[Path]:
        """The source's files, sorted. Raises FileNotFoundError or ValueError in one line."""
        path = Path(self.path)
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix in FORMATS)
            if not found:
                raise FileNotFoundError(f"source folder {path} holds no {', '.join(FORMATS)} file")
            return found
        if not path.exists():
            raise FileNotFoundError(f"source {path} does not exist: check `source.path` in the recipe")
        if path.suffix not in FORMATS:
            raise ValueError(f"source {path} is a {path.suffix or 'nameless'} file: use one of {', '.join(FORMATS)}")
        return [path]


def ingest(dataset: Folder, source: Source) -> list[Partition]:
    """Makes the partitions that are missing and returns all. A source that was ingested before is recognised by its digest."""
    files = source.files
    source_id = digest_of(source.url_column, source.text_column or "", *(_file_digest(f) for f in files))
    record = f"sources/{source_id}.json"
    if dataset.exists(record):
        return list_partitions(dataset)
    there = list_partitions(dataset)
    tables = [_read(f, source) for f in files]
    try:
        rows = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"the files of source {source.path} do not fit together: {_first_line(error)}") from None
    known = [read_parquet(dataset, p.parquet, ["key"]).column("key") for p in there]
    new = _new_rows(rows, known)
    first = int(there[-1].name) + 1 if there else 0
    for spot, start in enumerate(range(0, new.num_rows, source.partition_size)):
        _publish(dataset, f"{first + spot:06d}", new.slice(start, source.partition_size))
    counts = {"rows": rows.num_rows, "new": new.num_rows, "files": [f.name for f in files]}
    dataset.write(record, json.dumps(counts, indent=1).encode())
    return list_partitions(dataset)


def _publish(dataset: Folder, name: str, rows: pa.Table) -> None:
    data = parquet_bytes(rows)
    partition = Partition(name=name, rows=rows.num_rows, content_id=digest_of(data))
    dataset.write(partition.parquet, data)


def _new_rows(rows: pa.Table, known: list[pa.ChunkedArray]) -> pa.Table:
    """The first row of every key that no partition holds, in the source's order."""
    spots = pa.array(np.arange(rows.num_rows))
    firsts = pa.table({"key": rows.column("key"), "spot": spots}).group_by("key").aggregate([("spot", "min")])
    # All partitions' keys at once, not one filter for each: those would be partitions times rows.
    there = pa.table({"key": pa.chunked_array([c for keys in known for c in keys.chunks], pa.string())})
    new = firsts.join(there, keys="key", join_type="left anti")
    wanted = np.zeros(rows.num_rows, bool)
    wanted[new.column("spot_min").to_numpy()] = True
    return rows.filter(pa.array(wanted))  # unlike take, it needs no column in one piece, of which 2 GiB is the most


def _read(path: Path, source: Source) -> pa.Table:
    """One file as key, url, text and its further columns. Raises ValueError in one line."""
    try:
        return _named(_parse(path, source), path, source)
    except pa.ArrowException as error:
        raise ValueError(f"source {path} cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _named(table: pa.Table, path: Path, source: Source) -> pa.Table:
    """The columns under our names. Rows without a URL are left out."""
    for column in filter(None, (source.url_column, source.text_column)):
        found = table.column_names.count(column)
        if found != 1:
            have = ", ".join(table.column_names)
            what = f"{found} columns" if found else "no column"
            raise ValueError(f"source {path} has {what} {column!r} (it has: {have}): set url_column or text_column")
    urls = pc.utf8_trim_whitespace(table.column(source.url_column).cast(pa.string()))
    text = (
        table.column(source.text_column).cast(pa.string()) if source.text_column else pa.nulls(len(urls), pa.string())
    )
    taken = {source.url_column, source.text_column, "key", "url", "text"}
    extra = [c for c in table.column_names if c not in taken and table.column_names.count(c) == 1]
    named = table.select(extra).add_column(0, "text", pc.fill_null(text, "")).add_column(0, "url", urls)
    named = named.filter(pc.greater(pc.utf8_length(pc.fill_null(urls, "")), 0))
    keys = pa.array([sample_key(u) for u in named.column("url").to_pylist()], pa.string())
    return named.add_column(0, "key", keys)


def _parse(path: Path, source: Source) -> pa.Table:
    match path.suffix:
        case ".parquet":
            return pq.read_table(path)
        case ".jsonl":
            return pyarrow.json.read_json(path)
        case suffix:
            parsing = pyarrow.csv.ParseOptions(delimiter="\t" if suffix == ".tsv" else ",", newlines_in_values=True)
            # Guessed from the first rows, an alt text of digits would be a number: 1.50 would lose its nought.
            texts = {name: pa.string() for name in (source.url_column, source.text_column) if name}
            options = pyarrow.csv.ConvertOptions(column_types=texts)
            return pyarrow.csv.read_csv(path, parse_options=parsing, convert_options=options)


def _file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
