"""A file system that fails: `unreliable://SHARE-SEED/folder` is the local folder `/folder`, and a share of all calls raises what
networks and stores raise. Which calls is decided by the seed, the call and how often it was made, so every run fails alike.

A failing write leaves half a file behind. `unreliable://SHARE-SEED-SECONDS/...` is slow besides, as often.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import sleep
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

FAILURES = (
    OSError(16, "Please reduce your request rate"),
    TimeoutError("timed out"),
    ConnectionResetError(104, "reset"),
)


class UnreliableFiles(LocalFileSystem):
    """Counts its calls and how many failed in `asked` and `failed`."""

    protocol = ("unreliable", "local")  # it renames in one step

    def __init__(self, share: float, seed: str, seconds: float = 0.0) -> None:
        super().__init__(auto_mkdir=True)
        self.share, self.seed, self.seconds = share, seed, seconds
        self.asked: Counter[tuple[str, str]] = Counter()
        self.failed = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.split("://", 1)[1].split("/", 1)[1] if "://" in path else str(path)

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, Any]:
        share, seed, *seconds = path.split("://", 1)[1].split("/", 1)[0].split("-")
        return {"share": float(share), "seed": seed, "seconds": float(*seconds)}

    def _luck(self, call: str, path: str) -> Exception | None:
        """What this call fails with, if it does."""
        name = "/".join(path.split("/")[-2:])  # as the folder above may have another name each time
        self.asked[call, name] += 1
        told = f"{self.seed} {call} {name} {self.asked[call, name]}"
        drawn = int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest())
        sleep(self.seconds if (drawn >> 32) / 2**32 < self.share else 0.0)
        if (drawn & 0xFFFFFFFF) / 2**32 >= self.share:
            return None
        self.failed += 1
        return FAILURES[drawn % len(FAILURES)]

    def _try(self, call: str, path: str) -> None:
        if failure := self._luck(call, path):
            raise failure

    def ls(self, path: str, detail: bool = False, **given: Any) -> Sequence[Any]:
        self._try("ls", path)
        return LocalFileSystem().ls(path, detail=detail, **given)  # which asks `info` of each file: one call, not many

    def info(self, path: str, **given: Any) -> dict[str, Any]:
        self._try("info", path)
        return super().info(path, **given)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **given: Any) -> bytes:
        self._try("cat", path)
        return super().cat_file(path, start, end, **given)

    def get_file(self, path: str, lpath: str, **given: Any) -> None:
        self._try("get", path)
        super().get_file(path, lpath, **given)

    def put_file(self, lpath: str, rpath: str, **given: Any) -> None:
        failure = self._luck("put", os.path.dirname(rpath))  # the name is drawn by lot
        os.makedirs(os.path.dirname(rpath), exist_ok=True)
        data = Path(lpath).read_bytes()
        Path(rpath).write_bytes(data[: len(data) // 2] if failure else data)
        if failure:
            raise failure

    def mv(self, path1: str, path2: str, **given: Any) -> None:
        """Fails before it renamed, or after, in turn."""
        failure = self._luck("mv", path2)
        if not failure or self.failed % 2:
            os.replace(path1, path2)
        if failure:
            raise failure

    def rm_file(self, path: str) -> None:
        self._try("rm", path)
        super().rm_file(path)

    def modified(self, path: str) -> Any:
        self._try("modified", path)
        return super().modified(path)


fsspec.register_implementation("unreliable", UnreliableFiles, clobber=True)
