"""A source of the shapes world: URLs and alt texts with everything that real ones suffer from, and the truth of it.

Everything is a pure function of the configuration, row by row: a larger `count` only adds rows behind the others, so
that a source can grow between two builds. The pictures themselves are drawn when they are asked for (see server.py).
"""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from . import words
from .making.pictures import photo_jpeg
from .world import Facts, Scenes, draw_scenes, render, render_photo

Behaviour = Literal[
    "ok",
    "missing",
    "flaky",
    "slow",
    "truncated",
    "html",
    "redirect",
    "same_picture",
    "near_duplicate",
    "opt_out",
    "off_world",
    "tiny",
]
BEHAVIOURS: tuple[Behaviour, ...] = get_args(Behaviour)
_COPIES = ("same_picture", "near_duplicate")
_MAY_BE_PLANTED = ("ok", "flaky", "redirect")  # so that a planted mismatch is never dropped for another reason
_BLOCK = 256  # scenes are drawn so many at a time, whatever the count
_TRIES = 50
_SCENES, _TEXTS, _PHOTOS = range(3)  # random streams


@dataclass(frozen=True, kw_only=True)
class ShapesSource:
    """How many rows, and which share of them misbehaves how. What is left over is "ok"."""

    count: int = 2000
    """Rows."""
    seed: int = 0
    """Of everything."""
    shares: tuple[float, ...] = (0.2, 0.35, 0.3, 0.15)
    """Shares of pictures with one, two, three and four objects."""
    planted_mismatch: float = 0.08
    """Rows whose alt text was said of another picture; of the rows that come through otherwise."""
    missing: float = 0.04
    """Answered by 404."""
    flaky: float = 0.03
    """Answered by 500 the first time, well from then on."""
    slow: float = 0.001
    """Not answered within any timeout. Each one costs a build its timeout times its tries."""
    truncated: float = 0.01
    """A JPEG that breaks off."""
    html: float = 0.01
    """An error page under a picture's name, with status 200."""
    redirect: float = 0.03
    """Answered by 302 to where the picture now is."""
    same_picture: float = 0.02
    """The very bytes of an earlier row under another URL."""
    near_duplicate: float = 0.02
    """The picture of an earlier row, compressed anew."""
    opt_out: float = 0.02
    """Served with `X-Robots-Tag: noai`."""
    off_world: float = 0.02
    """Noise, gradients or blots: nothing that the world's words could describe."""
    tiny: float = 0.01
    """Eight pixels wide."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"shapes source: count must be at least 1, got {self.count}")
        if not 1 <= len(self.shares) <= 4 or min(self.shares) < 0 or sum(self.shares) <= 0:
            raise ValueError(f"shapes source: shares must be one to four numbers from 0 up, got {self.shares}")
        wrong = [f.name for f in fields(self) if f.type == "float" and not 0 <= getattr(self, f.name) <= 1]
        if wrong:
            raise ValueError(f"shapes source: {wrong[0]} must be from 0 to 1, got {getattr(self, wrong[0])}")
        total = sum(self.fractions)
        if total > 1 + 1e-9:
            raise ValueError(f"shapes source: the misbehaving shares add up to {total:.2f}, which is more than 1")

    @property
    def fractions(self) -> tuple[float, ...]:
        """The share of each behaviour but "ok", in the order of BEHAVIOURS."""
        return tuple(getattr(self, name) for name in BEHAVIOURS[1:])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the source, and the truth of it, which the pipeline does not get to see."""

    number: int
    """Its place in the table, and of its scene in `scenes`."""
    path: str
    """Of its URL, such as /p/000123.jpg."""
    text: str
    behaviour: Behaviour
    facts: Facts | None
    """What is in the picture that is served; None off the world."""
    planted_mismatch: bool = False
    copy_of: int | None = None
    """Number of the row whose picture it is, for same_picture and near_duplicate."""

    @property
    def shown(self) -> int:
        """Number of the scene that is in the picture."""
        return self.number if self.copy_of is None else self.copy_of


@lru_cache(maxsize=4)
def scenes(config: ShapesSource) -> Scenes:
    """The scene of every row: arrays of `count` (unused where a row copies another's, or is off the world)."""
    blocks = [
        draw_scenes(np.random.default_rng((config.seed, _SCENES, first)), _BLOCK, config.shares)
        for first in range(0, config.count, _BLOCK)
    ]
    cells, ground = np.concatenate([b.cells for b in blocks]), np.concatenate([b.ground for b in blocks])
    return Scenes(cells=cells[: config.count], ground=ground[: config.count])


@lru_cache(maxsize=4)
def _rows(config: ShapesSource) -> tuple[Row, ...]:
    world, made = scenes(config), list[Row]()
    limits = np.cumsum(config.fractions)
    whole: list[int] = []  # rows that others may copy
    for n in range(config.count):
        rng = np.random.default_rng((config.seed, _TEXTS, n))
        drawn = int(np.searchsorted(limits, rng.random(), side="right"))
        behaviour = BEHAVIOURS[drawn + 1] if drawn < len(limits) else "ok"
        if behaviour in _COPIES and not whole:
            behaviour = "ok"
        copy_of = whole[rng.integers(len(whole))] if behaviour in _COPIES else None
        facts = world.facts(n if copy_of is None else copy_of)
        text = words.alt_text(facts, rng)
        foreign = None
        if behaviour in _MAY_BE_PLANTED and rng.random() < config.planted_mismatch:
            foreign = _foreign_text(facts, [world.facts(int(k)) for k in rng.integers(max(n, 1), size=_TRIES)], rng)
        made.append(
            Row(
                number=n,
                path=f"/p/{n:06d}.jpg",
                text=foreign or text,
                behaviour=behaviour,
                facts=None if behaviour == "off_world" else facts,
                planted_mismatch=foreign is not None,
                copy_of=copy_of,
            )
        )
        if behaviour == "ok":
            whole.append(n)
    return tuple(made)


def rows(config: ShapesSource) -> list[Row]:
    """All rows, in the order of the table."""
    return list(_rows(config))


def truth(config: ShapesSource) -> dict[str, Row]:
    """Every row by the path of its URL; see `row_of`."""
    return {row.path: row for row in _rows(config)}


def row_of(url: str, known: dict[str, Row]) -> Row:
    """The truth of a URL, wherever it was served. KeyError for one that is not of this source."""
    return known[urlsplit(url).path]


def write_source(config: ShapesSource, base_url: str, path: str | Path) -> None:
    """The table that a build is pointed at: parquet with the columns url and text. `base_url` ends without a slash."""
    made = _rows(config)
    table = pa.table({"url": [base_url + row.path for row in made], "text": [row.text for row in made]})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def picture(config: ShapesSource, row: Row) -> bytes:
    """The JPEG file behind a row, whole (a truncated row's is cut by the server): the same bytes each time."""
    rng = np.random.default_rng((config.seed, _PHOTOS, row.shown))
    if row.behaviour == "off_world":
        return _jpeg(_nothing(rng), quality=90)
    if row.behaviour == "tiny":
        return _jpeg(render(scenes(config)[row.number : row.number + 1], 8)[0], quality=90)
    if row.behaviour == "near_duplicate":
        photo = render_photo(scenes(config), row.shown, rng)
        return _jpeg(photo, quality=60 + row.number % 15)
    return photo_jpeg(scenes(config), row.shown, rng)


def _foreign_text(facts: Facts, others: list[Facts], rng: np.random.Generator) -> str | None:
    """Something said of the first other picture that shares no colour with this one, so that it is false here."""
    colours = {thing.colour for thing in facts.things}
    for other in others:
        if not colours & {thing.colour for thing in other.things}:
            return words.weak_list(other, rng)  # an alt text, but never one of the vague that fit everything
    return None


def _nothing(rng: np.random.Generator) -> np.ndarray:
    """A picture from outside the world: noise, a gradient or blots; uint8 (side, side, 3)."""
    side = int(rng.choice((48, 64, 96, 128)))
    kind = rng.integers(3)
    if kind == 0:
        return rng.integers(256, size=(side, side, 3), dtype=np.uint8)
    corners = rng.integers(256, size=(2, 2, 3) if kind == 1 else (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(corners).resize((side, side), Image.Resampling.BICUBIC))


def _jpeg(pixels: np.ndarray, quality: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return out.getvalue()
