"""A name that is none is answered with the one that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(wrong: str, known: Iterable[str]) -> str:
    """`perhaps you meant batch-size`, or all the names that there are where none of them is near."""
    names = list(known)
    near = get_close_matches(wrong, names, n=1)
    return f"perhaps you meant {near[0]}" if near else f"there are: {', '.join(names) or 'none'}"
