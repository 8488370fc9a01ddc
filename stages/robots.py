"""What a site's files say to a crawler: robots.txt (RFC 9309) with the preferences it may carry, ai.txt, tdmrep.json.

The parsing is ours because the libraries turn a rule's asterisks into a regular expression that a hostile file makes run
for hours (four of them and a path of 150 letters: 18 s in Protego 0.6), and because preferences belong to the same groups.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import quote

from .opt_out import PREFERENCES, preference

SITE_FILES = {"robots.txt": "/robots.txt", "ai.txt": "/ai.txt", "tdmrep.json": "/.well-known/tdmrep.json"}
"""Path of each file."""
MOST_BYTES = 500 << 10
"""What is read of a file; RFC 9309, section 2.5, asks for at least that much."""

_RESERVED = "!#$%&'()*+,/:;=?@[]~"  # left as they are: RFC 3986 tells them from their percent-encoded selves
_ESCAPED_UNRESERVED = re.compile(r"%(?:2[DdEe]|3\d|4[1-9A-Fa-f]|5[\dAaFf]|6[1-9A-Fa-f]|7[\dAaEe])")
_ESCAPED = re.compile(r"%[\da-fA-F]{2}")
_TOKEN = re.compile(r"[a-z0-9_-]+")
_GROUP_FIELDS = ("allow", "disallow", "crawl-delay", *PREFERENCES)


class Rule(NamedTuple):
    """One directive for the paths that a pattern matches."""

    pattern: str
    """As `normalised`; * stands for anything, a $ at the end for the end."""
    says: bool
    """Whether the directive is said of them, or its contrary (Allow, ai-train=yes)."""


@dataclass(kw_only=True)
class SiteRules:
    """What a site's files say to one crawler; filled by `read_site_file`, tdmrep.json last."""

    rules: dict[str, list[Rule]] = field(default_factory=dict)
    """By directive; the first that matches decides."""
    crawl_delay: float = 0.0
    """Seconds between two requests that the site asks for."""

    def directives(self, path: str) -> set[str]:
        """The directives said of a path with its query."""
        path = normalised(path)
        said = {
            name: (rule.says for rule in rules if matches(rule.pattern, path)) for name, rules in self.rules.items()
        }
        return {name for name, answers in said.items() if next(answers, False)}


def product_token(user_agent: str) -> str:
    """The name that rules address, of what a crawler calls itself: "densebridge/0.1 (+…)" → "densebridge"."""
    found = _TOKEN.match(user_agent.strip().lower())
    return found[0] if found else ""


def read_site_file(name: str, text: str, agent: str, into: SiteRules) -> None:
    """Adds what the file `name` (of `SITE_FILES`) says to `agent` (a product token). What cannot be read says nothing."""
    if name == "tdmrep.json":
        into.rules["tdm-reservation"] = list(_reservations(text))  # in the file's order, as TDMRep has it
        return
    disallow = "robots-disallow" if name == "robots.txt" else "ai-txt-disallow"
    for key, value in _group(text, agent):
        if key in ("allow", "disallow") and value:
            _add(into, disallow, value, key == "disallow")
        elif key == "crawl-delay":
            into.crawl_delay = max(into.crawl_delay, _seconds(value))
        elif key in PREFERENCES:
            # The IETF's draft allows a path before the list, as in "Content-Usage: /art/ train-ai=n".
            path, _, listed = value.partition(" ") if value.startswith("/") else ("/", "", value)
            said = preference(listed, PREFERENCES[key])
            if said is not None:
                _add(into, PREFERENCES[key], path, said)
    for rules in into.rules.values():  # the longest pattern decides, and of equals the one that allows
        rules.sort(key=lambda rule: (-len(rule.pattern), rule.says))


def normalised(path: str) -> str:
    """A path or pattern with only what must be percent-encoded so encoded, in capitals (RFC 9309, section 2.2.2)."""
    path = _ESCAPED_UNRESERVED.sub(lambda found: chr(int(found[0][1:], 16)), quote(path, safe=_RESERVED))
    return _ESCAPED.sub(lambda found: found[0].upper(), path)


def matches(pattern: str, path: str) -> bool:
    """Whether a path begins with what the pattern says; in time proportional to their lengths, whatever the pattern."""
    to_end = pattern.endswith("$")
    first, *rest = pattern[: -1 if to_end else None].split("*")
    if not path.startswith(first):
        return False
    if not rest:
        return not to_end or path == first
    at = len(first)
    for piece in rest[:-1]:
        at = path.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    last = rest[-1]
    return path.endswith(last) and len(path) - len(last) >= at if to_end else path.find(last, at) >= 0


def _add(into: SiteRules, directive: str, pattern: str, says: bool) -> None:
    whole = normalised(re.sub(r"\*+", "*", pattern))
    into.rules.setdefault(directive, []).append(Rule(pattern=whole, says=says))


def _group(text: str, agent: str) -> Sequence[tuple[str, str]]:
    """(field, value) of the groups that name `agent`, or of those for everyone if none does."""
    groups: dict[str, list[tuple[str, str]]] = {}
    names, naming = {"*"}, False  # lines before the first name are for everyone
    for line in text.removeprefix("\ufeff").splitlines():
        key, _, value = (part.strip() for part in line.partition("#")[0].partition(":"))
        key = key.lower()
        if key == "user-agent":
            names = names if naming else set()
            names |= {"*" if value.startswith("*") else product_token(value)} & {"*", agent}
            for name in names:
                groups.setdefault(name, [])
        elif key in _GROUP_FIELDS:
            for name in names:
                groups.setdefault(name, []).append((key, value))
        naming = key == "user-agent" or (naming and key not in _GROUP_FIELDS)
    return groups.get(agent, groups.get("*", ()))


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        return 0.0
    return seconds if math.isfinite(seconds) else 0.0


def _reservations(text: str) -> Iterator[Rule]:
    try:
        listed = json.loads(text)
        json.dumps(listed, ensure_ascii=False).encode()  # escapes can spell what no text holds
    except (ValueError, RecursionError):
        return
    for entry in listed if isinstance(listed, list) else [listed]:
        location = entry.get("location") if isinstance(entry, dict) else None
        if isinstance(location, str):
            yield Rule(pattern=normalised(location), says=str(entry.get("tdm-reservation")) == "1")
