"""Who scores pictures: a judge knows the prompts and, for each picture, how much of its prompt it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One measure over all prompts, (N,) each."""

    raw: np.ndarray
    """Each picture against its own prompt."""
    shuffled: np.ndarray
    """The same picture against other prompts: what is scored by chance."""

    @property
    def corrected(self) -> np.ndarray:
        """raw - shuffled: drawing more of everything does not raise it."""
        return self.raw - self.shuffled


class Judge(Protocol):
    """Prompts and scores; the pictures are drawn elsewhere."""

    def prompts(self) -> Sequence[str]:
        """The held-out prompts."""

    def score(self, pictures: np.ndarray) -> dict[str, Scores]:
        """Measures of the pictures, uint8 (N, H, W, 3), one for each prompt in order."""
