"""What a stage is: a plain class that reads some columns of a partition and writes its own."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import pyarrow as pa

from .fingerprint import digest_of, plain, settings_id
from .sample import LISTED, MEMBERSHIP
from .spelling import nearest

Columns = Mapping[str, Sequence[Any]]
"""What `process` returns: one sequence a column, in the order of the batch. `status` and `reason` may be left out (kept),
and `transient`, which says of a failed row whether another try may help (no)."""

RESERVED = ("CPU", "GPU", "memory", "object_store_memory")
_EXAMPLES = {"resources": "captioner=1", "labels": "ray.io/accelerator-type=A100"}
_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(rf"!?(?:{_WORD}|in\({_WORD}(?:, ?{_WORD})*\))")  # as Ray's label selectors


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What one actor of a stage takes, and how many there may be."""

    cpus: float = 1.0
    """CPU cores that Ray reserves for each actor."""
    gpus: float = 0.0
    """GPUs for each actor; fractions share one."""
    memory_gb: float = 0.0
    """Memory that Ray reserves for each actor; 0 reserves none."""
    resources: tuple[str, ...] = ()
    """What else each actor takes of a node, as `name=amount`: resources that the cluster's nodes were started with."""
    labels: tuple[str, ...] = ()
    """Labels of the nodes that may run it, as `name=value` in Ray's words for selectors: `ray.io/accelerator-type=A100`,
    `market-type=!spot`, `zone=in(a,b)`."""
    actors: tuple[int, int] = (1, 1)
    """Fewest and most actors of the pool: it grows while partitions wait for the stage, and shrinks when none do."""
    deadline: float = 3600.0
    """Seconds after which a batch counts as hung: Ray's worker is ended, and the row at fault found and set aside."""

    def __post_init__(self) -> None:
        low, high = self.actors
        if not 1 <= low <= high:
            raise ValueError(f"actors must be (fewest, most) with 1 <= fewest <= most, got {self.actors}")
        if min(self.cpus, self.gpus, self.memory_gb) < 0:
            raise ValueError("cpus, gpus and memory_gb cannot be negative")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus must be a fraction of one or a whole number, got {self.gpus:g}")
        if self.deadline <= 0:
            raise ValueError(f"deadline must be more than 0 seconds, got {self.deadline}")
        for name, amount in _pairs("resources", self.resources).items():
            if name in RESERVED or not _is_amount(amount):
                raise ValueError(f"resources takes name=amount of what is no CPU, GPU or memory, got {name}={amount}")
        for name, value in _pairs("labels", self.labels).items():
            if not _LABEL.fullmatch(value):
                raise ValueError(f"labels takes name=value, value being a, !a, in(a,b) or !in(a,b), got {name}={value}")

    @property
    def custom(self) -> dict[str, float]:
        """`resources` by name."""
        return {name: float(amount) for name, amount in _pairs("resources", self.resources).items()}

    @property
    def selector(self) -> dict[str, str]:
        """`labels` by name."""
        return _pairs("labels", self.labels)


def _pairs(field: str, given: Sequence[str]) -> dict[str, str]:
    found = {name: value for name, _, value in (pair.partition("=") for pair in given)}
    if len(found) != len(given) or not all({*found, *found.values()}):
        raise ValueError(f"{field} takes pairs such as {_EXAMPLES[field]}, each name once, got {' '.join(given)}")
    return found


def _is_amount(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


class Stage:
    """Subclass it, set the class attributes, write `process`. Stages know nothing of Ray, of files or of each other.

    The engine calls `load` once in each worker, then `process` for one batch after another; a batch is a pyarrow table
    with `key` and the columns in `reads`. Whatever can go wrong with one sample is a row with a status and a reason.
    """

    name: str
    """Names the stage in the recipe, on the command line and in the dataset folder."""
    version: ClassVar[int] = 1
    """Raise it when the code changes what is written; everything after is then redone."""
    reads: tuple[str, ...] = ()
    """Columns of earlier stages (or of the partition) that `process` is given."""
    optional: tuple[str, ...] = ()
    """Of `reads`, those that no stage before it has to write. What none writes, `process` is not given."""
    writes: pa.Schema
    """Columns that `process` returns, apart from payloads, `status`, `reason` and `transient`."""
    payload: Mapping[str, str] = {}
    """Columns of bytes that go into a WebDataset tar beside the table instead of into it, with their file extension."""
    drops: ClassVar[bool] = True
    """Whether a rule of its own can end rows here. A stage without one does not stand between its neighbours: should it lose
    a row to a fault, only those that read its columns do without that row."""
    ordered: ClassVar[bool] = False
    """Whether a partition's rows depend on the partitions before it (first come wins). Such a stage has one actor."""
    whole: ClassVar[bool] = False
    """Whether a partition's rows depend on all the others (a percentile, say): `survey` is shown them all beforehand. Nothing
    after such a stage starts before all partitions have come to it."""
    revisable: ClassVar[tuple[str, ...]] = ()
    """Settings, as dotted names in `identity()`, under which `revise` can judge an earlier row anew instead of computing it.
    Of several earlier ones the row with the highest value of the first counts as the latest."""
    remembers: ClassVar[tuple[str, ...]] = ()
    """Columns of its own earlier row that `process` is given too, as `earlier_<column>`: null where there is none. It may
    answer `unchanged` for status; the earlier row then stands, payload and all."""
    restates: ClassVar[tuple[str, ...]] = ()
    """Columns that it tells anew of a row that is unchanged, where it has anything to tell."""
    recorded: ClassVar[bool] = False
    """Whether it is recorded beside the tables when and how often each row was tried."""
    not_fingerprinted: ClassVar[tuple[str, ...]] = ("batch_size", "device", "needs")
    """Fields of the configuration that do not change what is written."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def of_source(self) -> tuple[str, ...]:
        """Those of the columns it reads that the source has beside url and text. Where a row has none, it is null."""
        return ()

    @property
    def needs(self) -> Needs:
        """What one actor takes; the configuration's field `needs`, where it has one."""
        return getattr(self.config, "needs", Needs(cpus=0.25))

    @property
    def pool(self) -> tuple[int, int]:
        """Fewest and most actors that work on it at once."""
        return (1, 1) if self.ordered else self.needs.actors

    @property
    def batch_size(self) -> int:
        """Rows for each call of `process`."""
        return getattr(self.config, "batch_size", 1024)

    def identity(self) -> Any:
        """What the stage's output depends on, apart from its input. Stages with models name their weights here."""
        return plain(self.config, frozenset(self.not_fingerprinted))

    @property
    def spaces(self) -> Mapping[str, str]:
        """By column of embeddings or tokens, read or written: the model in whose space they lie. Two models' do not compare."""
        return {}

    @property
    def folder(self) -> str:
        """Where the stage's tables lie in the dataset folder: `<name>-<config id>`."""
        return f"{self.name}-{self.config_id}"

    @cached_property
    def config_id(self) -> str:
        """Fingerprint of settings, version and columns. Taken once, before the build: it may have to read a model's files,
        and a stage must not change its folder under way. It travels to the workers with the stage.
        """
        return digest_of(
            settings_id(self.identity(), self.version), str(self.writes), str(self.payload), ",".join(self.reads)
        )[:12]

    def check_rows(self, rows: int) -> None:
        """Raises ValueError where a stage must not have so many rows in all; asked before a build that would give it any."""

    def load(self) -> None:
        """Loads models and libraries. Called once in each worker, before the first batch and only if there is one."""

    def survey(self, batches: Iterator[pa.Table]) -> None:
        """A `whole` stage's look at the rows of all partitions, in their order, after `load` and before the first `process`."""
        raise NotImplementedError(f"{type(self).__name__} must define survey()")

    def revise(self, row: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The earlier row (status, reason, transient and the stage's columns) under the present settings; None where it
        must be computed. `settings` are those it was made under, as `identity()` told them. A kept row keeps its payload.
        """
        return None

    def process(self, batch: pa.Table) -> Columns:
        """One batch in, the stage's columns out."""
        raise NotImplementedError(f"{type(self).__name__} must define process()")


def check_stages(stages: Sequence[Stage]) -> None:
    """Refuses a list of stages that cannot run: two of one name, say, or a column that nobody before has written."""
    known = {*MEMBERSHIP, LISTED, *(name for stage in stages for name in stage.of_source)}
    names: set[str] = set()
    payloads: set[str] = set()
    spaces: dict[str, str] = {}
    for stage in stages:
        if stage.batch_size < 1:
            raise ValueError(f"stage {stage.name!r} has batch_size {stage.batch_size}: it must be at least 1")
        if stage.name in names:
            raise ValueError(f"two stages are called {stage.name!r}: give one of them another name")
        own = {"key", LISTED}.intersection((*stage.writes.names, *stage.payload))
        if own:
            raise ValueError(
                f"stage {stage.name!r} writes {min(own)!r}, which is the pipeline's own: call it otherwise"
            )
        missing = [c for c in stage.reads if c not in known and c not in stage.optional]
        if missing:
            raise ValueError(
                f"stage {stage.name!r} reads {missing[0]!r}, which no stage before it writes: "
                + nearest(missing[0], sorted(known))
            )
        for column, space in stage.spaces.items():  # which two models do not share
            written = spaces.get(column, space) if column in stage.reads else space
            if written != space:
                raise ValueError(
                    f"stage {stage.name!r} is set for {space}, but {column!r}, which it reads, was made by {written}: "
                    "give both stages the same settings"
                )
            spaces[column] = space
        bytes_read = [c for c in stage.reads if c in payloads]
        if len(bytes_read) > 1:
            raise ValueError(
                f"stage {stage.name!r} reads the bytes {' and '.join(bytes_read)}: one of them is the most"
            )
        both = [c for c in stage.payload if c in stage.reads]
        if both:
            raise ValueError(
                f"stage {stage.name!r} reads and writes the bytes {both[0]!r}: write them under another name"
            )
        names.add(stage.name)
        known |= {*stage.writes.names, *stage.payload}
        payloads |= {*stage.payload}
