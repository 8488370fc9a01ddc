"""Openings that say nothing of the picture: "The image shows a dog" is "A dog" to whoever draws from it."""

from __future__ import annotations

import re

# Not "painting", "drawing", "black-and-white photo": these say something of the picture, and stay.
_PICTURE = r"(?:image|picture|photo|photograph|pic|scene|shot|snapshot)"
_QUALITY = r"(?:(?:captivating|provided|given|overall|entire|main)\s+)*"
_THIS = (
    rf"(?:the|this|that)\s+{_QUALITY}{_PICTURE}(?:\s+(?:you(?:['’]ve|\s+have)?\s+)?(?:provided|shared|uploaded|sent))?"
)
_SHOWS = (
    r"(?:(?:clearly|vividly|primarily|mainly|prominently|simply)\s+)?"
    r"(?:shows|depicts|features|displays|presents|portrays|captures|showcases|illustrates|contains|includes|represents|"
    r"is\s+showing|is\s+depicting|(?:seems|appears)\s+to\s+show|consists\s+of)"
)
# What follows must be able to stand alone, and must not go on with what else the picture does.
_NOUN = (
    r"(?!(?:that|how|what|why|when|where|who|which|whether|if|as|up|off|signs?\s+of|us|me|you|him|them|it)\b)"
    r"(?![^.!?]*\band\s+(?:\w+ly\s+)?(?:is|was|has|hangs|stands|lies|shows|depicts|features|displays|presents|portrays"
    r"|captures|showcases|contains|includes|appears|seems|conveys|creates|gives|suggests|highlights|emphasi[sz]es)\b)"
)
_SOME = r"(?=(?:an?|the|one|two|three|four|five|six|several|many|some|various)\b)"
# "A picture of the pope hangs on the wall": a verb that goes with one picture ends in s, or is one of these.
_VERBLESS = r"(?![^.!?]*(?:[^\Ws]s|\b(?:can|could|may|might|must|will|would|should|hung|stood|lay|sat))\b)"
_OPENINGS = re.compile(
    rf"""^(?:
      (?:sure|certainly|of\ course|okay|absolutely)[!,.]\s*(?=(?-i:[A-Z])|here\b)
    | here(?:\ is|['’]s)\s+(?:an?|the)\s+(?:\w+\s+){{0,3}}(?:description|caption|summary)
      (?:\s+of\s+(?:the|this)\s+{_PICTURE})?\s*[:.]\s*
    | (?:image\s+)?(?:detailed\s+)?(?:description|caption|answer|summary)\s*:\s*
    | (?:in|within)\s+{_THIS}\s*,?\s*(?:we|you|one|i)\s+(?:can|could|may)\s+(?:clearly\s+)?(?:see|observe|spot)\s+{_NOUN}
    | (?:in|within)\s+{_THIS}\s*,\s*
    | (?:we|you|one|i)\s+(?:can|could)\s+(?:clearly\s+)?see\s+(?:in\s+{_THIS}\s+)?(?![^.!?]*\b(?:from|through)\b){_NOUN}{_SOME}
    | (?:the\s+main\s+(?:subject|focus)|the\s+(?:focus|subject|centerpiece|centrepiece))\s+of\s+{_THIS}\s+is\s+{_SOME}
    | {_THIS}\s+{_SHOWS}\s+{_NOUN}
    | {_THIS}\s+(?:is|(?:seems|appears)\s+to\s+be)\s+(?:of\s+)?{_NOUN}{_SOME}
    | this\s+is\s+(?:an?|the)\s+{_QUALITY}{_PICTURE}\s+(?:of|showing|depicting|featuring|that\s+shows)\s+{_NOUN}
    | (?:an?|the)\s+{_PICTURE}\s+(?:of|showing|depicting|featuring)\s+{_SOME}{_VERBLESS}
    )""",
    re.I | re.X,
)


def strip_opening(caption: str) -> str:
    """The caption without one opening, its next word with a capital; as it is where nothing would be left."""
    match = _OPENINGS.match(caption)
    rest = caption[match.end() :].lstrip() if match else ""
    if not match or not rest or not rest[0].isalnum():
        return caption
    capital = rest[0].upper()
    return (capital if len(capital) == 1 else rest[0]) + rest[1:]  # ß has no capital of its own
