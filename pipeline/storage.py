"""The dataset folder on any fsspec file system, and the one way anything gets into it: written aside, then published whole.

Elsewhere than on this machine whatever fails and may pass is asked again (`patience.py`). So every request must do no harm
when it is made twice: reading and listing do none, a removed file may be gone already, and a file is published under a name
that says what it holds, or else takes an older one's place. That is also why nothing is put only if absent, and no two
builders need a lock.
"""

from __future__ import annotations

import io
import json
import os
import posixpath
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar, cast

import fsspec
from fsspec.dircache import DirCache

from .patience import ask

_T = TypeVar("_T")


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
# Protocols that show a file while it is written, and rename it over another in one step.
_RENAMING = {"sftp", "ssh", "local"}


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

    def _asked(self, request: Callable[[], _T]) -> _T:
        """What the file system answers; one elsewhere is asked with patience."""
        return request() if self.is_local else ask(request, self.url)

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
            with suppress(FileNotFoundError):  # a builder has published or left it since
                size, modified = self._told(listed)
                found.append(Entry(name=name, size=size, modified=modified))
        return found

    def _listing(self, folder: str, kind: Literal["file", "directory"]) -> Mapping[str, Any]:
        """What lies directly in `folder`, by rising name: an `os.DirEntry` each, or what the file system tells of it. What has
        been published is in it: S3 and its like list what they have confirmed.
        """
        found: dict[str, Any]
        try:
            if self.is_local:
                with os.scandir(self.path(folder)) as local:
                    found = {e.name: e for e in local if (e.is_file() if kind == "file" else e.is_dir())}
            else:
                listed = self._asked(lambda: self._listed(folder))
                found = {posixpath.basename(e["name"].rstrip("/")): e for e in listed if e["type"] == kind}
        except FileNotFoundError:
            return {}
        return dict(sorted(found.items()))

    def _listed(self, folder: str) -> Sequence[dict[str, Any]]:
        files, path = self._files, self.path(folder)
        files.invalidate_cache(path)
        return files.ls(path, detail=True)

    def _told(self, listed: Any) -> tuple[int, float]:
        """Size and time of a file of a listing."""
        if self.is_local:
            stat = listed.stat()
            return stat.st_size, stat.st_mtime
        told = next((listed[name] for name in _TIMES if name in listed), None)
        told = told or self._asked(lambda: self._files.modified(listed["name"]))  # where no listing tells
        return listed["size"], told.timestamp()

    def read(self, name: str) -> bytes:
        """The whole file."""
        return self._asked(lambda: self._files.cat_file(self.path(name)))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer where the file ends before."""
        return self.read_ranges(name, [(offset, size)])[0]

    def read_ranges(self, name: str, places: Sequence[tuple[int, int]]) -> Sequence[bytes]:
        """The bytes at each (offset, size). Elsewhere each is a request, so they are asked for together."""
        if self.is_local:
            with open(self.path(name), "rb") as file:
                return [file.read(size) for offset, size in places if file.seek(offset) >= 0]
        found: dict[tuple[int, int], bytes] = {(offset, 0): b"" for offset, size in places if not size}

        def request() -> None:
            left = [place for place in dict.fromkeys(places) if place not in found]
            starts, ends = [offset for offset, _ in left], [offset + size for offset, size in left]
            answers = self._files.cat_ranges([self.path(name)] * len(left), starts, ends, on_error="return")
            found.update((p, data) for p, data in zip(left, answers, strict=True) if not isinstance(data, Exception))
            for failure in (answer for answer in answers if isinstance(answer, Exception)):
                raise failure  # of many ranges some fail every time, so what came is not asked for again

        self._asked(request)
        return [found[place] for place in places]

    def open(self, name: str) -> BinaryIO:
        """The file for reading here and there in it; elsewhere nothing is read ahead."""
        return open(self.path(name), "rb") if self.is_local else cast(BinaryIO, _Elsewhere(self, name))

    def size(self, name: str) -> int:
        """Bytes of the file, as the file system tells it."""
        return self._asked(lambda: self._files.size(self.path(name)))

    def fetch(self, name: str, path: Path) -> int:
        """Copies the file to `path` on this machine; its size, bytes, as the file system tells it."""
        self._asked(lambda: self._files.get_file(self.path(name), str(path)))
        return self.size(name)

    def exists(self, name: str) -> bool:
        """Whether the file is there. Not fsspec's `exists`, which takes any failure for a no."""
        try:
            self._asked(lambda: self._files.info(self.path(name)))
        except FileNotFoundError:
            return False
        return True

    def remove(self, name: str) -> None:
        """Deletes the file if it is there."""
        with suppress(FileNotFoundError):
            self._asked(lambda: self._files.rm_file(self.path(name)))

    @contextmanager
    def writing(self, folder: str) -> Iterator[Aside]:
        """A file to write to whose name is not yet known: `aside.publish(name)` makes it appear, whole and durable.

        On a local disk: a hidden temporary neighbour, fsync, rename, fsync of the folder. Elsewhere: a local temporary
        file that is uploaded in one piece (object stores show an object only when it is complete; over SFTP under a hidden
        name, then renamed). What is not published is gone when the block ends.
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
            self._asked(lambda: self._put(path, self.path(name)))
            return
        final = Path(self.path(name))
        final.parent.mkdir(parents=True, exist_ok=True)
        _sync(path)
        os.replace(path, final)
        _sync(final.parent)

    def _put(self, path: Path, place: str) -> None:
        files = self._files
        if not _RENAMING.intersection([files.protocol] if isinstance(files.protocol, str) else files.protocol):
            files.put_file(str(path), place)
            return
        aside = posixpath.join(posixpath.dirname(place), path.name)
        files.put_file(str(path), aside)
        files.mv(aside, place)


class _Elsewhere(io.RawIOBase):
    """A file elsewhere. Every read is a request of its own, of just these bytes."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name, self._at, self._size = folder, name, 0, folder.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._folder.read_range(self._name, self._at, max(0, min(len(buffer), self._size - self._at)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def readall(self) -> bytes:
        return self.read(max(0, self._size - self._at)) or b""


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
