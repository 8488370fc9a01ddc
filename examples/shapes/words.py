"""What people say of a scene: dense captions, short phrases, weak lists and web-like alt texts.

Dense captions have 30 to 70 words and name every fact; several phrasings, objects in any order. The other kinds are what
a base model saw on the web: one object in full, or several objects loosely. Every word of a dense caption occurs in the
kinds that the base is trained on, but it never sees two fully described objects: that is the gap a connector closes.
"""

from __future__ import annotations

import numpy as np

from .world import COLOURS, GROUNDS, NUMBERS, PLACES, SHAPES, SIZES, TEXTURES, Facts, Thing

OPENINGS = (
    "The picture shows {number} on a {texture} {ground} background.",
    "This is an image of {number} in front of a {texture} {ground} background.",
    "On a {texture} {ground} background there {are} {number}.",
    "{Number} can be seen here and the background is {texture} {ground}.",
)
SENTENCES = (
    "A {size} {colour} {shape} is in the {place} corner.",
    "In the {place} corner there is a {shape} that is {size} and {colour}.",
    "There is a {colour} {shape} in the {place} corner and it is {size}.",
    "The {place} corner holds a {shape} of {size} size and {colour} colour.",
)
PROMPTS = (
    "Describe the picture in detail.",
    "What does the image show? Name every object and its place.",
    "List all that can be seen and where it is.",
    "Write a long caption for this picture.",
)
ORDERS = ((0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3), (3, 1, 2, 0))  # the order in which each style names the places
CLOSINGS = (
    "Nothing else can be seen in the picture and the other corners are empty.",
    "The rest of the picture is empty and shows just the background.",
    "All of the other corners are empty so there is nothing else to see here.",
)
PHRASES = (
    "a {size} {colour} {shape} in the {place} corner on a {texture} {ground} background",
    "{size} {colour} {shape}, {place}, {texture} {ground} background",
    "{place}: a {size} {colour} {shape}, {texture} {ground}",
    "{colour} {shape}, {size}, in the {place} of a {texture} {ground} image",
)
RELATIONS = (
    "the {colour} {shape} is {relation} the {other_colour} {other_shape}.",
    "a {colour} {shape} {relation} a {other_colour} {other_shape}",
)
VAGUE = ("shapes wallpaper", "image {n}", "colour shapes picture", "picture of {ground} background", "photo {n}")


def dense_caption(facts: Facts, rng: np.random.Generator) -> str:
    """A caption that names every fact, in 30 to 70 words: any phrasing of each sentence, objects in any order."""
    things = [facts.things[i] for i in rng.permutation(len(facts.things))]
    sentences = [_fill(SENTENCES[rng.integers(len(SENTENCES))], thing) for thing in things]
    return _join(facts, OPENINGS[rng.integers(len(OPENINGS))], sentences, CLOSINGS[rng.integers(len(CLOSINGS))])


def styled_caption(facts: Facts, style: int) -> str:
    """The dense caption in one of `len(PROMPTS)` fixed styles: what the captioner answers to PROMPTS[style]."""
    things = [t for place in ORDERS[style] for t in facts.things if t.place == PLACES[place]]
    sentences = [_fill(SENTENCES[style], thing) for thing in things]
    return _join(facts, OPENINGS[style], sentences, CLOSINGS[style % len(CLOSINGS)])


def _join(facts: Facts, opening: str, sentences: list[str], closing: str) -> str:
    number = NUMBERS[len(facts.things)]
    are = "is" if len(facts.things) == 1 else "are"
    filled = opening.format(
        number=number, Number=number.capitalize(), are=are, texture=facts.texture, ground=facts.ground
    )
    return " ".join([filled, *sentences, *([closing] if len(sentences) < 3 else [])])


def ordered_caption(facts: Facts) -> str:
    """The one canonical short form, places in reading order: what the language model learns to paraphrase into."""
    by_place = {thing.place: thing for thing in facts.things}
    parts = []
    for place in PLACES:
        thing = by_place.get(place)
        parts.append(f"{place}: {thing.size} {thing.colour} {thing.shape}" if thing else f"{place}: empty")
    return ", ".join(parts) + f", {facts.texture} {facts.ground} background"


def base_caption(facts: Facts, rng: np.random.Generator) -> str:
    """What the base model is trained on: one object in full (dense form or phrase), several objects loosely."""
    if len(facts.things) == 1:
        return dense_caption(facts, rng) if rng.random() < 0.5 else _phrase(facts, rng)
    if rng.random() < 0.25:
        return _relation(facts, rng)
    names = weak_list(facts, rng)
    if rng.random() < 0.2:
        number = NUMBERS[len(facts.things)]
        return f"The picture shows {number} on a {facts.texture} {facts.ground} background. {names}"
    return names


def weak_list(facts: Facts, rng: np.random.Generator) -> str:
    """Some of the objects with some of their attributes, as captions on the web have them."""
    things = [facts.things[i] for i in rng.permutation(len(facts.things))]
    if len(things) > 1 and rng.random() < 0.2:
        things = things[:-1]
    names = [_weak_name(thing, rng) for thing in things]
    ground = f" on a {facts.texture} {facts.ground} background" if rng.random() < 0.3 else ""
    return str(rng.choice((" and ", ", ", ". "))).join(names) + ground


def alt_text(facts: Facts, rng: np.random.Generator) -> str:
    """An alt text as the web has it: vague, or partial."""
    if rng.random() < 0.3:
        return str(rng.choice(VAGUE)).format(n=rng.integers(10), ground=facts.ground)
    return weak_list(facts, rng)


def _fill(sentence: str, thing: Thing) -> str:
    return sentence.format(size=thing.size, colour=thing.colour, shape=thing.shape, place=thing.place)


def _phrase(facts: Facts, rng: np.random.Generator) -> str:
    (thing,) = facts.things
    return str(rng.choice(PHRASES)).format(
        size=thing.size,
        colour=thing.colour,
        shape=thing.shape,
        place=thing.place,
        texture=facts.texture,
        ground=facts.ground,
    )


def _weak_name(thing: Thing, rng: np.random.Generator) -> str:
    size, colour, shape, place = rng.random(4) < (0.3, 0.85, 0.9, 0.3)
    words = ["a", thing.size if size else "", thing.colour if colour else "", thing.shape if shape else "shape"]
    return " ".join(filter(None, words)) + (f" in the {thing.place} corner" if place else "")


def _relation(facts: Facts, rng: np.random.Generator) -> str:
    first, second = (facts.things[i] for i in rng.permutation(len(facts.things))[:2])
    (row, column), (other_row, other_column) = (divmod(PLACES.index(t.place), 2) for t in (first, second))
    if row != other_row and (column == other_column or rng.random() < 0.5):
        relation = "above" if row < other_row else "below"
    else:
        relation = "left of" if column < other_column else "right of"
    return str(rng.choice(RELATIONS)).format(
        colour=first.colour,
        shape=first.shape,
        relation=relation,
        other_colour=second.colour,
        other_shape=second.shape,
    )


def vocabulary() -> list[str]:
    """Every word and mark that the world's captions can hold, sorted: what the tokenizers are made of."""
    templates = [*OPENINGS, *SENTENCES, *CLOSINGS, *PHRASES, *RELATIONS, *VAGUE, *PROMPTS]
    names = [*SHAPES, *COLOURS, *SIZES, *PLACES, *GROUNDS, *TEXTURES, *NUMBERS, *map(str.capitalize, NUMBERS)]
    loose = ["and a empty shape above below is are in the on", "USER ASSISTANT"]
    text = " ".join([*templates, *names, *loose])
    for mark in ".,:?{}":
        text = text.replace(mark, " ")
    fields = {"number", "Number", "relation", "other_colour", "other_shape", "n"}
    return sorted((set(text.split()) - fields) | {".", ",", ":", "?"} | set("0123456789"))
