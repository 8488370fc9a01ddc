"""Openings that say nothing go, what says something of the picture stays, and the rest is still a sentence."""

from __future__ import annotations

import pytest

from stages.captioning.openings import strip_opening


@pytest.mark.parametrize(
    ("caption", "stripped"),
    [
        ("The image shows a large brown dog.", "A large brown dog."),
        ("The image features a man on skis.", "A man on skis."),
        ("This image depicts two children playing.", "Two children playing."),
        ("The photo captures people at a market.", "People at a market."),
        ("The image you've provided shows a cat.", "A cat."),
        ("The scene vividly portrays a harbour at dusk.", "A harbour at dusk."),
        ("In this image, we can see a red bus.", "A red bus."),
        ("In the picture you can clearly see the old bridge.", "The old bridge."),
        ("In this image, there is a cup on a table.", "There is a cup on a table."),
        ("We can see a dog and a ball.", "A dog and a ball."),
        ("The main subject of the image is a green parrot.", "A green parrot."),
        ("The image is a close-up of a watch.", "A close-up of a watch."),
        ("The image is of an old man.", "An old man."),
        ("This is a photo of a lake.", "A lake."),
        ("A picture of a lake.", "A lake."),
        ("The image appears to show a kitchen.", "A kitchen."),
        ("Sure! A lake lies between hills.", "A lake lies between hills."),
        ("Here is a detailed description of the image: A lake.", "A lake."),
        ("Caption: A lake.", "A lake."),
        ("The image contains 3 cups.", "3 cups."),
        ("The image appears to be a kitchen.", "A kitchen."),
        ("Sure, here is a caption: A lake.", "Here is a caption: A lake."),
    ],
)
def test_an_opening_goes_and_the_next_word_gets_a_capital(caption: str, stripped: str) -> None:
    assert strip_opening(caption) == stripped


@pytest.mark.parametrize(
    "caption",
    [
        "A painting of three boats.",  # that it is a painting is worth saying
        "This is a black-and-white photo of a lake.",
        "The image shows that the dog is wet.",
        "The image shows how a dog runs.",
        "The image is divided into two parts.",
        "The image quality is poor.",
        "The picture on the wall shows a dog.",
        "A dog. The image shows a cat.",
        "The image shows",
        "The image shows ...",
        "We can see.",
        "A picture of the pope hangs on the wall.",
        "An image of a lion is carved into the door.",
        "The photo of the couple stands on a desk.",
        "A photograph of two women hangs over a sofa.",
        "The image appears to be blurry and shows a dog.",
        "The image shows a dog and is blurry.",
        "The image shows us a dog.",
        "The photo shows him at a desk.",
        "The image depicts where a dog runs.",
        "Absolutely! is the title on the cover.",
        "One can see the sea from the window.",
        "",
    ],
)
def test_what_says_something_stays(caption: str) -> None:
    assert strip_opening(caption) == caption
