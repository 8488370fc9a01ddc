"""Tell one sample's whole story, by its key or URL: densebridge explain RECIPE KEY_OR_URL. What the source said of it, what
every stage made of it and with which settings, and which shards hold it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro
from rich.table import Table
from rich.text import Text

from pipeline.plan import make_plan
from pipeline.sample import KEY_LENGTH, sample_key
from pipeline.story import Chapter, Place, ShardPlace, Story, tell_story
from stages.ingest import ingested

from .display import console
from .recipe import Recipe, parse

LONGEST = 160  # characters of a value in the table
FIRST = 4  # numbers of an embedding in the table


@dataclass(frozen=True, kw_only=True)
class ExplainOptions:
    """Options of `densebridge explain`."""

    asked: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="KEY_OR_URL")]] = ""
    """The sample's key, or its URL as the source spells it."""
    json: bool = False
    """Print JSON, with every value in full, instead of tables."""


def explain(recipe: Recipe, key_or_url: str) -> Story:
    """The sample's story. Raises ValueError for one that the dataset does not hold."""
    dataset, asked = recipe.folder, key_or_url.strip()
    is_key = re.fullmatch(rf"[0-9a-f]{{{KEY_LENGTH}}}", asked) is not None
    key = asked if is_key else sample_key(asked)
    plan = make_plan(dataset, recipe.stages, ingested(dataset, recipe.source))
    story = tell_story(dataset, plan, key=key, url="" if is_key else asked)
    if story is None:
        hint = (
            "is it a key of this dataset?"
            if is_key
            else f"a key has {KEY_LENGTH} hexadecimal digits, and a URL must be as the source spells it, letter by letter"
        )
        raise ValueError(f"{recipe.dataset} holds no sample {asked!r}: {hint}")
    return story


def print_story(story: Story) -> None:
    """The source row, a table of the stages, a table of the shards."""
    print(f"sample {story.key}" + (f", taken down ({story.taken_down})" if story.taken_down else ""))
    if not story.partition:
        print("no partition holds it")
        return
    listed = "the source lists it" if story.is_listed else "the source does not list it"
    print(f"partition {story.partition}, {listed}")
    table = _table("source", "column", "value")
    for name, value in story.source.items():
        table.add_row(Text(name), Text(shown(value)))
    console.print(table)
    if story.chapters:
        table = _table("stages", "stage", "outcome", "column", "value")
        for chapter in story.chapters:
            first, *rest = _lines(chapter) or [("", "")]
            outcome = chapter.outcome + (f" ({chapter.reason})" if chapter.reason else "")
            lines = [(chapter.stage, outcome, *first), *(("", "", *line) for line in rest)]
            for line in lines:
                table.add_row(*map(Text, line), end_section=line is lines[-1])
        console.print(table)
    if story.shards:
        console.print(_shard_table(story.shards))


def _lines(chapter: Chapter) -> list[tuple[str, str]]:
    """What a stage wrote, when, and with which settings."""
    found = [(name, shown(value)) for name, value in chapter.values.items() if value is not None]
    found += [(f"{name} {chapter.values[name]}", shown(value)) for name, value in chapter.chosen.items()]
    found += [(name, f"{_place(place)}, sha256 {place.sha256}") for name, place in chapter.places.items()]
    if chapter.attempts is not None:
        found.append(("attempts", f"{chapter.attempts}, the last at {chapter.tried_at}"))
    found += [(f"setting {name}", shown(value)) for name, value in (chapter.settings or {}).items()]
    return found


def _shard_table(shards: Sequence[ShardPlace]) -> Table:
    table = _table("shards", "view", "version", "column", "where")
    for shard in shards:
        for name, place in shard.places.items():
            table.add_row(shard.view, "present" if shard.is_present else "older", name, Text(_place(place)))
    return table


def _table(title: str, *columns: str) -> Table:
    """A table that cuts nothing off: what is in it is to be copied."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _place(place: Place) -> str:
    return f"{place.size} bytes at {place.offset} in {place.tar}"


def shown(value: Any) -> str:
    """A value in a few words: of numbers how many and the first, of a long text its beginning."""
    if isinstance(value, list) and len(value) > FIRST and all(isinstance(v, int | float) for v in value):
        return f"{len(value)} numbers: {', '.join(f'{v:.4g}' for v in value[:FIRST])}, …"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def main(argv: list[str]) -> int:
    """Command line."""
    recipe, options = parse(argv, "explain", ExplainOptions, __doc__ or "", words="RECIPE KEY_OR_URL")
    if not options.asked:
        raise ValueError(f"densebridge explain needs a key or URL after the recipe: densebridge explain {argv[0]} KEY")
    story = explain(recipe, options.asked)
    if options.json:
        print(json.dumps(asdict(story), default=str, ensure_ascii=False))
    else:
        print_story(story)
    return 0


if __name__ == "__main__":
    from .cli import run

    run("explain", sys.argv[1:])
