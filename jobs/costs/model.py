"""The arithmetic of `densebridge cost`: rows through the stages; from rates, shares and sizes to hours, bytes, requests, money.

A stage's time is that of its own work. What Ray and the engine take beside it (`benchmarks/scaling.py` measures it) is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.plan import depends_on
from pipeline.stage import Stage

from .requests import NO_REQUESTS, WRITTEN, Requests, requests_of

Origin = Literal["measured", "stated", "assumed"]
GB = 1 << 30  # as stores bill them


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number, and whence it is."""

    value: float
    origin: Origin
    source: str = ""
    """Of an assumed one: who published it."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What is known of a stage beforehand."""

    keep: Figure
    """Share of the rows that it is given which it keeps."""
    rate: Figure | None = None
    """Rows a second of one actor; None where nobody knows it."""
    size: Figure | None = None
    """Bytes of its files for each row that it keeps."""


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage takes."""

    stage: Stage
    rows: float
    """That it is given."""
    figures: Figures
    requests: Requests
    read_bytes: float | None
    """Pictures and other payloads that it reads from the dataset folder; tables are little beside them."""

    @property
    def seconds(self) -> float | None:
        """Of one worker."""
        return self.rows / self.figures.rate.value if self.figures.rate else None

    @property
    def gpu_hours(self) -> float | None:
        """At work; what a pool holds while it waits is not in it."""
        if not self.stage.needs.gpus:
            return 0.0
        return None if self.seconds is None else self.seconds * self.stage.needs.gpus / 3600

    @property
    def cpu_hours(self) -> float | None:
        """Of the cores that its actors reserve, at work."""
        return None if self.seconds is None else self.seconds * self.stage.needs.cpus / 3600

    @property
    def stored_bytes(self) -> float | None:
        """In the dataset folder."""
        return self.rows * self.figures.keep.value * self.figures.size.value if self.figures.size else None

    @property
    def actors(self) -> int:
        """The most that its pool may have."""
        return self.stage.pool[1]

    @property
    def wall_seconds(self) -> float | None:
        """Of the stage by itself, with its most actors."""
        return None if self.seconds is None else self.seconds / self.actors


@dataclass(frozen=True, kw_only=True)
class Prices:
    """In whatever money the user counts; None is not stated, and then not in any sum."""

    gpu_hour: float | None = None
    cpu_hour: float | None = None
    million_reads: float | None = None
    million_writes: float | None = None
    gb_read: float | None = None
    gb_month: float | None = None

    @property
    def any_once(self) -> bool:
        """Whether anything that a build takes once has a price."""
        return any(price is not None for price in (self.gpu_hour, self.cpu_hour, self.million_reads, self.gb_read))

    def of(self, cost: StageCost) -> float | None:
        """What the stage's work costs once; None where a quantity with a price is not known."""
        return self.total(
            gpu_hours=cost.gpu_hours,
            cpu_hours=cost.cpu_hours,
            requests=cost.requests,
            read_bytes=cost.read_bytes,
        )

    def total(
        self,
        *,
        gpu_hours: float | None = 0.0,
        cpu_hours: float | None = 0.0,
        requests: Requests = NO_REQUESTS,
        read_bytes: float | None = 0.0,
    ) -> float | None:
        """Of these quantities; None where one that has a price is not known."""
        pairs = (
            (self.gpu_hour, gpu_hours),
            (self.cpu_hour, cpu_hours),
            (self.million_reads, requests.reads / 1e6),
            (self.million_writes, requests.writes / 1e6),
            (self.gb_read, None if read_bytes is None else read_bytes / GB),
        )
        priced = [(price, quantity) for price, quantity in pairs if price is not None]
        if any(quantity is None for _, quantity in priced):
            return None
        return sum(price * (quantity or 0.0) for price, quantity in priced)

    def month(self, size: float | None) -> float | None:
        """What so many bytes cost for each month that they lie there."""
        return None if self.gb_month is None or size is None else self.gb_month * size / GB


def rows_given(stages: Sequence[Stage], rows: float, keep: Mapping[str, float]) -> list[float]:
    """Per stage the rows that it is given of `rows`, where each stage keeps its share: those that all before it let through
    which may end rows here, and of which there is what it reads. A share counts as the same whoever else drops rows.
    """
    return [rows * math.prod(keep[s.name] for s in depends_on(stages, i)) for i in range(len(stages))]


def cost_stages(
    stages: Sequence[Stage], figures: Mapping[str, Figures], *, rows: float, partitions: int
) -> list[StageCost]:
    """What a build of so many rows takes, a stage each."""
    given = rows_given(stages, rows, {name: f.keep.value for name, f in figures.items()})
    found = []
    for index, (stage, own) in enumerate(zip(stages, given, strict=True)):
        known = figures[stage.name]
        tar = known.size.value * known.keep.value * own / partitions if known.size and stage.payload else 0.0
        requests = requests_of(
            stages, index, partitions=partitions, rows=own, keeps_all=known.keep.value == 1, tar_bytes=tar
        )
        read = _read_bytes(stages, index, figures, own)
        found.append(StageCost(stage=stage, rows=own, figures=known, requests=requests, read_bytes=read))
    return found


def _read_bytes(stages: Sequence[Stage], index: int, figures: Mapping[str, Figures], rows: float) -> float | None:
    """Of the one payload that a stage may read."""
    for provider in reversed(depends_on(stages, index)):
        if {*provider.payload} & {*stages[index].reads}:
            size = figures[provider.name].size
            return rows * size.value if size else None
    return 0.0


@dataclass(frozen=True, kw_only=True)
class Wall:
    """How long a build takes."""

    seconds: float
    slowest: str
    """The stage that the others wait for longest."""
    limit: Literal["pools", "GPUs", "CPUs"] = "pools"
    """What makes it so long: the pools' sizes, or what the cluster has."""
    gpus: float | None = None
    """That the cluster has; None: as many as the pools may take."""


def critical_path(
    costs: Sequence[StageCost], partitions: int, *, gpus: float | None = None, cpus: float | None = None
) -> Wall:
    """With the most actors that every pool may have, and no more GPUs or CPUs at work than the cluster has (None: as many as
    that takes). Stages overlap partition by partition: the slowest is at work all the time but for one partition on its way
    through the others. A `whole` stage begins when all before it have ended. A stage without a rate takes no time here.
    """
    known = [cost for cost in costs if cost.seconds]
    if not known:
        return Wall(seconds=0.0, slowest="", gpus=gpus)
    segments: list[list[StageCost]] = [[]]
    for cost in known:
        if cost.stage.whole:
            segments.append([])
        segments[-1].append(cost)
    seconds = sum(_overlapping(segment, partitions) for segment in segments)
    slowest = max(known, key=lambda cost: cost.wall_seconds or 0.0).stage.name
    wall = Wall(seconds=seconds, slowest=slowest, gpus=gpus)
    by_gpus = sum(c.gpu_hours or 0.0 for c in known) * 3600 / gpus if gpus else 0.0
    by_cpus = sum(c.cpu_hours or 0.0 for c in known) * 3600 / cpus if cpus else 0.0
    if max(by_gpus, by_cpus) > seconds:
        limit: Literal["GPUs", "CPUs"] = "GPUs" if by_gpus >= by_cpus else "CPUs"
        return replace(wall, seconds=max(by_gpus, by_cpus), limit=limit)
    return wall


def _overlapping(costs: Sequence[StageCost], partitions: int) -> float:
    """Seconds of stages that each work on one partition after another, with several actors, as soon as the one before has."""
    each = [(cost.seconds or 0.0) / partitions for cost in costs]
    rounds = [math.ceil(partitions / cost.actors) for cost in costs]
    return max((n * own + sum(each) - own for n, own in zip(rounds, each, strict=True)), default=0.0)


@dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """What one phase of a training takes."""

    name: str
    """`<training>.<number>`."""
    samples: int
    rate: Figure | None
    """Samples a second of one GPU; None where nobody has stated it."""

    @property
    def gpu_hours(self) -> float | None:
        """None without a rate."""
        return self.samples / self.rate.value / 3600 if self.rate else None


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a recipe takes."""

    rows: float
    partitions: int
    source: Figure
    """Bytes of a partition's row."""
    stages: list[StageCost]
    phases: list[PhaseCost]
    wall: Wall

    @property
    def without_rate(self) -> list[str]:
        """Stages whose time nobody knows: hours, time and money leave them out."""
        return [cost.stage.name for cost in self.stages if cost.seconds is None]

    @property
    def gpu_hours(self) -> float:
        """At work, of the stages with a rate."""
        return sum(cost.gpu_hours or 0.0 for cost in self.stages)

    @property
    def cpu_hours(self) -> float:
        """At work, of the stages with a rate."""
        return sum(cost.cpu_hours or 0.0 for cost in self.stages)

    @property
    def held_gpu_hours(self) -> float:
        """If the pools had their most actors, or all GPUs there are, all the time; the bill is between it and `gpu_hours`."""
        most = sum(cost.actors * cost.stage.needs.gpus for cost in self.stages)
        return self.wall.seconds * min(most, self.wall.gpus or math.inf) / 3600

    @property
    def source_requests(self) -> Requests:
        """To write the partitions."""
        return WRITTEN.times(self.partitions)

    @property
    def stored_bytes(self) -> float | None:
        """Of the whole dataset folder; None where a stage's are not known."""
        sizes = [self.rows * self.source.value, *(cost.stored_bytes for cost in self.stages)]
        return None if None in sizes else sum(size or 0.0 for size in sizes)

    @property
    def requests(self) -> Requests:
        """Of the whole build."""
        return sum((cost.requests for cost in self.stages), self.source_requests)

    def money(self, prices: Prices) -> float | None:
        """Of the build alone, once; None where a quantity with a price is not known."""
        parts = [*(prices.of(cost) for cost in self.stages), prices.total(requests=self.source_requests)]
        return None if None in parts else sum(part or 0.0 for part in parts)
