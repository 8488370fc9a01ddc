"""caption → its sentences, and back: what `score` scores one by one and `prune` takes out; and how much of one is whole.

A boundary is a full stop (or ! ? …) with its closing quotes, and space after it; or a Chinese or Japanese full stop. None
is one inside quotes or brackets, before a small letter, between a Japanese quote and a particle, after an abbreviation,
between initials or after a list's number. Where it is in doubt ("U.S. Army") the sentences stay together: half a sentence
means something else, two at once only more.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence

_BOUNDARY = re.compile(r"(?:(?<![.!?…])[.!?…]+[\"'”’»)\]]*\s+|[。！？]+[”’」』）]*\s*)(?=\S)")
_ENCLOSED = re.compile(r"(?<![^\s(\[])\"[^\"]*\"|“[^“”]*”|«[^«»]*»|「[^「」]*」|\([^()]*\)|\[[^\[\]]*\]")
_INITIALS = re.compile(r"(?:\w\.)+\w")  # U.S, p.m
_OPENING, _CLOSING = "\"'“‘«([「『", "\"'”’»)]"
_NEAR = 60  # characters before and after a mark that tell what it is
_ASIAN_STOPS = tuple("。！？」』）")
_ASIAN_CLOSING = tuple("」』）")
_PARTICLES = tuple("とはがをにのもでへや")  # go on with a sentence after what is quoted
_INITIAL = re.compile(r"[^\W\d_]\.")


def _words(listed: str) -> frozenset[str]:
    return frozenset(listed.split())


_BEFORE_A_NAME = _words(
    "mr mrs ms dr prof st mt ft gen sen rev hon fig figs no nos vol vs ca cf approx e.g i.e eg ie viz"
)
_MAY_END = _words("etc inc ltd co corp jr sr dept est a.m p.m al")
_STARTERS = _words(
    "a an the this that these those it its he she his her they their there here in on at to behind above below beneath "
    "under beside next around between near with while as overall both each one two three several some many another all "
    "no nothing"
)


def split_sentences(caption: str) -> list[str]:
    """The caption's sentences, in order and stripped; the caption itself where it has no more than one."""
    small = caption.islower()
    enclosed = [m.span() for m in _ENCLOSED.finditer(caption)]
    found, start = list[str](), 0
    for match in _BOUNDARY.finditer(caption):
        span = bisect_left(enclosed, match.span()) - 1
        inside = span >= 0 and match.end() < enclosed[span][1]
        said = caption[max(start, match.start() - _NEAR) : match.end()]
        rest = caption[match.end() : match.end() + _NEAR].lstrip(_OPENING)
        if not inside and _ends(said, rest, small_letters_tell=not small):
            found.append(caption[start : match.end()].strip())
            start = match.end()
    found.append(caption[start:].strip())
    return [s for s in found if s] or [caption]


def join_sentences(sentences: Sequence[str]) -> str:
    """The sentences as one text; a space between them, except after a Chinese or Japanese full stop."""
    return "".join(s if s.endswith(_ASIAN_STOPS) else f"{s} " for s in sentences).rstrip()


def whole_sentences(text: str) -> str:
    """The text up to its last whole sentence; empty where it has none. For a text that was cut: a number or an abbreviation
    at its very end (3. of 3.5) is no end of a sentence.
    """
    whole = text.strip()
    while whole:
        last = split_sentences(whole)[-1]
        if _is_whole(last):
            return whole
        whole = whole[: -len(last)].rstrip()
    return ""


def _is_whole(sentence: str) -> bool:
    bare = sentence.rstrip(_CLOSING)
    word = bare.split()[-1].lstrip(_OPENING) if bare.split() else ""
    told = word.endswith(("!", "?", "…", "。", "！", "？", "..")) or sentence.endswith(_ASIAN_STOPS)
    named = word[:-1].lower() in _BEFORE_A_NAME or word[:-1].isdigit() or (len(word) == 2 and word[0].isupper())
    return told or (word.endswith(".") and not named and word != ".")


def _ends(said: str, rest: str, *, small_letters_tell: bool) -> bool:
    """Whether a sentence ends between what is `said` of it, and the `rest`."""
    if not any(c.isalnum() for c in said):
        return False  # a mark by itself
    if small_letters_tell and rest[:1].islower():
        return False
    if said.rstrip().endswith(_ASIAN_CLOSING) and rest.startswith(_PARTICLES):
        return False  # 「こんにちは。」と
    *before, last = said.split()
    word = last.rstrip(_CLOSING).lstrip(_OPENING)
    if not word.endswith(".") or word.endswith(".."):
        return True  # another mark than one full stop
    word = word[:-1]
    if word.isdigit():
        return bool(before)  # "1." opens a list's line
    if len(word) == 1 and word.isupper():
        # "the letter A. Below it", but "John F. Kennedy" and "by J. R. R. Tolkien"
        return bool(before) and before[-1][:1].islower() and not _INITIAL.match(rest)
    if word.lower() in _BEFORE_A_NAME:
        return False
    if word.lower() in _MAY_END or _INITIALS.fullmatch(word):
        return re.split(r"\W", rest, maxsplit=1)[0].lower() in _STARTERS
    return True
