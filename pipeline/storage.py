"""The dataset folder on any fsspec file system, and the one way anything gets into it: written aside, then published whole."""

from __future__ import annotations

import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import fsspec


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file of a listing, published or not."""

    name: str
    size: int
    """Bytes."""
    modified: float
    """When it was last written, in seconds since 1970."""


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
            # Listings are never old: other builders publish too. And kept, they would be the most of a plan's memory.
            return fsspec.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            raise ValueError(f"{self.url}: a package is missing for such folders: {error}") from None

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

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in `folder`, sorted; empty when there is none."""
        path = self.path(folder)
        try:
            if self.is_local:
                names = [entry.name for entry in os.scandir(path) if entry.is_dir()]
            else:
                with self._asking():
                    entries = self._files.ls(path, detail=True)
                names = [posixpath.basename(e["name"].rstrip("/")) for e in entries if e["type"] == "directory"]
        except FileNotFoundError:
            return []
        return sorted(n for n in names if not n.startswith("."))

    def list(self, folder: str) -> list[str]:
        """Names of the files directly in `folder`, sorted; empty when there is none. Unpublished files are not shown."""
        path = self.path(folder)
        if self.is_local:
            try:
                names = [entry.name for entry in os.scandir(path) if entry.is_file()]
            except FileNotFoundError:
                return []
        else:
            files = self._files
            try:
                with self._asking():
                    entries = files.ls(path, detail=True)
            except FileNotFoundError:
                return []
            names = [posixpath.basename(e["name"]) for e in entries if e["type"] == "file"]
        return sorted(n for n in names if not n.startswith("."))

    def entries(self, folder: str) -> Sequence[Entry]:
        """The files directly in `folder`, by name, with those that are not published; empty when there is no such folder."""
        path, found = self.path(folder), []
        try:
            if self.is_local:
                for file in os.scandir(path):
                    with suppress(FileNotFoundError):  # a builder has published or left it since
                        if file.is_file():
                            stat = file.stat()
                            found.append(Entry(name=file.name, size=stat.st_size, modified=stat.st_mtime))
            else:
                files = self._files
                with self._asking():
                    listed = [file for file in files.ls(path, detail=True) if file["type"] == "file"]
                for file in listed:
                    name, told = file["name"], next((file[k] for k in _TIMES if k in file), None)
                    with suppress(FileNotFoundError), self._asking():
                        modified = (told or files.modified(name)).timestamp()  # a request each, where no listing tells
                        found.append(Entry(name=posixpath.basename(name), size=file["size"], modified=modified))
        except FileNotFoundError:
            return []
        return sorted(found, key=lambda e: e.name)

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
        path = near / f".aside-{uuid.uuid4().hex}"
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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
