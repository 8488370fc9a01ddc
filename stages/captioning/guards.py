"""Whether an answer is a caption, and what is to be mended about it: pure functions of the text.

A refusal, a loop or an echo of the prompt is no caption and says why; an opening that says nothing ("The image shows") and
half a sentence at the end are taken off, and that is recorded too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..sentences import whole_sentences
from .engine import Finish
from .openings import strip_opening

Reason = Literal[
    "caption_refused",
    "caption_leaks_prompt",
    "caption_wrong_language",
    "caption_loops",
    "caption_cut",
    "caption_too_short",
]

_NOT_LATIN = (
    "am ar as ba be bg bn dv dz el fa gu he hi hy ja ka kk km kn ko ky lo mk ml mn mr my ne or pa ps ru sa sd si ta te tg th "
    "ti tt ug uk ur yi zh"
)


@dataclass(frozen=True, kw_only=True)
class GuardsConfig:
    """What a caption has to be."""

    min_words: int = 5
    """A caption of fewer words is dropped."""
    openings: Literal["stripped", "kept"] = "stripped"
    """Whether a caption loses an opening such as "The image shows"."""
    loop_words: int = 6
    """Length of the word sequences that are looked for again in the same caption."""
    max_loops: float = 0.3
    """Most of these sequences, as a share, that may have been there before."""
    script: Literal["latin", "any"] = "latin"
    """In which script captions are; up to a fifth of the letters may be of another (a sign in the picture, say)."""
    language: str = ""
    """ISO 639-1 code of the language that captions must be in, `en` for example; empty asks for none. Captions of fewer than
    `SURE` words pass. Needs py3langid."""

    def __post_init__(self) -> None:
        if self.min_words < 1 or self.loop_words < 1 or not 0 < self.max_loops <= 1:
            raise ValueError(
                "recaption: guards need min_words and loop_words of at least 1 and max_loops above 0 and up to 1, got "
                f"{self.min_words}, {self.loop_words} and {self.max_loops}"
            )
        if self.language and not re.fullmatch("[a-z]{2}", self.language):
            raise ValueError(f"recaption: guards.language is two small letters such as en, got {self.language!r}")
        if self.script == "latin" and self.language in _NOT_LATIN.split():
            raise ValueError(
                f"recaption: guards.language={self.language!r} is not written in Latin: set guards.script=any"
            )

    def load_language(self) -> Callable[[str], str] | None:
        """Text → language code; None where no language is asked for. Raises ValueError where py3langid is missing,
        or does not know it.
        """
        if not self.language:
            return None
        try:
            from py3langid.langid import classify, rank
        except ModuleNotFoundError as error:
            raise ValueError(
                f"recaption: guards.language={self.language!r} needs py3langid: pip install 'densebridge[language]'"
            ) from error
        known = sorted({code for code, _ in rank("")})
        if self.language not in known:
            raise ValueError(f"recaption: guards.language={self.language!r} is none of py3langid's: {' '.join(known)}")
        return lambda text: classify(text)[0]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A caption, or why it is none."""

    caption: str
    """As it goes on; with a reason, as the model wrote it."""
    mended: tuple[str, ...] = ()
    """What was done to it: `markdown`, `opening`, `cut`."""
    reason: Reason | None = None


def judge(
    text: str,
    finish: Finish | None,
    config: GuardsConfig,
    asked: Sequence[str] = (),
    language: Callable[[str], str] | None = None,
) -> Judged:
    """The answer as a caption. `asked`: what the model was told and must not repeat; `language`: `load_language()`'s."""
    line = " ".join(text.split())
    reason: Reason | None = None
    if _REFUSAL.search(unquoted(line)[:300]):
        reason = "caption_refused"
    elif leaks(text, asked):
        reason = "caption_leaks_prompt"
    elif config.script == "latin" and foreign_share(line) > FOREIGN:
        reason = "caption_wrong_language"
    elif loops(line, config.loop_words) > config.max_loops or runs(line):
        reason = "caption_loops"
    if reason:
        return Judged(caption=text, reason=reason)
    caption, mended = _mend(text, finish, config.openings)
    if not caption and finish == "length":
        reason = "caption_cut"
    elif len(words(caption)) < config.min_words:
        reason = "caption_too_short"
    elif loops(caption, config.loop_words) > config.max_loops or runs(caption):  # marks parted what is repeated
        reason = "caption_loops"
    elif language and len(words(caption)) >= SURE and language(caption) != config.language:
        reason = "caption_wrong_language"
    return Judged(caption=text, reason=reason) if reason else Judged(caption=caption, mended=mended)


def _mend(text: str, finish: Finish | None, openings: Literal["stripped", "kept"]) -> tuple[str, tuple[str, ...]]:
    """(the caption on one line, what was done to it); empty where nothing whole is left of a text that was cut."""
    steps = {"markdown": without_markdown, "opening": strip_opening}
    if openings == "kept":
        del steps["opening"]
    mended, caption, before = [], text, ""
    while caption != before:  # one opening may hide behind another, or behind a mark
        before = caption
        for name, step in steps.items():
            line, caption = " ".join(caption.split()), step(caption)
            if caption != line and name not in mended:
                mended.append(name)
    whole = whole_sentences(caption) if finish == "length" else caption
    if whole != caption:
        mended.append("cut")
    return whole, tuple(mended)


_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:['’\-][^\W_]+)*")
# What is written in the picture; an apostrophe before a letter does not end a span in single quotes.
_QUOTED = re.compile(r"\"[^\"]{0,200}\"|“[^”]{0,200}”|«[^»]{0,200}»|(?<!\w)['‘](?:[^'’]|['’](?=\w)){1,200}['’](?!\w)")
_IMAGE = r"(?:images?|pictures?|photos?|photographs?)"
_CANNOT = r"(?:can['’]?t|cannot|can\ not|could(?:n['’]t|\ not)|(?:am\ |['’]?m\ )?(?:unable\ to|not\ able\ to))"
_NO = r"(?:(?:is|was|does|did|could|can)(?:\ not|n['’]t)|cannot|failed\ to)"
_REFUSAL = re.compile(
    rf"""^[^\w"“«'‘]*(?:
      i(?:['’]m|\ am)\ (?:very\ |so\ |really\ |truly\ )?sorry\b
    | sorry[,.!]?\ (?:but\b|no\b|i\ (?:can|could|am|do|was|won)|i['’](?:m|ve|ll)\b)
    | i\ (?:sincerely\ )?apologi[sz]e\b | (?:my\ )?apologies\b
    | unfortunately,?\ (?:i\b|(?:there\ is\ )?no\ {_IMAGE}\b)
    | i(?:\ really)?\ ?{_CANNOT}\b | i\ won['’]t\b
    | i\ (?:don['’]t|do\ not)\ (?:feel\ comfortable|(?:see|have)\ (?:any|an?|the|access|{_IMAGE})\b)
    | i(?:['’]m|\ am)\ (?:not\ comfortable|an?\ (?:ai|artificial\ intelligence|(?:large\ )?language\ model)\b)
    | (?:unable|not\ able)\ to\ (?:process|view|see|identify|describe|recogni[sz]e|provide|analy[sz]e|load|access|open
      |assist|help|comply)\b
    | (?:please|kindly|(?:could|can)\ you(?:\ please)?)\ (?:provide|upload|attach|share|send)\ (?:me\ )?
      (?:(?:an?|the|your|another|clear|valid|actual)\ ){{0,3}}(?:{_IMAGE}|file|link|more\ (?:details|context|information))\b
    | (?:there\ (?:is|was)\ )?no\ {_IMAGE}\ (?:(?:was|is|were|are|has\ been)\ )?
      (?:provided|uploaded|shared|attached)\b(?!\ (?:to|on|with|by)\ (?!(?:your|this|the)\ (?:message|request|question|chat)\b))
    | it\ (?:looks|seems|appears)\ (?:like\ |that\ )?(?:you(?:['’]ve|\ have|\ did|\ forgot)
      |(?:there\ (?:is|was)\ )?no\ {_IMAGE}\b)
    | (?:the|your|this)\ {_IMAGE}\ {_NO}\ (?:be\ )?
      (?:visible|available|accessible|provided|attached|load(?:ed)?|displayed|seen|viewed|processed)
      (?:[,.;!]|\ (?:to\ me|so|and\ i|properly|correctly)\b|$)
    )
    | \bas\ an?\ (?:text-based\ )?(?:ai|artificial\ intelligence|(?:large\ )?language\ model)\b[\w\ -]{{0,40}},?\ i\b
    | \bi\ ?{_CANNOT}\ (?:assist|comply|process|help\ (?:with|you))\b
    | \bi\ ?{_CANNOT}\ (?:see|view|identify|describe|recogni[sz]e|provide|name)\ (?:(?:the|this|these|any|an?|real|specific)\ )*
      (?:people|persons?|individuals?|who|them|him|her|anyone|descriptions?|{_IMAGE})\b""",
    re.I | re.X,
)
# The words of a template count where a turn begins; inside a line they may be written in the picture.
_CHAT = re.compile(
    r"<\|?/?(?:image|im_start|im_end|pad|end|user|assistant|system|start_of_turn|end_of_turn|eot_id|endoftext)\|?>"
    r"|\[/?INST\]|<<SYS>>|^[^\S\n]*(?:USER|ASSISTANT|Human):|USER:[^\n]{0,2000}?ASSISTANT:"
    r"|###\s?(?:Instruction|Response|Input|Human|Assistant|User|System):|\{alt\}",
    re.M,
)
ECHO = 12
"""Words in a row that a caption may not share with a sentence of the prompt, or the whole sentence if it is shorter."""
TOLD = 7
"""Sentences of the prompt of fewer words may be in a caption."""
FOREIGN = 0.2
"""Share of letters of another script that is no quotation any more."""
SURE = 12
"""Words from which on a text's language can be told."""


def words(text: str) -> list[str]:
    """The words of a text, without punctuation. In scripts that do not part them, every sign counts as one."""
    return _WORD.findall(text)


def unquoted(text: str) -> str:
    """The text with nothing between its quotation marks; a text that is one quotation, without the marks."""
    blank = _QUOTED.sub('""', text)
    return blank if words(blank) else text.strip("\"“”«»'‘’ ")


def leaks(text: str, asked: Iterable[str]) -> bool:
    """Whether the text holds marks of a chat template, or `ECHO` words in a row of a sentence of what was asked."""
    if _CHAT.search(text):
        return True
    said = " | ".join(" ".join(words(part)) for part in re.split(r"(?<=[.!?])\s", text.lower()))
    for told in asked:
        for sentence in re.split(r"[.!?:;]", told.lower()):
            prompt = words(sentence)
            length = min(ECHO, len(prompt))
            starts = range(len(prompt) - length + 1) if length >= TOLD else ()
            if any(f" {' '.join(prompt[n : n + length])} " in f" {said} " for n in starts):
                return True
    return False


def loops(text: str, length: int) -> float:
    """Share of the sequences of `length` words that occurred before in the text; 0 where it is shorter."""
    said = words(text.lower())
    sequences = [tuple(said[n : n + length]) for n in range(len(said) - length + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def runs(text: str) -> bool:
    """Whether up to twelve words stand four times in a row; one or two words, ten times, as "very, very" and "New York, New
    York" are no loops. What is quoted, and numbers, may repeat: scoreboards and signs do.
    """
    said = [word for word in words(unquoted(text).lower()) if not word.isdigit()]
    for period in range(1, min(12, len(said) // 4) + 1):
        run, wanted = 0, (9 if period <= 2 else 3) * period
        for n in range(period, len(said)):
            run = run + 1 if said[n] == said[n - period] else 0
            if run >= wanted and (period <= 2 or len(set(said[n - period : n])) > 2):  # not "x y x y" again and again
                return True
    return False


def foreign_share(text: str) -> float:
    """Share of the letters that are not Latin; 0 where there are none."""
    if text.isascii():
        return 0.0
    letters = [c for c in text if c.isalpha()]
    return sum(not _is_latin(c) for c in letters) / len(letters) if letters else 0.0


@lru_cache(maxsize=4096)
def _is_latin(letter: str) -> bool:
    return unicodedata.name(letter, "").startswith(("LATIN", "FULLWIDTH LATIN", "MODIFIER LETTER"))


# Two underscores are emphasis around a capital or several words, and part of the name in `__init__`.
_EMPHASIS = re.compile(r"\*\*|`|(?<!\w)__(?=[^\W_a-z]|[^_\n]{1,80}\s)([^_\n]{1,200})__(?!\w)")
_MARKS = re.compile(r"(?:(?:#{1,6}|[-*•])(?:\s+|$))+")
_NUMBERED = re.compile(r"(?:(?:#{1,6}|[-*•])\s+)*\d{1,2}[.)](?:\s|$)")
_MARKS_AND_NUMBERS = re.compile(r"(?:(?:#{1,6}|[-*•]|\d{1,2}[.)])(?:\s+|$))+")


def without_markdown(text: str) -> str:
    """The text on one line, without the marks of emphasis, headings and lists; a heading ends in a colon there, a list's line
    in a full stop. A single line that begins with a number is no list.
    """
    lines = [line.strip() for line in _EMPHASIS.sub(lambda m: m[1] or "", text).splitlines()]
    marks = _MARKS_AND_NUMBERS if sum(bool(_NUMBERED.match(line)) for line in lines) > 1 else _MARKS
    parts, ending = list[str](), ""
    for line in lines:
        match = marks.match(line)
        rest = line[match.end() :] if match else line
        if not rest:
            continue
        if ending and not parts[-1].rstrip("\"'”’»)").endswith(tuple(".!?:;,…。！？：；，")):
            parts[-1] += ending
        parts.append(rest)
        ending = "" if not match else ":" if line.startswith("#") else "."
    return " ".join(" ".join(parts).split())
