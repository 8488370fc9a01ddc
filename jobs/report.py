"""Write a page that shows it all: funnel, captions, scores, what was dropped, losses, pictures. One file."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.funnel import FunnelRow, count_funnel
from pipeline.plan import make_plan
from pipeline.shards import View
from pipeline.storage import Folder
from stages.ingest import ingested
from stages.pack import Pack

from . import report_charts as charts
from .caption_statistics import caption_table
from .recipe import Recipe, parse, quiet_libraries
from .report_data import TrainingLog, caption_pairs, ended_examples, score_spread, training_logs
from .report_pictures import Picture, show_pixels

TEMPLATE = "report.html.jinja"
PROMPTS = 12


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `densebridge report`."""

    out: Path = Path("report")
    """Folder for index.html."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A key number at the head of the page."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One held-out prompt and what each arm drew of it."""

    prompt: str
    pictures: list[Picture]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What `densebridge evaluate` left."""

    table: Mapping[str, Mapping[str, Any]]
    """{arm: {measure: {raw, shuffled, corrected, interval}, n}}."""
    gain: Mapping[str, Mapping[str, Any]]
    """{pair: {measure: {mean, interval}}}."""

    @property
    def measures(self) -> list[str]:
        """In the judge's order."""
        return [m for m in next(iter(self.table.values())) if m != "n"]

    @property
    def gain_measures(self) -> list[str]:
        """Measures of the gains, in the same order."""
        return [m for m in self.measures if any(m in row for row in self.gain.values())]

    def span(self, measure: str, rows: Mapping[str, Mapping[str, Any]]) -> tuple[float, float]:
        """The axis that all rows of a measure share; zero is on it."""
        ends = [end for row in rows.values() if measure in row for end in row[measure]["interval"]]
        return min(0.0, *ends), max(0.0, *ends) or 1.0


def verdict(interval: Sequence[float]) -> str:
    """`better` or `worse` where the interval of a difference leaves out zero, else `unclear`."""
    return "better" if interval[0] > 0 else "worse" if interval[1] < 0 else "unclear"


def read_scores(folder: Path) -> Scored | None:
    """The evaluation's figures, if it has run."""
    path = folder / "evaluation.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): run `densebridge evaluate` again") from None
    return Scored(table=found["oracle"], gain=found.get("gain", {})) if found.get("oracle") else None


def drawn_pictures(recipe: Recipe, folder: Path) -> tuple[list[str], list[Drawn]]:
    """Names of the arms that have pictures, and the first prompts with them."""
    arms = [a for a in (recipe.evaluation.arms if recipe.evaluation else ()) if (folder / f"{a}.npy").is_file()]
    if not arms or recipe.evaluation is None:
        return [], []
    pictures = [np.load(folder / f"{arm}.npy", mmap_mode="r", allow_pickle=False) for arm in arms]
    prompts = list(recipe.evaluation.judge().prompts())[: min(PROMPTS, *map(len, pictures), PROMPTS)]
    rows = [Drawn(prompt=p, pictures=[show_pixels(drawn[n]) for drawn in pictures]) for n, p in enumerate(prompts)]
    return arms, rows


def headline(
    recipe: Recipe, funnel: Mapping[str, FunnelRow], logs: Sequence[TrainingLog], scores: Scored | None
) -> list[Figure]:
    """The numbers that a reader wants first; those that there are."""
    rows = [funnel[s.name] for s in recipe.stages if not isinstance(s, Pack)]
    figures = []
    if rows and rows[0].given:
        figures.append(Figure(value=f"{rows[0].given:,}", label="URLs in"))
    if rows and rows[-1].given:
        share = f"{rows[-1].kept / rows[0].given:.0%} of them"
        figures.append(Figure(value=f"{rows[-1].kept:,}", label="samples kept", note=share))
    for pack in (s for s in recipe.stages if isinstance(s, Pack)):
        if recipe.folder.exists(f"views/{pack.config.view}.json"):
            view = View.open(recipe.folder, pack.config.view).info
            figures.append(Figure(value=f"{view.samples:,}", label=f"view {view.view}", note=f"{view.resolution} px"))
    if recipe.trainings:
        done = sum(log.is_done for log in logs)
        note = f"of {len(recipe.trainings)}" + (f", {len(logs) - done} under way" if len(logs) > done else "")
        figures.append(Figure(value=str(done), label="training done" if done == 1 else "trainings done", note=note))
    if scores and scores.gain:
        pair, row = next(iter(scores.gain.items()))
        measure, found = next(iter(row.items()))
        low, high = found["interval"]
        figures.append(
            Figure(
                value=f"{found['mean']:+.3f}",
                label=f"{measure}: {pair.replace('_over_', ' over ')}",
                note=f"[{low:+.3f}, {high:+.3f}]",
            )
        )
    return figures


def last_build(dataset: Folder) -> Mapping[str, Any] | None:
    """The newest build's `run.json` with its time as `when`; looked for on a local disk only."""
    runs = sorted(Path(dataset.path("runs")).glob("*/run.json")) if dataset.is_local else []
    if not runs:
        return None
    stamp = runs[-1].parent.name.split("-")[0]
    when = f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]} {stamp[9:11]}:{stamp[11:13]} UTC"
    return {**json.loads(runs[-1].read_text()), "when": when}


def render(recipe: Recipe, command: str) -> str:
    """The whole page as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    dataset = recipe.folder
    tickets = make_plan(dataset, recipe.stages, ingested(dataset, recipe.source)).tickets
    funnel = count_funnel(dataset, recipe.stages, tickets)
    logs = training_logs(recipe)
    evaluation = Path(recipe.runs) / "evaluation"
    scores = read_scores(evaluation)
    arms, drawn = drawn_pictures(recipe, evaluation)
    # Captions, URLs and alt texts are strangers' words: autoescape is on for every template, whatever its name.
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(TEMPLATE).render(
        recipe=recipe,
        command=command,
        figures=headline(recipe, funnel, logs, scores),
        funnel=funnel,
        built={s.name: sum(s.name in t.tables for t in tickets) for s in recipe.stages},
        partitions=len(tickets),
        widest=max((row.given for row in funnel.values()), default=0),
        pairs=caption_pairs(dataset, recipe.stages, tickets),
        texts=caption_table(dataset, recipe.stages, tickets),
        spread=score_spread(dataset, recipe.stages, tickets, funnel),
        ends=ended_examples(dataset, recipe.stages, tickets, funnel),
        logs=logs,
        losses=charts.loss_range(logs) if logs else (0.0, 1.0),
        arms=arms,
        drawn=drawn,
        scores=scores,
        build=last_build(dataset),
        charts=charts,
        verdict=verdict,
    )


def keys_shown(page: str) -> set[str]:
    """The keys of the samples that a page shows. Strangers' words cannot pretend to be one: their quotes are escaped."""
    return set(re.findall(r'data-key="([0-9a-f]+)"', page))


def main(argv: list[str]) -> int:
    """Command line."""
    quiet_libraries()
    recipe, options = parse(argv, "report", ReportOptions, __doc__ or "")
    page = render(recipe, shlex.join(["densebridge", "report", *argv])).encode()
    Folder(url=str(options.out)).write("index.html", page)
    print(f"{options.out / 'index.html'}: {len(page) / 1e6:.1f} MB, open it in a browser")
    return 0


if __name__ == "__main__":
    from .cli import run

    run("report", sys.argv[1:])
