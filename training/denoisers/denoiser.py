"""What all frozen diffusion models have in common: network, VAE and noise levels, read from a diffusers pipeline folder."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from pipeline.shards import ViewInfo
from pipeline.vaes import VaeFacts, encode_pixels, load_vae, vae_facts, vae_id
from training.bridge import Conditioning
from training.configuration import DenoiserConfig, Phase
from training.objective import NoiseLevels
from training.view_order import BUCKETS, KEEP

from .files import VAE, levels_of, load_network, scheduler_facts


def check_latents(config: DenoiserConfig, phase: Phase, info: ViewInfo) -> None:
    """Raises ValueError when a phase asks for latents that the view does not hold, or that this denoiser's VAE did not make."""
    if phase.latents == "off":
        return
    found = info.companions.get("latents")
    where = f"view {info.view!r}"
    if found is None:
        raise ValueError(
            f"{where} has no latents: add an EncodeLatents stage for it and build, or set latents to 'off'"
        )
    wanted = vae_id(config.model, config.revision, VAE)
    if found["vae"] != wanted:
        raise ValueError(
            f"{where}: its latents were made by the VAE {found['vae']}, the denoiser's is {wanted}: encode them with "
            f"{config.model}/{VAE}, or set latents to 'off'"
        )
    if found["crop"] != "none" and info.shape == BUCKETS:
        raise ValueError(
            f"{where}: its latents are of squares, its pictures of many shapes: encode them with crop='none', or set latents to "
            "'off'"
        )
    if found["crop"] != "center" and info.shape == KEEP:
        raise ValueError(
            f"{where}: its latents are of whole pictures, of many shapes, and training takes squares: encode them with "
            "crop='center', or set latents to 'off'"
        )
    if phase.resolution != info.resolution:
        raise ValueError(
            f"{where}: its latents are of pictures of {info.resolution} px, the phase wants {phase.resolution}: make "
            "them equal, or set latents to 'off'"
        )


class Denoiser:
    """A frozen latent diffusion model. Gradients flow through its activations to the conditioning, never to its weights; only
    a LoRA in it is trained, where the settings ask for one.
    """

    network_class: ClassVar[str]
    """The network's class in diffusers."""
    subfolder: ClassVar[str]
    """Where it lies in a diffusers pipeline folder."""
    pooled_width: int | None = None
    """Width of the text as one vector, where the network wants it."""

    def __init__(
        self, config: DenoiserConfig, network: Any, vae: Any | None, scheduler: dict[str, Any], facts: VaeFacts
    ) -> None:
        """`vae` may be left out where pictures are neither encoded nor decoded; `facts` are of it in any case. `scheduler` are
        the settings of its scheduler_config.json.
        """
        self.config, self.scheduler = config, scheduler
        self.network: Any = network
        self.vae: Any = vae
        self.levels: NoiseLevels = levels_of(scheduler, config.model)
        """Its noise levels, from little to much noise."""
        self.vae_facts = facts
        """The VAE's channels, scale and shift, and whether its latents are drawn."""
        self.lora: dict[str, nn.Module] = {}
        """What is trained in the network, as `add_lora` gave it; empty where the settings ask for none."""

    @classmethod
    def load(cls, config: DenoiserConfig, *, with_vae: bool = True) -> Denoiser:
        """The frozen parts, on the CPU. Raises OSError or ValueError in one line that says what is missing."""
        facts = vae_facts(config.model, config.revision, VAE)
        scheduler = scheduler_facts(config)
        network = load_network(config, cls.network_class, cls.subfolder)
        vae = load_vae(config.model, config.revision, VAE, config.dtype) if with_vae else None
        return cls(config, network, vae, scheduler, facts)

    @property
    def width(self) -> int:
        """Width of the tokens that the network's text input takes."""
        raise NotImplementedError(f"{type(self).__name__} must define width")

    def predict(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """noisy (B, C, h, w), times (B,) as `levels.times` tells them -> prediction as noisy, in the network's dtype.

        `sizes` (B, 6): height and width of the picture as it came, top and left of the crop, height and width wanted, all in
        pixels, for networks that are told (SDXL); None stands for whole pictures of the wanted size.
        """
        raise NotImplementedError(f"{type(self).__name__} must define predict()")

    @property
    def prediction_type(self) -> str:
        """What the network predicts."""
        return self.levels.kind

    @property
    def steps(self) -> int:
        """T, the number of noise levels."""
        return len(self.levels)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def to(self, device: torch.device | str) -> Denoiser:
        """Moves the weights; returns itself."""
        self.network.to(device)
        if self.vae is not None:
            self.vae.to(device)
        self.levels = self.levels.to(device)
        return self

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """(channels, height, width) of an image's latents, without `width` of a square's. Raises ValueError for a side that does
        not divide.
        """
        width = height if width is None else width
        factor, patch = self.vae_facts.factor, int(self.network.config.get("patch_size") or 1)  # U-Nets have none
        if min(height, width) < 1 or height % (factor * patch) or width % (factor * patch):
            asked = height if height == width else f"{width}x{height}"
            parts = f"the VAE's patch of {factor} times the network's of {patch}" if patch > 1 else "the VAE's patch"
            raise ValueError(f"resolution {asked} is not a multiple of {factor * patch}, {parts}: choose another")
        return self.vae_facts.channels, height // factor, width // factor

    def encode_images(self, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w), drawn as `draw_latents` does."""
        return self.draw_latents(*encode_pixels(self.vae, pixels), noise)

    def draw_stored(self, stored: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """Scaled latents (B, C, h, w) from a view's: mean and deviation (B, 2C, h, w), or the mean alone."""
        mean, deviation = stored.chunk(2, dim=1) if self.vae_facts.is_drawn else (stored, None)
        return self.draw_latents(mean, deviation, noise)

    def draw_latents(
        self, mean: torch.Tensor, deviation: torch.Tensor | None, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Scaled latents from what the VAE gave, (B, C, h, w) each: mean + deviation x `noise`, or the mean without either."""
        drawn = mean if deviation is None or noise is None else mean + deviation * noise.to(deviation.dtype)
        return (drawn - self.vae_facts.shift_factor) * self.vae_facts.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, h, w) -> float32 pixels (B, 3, H, W) in [-1, 1]."""
        given = latents.to(self.vae.dtype) / self.vae_facts.scaling_factor + self.vae_facts.shift_factor
        return self.vae.decode(given).sample.float().clamp(-1, 1)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must say of the denoiser that its connector drives."""
        return self.config.identity() | {"prediction_type": self.prediction_type, "width": self.width}
