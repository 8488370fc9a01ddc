"""A world whose list changes: the lists before and after, a server that counts, and a result held against the right one."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal, TypeVar
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq

from examples.shapes.server import serve
from examples.shapes.source import Row, ShapesSource, rows

ListName = Literal["original", "grown", "added", "removed", "reordered"]
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class World:
    """A shapes source, of which every eleventh row is at first not listed, and the server that has its pictures."""

    source: ShapesSource
    url: str

    def listed(self, name: ListName) -> list[Row]:
        """The rows of a list, in its order; duplicates included."""
        everything = rows(self.source)
        original = [row for row in everything if row.number % 11 != 5]
        match name:
            case "original":
                return original
            case "grown":
                return original + [row for row in everything if row.number % 11 == 5]
            case "added":
                return random.Random(0).sample(everything, len(everything))
            case "removed":
                return [row for spot, row in enumerate(original) if spot % 10 != 5]
            case "reordered":
                return [*original, *original[::10]][::-1]

    def write_list(self, name: ListName, path: Path) -> None:
        """The list as the parquet table that all three tools are pointed at."""
        listed = self.listed(name)
        urls = [self.url + row.path for row in listed]
        pq.write_table(pa.table({"url": urls, "text": [row.text for row in listed]}), path)

    def failing_at_first(self) -> set[str]:
        """URLs that the server answers by 500 the first time, and well from then on."""
        return {self.url + row.path for row in rows(self.source) if row.behaviour == "flaky"}

    def asked(self) -> Counter[str]:
        """How often each picture was asked for so far, by URL."""
        with urlopen(f"{self.url}/asked") as answer:
            return Counter({self.url + path: times for path, times in json.load(answer).items()})


@contextmanager
def changing_world(count: int) -> Iterator[World]:
    """A world of `count` rows on the original list, and its server while the block lasts."""
    source = ShapesSource(count=count * 11 // 10, slow=0.0)
    with serve(source) as url:
        yield World(source=source, url=url)


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What is wrong with a result, in samples."""

    missing: int = 0
    """Wanted and not there."""
    twice: int = 0
    """There more than once."""
    left_over: int = 0
    """There and not wanted."""
    stale: int = 0
    """There with what an earlier setting made."""

    def __str__(self) -> str:
        names = ("missing", "twice", "left over", "stale")
        return ", ".join(f"{n} {name}" for n, name in zip(astuple(self), names, strict=True) if n) or "0"

    @property
    def worst(self) -> int:
        """For choosing among tallies."""
        return sum(astuple(self))


def tally(wanted: Mapping[str, Value], found: Sequence[tuple[str, Value]], either: Collection[str] = ()) -> Tally:
    """Holds what was found against what is wanted; the names in `either` may be there or not."""
    times = Counter(name for name, _ in found)
    return Tally(
        missing=len(wanted.keys() - times.keys() - set(either)),
        twice=sum(n > 1 for n in times.values()),
        left_over=len(times.keys() - wanted.keys() - set(either)),
        stale=len({name for name, value in found if name in wanted and value != wanted[name]}),
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a change cost a tool, and what became of its result."""

    work: int
    """Pictures asked for (img2dataset) or captioned (Ray Data)."""
    again: int
    """Of them, those that had been before."""
    wrong: Tally


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A change, and the same taken back."""

    there: Measured
    back: Measured | None = None
