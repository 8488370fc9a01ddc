"""What people say against the use of their pictures: the words for it, where answers say them, and who heeds what.

What was seen is recorded whether it is heeded or not, so that another policy needs no new fetch.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Protocol

KNOWN = (
    "noai",  # X-Robots-Tag: noai and noimageai are DeviantArt's, noml others'
    "noimageai",
    "noml",
    "noindex",
    "noimageindex",
    "noarchive",  # with nocache, Bing's words against training; elsewhere they speak of cached copies
    "nocache",
    "tdm-reservation",  # TDM-Reservation: 1, or /.well-known/tdmrep.json; article 4 of the EU's directive 2019/790
    "robots-disallow",  # robots.txt, RFC 9309
    "robots-unreachable",  # a robots.txt that could not be had, where "robots-disallow" is not heeded
    "ai-txt-disallow",  # ai.txt, Spawning's
    "ai-train=no",  # Content-Signal, in robots.txt or as a header
    "train-ai=n",  # Content-Usage, the IETF's draft of the same: draft-ietf-aipref-attach
)
"""Every directive that is recorded."""

HEEDED = tuple(d for d in KNOWN if d not in ("noarchive", "nocache", "robots-unreachable"))
"""Those that drop a picture unless the recipe says otherwise."""

PREFERENCES = {"content-signal": "ai-train=no", "content-usage": "train-ai=n"}
"""By field, of a header or a line of robots.txt, the directive that it may hold."""

# Directives of X-Robots-Tag that hold a colon themselves, so that what is before it is not a crawler's name.
_VALUED_DIRECTIVES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")


_CRAWLER = re.compile(r"[a-z_-][\w-]*")


class Headers(Protocol):
    """What is asked of an answer's headers; names count in any case, as in `CIMultiDict`."""

    def get(self, key: str, default: str) -> str: ...

    def getall(self, key: str, default: Collection[str]) -> Collection[str]: ...


def header_directives(headers: Headers, agent: str) -> set[str]:
    """Directives of one answer that address everyone, or `agent` (lower case) by name."""
    found = set()
    for value in headers.getall("X-Robots-Tag", ()):
        name = "*"
        for part in value.lower().split(","):
            head, colon, tail = part.partition(":")
            # A date has colons too, and a comma: "unavailable_after: Wed, 03 Sep 2025 13:09:53 GMT".
            if colon and _CRAWLER.fullmatch(head.strip()) and head.strip() not in _VALUED_DIRECTIVES:
                name, part = head.strip(), tail  # "otherbot: noindex, nofollow": the name goes for what follows
            if name in ("*", agent):
                found.add("noindex" if part.strip() == "none" else part.strip())
    if headers.get("TDM-Reservation", "").strip() == "1":
        found.add("tdm-reservation")
    found &= {*KNOWN}
    for field, directive in PREFERENCES.items():
        if preference(",".join(headers.getall(field, ())), directive):
            found.add(directive)
    return found


def preference(text: str, directive: str) -> bool | None:
    """Whether a list such as "search=yes, ai-train=no" holds the directive (True) or its contrary; None for neither."""
    key, _, refusal = directive.partition("=")
    for part in text.lower().split(","):
        name, _, value = part.partition(";")[0].partition("=")
        if name.strip() == key and value.strip():
            return value.strip() == refusal
    return None


def refused_by(directives: str, policy: Collection[str]) -> bool:
    """Whether a picture with these recorded directives (with commas between) is to be dropped under `policy`."""
    return not {*policy}.isdisjoint(directives.split(","))
