"""The manifest of a view: one parquet file, a row a sample. Written in pieces, read column by column, so that views of tens
of millions of samples fit in memory.

Its columns: key, shard (its path in the dataset folder), width and height of the packed picture, bucket (`WxH`, null where
the view has none), original_width and original_height (as it came), crop_left and crop_top (in the scaled picture); for
each member `<member>_offset`, `<member>_size` in bytes and `<member>_crc32` (null where a sample has no such member), for
tokens `<member>_length`. Members that lie in other tars than the view's own, such as latents, have `<member>_shard` too.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .storage import Aside, Folder

ROW_GROUP = 1 << 16  # rows that are in memory when a manifest is written or gone through
SHARD = "shard"
_PIECE = 1 << 23  # bytes of a manifest elsewhere that are asked for at a time


class ManifestWriter:
    """Writes a manifest aside. The same rows give the same bytes, in whatever pieces they come."""

    def __init__(self, aside: Aside) -> None:
        self.rows = 0
        self.sha256 = ""
        """Of the file; known once it is closed."""
        self._aside = aside
        self._file: pq.ParquetWriter | None = None
        self._waiting: pa.Table | None = None

    def add(self, rows: pa.Table) -> None:
        """Appends rows; the first, of which there may be none, decide what the columns are."""
        if self._file is None or self._waiting is None:
            self._waiting = rows.schema.remove_metadata().empty_table()
            self._file = pq.ParquetWriter(self._aside.path, self._waiting.schema, compression="zstd", store_schema=True)
        self._waiting = pa.concat_tables([self._waiting, rows.replace_schema_metadata(None)])
        while self._waiting.num_rows >= ROW_GROUP:
            self._write(ROW_GROUP)

    def _write(self, count: int) -> None:
        assert self._file and self._waiting is not None, "add() comes first"
        if count:
            self._file.write_table(self._waiting.slice(0, count).combine_chunks(), row_group_size=ROW_GROUP)
        self._waiting = self._waiting.slice(count)
        self.rows += count

    def close(self) -> None:
        """Ends the file and takes its digest."""
        assert self._file and self._waiting is not None, "add() comes first"
        self._write(self._waiting.num_rows)
        self._file.close()
        with self._aside.path.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()

    def publish(self, name: str) -> None:
        """Lets the closed file appear."""
        self._aside.publish(name)


@contextmanager
def writing_manifest(dataset: Folder, folder: str) -> Iterator[ManifestWriter]:
    """A writer for a manifest in this folder; nothing is left behind unless it is published."""
    with dataset.writing(folder) as aside:
        yield ManifestWriter(aside)


class Manifest:
    """Reads a manifest. A column is read when it is first asked for, and kept. Safe to share between threads."""

    def __init__(self, dataset: Folder, name: str, sha256: str = "") -> None:
        """`sha256`: what the file must digest to; empty asks nothing."""
        self.dataset, self.name, self.sha256 = dataset, name, sha256
        self._columns: dict[str, pa.ChunkedArray] = {}
        self._lock = Lock()

    @cached_property
    def _source(self) -> Any:
        """The file, mapped into memory. One elsewhere is copied here for that, under a name that is gone at once."""
        if self.dataset.is_local:
            return self._mapped(self.dataset.path(self.name))
        if not self.sha256:  # then only what is asked for has to be read
            return self.dataset.open(self.name)
        with tempfile.NamedTemporaryFile() as copy:
            with self.dataset.open(self.name) as there:
                shutil.copyfileobj(there, copy, _PIECE)
            copy.flush()
            return self._mapped(copy.name)

    def _mapped(self, path: str) -> pa.MemoryMappedFile:
        if self.sha256:
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.sha256:
                    raise self._damaged("its digest is not the view's")
        return pa.memory_map(path)

    def _damaged(self, why: str) -> ValueError:
        there = f"{self.dataset.url}/{self.name}"
        return ValueError(f"{there} is damaged ({why}): delete it, and the next build makes it again")

    @cached_property
    def _plain(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._source)
        except pa.ArrowInvalid as error:
            raise self._damaged(str(error)) from None

    @cached_property
    def _compact(self) -> pq.ParquetFile:
        """What repeats from row to row takes four bytes a row instead of a hundred."""
        repeating = [name for name in self.column_names if name == "bucket" or is_shard_column(name)]
        return pq.ParquetFile(self._source, read_dictionary=repeating)

    @property
    def schema(self) -> pa.Schema:
        """The columns' types, as they are stored."""
        return self._plain.schema_arrow.remove_metadata()

    @cached_property
    def column_names(self) -> list[str]:
        """The columns."""
        return self._plain.schema_arrow.names

    @property
    def num_rows(self) -> int:
        """Samples."""
        return self._plain.metadata.num_rows

    def __len__(self) -> int:
        return self.num_rows

    def column(self, name: str) -> pa.ChunkedArray:
        """One column. Raises KeyError where there is none of this name."""
        with self._lock:
            if name not in self._columns:
                self._columns[name] = self._compact.read(columns=[name]).column(name)
            return self._columns[name]

    def select(self, names: Sequence[str]) -> pa.Table:
        """Some columns."""
        return pa.table({name: self.column(name) for name in names})

    def batches(self, names: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """All columns or some, a row group at a time; nothing is kept."""
        for group in range(self._plain.num_row_groups):
            yield self._plain.read_row_group(group, columns=names)

    @property
    def shards(self) -> set[str]:
        """All tars that hold members of the samples."""
        names = [name for name in self.column_names if is_shard_column(name)]
        columns = (column for batch in self.batches(names) for column in batch.columns)
        return {shard for column in columns for shard in column.unique().to_pylist()} - {None}


def is_shard_column(name: str) -> bool:
    """Whether a manifest's column names tars."""
    return name == SHARD or name.endswith(f"_{SHARD}")
