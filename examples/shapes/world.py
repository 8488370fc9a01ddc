"""The world itself: pictures of one to four objects on a 2 x 2 grid, their facts, and the words people use for them.

A scene is five small integers, so a hundred thousand of them are one numpy array: `cells[n, place]` holds 0 for an
empty place or 1 + an object number, `ground[n]` the background. Everything is a pure function of a seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (60, 110, 255),
    "yellow": (250, 225, 40),
    "orange": (250, 140, 20),
    "purple": (170, 60, 220),
    "white": (250, 250, 250),
    "cyan": (50, 225, 230),
}
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")
GROUNDS = {"black": (18, 18, 18), "navy": (18, 24, 78), "brown": (78, 46, 20), "gray": (84, 84, 84)}
TEXTURES = ("plain", "striped", "checkered")
NUMBERS = ("no objects", "one object", "two objects", "three objects", "four objects")

OBJECT_KINDS = len(SHAPES) * len(COLOURS) * len(SIZES)
GROUND_KINDS = len(GROUNDS) * len(TEXTURES)
RADIUS = {"small": 0.15, "large": 0.225}  # in units of the picture's side
TEXTURE_STRENGTH = 13  # added to and taken from the background colour, of 255


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: what it is and where it stands."""

    shape: str
    colour: str
    size: str
    place: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All there is to know of a scene (or all that a caption claims)."""

    things: tuple[Thing, ...]
    ground: str
    texture: str


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """Many scenes at once. cells: int (N, 4), 0 = empty; ground: int (N,)."""

    cells: np.ndarray
    ground: np.ndarray

    def __len__(self) -> int:
        return len(self.ground)

    def __getitem__(self, index: np.ndarray | slice) -> Scenes:
        return Scenes(cells=self.cells[index], ground=self.ground[index])

    def facts(self, n: int) -> Facts:
        """The facts of scene n, in reading order."""
        things = [_thing(int(kind), place) for place, kind in zip(PLACES, self.cells[n], strict=True) if kind]
        ground, texture = divmod(int(self.ground[n]), len(TEXTURES))
        return Facts(things=tuple(things), ground=list(GROUNDS)[ground], texture=TEXTURES[texture])


def _thing(kind: int, place: str) -> Thing:
    rest, size = divmod(kind - 1, len(SIZES))
    shape, colour = divmod(rest, len(COLOURS))
    return Thing(shape=SHAPES[shape], colour=list(COLOURS)[colour], size=SIZES[size], place=place)


def kind_of(shape: str, colour: str, size: str) -> int:
    """The object number that `cells` holds for this object."""
    colour_index = list(COLOURS).index(colour)
    return 1 + (SHAPES.index(shape) * len(COLOURS) + colour_index) * len(SIZES) + SIZES.index(size)


def draw_scenes(rng: np.random.Generator, count: int, shares: tuple[float, ...]) -> Scenes:
    """`count` random scenes; `shares[k]` is the share with k + 1 objects. (shape, colour) is unique within a scene."""
    numbers = rng.choice(len(shares), size=count, p=np.array(shares) / sum(shares)) + 1
    pairs = rng.random((count, len(SHAPES) * len(COLOURS))).argsort(axis=1)[:, :4]
    sizes = rng.integers(len(SIZES), size=(count, 4))
    kinds = 1 + pairs * len(SIZES) + sizes
    rank = rng.random((count, 4)).argsort(axis=1)
    return Scenes(cells=np.where(rank < numbers[:, None], kinds, 0), ground=rng.integers(GROUND_KINDS, size=count))


# --- pictures -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def tile_bank(side: int) -> np.ndarray:
    """Every possible quarter picture: uint8 (grounds, 1 + object kinds, side/2, side/2, 3). `side` is a multiple of 8."""
    if side % 8:
        raise ValueError(f"a picture's side must be a multiple of 8, got {side}")
    half = side // 2
    grounds = np.stack([_ground(g, side)[:half, :half] for g in range(GROUND_KINDS)]).astype(np.float32)
    bank = np.repeat(grounds[:, None], 1 + OBJECT_KINDS, axis=1)
    for shape in SHAPES:
        for size in SIZES:
            mask = _mask(shape, RADIUS[size], side)[..., None]
            for colour, rgb in COLOURS.items():
                kind = kind_of(shape, colour, size)
                bank[:, kind] = bank[:, kind] * (1 - mask) + np.array(rgb, np.float32) * mask
    return bank.round().astype(np.uint8)


def _ground(ground: int, side: int) -> np.ndarray:
    base, texture = divmod(ground, len(TEXTURES))
    step = np.arange(side) // (side // 8) % 2
    pattern = {
        "plain": np.full((side, side), 0.5),
        "striped": np.repeat(step[:, None], side, axis=1),
        "checkered": step[:, None] ^ step[None, :],
    }[TEXTURES[texture]]
    colour = np.array(list(GROUNDS.values())[base], np.float32)
    return colour + (2 * pattern[..., None] - 1) * TEXTURE_STRENGTH


def _mask(shape: str, radius: float, side: int, oversample: int = 8) -> np.ndarray:
    """Coverage of a shape in the middle of its quarter, anti-aliased: float32 (side/2, side/2)."""
    fine = side // 2 * oversample
    y, x = (np.mgrid[:fine, :fine] + 0.5) / (side * oversample) - 0.25
    inside = {
        "circle": x**2 + y**2 <= radius**2,
        "square": np.maximum(abs(x), abs(y)) <= 0.93 * radius,
        "triangle": (y <= 0.85 * radius) & (y >= -radius) & (abs(x) <= (y + radius) * 0.58),
        "cross": (np.minimum(abs(x), abs(y)) <= 0.3 * radius) & (np.maximum(abs(x), abs(y)) <= 1.05 * radius),
    }[shape]
    return inside.reshape(side // 2, oversample, side // 2, oversample).mean(axis=(1, 3), dtype=np.float32)


def render(scenes: Scenes, side: int) -> np.ndarray:
    """Pictures of the scenes: uint8 (N, side, side, 3)."""
    bank, half = tile_bank(side), side // 2
    out = np.empty((len(scenes), side, side, 3), np.uint8)
    for place in range(4):
        row, column = divmod(place, 2)
        out[:, row * half : (row + 1) * half, column * half : (column + 1) * half] = bank[
            scenes.ground, scenes.cells[:, place]
        ]
    return out


def render_photo(scenes: Scenes, n: int, rng: np.random.Generator) -> np.ndarray:
    """Scene n as a web photo: 48 to 128 pixels, sometimes wider or taller than the scene by a strip of background."""
    side = int(rng.choice((48, 64, 96, 128)))
    picture = render(scenes[n : n + 1], side)[0]
    strip = int(rng.choice((0, 0, side // 4)))  # a whole period of the texture, so that it runs on
    if not strip:
        return picture
    upright = bool(rng.integers(2))
    tiles, axis = ((2, 1, 1), 0) if upright else ((1, 2, 1), 1)
    canvas = np.tile(_ground(int(scenes.ground[n]), side).round().astype(np.uint8), tiles)
    canvas = canvas.take(range(side + 2 * strip), axis=axis)
    inner = slice(strip, strip + side)
    canvas[(inner,) if upright else (slice(None), inner)] = picture
    return canvas
