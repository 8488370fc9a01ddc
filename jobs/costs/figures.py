"""Which figure counts: what the user states, before what this dataset's builds measured, before what others published."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from pipeline.plan import Plan
from pipeline.spelling import nearest
from pipeline.storage import Folder

from ..estimates import read_rates, read_shares, read_sizes
from ..recipe import Recipe
from .anchors import SOURCE_ROW, anchor_of
from .model import Figure, Figures, PhaseCost


@dataclass(frozen=True, kw_only=True)
class Stated:
    """What the user says, by stage."""

    rates: Mapping[str, float]
    """Rows a second of one actor; of a training or a phase of it samples a second of one GPU."""
    keep: Mapping[str, float]
    """Share of the rows that go on."""
    sizes: Mapping[str, float]
    """Bytes a row that is kept."""


def read_pairs(flag: str, words: Sequence[str], known: Sequence[str], most: float = math.inf) -> dict[str, float]:
    """`download=0.7` and the like: the numbers by name. Raises ValueError in one line for what is none, or names nothing."""
    found = {}
    for word in words:
        name, number = read_pair(flag, word, most)
        if name not in known:
            raise ValueError(f"{flag} {word}: the recipe has no {name!r}: {nearest(name, known)}")
        found[name] = number
    return found


def read_pair(flag: str, word: str, most: float = math.inf) -> tuple[str, float]:
    """One of them. The number is above 0, and `most` at most."""
    name, equals, text = word.partition("=")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (name and equals) or not 0 < number <= most or math.isinf(number):
        above = "a number above 0" if math.isinf(most) else f"a number above 0 and at most {most:g}"
        raise ValueError(f"{flag} {word}: write NAME={above}, such as {flag} {name or 'NAME'}=0.5")
    return name, number


def stage_figures(dataset: Folder, plan: Plan, stated: Stated) -> dict[str, Figures]:
    """By stage name; `plan` tells which of the dataset's tables are the recipe's."""
    stages = [s.stage for s in plan.stages]
    seconds = read_rates(dataset, stages)
    rates = {name: 1 / spent for name, spent in seconds.items()}
    shares, sizes = read_shares(plan), read_sizes(dataset, plan)
    found = {}
    for stage in stages:
        anchor = anchor_of(stage)
        source = anchor.source if anchor else ""
        found[stage.name] = Figures(
            keep=_figure(stage.name, stated.keep, shares, anchor.keep if anchor else 1.0, source),
            rate=_figure(stage.name, stated.rates, rates, anchor.rate_of(stage) if anchor else None, source),
            size=_figure(stage.name, stated.sizes, sizes, anchor.size if anchor else None, source),
        )
    return found


@overload
def _figure(
    name: str, stated: Mapping[str, float], measured: Mapping[str, float], assumed: float, source: str
) -> Figure: ...
@overload
def _figure(
    name: str, stated: Mapping[str, float], measured: Mapping[str, float], assumed: float | None, source: str
) -> Figure | None: ...
def _figure(
    name: str, stated: Mapping[str, float], measured: Mapping[str, float], assumed: float | None, source: str
) -> Figure | None:
    if name in stated:
        return Figure(value=stated[name], origin="stated")
    if name in measured:
        return Figure(value=measured[name], origin="measured")
    return Figure(value=assumed, origin="assumed", source=source) if assumed is not None else None


def source_size(dataset: Folder, plan: Plan) -> Figure:
    """Bytes of a partition's row."""
    there = {entry.name: entry.size for entry in dataset.entries("partitions")}
    own = [t.partition for t in plan.tickets if t.partition.parquet.rsplit("/", 1)[1] in there]
    rows = sum(partition.rows for partition in own)
    if not rows:
        return Figure(value=SOURCE_ROW, origin="assumed", source="a URL and an alt text")
    return Figure(value=sum(there[p.parquet.rsplit("/", 1)[1]] for p in own) / rows, origin="measured")


def phase_costs(recipe: Recipe, rates: Mapping[str, float]) -> list[PhaseCost]:
    """The trainings' phases; a rate of the phase counts before one of its training."""
    found = []
    for training, config in recipe.trainings.items():
        for number, phase in enumerate(config.phases):
            name = f"{training}.{number}"
            rate = rates.get(name, rates.get(training))
            figure = Figure(value=rate, origin="stated") if rate else None
            found.append(PhaseCost(name=name, samples=phase.samples, rate=figure))
    return found
