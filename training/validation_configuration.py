"""How a run is looked at while it trains: what is drawn, whose loss is measured, which weights are kept as the best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .choices import check_choices

Sampler = Literal["auto", "ddim", "dpm++", "unipc", "euler", "euler_a", "ddpm"]
"""How pictures are drawn: DDIM (Song et al. 2021), DPM-Solver++ of second order (Lu et al. 2022; ELLA's), UniPC (Zhao et al.
2023; LaVi-Bridge's), Euler's steps and ancestral ones (Karras et al. 2022), DDPM (Ho et al. 2020). "auto": DDIM, and Euler's
for a flow."""
Metric = Literal["held_out_loss", "clip_score"]
"""The mean loss of held-out samples, where less is better; or the mean cosine of drawn pictures and their prompts."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Held-out loss and pictures of fixed prompts, always from the same noise; the release that did best is kept as `best`.

    It changes nothing of what is trained. Where the run keeps an average of its weights, that is what is looked at.
    """

    every: int
    """Samples between validations. There is one before the first step too, and one at the run's end."""
    resolution: int
    """Side of the pictures, drawn and held out, pixels; the same in all phases, so that figures can be compared."""
    view: str | None = None
    """A view whose samples are held out: training must see none of them. None measures no loss. A key is a digest, so two
    conditions part the samples: `key < '01'` holds out one of 256 for this view, `key >= '01'` leaves training the others."""
    samples: int = 1024
    """Held-out samples that are read each time; where the view has fewer, all."""
    latents: Literal["off", "view"] = "off"
    """Whether held-out pictures are encoded, or the view's latents read, as in a `Phase`."""
    prompts: tuple[str, ...] = ()
    """What is drawn."""
    seed: int = 0
    """Of the first prompt's picture (the next has the next), and of the held-out samples' noise and timesteps."""
    steps: int = 20
    """Denoising steps."""
    guidance: float = 7.5
    """Classifier-free guidance scale."""
    sampler: Sampler = "auto"
    """How noise becomes a picture."""
    batch: int = 8
    """Samples, or pictures, in one forward pass. Timesteps are spread evenly over each such batch of held-out samples."""
    clip: str | None = None
    """Folder or hub name of a CLIP (or Long-CLIP, or SigLIP) in transformers' format that scores the pictures: the mean cosine
    of picture and prompt, as far as it reads (CLIP: 77 tokens). None scores none."""
    clip_revision: str | None = None
    """Commit of its hub repository; pin it."""
    best: Literal["auto", "held_out_loss", "clip_score", "off"] = "auto"
    """By which figure the best is told. "auto": the held-out loss where it is measured, else the score; "off" keeps none."""

    def __post_init__(self) -> None:
        if self.view is None and not self.prompts:
            raise ValueError("validation has nothing to look at: set its view, or its prompts")
        for name in ("every", "resolution", "samples", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"validation.{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.guidance < math.inf:
            raise ValueError(
                f"validation.guidance is {self.guidance}: it must be at least 0, and finite; 1 turns it off"
            )
        check_choices(self, "validation.")
        if self.clip is not None and not self.prompts:
            raise ValueError("validation.clip scores pictures of validation.prompts, which are empty: give some")
        if self.best not in ("auto", "off", *self.measured):
            what = "view" if self.best == "held_out_loss" else "clip"
            raise ValueError(f"validation.best is {self.best!r}, which is not measured: set validation.{what}")

    @property
    def measured(self) -> tuple[Metric, ...]:
        """The figures that there will be."""
        known: dict[Metric, str | None] = {"held_out_loss": self.view, "clip_score": self.clip}
        return tuple(name for name, needed in known.items() if needed is not None)

    @property
    def metric(self) -> Metric | None:
        """The figure by which the best is told; None where none is kept."""
        if self.best == "auto":
            return next(iter(self.measured), None)
        return None if self.best == "off" else self.best
