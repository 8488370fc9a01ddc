"""The dataset folder on any fsspec file system, and the one way anything gets into it: written aside, then published whole."""

from __future__ import annotations

import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec
from fsspec.dircache import DirCache


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of a listing, published or not."""

    name: str
    size: int
    """Bytes."""
    modified: float
    """When it was last written, in seconds since 1970."""


ASIDE = ".aside-"
"""How the names of files begin that are not yet published."""
_TIMES = ("LastModified", "last_modified")  # what the listings of S3 and Azure call it


@dataclass(frozen=True, kw_only=True)
class Folder:
    """A folder at an fsspec URL (`build/shapes`, `s3://bucket/dataset`). Paths are relative to it, with forward slashes.

    Picklable, so that it can travel to workers; the file system is made anew where it is used.
    """

    url: str

    @property
    def is_local(self) -> bool:
        """Whether the folder is on this machine's own file system."""
        return "://" not in self.url or self.url.startswith("file://")

    def path(self, name: str) -> str:
        """Where `name` lies, as the file system spells it."""
        root = os.path.abspath(self.url.removeprefix("file://")) if self.is_local else self._place[1]
        return posixpath.join(root, name) if name else root

    @property
    def _files(self) -> fsspec.AbstractFileSystem:
        return fsspec.filesystem("file") if self.is_local else self._place[0]

    @property
    def _place(self) -> tuple[fsspec.AbstractFileSystem, str]:
        """File system and path of a folder elsewhere. The URL may name a host or an account, which is no part of the path."""
        try:
            files, path = fsspec.url_to_fs(self.url)
        except ImportError as error:
            raise ValueError(f"{self.url}: a package is missing for such folders: {error}") from None
        # Listings are never old: other builders publish too. And kept, they would be the most of a plan's memory. Not an
        # argument of the constructor: some hand on to their library what they do not know.
        if isinstance(kept := getattr(files, "dircache", None), DirCache):
            kept.use_listings_cache = False
        return files, path

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """What a file system elsewhere raises of its own kind (no credentials, no such host) becomes an OSError."""
        try:
            yield
        except (OSError, ValueError):
            raise
        except Exception as error:
            if self.is_local:
                raise
            raise OSError(f"{self.url}: {type(error).__name__}: {error}") from error

    def folders(self, folder: str) -> Sequence[str]:
        """Names of the folders directly in `folder`, sorted; empty when there is none."""
        return [name for name in self._listing(folder, "directory") if not name.startswith(".")]

    def list(self, folder: str) -> Sequence[str]:
        """Names of the files directly in `folder`, sorted; empty when there is none. Unpublished files are not shown."""
        return [name for name in self._listing(folder, "file") if not name.startswith(".")]

    def entries(self, folder: str) -> Sequence[Entry]:
        """The files directly in `folder`, by name, with those that are not published; empty when there is no such folder."""
        found = []
        for name, listed in self._listing(folder, "file").items():
            with suppress(FileNotFoundError), self._asking():  # a builder has published or left it since
                size, modified = self._told(listed)
                found.append(Entry(name=name, size=size, modified=modified))
        return found

    def _listing(self, folder: str, kind: Literal["file", "directory"]) -> Mapping[str, Any]:
        """What lies directly in `folder`, by rising name: an `os.DirEntry` each, or what the file system tells of it."""
        path = self.path(folder)
        try:
            if self.is_local:
                with os.scandir(path) as local:
                    found = {e.name: e for e in local if (e.is_file() if kind == "file" else e.is_dir())}
            else:
                files = self._files
                with self._asking():
                    files.invalidate_cache(path)
                    listed = files.ls(path, detail=True)
                found = {posixpath.basename(e["name"].rstrip("/")): e for e in listed if e["type"] == kind}
        except FileNotFoundError:
            return {}
        return dict(sorted(found.items()))

    def _told(self, listed: Any) -> tuple[int, float]:
        """Size and time of a file of a listing."""
        if self.is_local:
            stat = listed.stat()
            return stat.st_size, stat.st_mtime
        told = next((listed[name] for name in _TIMES if name in listed), None)
        return listed["size"], (told or self._files.modified(listed["name"])).timestamp()  # where no listing tells, ask

    def read(self, name: str) -> bytes:
        """The whole file."""
        with self._asking():
            return self._files.cat_file(self.path(name))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer where the file ends before."""
        return self.read_ranges(name, [(offset, size)])[0]

    def read_ranges(self, name: str, places: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """The bytes at each (offset, size). Elsewhere each is a request, so they are asked for together."""
        if self.is_local:
            with open(self.path(name), "rb") as file:
                return [file.read(size) for offset, size in places if file.seek(offset) >= 0]
        there = [(offset, offset + size) for offset, size in places if size]  # no range of no bytes can be asked for
        starts, ends = [start for start, _ in there], [end for _, end in there]
        with self._asking():
            found = iter(self._files.cat_ranges([self.path(name)] * len(there), starts, ends, on_error="raise"))
        return [next(found) if size else b"" for _, size in places]

    def open(self, name: str) -> BinaryIO:
        """The file for reading here and there in it; elsewhere nothing is read ahead."""
        with self._asking():
            return (
                open(self.path(name), "rb") if self.is_local else self._files.open(self.path(name), cache_type="none")
            )

    def fetch(self, name: str, path: Path) -> int:
        """Copies the file to `path` on this machine; its size, bytes, as the file system tells it."""
        with self._asking():
            self._files.get_file(self.path(name), str(path))
            return self._files.size(self.path(name))

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        with self._asking():
            return self._files.exists(self.path(name))

    def remove(self, name: str) -> None:
        """Deletes the file if it is there."""
        with suppress(FileNotFoundError), self._asking():
            self._files.rm_file(self.path(name))

    @contextmanager
    def writing(self, folder: str) -> Iterator[Aside]:
        """A file to write to whose name is not yet known: `aside.publish(name)` makes it appear, whole and durable.

        On a local disk: a hidden temporary neighbour, fsync, rename, fsync of the folder. Elsewhere: a local temporary
        file that is uploaded in one piece (object stores show an object only when it is complete). What is not
        published is gone when the block ends.
        """
        near = Path(self.path(folder)) if self.is_local else Path(tempfile.gettempdir())
        near.mkdir(parents=True, exist_ok=True)
        path = near / f"{ASIDE}{uuid.uuid4().hex}"
        try:
            yield Aside(folder=self, path=path)
        finally:
            path.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Publishes `data` as a whole file."""
        with self.writing(posixpath.dirname(name)) as aside:
            aside.path.write_bytes(data)
            aside.publish(name)

    def _publish(self, path: Path, name: str) -> None:
        if not self.is_local:
            with self._asking():
                self._files.put_file(str(path), self.path(name))
            return
        final = Path(self.path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        _sync(path)
        os.replace(path, final)
        _sync(final.parent)


@dataclass(frozen=True, kw_only=True)
class Aside:
    """A file that is being written beside its final place."""

    folder: Folder
    path: Path

    def publish(self, name: str) -> None:
        """Lets the file appear as `name` in the dataset folder."""
        self.folder._publish(self.path, name)


def read_json(dataset: Folder, name: str, **needed: type) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError in one line where there is none, or it lacks a field of the needed type."""
    try:
        found = json.loads(dataset.read(name))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{dataset.path(name)} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{dataset.path(name)} is damaged: it holds no JSON object")
    for field, kind in needed.items():
        if not isinstance(found.get(field), kind):
            raise ValueError(f"{dataset.path(name)} is damaged: it has no proper {field!r}")
    return found


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
