"""The dataset folder on any fsspec file system, and the one way anything gets into it: written aside, then published whole."""

from __future__ import annotations

import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import fsspec


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
        root = os.path.abspath(self.url.removeprefix("file://")) if self.is_local else self.url.split("://", 1)[1]
        return posixpath.join(root, name) if name else root

    @property
    def _files(self) -> fsspec.AbstractFileSystem:
        return fsspec.filesystem("file" if self.is_local else self.url.split("://", 1)[0])

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
            files.invalidate_cache(path)
            try:
                entries = files.ls(path, detail=True)
            except FileNotFoundError:
                return []
            names = [posixpath.basename(e["name"]) for e in entries if e["type"] == "file"]
        return sorted(n for n in names if not n.startswith("."))

    def read(self, name: str) -> bytes:
        """The whole file."""
        return self._files.cat_file(self.path(name))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`."""
        return self._files.cat_file(self.path(name), start=offset, end=offset + size)

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return self._files.exists(self.path(name))

    def remove(self, name: str) -> None:
        """Deletes the file if it is there."""
        with suppress(FileNotFoundError):
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
