"""Reads the facts back without any training: pictures by template matching, captions by grammar; and scores both.

Measures (definitions of the shapes experiments). For every object a prompt names: `fact` is the mean of present, colour,
shape and size in its named place; `full` is all of them right; `bag` is its (colour, shape) drawn anywhere; `count` is
one per picture, the right number of objects. Raw recall rises by merely drawing more objects, so every measure also
comes *shuffled* (the same pictures scored against other prompts) and *corrected* (raw minus shuffled).
"""

from __future__ import annotations

import re

import numpy as np

from training.evaluation.judge import Scores

from .world import COLOURS, GROUNDS, OBJECT_KINDS, PLACES, SHAPES, SIZES, TEXTURES, Facts, Scenes, Thing, tile_bank

ROTATIONS = 20
_PLACE = "|".join(PLACES)
_WORDS = {
    "colour": re.compile(rf"\b({'|'.join(COLOURS)})\b"),
    "shape": re.compile(rf"\b({'|'.join(SHAPES)})\b"),
    "size": re.compile(rf"\b({'|'.join(SIZES)})\b"),
    "place": re.compile(rf"\b({_PLACE})\b"),
    "ground": re.compile(rf"\b({'|'.join(TEXTURES)}) ({'|'.join(GROUNDS)})\b"),
}


def read_pictures(pictures: np.ndarray) -> Scenes:
    """The scenes nearest to the pictures: uint8 or float (N, side, side, 3) in 0..255, side a multiple of 8.

    Every quarter is held against every tile (one matrix product); the background is the one that fits the whole picture.
    """
    count, side = pictures.shape[:2]
    half = side // 2
    bank = tile_bank(side).astype(np.float32).reshape(-1, half * half * 3)
    quarters = pictures.astype(np.float32).reshape(count, 2, half, 2, half, 3).transpose(0, 1, 3, 2, 4, 5)
    quarters = quarters.reshape(count, 4, half * half * 3)
    distance = (bank**2).sum(1) - 2 * quarters @ bank.T  # (N, 4, grounds * kinds), up to a constant of the quarter
    distance = distance.reshape(count, 4, -1, 1 + OBJECT_KINDS)
    ground = distance.min(axis=3).sum(axis=1).argmin(axis=1)
    cells = distance[np.arange(count), :, ground].argmin(axis=2)
    return Scenes(cells=cells, ground=ground)


def read_caption(text: str) -> Facts:
    """The facts that a caption claims. A sentence without a place and a shape claims no object."""
    things: dict[str, Thing] = {}
    for sentence in re.split(r"\.\s*", text.lower()):
        place, shape = _WORDS["place"].search(sentence), _WORDS["shape"].search(sentence)
        if place and shape and place[0] not in things:
            colour, size = _WORDS["colour"].search(sentence), _WORDS["size"].search(sentence)
            things[place[0]] = Thing(
                shape=shape[0], colour=colour[0] if colour else "", size=size[0] if size else "", place=place[0]
            )
    ground = _WORDS["ground"].search(text.lower())
    return Facts(things=tuple(things.values()), texture=ground[1] if ground else "", ground=ground[2] if ground else "")


def fact_f1(claimed: list[Facts], true: list[Facts]) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 per fact kind, over all items: {kind: {precision, recall, f1}}, and their union `all`.

    An object fact is (place, kind, value), so the right colour in the wrong place is wrong.
    """
    counts = {kind: np.zeros(3) for kind in ("place", "colour", "shape", "size", "ground", "texture", "all")}
    for a, b in zip(claimed, true, strict=True):
        said, held = _fact_set(a), _fact_set(b)
        for kind in counts:
            one, two = ({f for f in facts if kind in (f[1], "all")} for facts in (said, held))
            counts[kind] += (len(one & two), len(one), len(two))
    return {kind: _precision_recall_f1(*c) for kind, c in counts.items()}


def _fact_set(facts: Facts) -> set[tuple[str, str, str]]:
    found = {("", "ground", facts.ground), ("", "texture", facts.texture)}
    for t in facts.things:
        found |= {(t.place, "place", ""), (t.place, "colour", t.colour)}
        found |= {(t.place, "shape", t.shape), (t.place, "size", t.size)}
    return {f for f in found if f[1] == "place" or f[2]}


def _precision_recall_f1(hits: float, said: float, held: float) -> dict[str, float]:
    precision, recall = hits / max(said, 1), hits / max(held, 1)
    return {"precision": precision, "recall": recall, "f1": 2 * hits / max(said + held, 1)}


def score_pictures(drawn: Scenes, prompted: Scenes) -> dict[str, np.ndarray]:
    """Per prompt {measure: (N,)}, raw: recall of fact, full and bag, of places and of colours in them, count, and the
    precision of full.
    """
    held, want = drawn.cells > 0, prompted.cells > 0
    a, b = drawn.cells - 1, prompted.cells - 1
    size, colour_shape = a % 2 == b % 2, a // 2 == b // 2
    colour, shape = a // 2 % len(COLOURS) == b // 2 % len(COLOURS), a // 2 // len(COLOURS) == b // 2 // len(COLOURS)
    both = held & want
    parts = (both.astype(float) + (both & colour) + (both & shape) + (both & size)) / 4
    full = both & colour_shape & size
    anywhere = ((a[:, None, :] // 2 == b[:, :, None] // 2) & held[:, None, :]).any(axis=2) & want
    wanted = np.maximum(want.sum(1), 1)
    return {
        "fact": (parts * want).sum(1) / wanted,
        "full": full.sum(1) / wanted,
        "bag": anywhere.sum(1) / wanted,
        "place": both.sum(1) / wanted,
        "colour": (both & colour).sum(1) / wanted,
        "count": (held.sum(1) == want.sum(1)).astype(float),
        "precision": full.sum(1) / np.maximum(held.sum(1), 1),
    }


def score_with_shuffle(drawn: Scenes, prompted: Scenes) -> dict[str, Scores]:
    """Every measure raw and shuffled: pictures scored against the prompts 1 .. ROTATIONS places further on."""
    raw = score_pictures(drawn, prompted)
    turns = [k for k in range(1, min(ROTATIONS, len(prompted) - 1) + 1)]
    order = np.arange(len(prompted))
    others = [score_pictures(drawn, prompted[np.roll(order, k)]) for k in turns]
    return {m: Scores(raw=raw[m], shuffled=np.mean([o[m] for o in others], axis=0)) for m in raw}
