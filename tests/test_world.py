"""The world: what is drawn is what the facts say, from a seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from examples.shapes.world import (
    COLOURS,
    GROUND_KINDS,
    GROUNDS,
    OBJECT_KINDS,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURE_STRENGTH,
    Facts,
    Scenes,
    Thing,
    draw_scenes,
    kind_of,
    render,
    render_photo,
    tile_bank,
)


def one_scene(kind: int, place: int, ground: int = 0) -> Scenes:
    cells = np.zeros((1, 4), int)
    cells[0, place] = kind
    return Scenes(cells=cells, ground=np.array([ground]))


def test_object_numbers_and_facts_agree() -> None:
    kinds = [kind_of(shape, colour, size) for shape in SHAPES for colour in COLOURS for size in SIZES]
    assert sorted(kinds) == list(range(1, OBJECT_KINDS + 1))
    facts = one_scene(kind_of("cross", "cyan", "small"), place=2, ground=GROUND_KINDS - 1).facts(0)
    thing = Thing(shape="cross", colour="cyan", size="small", place="bottom left")
    assert facts == Facts(things=(thing,), ground="gray", texture="checkered")


def test_scenes_are_a_function_of_the_seed() -> None:
    first, again, other = (draw_scenes(np.random.default_rng(seed), 50, (0.5, 0.5)) for seed in (1, 1, 2))
    assert (first.cells == again.cells).all() and (first.ground == again.ground).all()
    assert (first.cells != other.cells).any()


def test_numbers_of_objects_follow_the_shares() -> None:
    scenes = draw_scenes(np.random.default_rng(0), 4000, (0.2, 0.35, 0.3, 0.15))
    numbers = np.bincount((scenes.cells > 0).sum(axis=1), minlength=5) / 4000
    assert np.abs(numbers - (0, 0.2, 0.35, 0.3, 0.15)).max() < 0.03
    assert np.bincount(scenes.ground, minlength=GROUND_KINDS).min() > 0
    assert ((scenes.cells > 0).mean(axis=0) > 0.5).all()  # every place is used
    assert len(np.unique(scenes.cells)) == 1 + OBJECT_KINDS


def test_shape_and_colour_together_are_unique_within_a_scene() -> None:
    cells = draw_scenes(np.random.default_rng(0), 1000, (0, 0, 0, 1)).cells
    pairs = np.sort((cells - 1) // len(SIZES), axis=1)
    assert (cells > 0).all() and (np.diff(pairs, axis=1) > 0).all()


@pytest.mark.parametrize("place", range(4))
def test_an_object_is_drawn_in_its_place_and_colour(place: int) -> None:
    picture = render(one_scene(kind_of("square", "red", "large"), place), 64)[0]
    row, column = divmod(place, 2)
    assert tuple(picture[row * 32 + 16, column * 32 + 16]) == COLOURS["red"], PLACES[place]
    empty = render(one_scene(0, place), 64)[0]
    assert (picture != empty).any(axis=2).sum() == pytest.approx((0.93 * 0.225 * 2 * 64) ** 2, rel=0.15)


def test_sizes_shapes_and_grounds_differ() -> None:
    small, large = (render(one_scene(kind_of("circle", "white", size), 0), 64)[0].astype(int).sum() for size in SIZES)
    assert small < large
    bank = tile_bank(16).reshape(GROUND_KINDS * (1 + OBJECT_KINDS), -1)
    assert len(np.unique(bank, axis=0)) == len(bank)
    base = np.array(list(GROUNDS.values()))
    assert np.abs(tile_bank(16)[:, 0].reshape(4, -1, 3).mean(axis=1) - base).max() <= TEXTURE_STRENGTH


def test_textures_have_their_form() -> None:
    plain, striped, checkered = (render(one_scene(0, 0, ground), 64)[0].astype(int) for ground in range(3))
    assert np.ptp(plain, axis=(0, 1)).max() == 0
    assert np.ptp(striped, axis=1).max() == 0 and np.ptp(striped, axis=0).max() == 2 * TEXTURE_STRENGTH
    assert np.ptp(checkered, axis=1).max() == np.ptp(checkered, axis=0).max() == 2 * TEXTURE_STRENGTH


def test_photos_are_the_scene_with_at_most_a_strip_around_it() -> None:
    scenes = draw_scenes(np.random.default_rng(5), 40, (0.25,) * 4)
    seen = set()
    for n in range(40):
        photo = render_photo(scenes, n, np.random.default_rng(n))
        assert (photo == render_photo(scenes, n, np.random.default_rng(n))).all()
        height, width = photo.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        assert (photo[top : top + side, left : left + side] == render(scenes[n : n + 1], side)[0]).all()
        seen.add((side, "tall" if height > width else "wide" if width > height else "square"))
    assert {s for s, _ in seen} == {48, 64, 96, 128} and {f for _, f in seen} == {"tall", "wide", "square"}


def test_a_side_must_fit_the_texture() -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        tile_bank(20)
