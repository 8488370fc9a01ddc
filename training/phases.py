"""The legs of a training run, and the learning rate they give."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .choices import check_choices


@dataclass(frozen=True, kw_only=True)
class TimestepConfig:
    """How timesteps are drawn."""

    kind: Literal["uniform", "high_noise", "logit_normal"] = "uniform"
    """Uniform (as ELLA), a share of the samples from the high noise levels alone, where places are decided, or most from the
    middle: the logit of the level, counted from 0 to 1, is normal (Esser et al. 2024, arXiv 2403.03206, eq. 19). A flow's
    shift comes after it."""
    share: float = 0.5
    """high_noise: share of the samples that is drawn from [floor, 1); the rest is uniform."""
    floor: float = 0.6
    """high_noise: where the high noise levels begin, as a fraction of all."""
    mean: float = 0.0
    """logit_normal: of the logit; above 0 leans towards noise. The scripts of diffusers count from the noise down, so there the
    sign is the other one."""
    deviation: float = 1.0
    """logit_normal: of the logit."""

    def __post_init__(self) -> None:
        check_choices(self, "timesteps.")
        for name in ("share", "floor"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"timesteps.{name} is {getattr(self, name)}: it must be in [0, 1)")
        if not (math.isfinite(self.mean) and 0 < self.deviation < math.inf):
            raise ValueError(
                f"timesteps.mean is {self.mean} and timesteps.deviation {self.deviation}: give finite ones, the deviation above 0"
            )


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One leg of a run: a view or several, a resolution, a number of samples."""

    view: str | Mapping[str, float]
    """Name of the view in the dataset folder; or of several with their weights, such as `{"photos": 3, "art": 1}`: of every
    four samples three are photos. Each view is gone through in epochs of its own."""
    resolution: int
    """Side of the square images, pixels; at most the view's. Of a view with buckets the view's own: its pictures are taken in
    their buckets' shapes, a global batch of one bucket."""
    samples: int
    """Samples to train on; a multiple of `batch`. May exceed the view: epochs follow each other."""
    window: int = 0
    """Shards that are shuffled at a time, for views in an object store: whole shards can then be fetched ahead. At a million
    samples a window little of the shuffling is lost. 0 shuffles the whole view, for disks that read at random."""
    batch: int
    """Global batch: samples of one optimizer step, over all processes."""
    micro_batch: int
    """Most samples of one forward pass in one process, the denoiser's at `timesteps_per_encoding` times as many; does not
    change the result, but for what dropout draws."""
    rate: float = 1e-4
    """Peak learning rate."""
    warmup_samples: int = 0
    """The rate rises linearly over so many samples."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """How the rate falls over the phase, to zero."""
    latents: Literal["off", "view"] = "off"
    """Encode the pictures, or read the latents that the view holds of them: the same samples without the VAE's work (36 % of
    a step of SD 1.5 at 512 pixels, 25 % of SDXL's at 1024). They are of the middle of a picture."""
    optimizer: Literal["keep", "fresh"] = "keep"
    """Whether AdamW's moments come over from the phase before, or begin anew: where resolution or rate change much, old second
    moments scale the first steps wrongly."""
    ema: Literal["keep", "fresh"] = "keep"
    """Whether the average of the weights goes on from the phase before, or begins anew at the weights as they are."""

    def __post_init__(self) -> None:
        for name in ("resolution", "samples", "batch", "micro_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"phase {self.view!r}: {name} is {getattr(self, name)}, it must be at least 1")
        if self.samples % self.batch:
            near = max(1, round(self.samples / self.batch)) * self.batch
            raise ValueError(
                f"phase {self.view!r}: samples {self.samples} is not a multiple of batch {self.batch}: use {near}"
            )
        if self.batch % self.micro_batch:
            raise ValueError(
                f"phase {self.view!r}: batch {self.batch} is not a multiple of micro_batch {self.micro_batch}"
            )
        weights = self.views.values()
        if not weights or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"phase {self.view!r}: name a view, or several with weights above 0")
        if self.window < 0:
            raise ValueError(f"phase {self.view!r}: window is {self.window}, it must be at least 0")
        if self.rate <= 0 or self.warmup_samples < 0:
            raise ValueError(f"phase {self.view!r}: rate must be above 0 and warmup_samples at least 0")
        check_choices(self, f"phase {self.view!r}: ")

    @property
    def views(self) -> dict[str, float]:
        """The views by name, with their weights."""
        return {self.view: 1.0} if isinstance(self.view, str) else dict(sorted(self.view.items()))

    def micro_batch_of(self, processes: int) -> int:
        """Samples of one forward pass: no more than a process's share of the global batch."""
        return min(self.micro_batch, max(1, self.batch // processes))


def rate_at(phase: Phase, position: int) -> float:
    """Learning rate of the step that starts at `position` samples into the phase, whatever processes and restarts."""
    warmth = min(1.0, (position + phase.batch) / phase.warmup_samples) if phase.warmup_samples else 1.0
    progress = position / phase.samples
    match phase.schedule:
        case "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            fall = 1 - progress
        case _:
            fall = 1.0
    return phase.rate * warmth * fall
