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
    r"is\s+showing|is\s+depicting|seems\s+to\s+(?:be|show)|appears\s+to\s+(?:be|show)|consists\s+of)"
)
_NOUN = r"(?!(?:that|how|what|why|when|as|up|off|signs?\s+of)\b)"  # what follows must be able to stand alone
_SOME = r"(?=(?:an?|the|one|two|three|four|five|six|several|many|some|various)\b)"
_OPENINGS = re.compile(
    rf"""^(?:
      (?:sure|certainly|of\ course|okay|absolutely)[!,.]\s*
    | here(?:\ is|['’]s)\s+(?:an?|the)\s+(?:\w+\s+){{0,3}}(?:description|caption|summary)
      (?:\s+of\s+(?:the|this)\s+{_PICTURE})?\s*[:.]\s*
    | (?:image\s+)?(?:detailed\s+)?(?:description|caption|answer|summary)\s*:\s*
    | (?:in|within)\s+{_THIS}\s*,?\s*(?:we|you|one|i)\s+(?:can|could|may)\s+(?:clearly\s+)?(?:see|observe|spot)\s+{_NOUN}
    | (?:in|within)\s+{_THIS}\s*,\s*
    | (?:we|you|one|i)\s+(?:can|could)\s+(?:clearly\s+)?see\s+(?:in\s+{_THIS}\s+)?{_NOUN}{_SOME}
    | (?:the\s+main\s+(?:subject|focus)|the\s+(?:focus|subject|centerpiece|centrepiece))\s+of\s+{_THIS}\s+is\s+{_SOME}
    | {_THIS}\s+{_SHOWS}\s+{_NOUN}
    | {_THIS}\s+is\s+of\s+{_SOME}
    | {_THIS}\s+is\s+{_SOME}
    | this\s+is\s+(?:an?|the)\s+{_QUALITY}{_PICTURE}\s+(?:of|showing|depicting|featuring|that\s+shows)\s+{_NOUN}
    | (?:an?|the)\s+{_PICTURE}\s+(?:of|showing|depicting|featuring)\s+{_SOME}
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
