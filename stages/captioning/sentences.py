"""Where sentences end: enough English to cut a caption at a full stop that is one."""

from __future__ import annotations

import re

# A stop, whatever closes a quotation or bracket after it, then space or the end.
_STOP = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+[」』”’）]*")
# Never the last word before a stop; those of the second kind may end a sentence all the same, where a capital follows.
_ABBREVIATIONS = re.compile(r"e\.g|i\.e|vs|approx|ca|cf|vol|st|mt|mr|mrs|ms|dr|prof|sr|jr|lt|sgt|capt|rev")
_CLOSING = re.compile(r"etc|al|inc|ltd|corp|[ap]\.m|u\.[sk]|[cmk]m|kg|lb|ft|oz")


def sentences(text: str) -> list[str]:
    """The sentences of a text on one line; the last may lack its stop. Joined by blanks they are the text again, but for
    marks that need no blank (。).
    """
    found, start = [], 0
    for end in _ends(text):
        found.append(text[start:end].strip())
        start = end
    rest = text[start:].strip()
    return [*found, rest] if rest else found


def whole_sentences(text: str) -> str:
    """The text up to its last whole sentence; empty where it has none. For a text that was cut: a number or an abbreviation
    at its very end (3. of 3.5) is no end of a sentence.
    """
    ends = _ends(text)
    if ends and ends[-1] == len(text) and re.search(r"\d[.]$", text):
        ends.pop()
    return text[: ends[-1]] if ends else ""


def _ends(text: str) -> list[int]:
    return [match.end() for match in _STOP.finditer(text) if _ends_here(text, match)]


def _ends_here(text: str, stop: re.Match[str]) -> bool:
    if not stop.group().startswith(".") or stop.group().startswith(".."):
        return True
    words = text[max(0, stop.start() - 24) : stop.start()].split(" ")
    word, following = words[-1].lstrip("(\"'“‘[").lower(), text[stop.end() : stop.end() + 2].strip()
    if _CLOSING.fullmatch(word):
        return following.isupper()
    initial = len(word) == 1 and word.isalpha() and word != "i"
    return not _ABBREVIATIONS.fullmatch(word) and not initial and not following.islower()
