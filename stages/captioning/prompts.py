"""What a captioner is asked: named templates, which of them a sample gets, and what its alt text may add.

The templates ask for what ELLA asked of CogVLM (arXiv 2403.05135, section 3.2, which gives the intent and not the words):
main objects and surroundings with colours, textures and spatial relations, in about fifty words.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .guards import words

Short = Literal["none", "asked", "together", "first_sentence"]
"""Where a sample's short caption comes from. `asked`: a second prompt for the same picture, in the same batch; any model can.
`together`: one answer holds both, which saves the second look at the picture; for models that follow instructions.
`first_sentence`: of the long caption, at no cost."""

HINT = (
    "The picture was published with the text «{alt}». Use names of people, places and works from it where they fit what "
    "can be seen; it may also be wrong or say nothing of the picture."
)
TOGETHER = (
    "Begin with a line of its own that sums the picture up in one sentence of at most fifteen words; "
    "the description follows on the next line."
)
HINT_LENGTH = 200
"""Longest hint in characters; the rest of an alt text is mostly search words."""
LONGEST_ALT = 2000
"""Characters of an alt text that are looked at."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """One way to ask for a caption."""

    name: str
    """Recorded with each caption."""
    text: str
    """What the model is asked."""
    weight: int = 1
    """Share of the samples that are asked this, relative to the other prompts' weights."""
    hint: str = ""
    """Added where the sample has an alt text that says something, which stands for {alt}: `HINT`, say. Empty adds none."""
    short: str = "Describe this image in one sentence of at most fifteen words."
    """What the model is asked for the short caption, where it is asked for by itself."""

    def __post_init__(self) -> None:
        if not self.name or not self.text.strip() or not self.short.strip():
            raise ValueError(f"recaption: a prompt needs a name, a text and a short question, got {self}")
        if self.weight < 1:
            raise ValueError(f"recaption: the weight of prompt {self.name!r} must be at least 1, got {self.weight}")
        if self.hint and self.hint.count("{alt}") != 1:
            raise ValueError(f"recaption: the hint of prompt {self.name!r} must hold {{alt}} once, got {self.hint!r}")

    def ask(self, hint: str, short: Short) -> str:
        """The whole prompt; `hint` is what `hint_from` made of the alt text, empty for none."""
        parts = [self.text, self.hint.replace("{alt}", hint) if hint else "", TOGETHER if short == "together" else ""]
        return " ".join(part for part in parts if part)

    def own_words(self, short: Short) -> tuple[str, ...]:
        """What a caption must not repeat: all that the model is asked, but for the alt text."""
        further = {"asked": (self.short,), "together": (TOGETHER,)}.get(short, ())
        return (self.text, *further, *self.hint.split("{alt}"))


DENSE = PromptConfig(
    name="dense",
    text=(
        "Describe this image in about fifty words: the main objects and their surroundings, with their colours and "
        "textures and where they are in relation to each other. Say only what can be seen."
    ),
    weight=2,
)
SPATIAL = PromptConfig(
    name="spatial",
    text=(
        "Describe in about fifty words how this image is laid out: which objects are on the left, on the right, in "
        "front and behind, what they look like, and what lies between and around them. Say only what can be seen."
    ),
)
ATTRIBUTES = PromptConfig(
    name="attributes",
    text=(
        "Write about fifty words on what is in this image. Name every important object with its number, colour, "
        "material, texture and shape, then the background, the light and the style. Say only what can be seen."
    ),
)
TEMPLATES = (DENSE, SPATIAL, ATTRIBUTES)
"""Half of the samples get the first, a quarter each of the others."""


def choose(prompts: Sequence[PromptConfig], key: str) -> PromptConfig:
    """The prompt of the sample with this key: by weight, and the same one every time."""
    slot = int(key[-8:], 16) % sum(p.weight for p in prompts)
    for prompt in prompts:
        slot -= prompt.weight
        if slot < 0:
            return prompt
    raise AssertionError("the slots are as many as the weights")


_FILE = re.compile(
    r"\S+\.(jpe?g|png|gif|webp|bmp|tiff?|svg|html?|php|aspx?)\b|\b(img|dsc[nf]?|pxl|image|photo)[-_ ]?\d[\w-]*", re.I
)
_ADDRESS = re.compile(r"(https?://|www\.)\S*|\S+@\S+\.\S+|\b[\w-]+\.(com|net|org|de|co|uk|ru|cn)\b(/\S*)?", re.I)
# What stands where an alt text should, alone or with little else.
_BOILERPLATE = re.compile(
    r"(?:images?|photos?|pictures?|pics?|stock|royalty|free|thumbnail|logo|icon|banner|untitled|default|placeholder|avatar"
    r"|screenshot|click|here|to|enlarge|view|full|size|zoom|no|description|available|alt|text|title|product|main|front|back"
    r"|detail|gallery|slide|the|an|of|for|and|by|in|on|with|vector|illustration|wallpaper|hd|home"
    r"|loading|read|more|profile|cover|header|featured|post|blog|shop|buy|now|图片|照片|图像|画像|写真)",
    re.I,
)


def hint_from(alt: str | None) -> str:
    """What of an alt text a model may be told: one harmless line; empty where it says nothing.

    Everything that could be a special token of some model loses its brackets: an `<image>` among the words would make
    its processor refuse the whole batch, an `<|im_end|>` would end the question.
    """
    text = html.unescape((alt or "")[:LONGEST_ALT])
    text = re.sub(r"<[^<>]*>|\[/?[A-Z_]+\]", " ", text)
    text = "".join(c if c.isprintable() and c not in "<>[]{}|«»\\`#" else " " for c in text)
    text = " ".join(_ADDRESS.sub(" ", _FILE.sub(" ", text)).split()).strip(" ,;:-–")
    if len(text) > HINT_LENGTH:
        text = text[:HINT_LENGTH].rsplit(" ", 1)[0]
    telling = [word for word in re.findall(r"[^\W\d_]{2,}", text) if not _BOILERPLATE.fullmatch(word)]
    named = any(not word[0].islower() for word in telling)  # a capital, or a script that has none
    return text if named or len(telling) >= 2 else ""


def split_together(answer: str) -> tuple[str, str | None]:
    """(long, short) of an answer to `TOGETHER`; the short one is None where the answer is not in two parts: its first line is
    a paragraph, a heading or the announcement of what follows.
    """
    first, _, rest = (part.strip() for part in answer.strip().partition("\n"))
    is_short = 3 <= len(words(first)) <= 25 and not first.rstrip("*_ ").endswith((":", "："))
    return (rest, first) if rest and is_short else (answer, None)
