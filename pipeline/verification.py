"""Reads a view again from its files alone, every byte of every shard, and tells what is not as the manifest says.

A shard's bytes follow from the names and bytes of its members alone, so nothing in it may be otherwise: the blocks before
members are held against those that the writer writes, members against their size and crc32, and what is between and behind
them is zero. What lies in the members is then read as a reader would.
"""

from __future__ import annotations

import io
import json
import tarfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from .manifest import SHARD, Manifest
from .parallel import map_ahead
from .shards import View, member_header
from .storage import Folder

MOST = 20  # problems that are told of one shard; the others are counted
_PIECE = 1 << 22  # bytes that are asked for at a time: elsewhere each is a request

What = Literal["samples", "order", "key", "missing", "header", "bytes", "padding", "length", "image", "tokens", "json"]
"""samples: the manifest's rows are not as many as the view says · order: a shard in two places · key: in two samples ·
missing: no such file · header: not the member's name, size, owner or time, or not in its place · bytes: another crc32 ·
padding: not zero · length: cut, or more behind the end · image, tokens, json: not what it should be."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong."""

    shard: str
    """Path in the dataset folder, of a tar or of the manifest."""
    key: str
    """The sample; empty where it is no one's."""
    what: What
    told: str
    """In words."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was read, and what was wrong with it."""

    samples: int = 0
    shards: int = 0
    bytes: int = 0
    seconds: float = 0.0
    problems: tuple[Problem, ...] = ()
    """At most `MOST` a shard."""
    untold: int = 0
    """Problems beyond these."""

    def __add__(self, other: Verified) -> Verified:
        return Verified(
            samples=self.samples + other.samples,
            shards=self.shards + other.shards,
            bytes=self.bytes + other.bytes,
            seconds=self.seconds + other.seconds,
            problems=self.problems + other.problems,
            untold=self.untold + other.untold,
        )


def verify_view(dataset: Folder, name: str, *, decode: bool = False, threads: int = 4) -> Verified:
    """Reads all of a view's present version. `decode`: every picture, too, to its last pixel. Raises FileNotFoundError or
    ValueError where there is no view or no manifest to go by.
    """
    started = time.perf_counter()
    view = View.open(dataset, name)
    found = Verified(samples=len(view.manifest), problems=tuple(_check_manifest(view)))
    for column, members in _members_by_shard(view).items():
        check = partial(_check_shard, view, members, decode)
        for shard in map_ahead(check, _shards(view.manifest, column, members), threads):
            found += shard
    return found + Verified(seconds=time.perf_counter() - started)


def _check_manifest(view: View) -> Iterator[Problem]:
    """Its rows, and that no key is in two of them."""
    manifest = view.manifest
    problem = partial(Problem, shard=manifest.name)
    if len(manifest) != len(view):
        told = f"it has {len(manifest)} rows, the view says {len(view)} samples"
        yield problem(key="", what="samples", told=told)
    # Eight bytes a sample: the keys themselves would be gigabytes. Those whose digests meet are looked at again.
    digests = [np.fromiter(map(hash, rows.column("key").to_pylist()), np.int64) for rows in manifest.batches(["key"])]
    ordered = np.sort(np.concatenate(digests)) if digests else np.array([], np.int64)
    twice = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen = set[str]()
    for rows in manifest.batches(["key", SHARD]) if twice else ():
        for key, shard in zip(rows.column("key").to_pylist(), rows.column(SHARD).to_pylist(), strict=True):
            if hash(key) in twice and key in seen:
                yield Problem(shard=shard, key=key, what="key", told="another sample has this key")
            seen |= {key} if hash(key) in twice else set()
    for column in _members_by_shard(view):
        yield from _check_order(manifest, column)


def _check_order(manifest: Manifest, column: str) -> Iterator[Problem]:
    """That a shard's samples follow one upon the other."""
    before, last = set[str](), None
    for rows in manifest.batches([column]):
        for shard, _, _ in _runs(rows.column(column).drop_null()):
            if shard != last and shard in before:
                yield Problem(shard=shard, key="", what="order", told="the manifest has it in two places")
            before.add(shard)
            last = shard


def _runs(column: pa.ChunkedArray) -> Iterator[tuple[str, int, int]]:
    """The column's values with start and end of each run of equal ones."""
    runs = pc.run_end_encode(column.combine_chunks())
    start = 0
    for value, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
        yield value, start, end
        start = end


def _members_by_shard(view: View) -> dict[str, list[str]]:
    """The members by the manifest's column that names their shard."""
    found: dict[str, list[str]] = {SHARD: []}
    for member in view.info.members:
        own = f"{member}_{SHARD}"
        found.setdefault(own if own in view.manifest.column_names else SHARD, []).append(member)
    return found


def _shards(manifest: Manifest, column: str, members: Sequence[str]) -> Iterator[pa.Table]:
    """The manifest's rows shard by shard."""
    parts = ("offset", "size", "crc32", "length")
    wanted = [f"{m}_{part}" for m in members for part in parts if f"{m}_{part}" in manifest.column_names]
    names = ["key", column, "width", "height", "bucket", *wanted]
    waiting: list[pa.Table] = []
    for group in manifest.batches([name for name in names if name in manifest.column_names]):
        rows = group.filter(group.column(column).is_valid()).rename_columns({column: SHARD})
        for shard, start, end in _runs(rows.column(SHARD)):
            if waiting and waiting[0].column(SHARD)[0].as_py() != shard:
                yield pa.concat_tables(waiting)
                waiting = []
            waiting.append(rows.slice(start, end - start))
    if waiting:
        yield pa.concat_tables(waiting)


class _Shard:
    """One tar, read from its beginning to its end."""

    def __init__(self, view: View, name: str, decode: bool) -> None:
        self.name, self._decode = name, decode
        self._endings = view.info.members
        self.problems: list[Problem] = []
        self.bytes = 0

    def tell(self, what: What, told: str, key: str = "") -> None:
        self.problems.append(Problem(shard=self.name, key=key, what=what, told=told))

    def check(self, file: BinaryIO, rows: Sequence[Mapping[str, Any]], members: Sequence[str]) -> None:
        """Reads all of it. `rows` are the manifest's, in their order, which is the shard's."""
        end = 0
        for row in rows:
            for member in sorted(members, key=self._endings.__getitem__):
                if row[f"{member}_offset"] is not None:
                    end = self._check_member(file, row, member, end)
        blocks = -(-(end + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE)  # two empty ones, and what fills the record
        rest = self._read(file, end, blocks * tarfile.RECORDSIZE - end)
        if rest.strip(b"\0"):
            self.tell("padding", "what is behind the last member is not zero")
        if len(rest) < blocks * tarfile.RECORDSIZE - end:
            self.tell("length", f"it is cut after {end + len(rest)} of {blocks * tarfile.RECORDSIZE} bytes")
        elif file.read(1):
            self.tell("length", f"there is more in it behind its end at {blocks * tarfile.RECORDSIZE}")

    def _read(self, file: BinaryIO, start: int, size: int) -> bytes:
        if file.tell() != start:
            file.seek(start)
        data = file.read(size)
        self.bytes += len(data)
        return data

    def _check_member(self, file: BinaryIO, row: Mapping[str, Any], member: str, end: int) -> int:
        """Header, bytes and padding of one member; returns where the next one's header must begin."""
        key, name = row["key"], f"{row['key']}.{self._endings[member]}"
        offset, size, crc32 = (row[f"{member}_{part}"] for part in ("offset", "size", "crc32"))
        header = member_header(name, size)
        if offset != end + len(header):
            self.tell(
                "header", f"{name} is at {offset} by the manifest, at {end + len(header)} by what is before it", key
            )
        if self._read(file, offset - len(header), len(header)) != header:
            self.tell("header", f"what is before {offset} is not the header of {name}, {size} bytes, of no time", key)
        data = self._read(file, offset, size)
        if len(data) < size:
            self.tell("length", f"it is cut: of {name} there are {len(data)} of {size} bytes", key)
        elif crc32 is not None and zlib.crc32(data) != crc32:
            self.tell("bytes", f"{name} has crc32 {zlib.crc32(data):08x}, by the manifest {crc32:08x}", key)
        else:
            self._check_content(data, row, member)
        padding = self._read(file, offset + size, -size % tarfile.BLOCKSIZE)
        if padding.strip(b"\0"):
            self.tell("padding", f"what is behind {name} is not zero", key)
        return offset + size + -size % tarfile.BLOCKSIZE

    def _check_content(self, data: bytes, row: Mapping[str, Any], member: str) -> None:
        """That a reader finds in the member what the manifest says of it."""
        ending = self._endings[member].rsplit(".", 1)[-1]
        what: What = "image" if ending == "jpg" else "json" if ending == "json" else "tokens"
        try:
            told = _CHECKS[ending](data, row, member, self._decode) if ending in _CHECKS else ""
        except Exception as error:  # the readers raise anything at all for broken bytes
            told = f"{type(error).__name__}: {error}"
        if told:
            self.tell(what, f"{member}: {told}", row["key"])


def _check_jpg(data: bytes, row: Mapping[str, Any], member: str, decode: bool) -> str:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        size = (row["width"], row["height"])
        if image.size != size:
            return f"it is {image.size[0]}x{image.size[1]}, by the manifest {size[0]}x{size[1]}"
        if decode:
            image.load()
    bucket = row.get("bucket")
    return f"it is {size[0]}x{size[1]}, its bucket {bucket}" if bucket not in (None, f"{size[0]}x{size[1]}") else ""


def _check_json(data: bytes, row: Mapping[str, Any], member: str, decode: bool) -> str:
    facts = json.loads(data)
    if not isinstance(facts, dict):
        return f"it is {type(facts).__name__}, not an object"
    wrong = [name for name in ("key", "width", "height") if name in facts and facts[name] != row[name]]
    return f"{wrong[0]} is {facts[wrong[0]]}, by the manifest {row[wrong[0]]}" if wrong else ""


def _check_npy(data: bytes, row: Mapping[str, Any], member: str, decode: bool) -> str:
    values = np.load(io.BytesIO(data), allow_pickle=False)
    length = row.get(f"{member}_length")
    if length is None:
        return ""
    if values.ndim != 1 or values.dtype.kind not in "iu":
        return f"they are {values.dtype} {values.shape}, not a row of whole numbers"
    return f"they are {len(values)}, by the manifest {length}" if len(values) != length else ""


_CHECKS = {"jpg": _check_jpg, "json": _check_json, "npy": _check_npy}


def _check_shard(view: View, members: Sequence[str], decode: bool, rows: pa.Table) -> Verified:
    """One shard; `rows` are the manifest's of it."""
    shard = _Shard(view, rows.column(SHARD)[0].as_py(), decode)
    try:
        with view.dataset.open(shard.name) as there:
            file: Any = there if view.dataset.is_local else io.BufferedReader(there, _PIECE)  # type: ignore[type-var]
            shard.check(file, rows.to_pylist(), members)
    except FileNotFoundError:
        shard.tell("missing", "it is not there")
    told, untold = shard.problems[:MOST], len(shard.problems[MOST:])
    return Verified(shards=1, bytes=shard.bytes, problems=tuple(told), untold=untold)
