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
    """ISO 639-1 code of the language that captions must be in, `en` for example; empty asks for none. Needs py3langid."""

    def __post_init__(self) -> None:
        if self.min_words < 1 or self.loop_words < 1 or not 0 < self.max_loops <= 1:
            raise ValueError(
                "recaption: guards need min_words and loop_words of at least 1 and max_loops above 0 and up to 1, got "
                f"{self.min_words}, {self.loop_words} and {self.max_loops}"
            )

    def load_language(self) -> Callable[[str], str] | None:
        """Text → language code; None where no language is asked for. Raises ValueError where py3langid is missing."""
        if not self.language:
            return None
        try:
            from py3langid.langid import classify
        except ModuleNotFoundError as error:
            raise ValueError(
                f"recaption: guards.language={self.language!r} needs py3langid: pip install 'densebridge[language]'"
            ) from error
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
    if _REFUSAL.search(line[:300]):
        reason = "caption_refused"
    elif leaks(line, asked):
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
    elif language and language(caption) != config.language:
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
_MARKS = re.compile(r"\*\*|__|`|^\s*(?:#{1,6}|[-*•]|\d{1,2}[.)])\s+", re.M)
_REFUSAL = re.compile(
    r"""^\W*(?:i['’]m\ (?:very\ |so\ |really\ )?sorry|(?:i\ )?apologi[sz]e|sorry[,.]|my\ apologies|unfortunately,?\ i\b
    |i\ (?:really\ )?(?:can(?:['’]t|not|\ not)|could(?:n['’]t|\ not)|won['’]t|am\ (?:un|not\ )able|['’]?m\ (?:un|not\ )able
    |do(?:n['’]t|\ not)\ (?:see|have)\ (?:any|an|the|a|access)\ ?(?:image|picture|photo|ability|attached)?)
    |i['’]m\ (?:unable|not\ able)|(?:please|could\ you)\ (?:provide|upload|attach|share)\b
    |(?:no|there\ is\ no)\ (?:image|picture|photo)\ (?:was\ |is\ |has\ been\ )?(?:provided|attached|uploaded))
    |\bas\ an?\ (?:ai|artificial\ intelligence|language\ model|large\ language\ model)\b
    |\bi(?:['’]m|\ am)?\ (?:can['’]?t|cannot|can\ not|unable\ to|not\ able\ to)\ (?:assist|help|comply|process|see|view)\b""",
    re.I | re.X,
)
_CHAT = re.compile(
    r"<\|?/?(?:image|im_start|im_end|s|pad|end|user|assistant|system|start_of_turn|end_of_turn|eot_id|endoftext)\|?>"
    r"|\[/?INST\]|<<SYS>>|(?:^|\s)(?:USER|ASSISTANT|Human|###\s*\w+):|\{alt\}"
)
ECHO = 7
"""Words in a row that a caption may not share with the prompt."""
FOREIGN = 0.2
"""Share of letters of another script that is no quotation any more."""


def words(text: str) -> list[str]:
    """The words of a text, without punctuation. In scripts that do not part them, every sign counts as one."""
    return _WORD.findall(text)


def leaks(text: str, asked: Iterable[str]) -> bool:
    """Whether the text holds marks of a chat template, or `ECHO` words in a row of what was asked."""
    if _CHAT.search(text):
        return True
    said = " ".join(words(text.lower()))
    for told in asked:
        prompt = words(told.lower())
        starts = range(len(prompt) - ECHO + 1)
        if any(f" {' '.join(prompt[n : n + ECHO])} " in f" {said} " for n in starts):
            return True
    return False


def loops(text: str, length: int) -> float:
    """Share of the sequences of `length` words that occurred before in the text; 0 where it is shorter."""
    said = words(text.lower())
    sequences = [tuple(said[n : n + length]) for n in range(len(said) - length + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def runs(text: str) -> bool:
    """Whether up to twelve words stand four times in a row, six words in all or more."""
    said = words(text.lower())
    for period in range(1, min(12, len(said) // 4) + 1):
        run, wanted = 0, max(3 * period, 6 - period)
        for first, again in zip(said, said[period:], strict=False):
            run = run + 1 if first == again else 0
            if run >= wanted:
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


def without_markdown(text: str) -> str:
    """The text on one line, without the marks of emphasis, headings and lists."""
    before = ""
    while text != before:
        before, text = text, _MARKS.sub("", text)
    return " ".join(text.split())
