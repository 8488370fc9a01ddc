"""What each kind of change costs our own build, and whether its views are what a build from nothing would have made."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from examples.shapes.recipe import recipe as shapes
from examples.shapes.source import Row
from jobs.build import BuildOptions, build
from jobs.recipe import Recipe
from pipeline.runner import RunnerName
from pipeline.shards import View
from stages.ingest import Source
from stages.pack import Pack, PackConfig
from stages.recaption import Recaption

from .changing_world import ListName, Tally, World, tally
from .peers import SHARDS

_TEXTS = ("score", "pretokenize_t5", "pretokenize_clip", "clip_filter")
_PACKS = ("pack_16", "pack_24")
_STAGES = ("download", "deduplicate", "embed", "recaption", *_TEXTS, *_PACKS)
FRESH: dict[ListName, ListName] = {"added": "grown", "reordered": "original"}
"""What a build from nothing is given in place of a list: the same rows, in the order in which the dataset met them."""
Alter = Callable[[Recipe], Recipe]


class _NewRecaption(Recaption):
    """The same captions by a newer version of the code."""

    version = Recaption.version + 1


def unchanged(recipe: Recipe) -> Recipe:
    """The recipe as it is."""
    return recipe


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change to the list or to a setting, and what the design promises of it."""

    alter: Alter = unchanged
    listed: ListName = "original"
    retry: bool = False
    asks_failed: bool = False
    """Whether rows that failed are asked for again; without it they stay failed, though a build from nothing may get them."""
    runner: RunnerName = "local"
    redone: tuple[str, ...] = ()
    """Stages that may be given rows that are not new, the first of which is; the others are given `fresh` rows at most."""
    fresh: Callable[[World], int] = lambda world: 0
    """Rows that were never there, or that are tried again."""


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """What one build did."""

    rows: dict[str, int]
    """Rows that each stage was given."""
    seconds: float
    """Time that computing them took."""
    requests: int
    again: int
    """Requests for pictures that had come before."""
    wrong: Tally = field(default_factory=Tally)
    """Held against a build from nothing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A change, and the same taken back."""

    there: Rebuild
    back: Rebuild
    as_promised: bool


def settings(changes: Mapping[str, Callable[[Any], Any]]) -> Alter:
    """Changes the configurations of the stages that are named."""

    def alter(recipe: Recipe) -> Recipe:
        stages = [type(s)(changes[s.name](s.config)) if s.name in changes else s for s in recipe.stages]
        return replace(recipe, stages=tuple(stages))

    return alter


def new_version(recipe: Recipe) -> Recipe:
    """Newer code of the captioner, which says the same."""
    stages = [_NewRecaption(s.config) if s.name == "recaption" else s for s in recipe.stages]
    return replace(recipe, stages=tuple(stages))


def _shorter(config: PackConfig) -> PackConfig:
    return replace(config, tokenizers=(replace(config.tokenizers[0], max_length=32), *config.tokenizers[1:]))


_SETTINGS: dict[str, Alter] = {
    "prompt": settings({"recaption": lambda c: replace(c, prompts=c.prompts[::-1])}),
    "threshold": settings({"clip_filter": lambda c: replace(c, min_score=0.8)}),
    "where": settings({"pack_24": lambda c: replace(c, where="least(width, height) >= 48")}),
    "tokens": settings(
        {
            "pretokenize_t5": lambda c: replace(c, tokenizer=replace(c.tokenizer, max_length=32)),
            "pack_16": _shorter,
            "pack_24": _shorter,
        }
    ),
    "resolution": settings({"pack_16": lambda c: replace(c, resolution=12)}),
    "stored_size": settings({"download": lambda c: replace(c, max_edge=48)}),
    "limit": settings({"download": lambda c: replace(c, min_edge=56)}),
    "refresh": settings({"download": lambda c: replace(c, refresh=1)}),
    "batch": settings({name: lambda c: replace(c, batch_size=32) for name in ("download", "recaption", "pack_16")}),
}
# Asked once, the server fails some; so a retry has something to do. img2dataset, too, is told to ask once.
_ask_once = settings({"download": lambda c: replace(c, fetch=replace(c.fetch, retries=0))})


def _flaky(listed: Sequence[Row]) -> int:
    return sum(row.behaviour == "flaky" for row in listed)


def _orphans(world: World) -> int:
    """Pictures that are listed twice and whose first URL leaves the list: the second now stands for them."""
    left = world.listed("removed")
    there = {row.number for row in left}
    return sum(row.copy_of is not None and row.copy_of not in there for row in left)


CHANGES = {
    "nothing": Change(),
    "added": Change(listed="added", fresh=lambda w: len(w.listed("added")) - len(w.listed("original"))),
    "removed": Change(listed="removed", redone=("deduplicate", *_PACKS), fresh=_orphans),
    "reordered": Change(listed="reordered"),
    "prompt": Change(alter=_SETTINGS["prompt"], redone=("recaption", *_TEXTS, *_PACKS)),
    "threshold": Change(alter=_SETTINGS["threshold"], redone=("clip_filter", *_PACKS)),
    "where": Change(alter=_SETTINGS["where"], redone=("pack_24",)),
    "tokens": Change(alter=_SETTINGS["tokens"], redone=("pretokenize_t5", *_PACKS)),
    "resolution": Change(alter=_SETTINGS["resolution"], redone=("pack_16",)),
    "stored_size": Change(alter=_SETTINGS["stored_size"], redone=_STAGES),
    # Judged by the sizes that are known: no server is asked.
    "limit": Change(alter=_SETTINGS["limit"], redone=("deduplicate",)),
    # Everybody is asked, nothing is sent again but what failed.
    "refresh": Change(
        alter=_SETTINGS["refresh"],
        redone=("download", "deduplicate"),
        fresh=lambda w: _flaky(w.listed("original")),
        asks_failed=True,
    ),
    "version": Change(alter=new_version, redone=("recaption",)),
    "batch": Change(alter=_SETTINGS["batch"], runner="ray"),
    # Which of two equal pictures came first is looked at anew: digests alone, in order.
    "retry": Change(
        retry=True, redone=("deduplicate",), fresh=lambda w: _flaky(w.listed("original")), asks_failed=True
    ),
}


class Rebuilds:
    """Makes every change to a copy of one dataset, takes it back, and holds both against builds from nothing."""

    def __init__(self, world: World, folder: Path) -> None:
        self._world, self._folder = world, folder
        self._fresh: dict[tuple[Alter, ListName], dict[str, str]] = {}
        size = -(-len(world.listed("original")) // SHARDS)
        source = Source(path=str(folder / "list.parquet"), partition_size=size)
        plain = replace(shapes, source=source, trainings={}, evaluation=None)
        self._recipe = _ask_once(plain)
        folder.mkdir(parents=True)
        self.full = self._build("first", Change())

    def outcome(self, name: str, change: Change) -> Outcome:
        """The change there and back."""
        shutil.copytree(self._folder / "first", self._folder / name)
        there = self._checked(name, change, change)
        back = self._checked(name, Change(), Change(retry=change.retry, asks_failed=change.retry))
        shutil.rmtree(self._folder / name)
        return Outcome(there=there, back=back, as_promised=self._as_promised(change, there, back))

    def _as_promised(self, change: Change, there: Rebuild, back: Rebuild) -> bool:
        fresh = change.fresh(self._world)
        least = all(n <= fresh or stage in change.redone for stage, n in there.rows.items())
        took = all(there.rows.get(stage) for stage in change.redone[:1])  # a change without effect would show nothing
        asked = there.requests <= fresh or "download" in change.redone
        right = not there.wrong.worst and not back.wrong.worst
        return least and took and asked and right and not sum(back.rows.values()) and not back.requests

    def _checked(self, name: str, change: Change, expected: Change) -> Rebuild:
        """One build, held against what a build from nothing gives for `expected`."""
        done = self._build(name, change)
        either = () if expected.asks_failed else self._world.failing_at_first()
        packed = samples(self._at(name))
        names = {f"{view}:{url}" for url in either for view in ("16", "24")}
        return replace(done, wrong=tally(self._from_nothing(expected), packed, names))

    def _from_nothing(self, change: Change) -> dict[str, str]:
        listed = FRESH.get(change.listed, change.listed)
        known = (change.alter, listed)
        if known not in self._fresh:
            self._build("fresh", replace(change, listed=listed, retry=False, runner="local"))
            self._fresh[known] = dict(samples(self._at("fresh")))
            shutil.rmtree(self._folder / "fresh")
        return self._fresh[known]

    def _at(self, name: str) -> Recipe:
        return replace(self._recipe, dataset=str(self._folder / name))

    def _build(self, name: str, change: Change) -> Rebuild:
        recipe = change.alter(self._at(name))
        self._world.write_list(change.listed, Path(recipe.source.path))
        before, runs = self._world.asked(), self._runs(name)
        with contextlib.redirect_stdout(io.StringIO()):
            build(recipe, BuildOptions(runner=change.runner, retry_failed=change.retry))
        asked = self._world.asked() - before
        new = [json.loads(run.read_text())["stages"] for run in self._runs(name) - runs]
        return Rebuild(
            rows={stage: done["computed"] for run in new for stage, done in run.items()},
            seconds=sum(done["busy_seconds"] for run in new for done in run.values()),
            requests=asked.total(),
            again=sum(asked[url] for url in before.keys() - self._world.failing_at_first()),
        )

    def _runs(self, name: str) -> set[Path]:
        return set((self._folder / name).glob("runs/*/run.json"))


def samples(recipe: Recipe) -> list[tuple[str, str]]:
    """What the views hold: (`view:url`, digest of picture, caption, scores and tokens). Scores count to four places."""
    found = []
    for stage in recipe.stages:
        if not isinstance(stage, Pack):
            continue
        view = View.open(recipe.folder, stage.config.view)
        for row in range(len(view)):
            facts = view.facts(row)
            told = {n: round(v, 4) if isinstance(v, float) else v for n, v in facts.items()}
            members = [view.read(row, f"tokens_{t.name}") for t in stage.config.tokenizers]
            digest = hashlib.sha256(b"".join([view.read(row, "image"), *members, json.dumps(told).encode()]))
            found.append((f"{stage.config.view}:{facts['url']}", digest.hexdigest()))
    return found
