"""A setting is one of the words that its annotation lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from training.choices import check_choices

Colour = Literal["red", "green"]


@dataclass(frozen=True, kw_only=True)
class Paint:
    """Two choices, and what is none."""

    colour: Colour = "red"
    gloss: Literal["matt", "high"] = "matt"
    layers: int = 1
    name: str | None = None

    def __post_init__(self) -> None:
        check_choices(self, "paint.")


def test_only_listed_words_are_taken() -> None:
    Paint(colour="green", gloss="high", layers=7, name="any")
    with pytest.raises(ValueError, match=r"^paint.colour is 'blue': choose one of red, green$"):
        Paint(colour="blue")  # type: ignore[arg-type]
    for wrong in (["high"], None, True):
        with pytest.raises(ValueError, match=r"paint.gloss is .*: choose one of matt, high"):
            Paint(gloss=wrong)  # type: ignore[arg-type]
