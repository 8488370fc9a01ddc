"""Bytes of a view's shards: from open files where the dataset is on this machine, else by requests or from copies on its disk.

A store of objects answers a request in tens of milliseconds and sells bandwidth, so a sample at random costs a request, and a
shard that many samples are wanted of is better copied whole. Copies are kept in one folder, for all processes of the machine.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.manifest import SHARD
from pipeline.shards import View
from pipeline.storage import Folder

OPEN = 64
"""Shards whose descriptors stay open."""
ATTEMPTS = 3
"""How often something elsewhere is asked for before it counts as lost."""
_FETCHERS = 4  # shards that one process copies at a time
_LOCKS = 256  # lock files: two shards that share one only wait for each other
_T = TypeVar("_T")

Upcoming = Callable[[int], Sequence[str]]
"""Position of a phase → the shards that are wanted from there on, the first wanted first."""


class Shards(Protocol):
    """Where a reader has its bytes from. Threads may share one."""

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """The bytes at a place; fewer where the shard ends before. Raises OSError where it cannot be read."""

    def forget(self, shard: str) -> bool:
        """Drops a copy of the shard that proved damaged; whether there are copies, so that reading again may help."""

    def advance(self, position: int) -> None:
        """Tells that samples from `position` on are read next."""

    def close(self) -> None:
        """Ends what runs beside."""


def open_shards(views: Sequence[View], cache: str | None, cache_gib: float, upcoming: Upcoming | None = None) -> Shards:
    """How this machine reads the shards of views of one dataset. Raises ValueError where `cache` cannot hold what is read."""
    dataset = views[0].dataset
    if dataset.is_local:
        return OpenShards(lambda shard: Descriptor(dataset.path(shard)))
    if cache is None:
        return FarShards(dataset)
    if upcoming is None:  # a shuffle over all shards, so all of them are wanted all the time
        check_fits(views, cache, cache_gib)
    return ShardCache(dataset, Path(cache), round(cache_gib * 2**30), upcoming)


def check_fits(views: Sequence[View], cache: str, cache_gib: float) -> None:
    """Raises ValueError where a shuffle over whole views would throw shards out before they are read again."""
    needed = sum(sum(shard_sizes(view).values()) for view in views) / 2**30
    if needed > cache_gib:
        names = ", ".join(view.info.view for view in views)
        raise ValueError(
            f"views {names} have {needed:.1f} GiB of shards and training.cache_gib is {cache_gib:g}: give the phase a window, "
            f"set cache_gib to {int(needed) + 1} where {cache} has the room, or cache to None to read by requests"
        )


def shard_sizes(view: View) -> dict[str, int]:
    """Of each shard that the manifest names, where its last member ends, bytes."""
    ends: dict[str, int] = {}
    manifest = view.manifest
    for name in manifest.column_names:
        if not name.endswith("_offset"):
            continue
        member = name.removesuffix("_offset")
        own = f"{member}_{SHARD}"
        shards = manifest.column(own if own in manifest.column_names else SHARD).cast(pa.string())
        end = pc.add(manifest.column(name), manifest.column(f"{member}_size"))
        found = pa.table({"shard": shards, "end": end}).group_by("shard").aggregate([("end", "max")])
        for row in found.to_pylist():
            if row["shard"] is not None and row["end_max"] is not None:
                ends[row["shard"]] = max(ends.get(row["shard"], 0), row["end_max"])
    return ends


class Descriptor:
    """An open file that closes when nobody reads it any more, which may be after it was dropped from the open ones."""

    def __init__(self, path: Path | str) -> None:
        self.number = -1
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class OpenShards:
    """Shards that are files here. Those read last stay open: opening takes longer than reading."""

    def __init__(self, opened: Callable[[str], Descriptor], limit: int = OPEN) -> None:
        """`opened`: opens a shard."""
        self._opened, self._limit = opened, limit
        self._open: OrderedDict[str, Descriptor] = OrderedDict()
        self._lock = threading.Lock()
        self._forgotten = 0

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """As `Shards.read`."""
        descriptor = self._descriptor(shard)  # held while it is read, or another thread's reading might close it
        return os.pread(descriptor.number, size, offset)

    def _descriptor(self, shard: str) -> Descriptor:
        while True:
            with self._lock:
                if shard in self._open:
                    self._open.move_to_end(shard)
                    return self._open[shard]
                forgotten = self._forgotten
            opened = self._opened(shard)  # unlocked: it may have to be fetched first
            with self._lock:
                if self._forgotten != forgotten:  # it may be what was forgotten while we opened it
                    continue
                kept = self._open.setdefault(shard, opened)
                while len(self._open) > self._limit:
                    self._open.popitem(last=False)
            return kept

    def forget(self, shard: str) -> bool:
        """Closes it; there is no copy."""
        with self._lock:
            self._forgotten += 1
            self._open.pop(shard, None)
        return False

    def advance(self, position: int) -> None:
        """Nothing is read ahead: the system does that."""

    def close(self) -> None:
        """Closes all."""
        with self._lock:
            self._open.clear()


class FarShards:
    """Shards elsewhere, read by one request a member."""

    def __init__(self, dataset: Folder, *, pause: float = 1.0) -> None:
        """`pause`: seconds before the second attempt; twice as long before the third."""
        self._dataset, self._pause = dataset, pause

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """As `Shards.read`."""
        return _tried(lambda: self._dataset.read_range(shard, offset, size), self._pause)

    def forget(self, shard: str) -> bool:
        """There is no copy."""
        return False

    def advance(self, position: int) -> None:
        """Nothing is read ahead."""

    def close(self) -> None:
        """Nothing is open."""


class ShardCache:
    """Copies of shards in a folder of this machine, at most `limit` bytes of them beside those in the making. What
    `upcoming` tells of is fetched before it is asked for.

    Processes share the folder: a shard is fetched by whoever has its lock, aside, and renamed once it is as long as the store
    says. The system gives the lock of a process that died to the next, who writes over what was left. A copy that is dropped
    while it is read stays readable until it is closed, and so keeps its room for that long.
    """

    def __init__(
        self, dataset: Folder, folder: Path, limit: int, upcoming: Upcoming | None = None, *, pause: float = 1.0
    ) -> None:
        self._dataset, self._folder, self._limit, self._pause = dataset, folder, limit, pause
        self._upcoming = upcoming or (lambda position: ())
        self._wanted: tuple[str, ...] = ()
        self._forgotten: set[str] = set()
        self._pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="shards")
        (folder / "locks").mkdir(parents=True, exist_ok=True)
        self._clean()
        self._files = OpenShards(self._fetched)

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """As `Shards.read`; fetches the shard first where it is not here."""
        return self._files.read(shard, offset, size)

    def forget(self, shard: str) -> bool:
        """As `Shards.forget`; dropped is a shard once, as it may be damaged where it lies. Whoever read the damaged copy too may
        read again.
        """
        with self._locked(copy := self._copy(shard)):
            if shard not in self._forgotten:
                copy.unlink(missing_ok=True)  # before it is closed, or another thread would open it again
                self._files.forget(shard)
                self._forgotten.add(shard)
        return True

    def advance(self, position: int) -> None:
        """Begins to fetch what is wanted from there on and not here yet."""
        wanted = tuple(self._upcoming(position))
        if wanted == self._wanted:
            return
        new = [shard for shard in wanted if shard not in self._wanted]
        self._wanted = wanted
        for shard in new:
            self._pool.submit(self._fetch_ahead, shard)

    def close(self) -> None:
        """Stops fetching ahead."""
        self._wanted = ()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.close()

    def _copy(self, shard: str) -> Path:
        name = hashlib.blake2b(f"{self._dataset.url}/{shard}".encode(), digest_size=16).hexdigest()
        return self._folder / f"{name}.tar"

    @contextmanager
    def _locked(self, copy: Path, *, wait: bool = True) -> Iterator[None]:
        """Holds a copy's lock against threads and processes. Raises BlockingIOError where it is taken and not waited for."""
        number = int(copy.stem[:8], 16) % _LOCKS
        with self._holding(f"{number:03d}", wait=wait):
            yield

    @contextmanager
    def _holding(self, name: str, *, wait: bool = True) -> Iterator[None]:
        with open(self._folder / "locks" / name, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            yield

    def _fetch_ahead(self, shard: str) -> None:
        if shard in self._wanted:  # else the readers are past it
            with suppress(OSError):  # another process has it in hand, or it fails: who reads it will wait, or be told
                self._fetched(shard, wait=False)

    def _fetched(self, shard: str, *, wait: bool = True) -> Descriptor:
        """The shard's copy, made where there is none. Raises OSError where that fails."""
        copy = self._copy(shard)
        with suppress(FileNotFoundError):
            return self._used(copy)
        with self._locked(copy, wait=wait):
            with suppress(FileNotFoundError):
                return self._used(copy)  # made while we waited
            aside = copy.with_suffix(".aside")
            _tried(lambda: self._fetch(shard, aside), self._pause)
            fetched = Descriptor(aside)
            with self._holding("room"):  # or two that fetch would both count on the same room
                self._make_room(aside.stat().st_size)
                os.replace(aside, copy)
            return fetched

    def _used(self, copy: Path) -> Descriptor:
        found = Descriptor(copy)
        os.utime(found.number)
        return found

    def _fetch(self, shard: str, aside: Path) -> None:
        size = self._dataset.fetch(shard, aside)
        if aside.stat().st_size != size:
            raise OSError(f"of {shard} came {aside.stat().st_size} of {size} bytes")

    def _make_room(self, size: int) -> None:
        """Drops the copies that were opened longest ago, those that are not wanted first, so that one of `size` bytes fits."""
        wanted = {self._copy(shard) for shard in self._wanted}
        found = []
        for copy in self._folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process drops too
                stat = copy.stat()
                found.append((copy in wanted, stat.st_mtime_ns, stat.st_size, copy))
        room = self._limit - size - sum(one[2] for one in found)
        for _, _, freed, copy in sorted(found):
            if room >= 0:
                return
            copy.unlink(missing_ok=True)
            room += freed

    def _clean(self) -> None:
        """Deletes what processes left that died while they fetched."""
        for aside in self._folder.glob("*.aside"):
            with suppress(BlockingIOError), self._locked(aside, wait=False):  # else somebody is writing it now
                aside.unlink(missing_ok=True)


def _tried(ask: Callable[[], _T], pause: float) -> _T:
    """What `ask` returns, asked again after a while where it raises OSError, but for what is not there."""
    for attempt in range(1, ATTEMPTS):
        try:
            return ask()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(pause * attempt)
    return ask()
