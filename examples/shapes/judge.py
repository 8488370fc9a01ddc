"""The oracle as a judge: held-out dense prompts of two and three objects, scored by template matching."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from training.evaluation.judge import Scores

from .oracle import read_pictures, score_with_shuffle
from .words import dense_caption
from .world import Scenes, draw_scenes


@dataclass(frozen=True)
class ShapesJudge:
    """`count` prompts, the shares of which have one, two, three and four objects; none is drawn from a training seed."""

    count: int = 400
    shares: tuple[float, ...] = (0, 1, 1)
    seed: int = 990_001

    @cached_property
    def scenes(self) -> Scenes:
        """What the prompts describe."""
        return draw_scenes(np.random.default_rng(self.seed), self.count, self.shares)

    def prompts(self) -> list[str]:
        """A dense caption of each scene, in any phrasing."""
        rng = np.random.default_rng(self.seed + 1)
        return [dense_caption(self.scenes.facts(n), rng) for n in range(self.count)]

    def score(self, pictures: np.ndarray) -> dict[str, Scores]:
        """All measures (see the oracle)."""
        return score_with_shuffle(read_pictures(pictures), self.scenes)
