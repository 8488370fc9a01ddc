"""What the page shows, read from the dataset folder and the runs; small, and the same choice every time.

Samples are chosen by key, which is a digest and so a fair draw; partitions are read in ingest order, and only as many
as it takes. Everything here is optional: what is not there is None or empty, and the page says what would make it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.funnel import FunnelRow
from pipeline.plan import Ticket
from pipeline.stage import Stage
from pipeline.storage import Folder
from pipeline.tables import read_parquet, read_payloads, read_table
from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.pack import Pack

from .recipe import Recipe
from .report_pictures import Picture, show_bytes

FACTS = (
    "width",
    "height",
    "http_status",
    "directives",
    "duplicate_of",
    "distance",
    "cosine",
    "evaluation_item",
    "caption",
    "clip_score",
    "alt_score",
    "alt_supported",
)
"""Columns of any stage that the page can show of a sample."""
PAIRS = 12
UNSUPPORTED = 4  # of the pairs: those whose alt text the picture does not support are what a reader looks for
EXAMPLES = 4
PARTITIONS = 100
"""How many are searched for samples to show, so that a page of a large dataset takes no longer than that of a small one."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What all the tables together say of one sample."""

    key: str
    url: str
    text: str
    facts: Mapping[str, Any]
    """Values of FACTS; those that no stage wrote are missing."""
    picture: Picture | None
    """As it was downloaded; None where it was not."""
    original: Picture | None = None
    """The picture that this one duplicates."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Samples that ended at a stage for one reason."""

    stage: str
    status: str
    """`dropped` or `failed`."""
    reason: str
    count: int
    samples: list[Sample]

    @property
    def has_pictures(self) -> bool:
        """Whether any of them got as far as a picture."""
        return any(s.picture for s in self.samples)


@dataclass(frozen=True, kw_only=True)
class ScoreSpread:
    """All scores, and where the filter cuts."""

    captions: np.ndarray
    """Picture against dense caption, float32 (N,)."""
    alts: np.ndarray
    """Picture against alt text, float32 (M,)."""
    threshold: float | None
    alt_threshold: float | None
    row: FunnelRow | None
    """What became of the rows at the filter; None where it did not run."""
    rules: tuple[str, ...] = ()
    """What the filter asks of a caption, in words; none where it asks nothing of scores."""


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """One training as its log tells it."""

    name: str
    connector: str
    total: int
    """Samples that the recipe asks for."""
    samples: np.ndarray
    """Samples seen at each line of the log, (L,)."""
    losses: np.ndarray
    """Mean loss since the line before, (L,)."""
    phases: np.ndarray
    """Phase of each line, (L,)."""
    labels: list[str] = field(default_factory=list)
    """Per phase, such as `16 px`."""
    bins: list[float | None] = field(default_factory=list)
    """Loss by timestep bin in the last line; the first has the least noise."""

    @property
    def is_done(self) -> bool:
        """Whether it saw all its samples."""
        return bool(len(self.samples)) and int(self.samples[-1]) >= self.total


def look_up(dataset: Folder, stages: Sequence[Stage], ticket: Ticket, keys: Sequence[str]) -> dict[str, Sample]:
    """The samples of these keys that are in this partition."""
    wanted = pa.array(sorted(keys), pa.string())
    rows = _only(read_parquet(dataset, ticket.partition.parquet, ["key", "url", "text"]), wanted).to_pylist()
    if not rows:
        return {}  # an original may lie in any earlier partition: most are asked in vain
    facts: dict[str, dict[str, Any]] = {row["key"]: {} for row in rows}
    pictures: dict[str, Picture | None] = {}
    camera = next((s for s in stages if "image" in s.payload), None)  # the first: packing writes smaller ones
    for stage in stages:
        name = ticket.tables.get(stage.name)
        columns = [c for c in FACTS if c in stage.writes.names]
        places = [f"image_{part}" for part in ("offset", "size")] if stage is camera else []
        if name is None or not columns + places:
            continue
        found = _only(read_table(dataset, name, ["key", *columns, *places]), wanted)
        for row in found.select(["key", *columns]).to_pylist():
            facts[row.pop("key")].update({c: v for c, v in row.items() if v is not None})
        if places:
            there = found.filter(pc.is_valid(found.column("image_offset")))
            shown = map(show_bytes, read_payloads(dataset, name, there, "image"))
            pictures.update(zip(there.column("key").to_pylist(), shown, strict=True))
    return {
        row["key"]: Sample(
            key=row["key"],
            url=row["url"],
            text=row["text"] or "",
            facts=facts[row["key"]],
            picture=pictures.get(row["key"]),
        )
        for row in rows
    }


def caption_pairs(dataset: Folder, stages: Sequence[Stage], tickets: Sequence[Ticket]) -> list[Sample]:
    """Samples that came through to the views, of the first `PARTITIONS`; up to a third of them with an alt text that the
    picture does not support.
    """
    if not any("caption" in s.writes.names for s in stages):
        return []
    gate = [s for s in stages if not isinstance(s, Pack)][-1]
    judge = next((s for s in stages if "alt_supported" in s.writes.names), None)
    groups: dict[bool, list[tuple[str, Ticket]]] = {True: [], False: []}
    for ticket in [t for t in tickets if gate.name in t.tables][:PARTITIONS]:
        if len(groups[True]) >= PAIRS and (judge is None or len(groups[False]) >= UNSUPPORTED):
            break
        table = read_table(dataset, ticket.tables[gate.name], ["key", "status"])
        kept = sorted(table.filter(pc.equal(table.column("status"), "kept")).column("key").to_pylist())
        supported = dict.fromkeys(kept, True)
        if judge and judge.name in ticket.tables:
            verdicts = read_table(dataset, ticket.tables[judge.name], ["key", "alt_supported"])
            supported |= dict(zip(*(c.to_pylist() for c in verdicts.columns), strict=True))
        for key in kept:
            group, most = (groups[False], UNSUPPORTED) if supported[key] is False else (groups[True], PAIRS)
            if len(group) < most:
                group.append((key, ticket))
    chosen = sorted([*groups[False], *groups[True][: PAIRS - len(groups[False])]], key=lambda pair: pair[0])
    return _look_up_all(dataset, stages, chosen)


def ended_examples(
    dataset: Folder, stages: Sequence[Stage], tickets: Sequence[Ticket], funnel: Mapping[str, FunnelRow]
) -> list[Ended]:
    """For every stage, status and reason up to four samples; none where the first `PARTITIONS` have none."""
    ends = []
    for stage in stages:
        row = funnel[stage.name]
        counts = {
            (s, r): n for s, found in (("dropped", row.dropped), ("failed", row.failed)) for r, n in found.items()
        }
        chosen: dict[tuple[str, str], list[tuple[str, Ticket]]] = {end: [] for end in counts}
        for ticket in [t for t in tickets if stage.name in t.tables][:PARTITIONS]:
            if all(len(found) >= min(EXAMPLES, counts[end]) for end, found in chosen.items()):
                break
            table = read_table(dataset, ticket.tables[stage.name], ["key", "status", "reason"])
            table = table.filter(pc.not_equal(table.column("status"), "kept")).sort_by("key")
            for key, status, reason in zip(*(c.to_pylist() for c in table.columns), strict=True):
                if len(chosen[status, reason or ""]) < EXAMPLES:
                    chosen[status, reason or ""].append((key, ticket))
        for (status, reason), found in chosen.items():
            samples = _look_up_all(dataset, stages, found)
            samples = _with_originals(dataset, stages, tickets[:PARTITIONS], samples)
            ends.append(
                Ended(stage=stage.name, status=status, reason=reason, count=counts[status, reason], samples=samples)
            )
    return ends


def score_spread(
    dataset: Folder, stages: Sequence[Stage], tickets: Sequence[Ticket], funnel: Mapping[str, FunnelRow]
) -> ScoreSpread | None:
    """All scores; None where nothing is scored."""
    sieve = next((s for s in stages if isinstance(s, ClipFilter)), None)
    captions, alts = (_column(dataset, stages, tickets, name) for name in ("clip_score", "alt_score"))
    if not len(captions):
        return None
    return ScoreSpread(
        captions=captions,
        alts=alts,
        threshold=sieve.config.min_score if sieve else None,
        alt_threshold=sieve.config.min_alt_score if sieve else None,
        row=funnel[sieve.name] if sieve and funnel[sieve.name].given else None,
        rules=filter_rules(sieve.config) if sieve else (),
    )


def filter_rules(config: ClipFilterConfig) -> tuple[str, ...]:
    """What the filter's settings ask of a caption, those that are set."""
    asked = (
        ("a score of at least", config.min_score),
        ("no sentence below", config.min_sentence_score),
        ("a mean of its sentences of at least", config.min_sentence_mean),
        ("a gain over the alt text of at least", config.min_gain),
    )
    cuts = (f"{column} at its percentile or above" for column in config.cuts)
    return (*(f"{words} {least:g}" for words, least in asked if least is not None), *cuts)


def training_logs(recipe: Recipe) -> list[TrainingLog]:
    """The trainings of the recipe that have a log."""
    logs = []
    for name, config in recipe.trainings.items():
        path = recipe.run_folder(name) / "log.jsonl"
        lines = (
            [line for line in _json_lines(path.read_text()) if line.get("loss") is not None] if path.is_file() else []
        )
        if lines:
            logs.append(
                TrainingLog(
                    name=name,
                    connector=config.connector.kind,
                    total=config.samples,
                    samples=np.array([line["samples"] for line in lines]),
                    losses=np.array([line["loss"] for line in lines], np.float64),
                    phases=np.array([line["phase"] for line in lines]),
                    labels=[f"{p.resolution} px" for p in config.phases],
                    bins=lines[-1].get("bins") or [],
                )
            )
    return logs


def _json_lines(text: str) -> Iterable[dict[str, Any]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # half a line, of a run that is writing it now or was killed
            continue


def _column(dataset: Folder, stages: Sequence[Stage], tickets: Sequence[Ticket], name: str) -> np.ndarray:
    writer = next((s for s in stages if name in s.writes.names), None)
    tables = [t.tables[writer.name] for t in tickets if writer.name in t.tables] if writer else []
    parts = [read_table(dataset, table, [name]).column(name).drop_null().to_numpy() for table in tables]
    values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return values[np.isfinite(values)]


def _only(table: pa.Table, keys: pa.Array) -> pa.Table:
    return table.filter(pc.is_in(table.column("key"), value_set=keys))


def _look_up_all(dataset: Folder, stages: Sequence[Stage], chosen: Sequence[tuple[str, Ticket]]) -> list[Sample]:
    """The chosen samples in their order; each partition is read once."""
    by_partition: dict[str, tuple[Ticket, list[str]]] = {}
    for key, ticket in chosen:
        by_partition.setdefault(ticket.partition.name, (ticket, []))[1].append(key)
    found: dict[str, Sample] = {}
    for ticket, keys in by_partition.values():
        found |= look_up(dataset, stages, ticket, keys)
    return [found[key] for key, _ in chosen]


def _with_originals(
    dataset: Folder, stages: Sequence[Stage], tickets: Sequence[Ticket], samples: Sequence[Sample]
) -> list[Sample]:
    """The samples, duplicates with the picture that they repeat, which may lie in an earlier partition."""
    missing = {str(s.facts["duplicate_of"]) for s in samples if "duplicate_of" in s.facts}
    originals: dict[str, Sample] = {}
    for ticket in tickets:
        if missing <= originals.keys():
            break
        originals |= look_up(dataset, stages, ticket, sorted(missing - originals.keys()))
    return [
        Sample(
            key=s.key, url=s.url, text=s.text, facts=s.facts, picture=s.picture,
            original=originals[s.facts["duplicate_of"]].picture if s.facts.get("duplicate_of") in originals else None,
        )
        for s in samples
    ]  # fmt: skip
