"""A set of evaluation pictures, or of their embeddings, that training pictures are kept apart from. Named by its content."""

from __future__ import annotations

import hashlib
import io
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.fingerprint import digest_of
from pipeline.storage import Folder

from .flat import from_hex
from .pictures import PictureRules

_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_NAMES = ("name", "key", "url")
_RULES = PictureRules(min_edge=1, max_edge=100_000, max_pixels=100_000_000, max_aspect_ratio=1000, quality=95)


@dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """A folder of pictures (jpg, png, webp, gif, bmp; also in folders within), or one file of what is known of them."""

    path: str
    """Any fsspec URL. A file is .parquet, with the columns that are asked for and perhaps `name`, `key` or `url`, or .npy."""

    @cached_property
    def id(self) -> str:
        """Digest of names and content. Raises FileNotFoundError where there is none, ValueError where it is empty."""
        return digest_of(*(part for name, data in self._files() for part in (name, hashlib.sha256(data).hexdigest())))

    def pictures(self) -> pa.Table:
        """name, sha256, pdq and pdq_quality of each picture; what a parquet file does not have is null. Raises ValueError
        where a picture cannot be read, or a file has neither digest nor hash.
        """
        if not self._is_file:
            rows = [self._picture(name, data) for name, data in self._files()]
            return pa.table({column: [row[column] for row in rows] for column in rows[0]})
        table = _unhexed(self._parquet(("sha256", "pdq")))
        good = pa.array([100] * len(table), pa.int16())
        given = dict(zip(table.column_names, table.columns))
        nulls = {"sha256": pa.nulls(len(table), pa.string()), "pdq": pa.nulls(len(table), pa.binary())}
        return pa.table({"name": _names(table), "pdq_quality": good, **nulls, **given}).select(
            ["name", "sha256", "pdq", "pdq_quality"]
        )

    def embeddings(self) -> tuple[Sequence[str], np.ndarray]:
        """(names, vectors (pictures, width)): of the column image_embedding, or of a .npy file, named by their row."""
        if not self._is_file:
            raise ValueError(f"evaluation {self.path} must be a .npy or .parquet file of embeddings")
        if self.path.endswith(".npy"):
            [(_, data)] = self._files()
            vectors = np.load(io.BytesIO(data), allow_pickle=False)
            names = [str(row) for row in range(len(vectors))]
        else:
            table = self._parquet(("image_embedding",))
            names, vectors = _names(table), np.array(table.column("image_embedding").to_pylist())
        if vectors.ndim != 2 or vectors.dtype.kind != "f":
            raise ValueError(f"evaluation {self.path} must hold one vector of floats a picture, got {vectors.shape}")
        return names, vectors.astype(np.float32)

    @property
    def _is_file(self) -> bool:
        return self.path.endswith((".parquet", ".npy"))

    def _files(self) -> Iterator[tuple[str, bytes]]:
        """Content of the file, or name and content of each picture."""
        if self._is_file:
            parent, name = posixpath.split(self.path)
            try:
                yield "", Folder(url=parent or ".").read(name)
            except FileNotFoundError:
                raise FileNotFoundError(f"there is no evaluation file {self.path}") from None
            return
        folder = Folder(url=self.path)
        names = list(_pictures_in(folder, ""))
        if not names:
            raise FileNotFoundError(f"there are no evaluation pictures in {self.path}")
        for name in names:
            yield name, folder.read(name)

    def _picture(self, name: str, data: bytes) -> dict[str, object]:
        try:
            pdq, quality = pdq_of(data)
        except ValueError as error:
            raise ValueError(f"evaluation picture {name} in {self.path} cannot be read: {error}") from None
        return {"name": name, "sha256": hashlib.sha256(data).hexdigest(), "pdq": pdq, "pdq_quality": quality}

    def _parquet(self, columns: Sequence[str]) -> pa.Table:
        [(_, data)] = self._files()
        try:
            table = pq.ParquetFile(pa.BufferReader(data)).read()
        except pa.ArrowInvalid as error:
            raise ValueError(f"evaluation {self.path} is no parquet file: {error}") from None
        if not {*columns} & {*table.column_names} or not len(table):
            raise ValueError(f"evaluation {self.path} needs rows and a column {' or '.join(columns)}")
        return table


def pdq_of(data: bytes) -> tuple[bytes, int]:
    """(PDQ hash, 32 bytes; its quality, 0 to 100) of a picture file, as `download` would have it. Raises ValueError."""
    from .scaling import make_picture

    picture = make_picture(data, _RULES)
    if picture.pdq is None or picture.pdq_quality is None:
        raise ValueError(picture.reason)
    return picture.pdq, picture.pdq_quality


def _pictures_in(folder: Folder, within: str) -> Iterator[str]:
    for name in folder.list(within):
        if name.lower().endswith(_ENDINGS):
            yield posixpath.join(within, name)
    for name in folder.folders(within):
        yield from _pictures_in(folder, posixpath.join(within, name))


def _unhexed(table: pa.Table) -> pa.Table:
    """PDQ hashes are mostly written in hexadecimal."""
    if "pdq" not in table.column_names or not pa.types.is_string(table.schema.field("pdq").type):
        return table
    hashes, fits = from_hex(table.column("pdq"), 32)
    column = [
        h.tobytes() if f else b"" if v is not None else None for h, f, v in zip(hashes, fits, table.column("pdq"))
    ]
    return table.set_column(table.column_names.index("pdq"), "pdq", pa.array(column, pa.binary()))


def _names(table: pa.Table) -> list[str]:
    """What the rows are called: by a column, or by their number."""
    column = next((c for c in _NAMES if c in table.column_names), None)
    return [str(v) for v in (table.column(column).to_pylist() if column else range(len(table)))]
