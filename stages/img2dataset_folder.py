"""What lies in a folder that img2dataset wrote, in its formats webdataset (`00000.tar` beside `00000.parquet`) and files
(`00000/` beside it). Nothing is extracted: where each picture lies is looked up, and its bytes are read when asked for.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.sample import KEY_LENGTH, sample_key

EXTENSIONS = (".jpg", ".png", ".webp")
_COLUMNS = {
    "url": pa.string(),
    "key": pa.string(),
    "status": pa.string(),
    "original_width": pa.int32(),
    "original_height": pa.int32(),
}
_DIGEST = "sha256"  # a column that is there where img2dataset was asked for it
_PLACE = np.dtype(
    [
        ("key", f"S{KEY_LENGTH}"),
        ("file", np.int32),
        ("offset", np.int64),
        ("size", np.int64),
        ("width", np.int32),  # of the original; 0 where img2dataset did not record it
        ("height", np.int32),
        ("sha256", "S64"),  # of the original; empty where img2dataset did not record it
    ]
)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Where the folder's pictures lie: about 120 bytes of memory for each; their own bytes stay on the disk."""

    files: list[str]
    """Tars, or files of one picture each."""
    times: list[int]
    """When each file was last changed, in Unix seconds: the best that is known of when it was fetched."""
    places: np.ndarray
    """Of `_PLACE`, one for each URL, by rising key."""
    left: Counter[str]
    """Rows without a picture to adopt, by reason."""
    troubles: list[str]
    """A line for each tar or folder that lacks pictures which its table speaks of."""

    def among(self, keys: Sequence[str]) -> dict[str, np.void]:
        """Those of these keys that have a picture, with its place."""
        if not len(self.places):
            return {}
        known, wanted = self.places["key"], np.array(keys, f"S{KEY_LENGTH}")
        spots = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        there = np.flatnonzero(known[spots] == wanted).tolist()
        return {keys[n]: self.places[spots[n]] for n in there}

    def read(self, place: np.void) -> bytes | None:
        """The picture's bytes; None if they are no longer there."""
        try:
            with open(self.files[place["file"]], "rb") as file:
                file.seek(place["offset"])
                data = file.read(place["size"])
        except FileNotFoundError:
            return None
        return data if len(data) == place["size"] else None


def find_pictures(folder: Path, most_bytes: int) -> Pictures:
    """Goes through the folder's tables and tars, one at a time. Larger pictures than `most_bytes` are left.

    Raises FileNotFoundError or ValueError in one line for what is no such folder.
    """
    tables = sorted(folder.glob("[!.]*.parquet"))
    if not tables:
        raise FileNotFoundError(f"{folder} holds no .parquet file: give a folder that img2dataset wrote")
    files: dict[str, int] = {}
    times: list[int] = []
    parts: list[np.ndarray] = []
    left: Counter[str] = Counter()
    troubles: list[str] = []
    for table in tables:
        members, trouble = _members(table.with_suffix(""))
        rows, before = [], left["no_picture"]
        for key, member, width, height, sha256 in _pictures_of(table, members, most_bytes, left):
            if member.path not in files:
                files[member.path] = len(files)
                times.append(member.time)
            rows.append((key, files[member.path], member.offset, member.size, width, height, sha256))
        lost = left["no_picture"] - before
        if lost or trouble:
            troubles.append(f"{table.name}: {trouble or 'some files are missing'}: {lost} rows have no picture")
        parts.append(np.array(rows, _PLACE))
    places = np.concatenate(parts)
    _, firsts = np.unique(places["key"], return_index=True)
    left["duplicate_url"] += len(places) - len(firsts)
    return Pictures(files=list(files), times=times, places=places[firsts], left=+left, troubles=troubles)


class _Member(NamedTuple):
    """Where a picture lies."""

    path: str
    time: int
    offset: int
    size: int


def _pictures_of(
    table: Path, members: Mapping[str, _Member], most_bytes: int, left: Counter[str]
) -> Iterator[tuple[str, _Member, int, int, str]]:
    """Of each row with a picture: sample key, member, the original's width, height and digest. Counts the others."""
    rows = _read_table(table)
    urls = pc.utf8_trim_whitespace(rows.column("url").fill_null("")).to_pylist()
    keys, statuses, widths, heights = (rows.column(name).to_pylist() for name in list(_COLUMNS)[1:])
    digests = rows.column(_DIGEST).to_pylist() if _DIGEST in rows.column_names else [None] * rows.num_rows
    for url, key, status, width, height, digest in zip(urls, keys, statuses, widths, heights, digests, strict=True):
        member = next((members[f"{key}{e}"] for e in EXTENSIONS if f"{key}{e}" in members), None)
        if status != "success" or not url:
            left[str(status) if url else "no_url"] += 1
        elif member is None:
            left["no_picture"] += 1
        elif member.size > most_bytes:
            left["too_large"] += 1
        else:
            known = digest if digest and re.fullmatch("[0-9a-f]{64}", digest) else ""
            yield sample_key(url), member, max(width or 0, 0), max(height or 0, 0), known


def _read_table(path: Path) -> pa.Table:
    """The columns that count, of their types; an img2dataset that was stopped leaves tables that cannot be read."""
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            missing = [name for name in _COLUMNS if name not in names]
            if not missing:
                schema = pa.schema(_COLUMNS | ({_DIGEST: pa.string()} if _DIGEST in names else {}))
                rows = file.read(schema.names).select(schema.names).cast(schema)
                rows.validate(full=True)  # texts that are no UTF-8
                return rows
    except (pa.ArrowException, OSError) as error:
        said = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read ({said}): let img2dataset finish it, or take it out") from None
    raise ValueError(f"{path} has no column {missing[0]!r}: it is no table that img2dataset wrote")


def _members(stem: Path) -> tuple[dict[str, _Member], str | None]:
    """The pictures beside a table by file name, and what is wrong with what holds them."""
    tar = stem.with_suffix(".tar")
    if tar.is_file():
        return _tar_members(tar)
    if not stem.is_dir():
        return {}, f"there is neither {tar.name} nor a folder {stem.name}"
    found = {}
    for entry in os.scandir(stem):
        if entry.name.endswith(EXTENSIONS) and entry.is_file(follow_symlinks=False):
            stat = entry.stat(follow_symlinks=False)
            found[entry.name] = _Member(entry.path, int(stat.st_mtime), 0, stat.st_size)
    return found, None


def _tar_members(path: Path) -> tuple[dict[str, _Member], str | None]:
    """A walk over the headers. Not tarfile's own, which reads what a header says into memory and can be made to go round
    for ever; names are only looked up, and what lies beyond the file's end is not there.
    """
    found: dict[str, _Member] = {}
    with path.open("rb") as file:
        stat = os.fstat(file.fileno())
        offset = 0
        while True:
            file.seek(offset)
            try:
                header = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark
                return found, None
            except tarfile.HeaderError:
                whole = offset + tarfile.BLOCKSIZE <= stat.st_size
                return found, f"{path.name} is {'damaged' if whole else 'cut'}"
            start = offset + tarfile.BLOCKSIZE
            if not 0 <= header.size <= stat.st_size - start:
                return found, f"{path.name} is cut"
            if header.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and header.name.endswith(EXTENSIONS):
                found.setdefault(header.name, _Member(str(path), int(stat.st_mtime), start, header.size))
            offset = start + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
