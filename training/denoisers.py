"""The frozen diffusion model: U-Net, VAE and noise schedule, read from a diffusers pipeline folder."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.fingerprint import model_id
from pipeline.shards import ViewInfo
from pipeline.vaes import VaeFacts, encode_pixels, load_vae, vae_facts, vae_id

from .configuration import DenoiserConfig, Phase

VAE = "vae"
"""Where it lies in a diffusers pipeline folder."""


def load_denoiser(config: DenoiserConfig, *, with_vae: bool = True) -> Denoiser:
    """The frozen parts, on the CPU. Raises OSError or ValueError in one line that says what is missing."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    facts = vae_facts(config.model, config.revision, VAE)
    unet = UNet2DConditionModel.from_pretrained(
        config.model,
        subfolder="unet",
        revision=config.revision,
        torch_dtype=getattr(torch, config.dtype),
        use_safetensors=True,
    )
    vae = load_vae(config.model, config.revision, VAE, config.dtype) if with_vae else None
    scheduler = DDIMScheduler.from_pretrained(config.model, subfolder="scheduler", revision=config.revision)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return Denoiser(config, unet, vae, scheduler, facts)


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
    if found["crop"] != "center" and info.shape == "keep":
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
    """A frozen latent diffusion model. Gradients flow through its activations to the tokens, never to its weights."""

    def __init__(self, config: DenoiserConfig, unet: Any, vae: Any | None, scheduler: Any, facts: VaeFacts) -> None:
        """`vae` may be left out where pictures are neither encoded nor decoded; `facts` are of it in any case."""
        if unet.config.addition_embed_type is not None:
            raise ValueError(
                f"{config.model}: its U-Net wants pooled text ({unet.config.addition_embed_type}), as SDXL's does: "
                "only SD 1.x and 2.x U-Nets can be driven so far"
            )
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{config.model} predicts {scheduler.config.prediction_type}: only epsilon and v_prediction"
            )
        self.config, self.scheduler = config, scheduler
        self.unet: Any = unet.eval().requires_grad_(False)
        self.vae: Any = vae
        self.alphas: torch.Tensor = scheduler.alphas_cumprod.float()
        """Cumulative products of alpha, float32 (T,), from little to much noise."""
        self.prediction_type: str = scheduler.config.prediction_type
        self.width: int = unet.config.cross_attention_dim
        """Width of the tokens that cross-attention reads."""
        self.vae_facts = facts
        """The VAE's channels, scale and shift, and whether its latents are drawn."""

    @property
    def steps(self) -> int:
        """T, the number of noise levels."""
        return len(self.alphas)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.unet.parameters()).device

    def to(self, device: torch.device | str) -> Denoiser:
        """Moves the weights; returns itself."""
        self.unet.to(device)
        if self.vae is not None:
            self.vae.to(device)
        self.alphas = self.alphas.to(device)
        return self

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(channels, height, width) of a square image's latents. Raises ValueError for a side that does not divide."""
        factor = self.vae_facts.factor
        if resolution < 1 or resolution % factor:
            raise ValueError(f"resolution {resolution} is not a multiple of {factor}, the VAE's patch: choose another")
        return self.vae_facts.channels, resolution // factor, resolution // factor

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

    def predict(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """noisy (B, C, h, w), timesteps (B,), tokens (B, Q, width), mask (B, Q) bool or None -> prediction as noisy."""
        dtype = self.unet.dtype
        return self.unet(noisy.to(dtype), timesteps, tokens.to(dtype), encoder_attention_mask=mask, return_dict=False)[
            0
        ]

    def identity(self) -> dict[str, Any]:
        """What a checkpoint must say of the denoiser that its connector drives."""
        return {
            "model": model_id(self.config.model, self.config.revision),
            "prediction_type": self.prediction_type,
            "width": self.width,
        }
