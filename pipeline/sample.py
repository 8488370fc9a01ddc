"""A sample and how it can end: the key that names it in every run, and the three states a stage can leave it in."""

from __future__ import annotations

import hashlib
from typing import Literal

Status = Literal["kept", "dropped", "failed"]
"""kept: goes on. dropped: a rule said no. failed: it could not be worked on. Both of the latter carry a reason."""

KEY_LENGTH = 24  # hex digits: 96 bits, so no two of a hundred billion samples share a key

MEMBERSHIP = ("key", "url", "text")
"""The columns that every partition has; a source's extra columns follow them."""

LISTED = "listed"
"""A column that every stage can read: whether the recipe's source still lists the sample. What it no longer lists keeps what
was paid for it, but goes into no view."""


def sample_key(url: str) -> str:
    """The key of a sample: a digest of its URL or file path. Hexadecimal, so that no dot confuses WebDataset."""
    return hashlib.sha256(url.encode()).hexdigest()[:KEY_LENGTH]
