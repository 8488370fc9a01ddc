"""Short digests of settings and of content: what the names in the dataset folder are made of."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

ID_LENGTH = 16  # hex digits: 64 bits, so two of a billion names meet with probability 3 %


def digest_of(*parts: str | bytes) -> str:
    """A digest of strings, each delimited by its length, so that ("ab", "c") and ("a", "bc") differ."""
    pieces = [part.encode() if isinstance(part, str) else part for part in parts]
    delimited = b"".join(len(piece).to_bytes(8, "little") + piece for piece in pieces)
    return hashlib.sha256(delimited).hexdigest()[:ID_LENGTH]


def settings_id(config: Any, version: int, ignore: Iterable[str] = ()) -> str:
    """The id of everything in `config` that changes what a stage writes; `ignore` names the fields that do not."""
    return digest_of(str(version), json.dumps(plain(config, frozenset(ignore)), sort_keys=True))


def plain(value: Any, ignore: frozenset[str] = frozenset()) -> Any:
    """A configuration as JSON values. Raises TypeError for what has no stable text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.name not in ignore]
        return {name: plain(getattr(value, name)) for name in fields}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Path):
        return value.as_posix()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be part of a configuration")


def model_id(model: str, revision: str | None) -> str:
    """What identifies a model's weights: `name@revision` on a hub, a digest of the files for a local folder."""
    folder = Path(model)
    if not folder.is_dir():
        return f"{model}@{revision or 'main'}"
    # .jinja: the chat template, which is part of what a captioner is asked
    kinds = {".json", ".safetensors", ".txt", ".model", ".jinja"}
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in kinds)
    return digest_of(*(part for p in files for part in (p.relative_to(folder).as_posix(), file_digest(p))))


def row_digests(values: pa.Table) -> list[str]:
    """For each row a digest of its values, their names and types: what the row of the next stage is made from."""
    if not values.num_rows:
        return []
    head = b"".join(_delimited(f"{field.name} {field.type}".encode()) for field in values.schema)
    columns = [_cells(column.combine_chunks()) for column in values.columns]
    digests = (hashlib.sha256(b"".join((head, *map(_delimited, row)))) for row in zip(*columns, strict=True))
    return [digest.hexdigest()[:ID_LENGTH] for digest in digests]


def _delimited(cell: bytes) -> bytes:
    return len(cell).to_bytes(8, "little") + cell


def _cells(column: pa.Array) -> list[bytes]:
    """Each value as bytes that no other value has; a null is no byte at all. Vectors come straight from their buffer."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_binary(kind):
        return [b"" if cell is None else b"=" + cell for cell in column.cast(pa.binary()).to_pylist()]
    if pa.types.is_list(kind) and pa.types.is_primitive(kind.value_type) and not column.flatten().null_count:
        inner = column.flatten().to_numpy(zero_copy_only=False)
        ends = np.cumsum(column.value_lengths().fill_null(0).to_numpy()) * inner.itemsize
        starts, there = np.concatenate([[0], ends[:-1]]), column.is_valid()
        data, spots = inner.tobytes(), zip(there.to_pylist(), starts.tolist(), ends.tolist(), strict=True)
        return [b"=" + data[start:end] if valid else b"" for valid, start, end in spots]
    return [b"" if cell is None else b"=" + json.dumps(cell).encode() for cell in column.to_pylist()]


def file_digest(path: Path) -> str:
    """Of a file that may be gigabytes and is asked for by several stages: read again only when it was written again."""
    stat = path.stat()
    return _digest_once(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest_once(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
