"""The frozen diffusion model: U-Net, VAE and noise schedule, read from a diffusers pipeline folder."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.fingerprint import model_id

from .configuration import DenoiserConfig


def load_denoiser(config: DenoiserConfig) -> Denoiser:
    """The frozen parts, on the CPU. Raises OSError or ValueError in one line that says what is missing."""
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel

    dtype = getattr(torch, config.dtype)
    settings: dict[str, Any] = {"revision": config.revision, "torch_dtype": dtype, "use_safetensors": True}
    unet = UNet2DConditionModel.from_pretrained(config.model, subfolder="unet", **settings)
    vae_class = UNet2DConditionModel.load_config(config.model, subfolder="vae", revision=config.revision)["_class_name"]
    match vae_class:
        case "AutoencoderTiny":
            vae = AutoencoderTiny.from_pretrained(config.model, subfolder="vae", **settings)
        case "AutoencoderKL":
            vae = AutoencoderKL.from_pretrained(config.model, subfolder="vae", **settings)
        case _:
            raise ValueError(f"{config.model}/vae is a {vae_class}: only AutoencoderKL and AutoencoderTiny are known")
    scheduler = DDIMScheduler.from_pretrained(config.model, subfolder="scheduler", revision=config.revision)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return Denoiser(config, unet, vae, scheduler)


class Denoiser:
    """A frozen latent diffusion model. Gradients flow through its activations to the tokens, never to its weights."""

    def __init__(self, config: DenoiserConfig, unet: Any, vae: Any, scheduler: Any) -> None:
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
        self.vae: Any = vae.eval().requires_grad_(False)
        self.alphas: torch.Tensor = scheduler.alphas_cumprod.float()
        """Cumulative products of alpha, float32 (T,), from little to much noise."""
        self.prediction_type: str = scheduler.config.prediction_type
        self.width: int = unet.config.cross_attention_dim
        """Width of the tokens that cross-attention reads."""
        self.is_drawn: bool = not hasattr(vae.config, "latent_magnitude")
        """Whether the VAE's latents are drawn from a posterior (AutoencoderKL) or given (AutoencoderTiny)."""

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
        self.vae.to(device)
        self.alphas = self.alphas.to(device)
        return self

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(channels, height, width) of a square image's latents. Raises ValueError for a side that does not divide."""
        blocks = getattr(self.vae.config, "block_out_channels", None) or self.vae.config.encoder_block_out_channels
        factor = 2 ** (len(blocks) - 1)
        if resolution < 1 or resolution % factor:
            raise ValueError(f"resolution {resolution} is not a multiple of {factor}, the VAE's patch: choose another")
        return self.vae.config.latent_channels, resolution // factor, resolution // factor

    @torch.no_grad()
    def encode_images(self, pixels: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> scaled latents (B, C, h, w).

        A VAE with a posterior (`is_drawn`) gives mean + deviation x `noise` (B, C, h, w), or the mean without noise.
        """
        found = self.vae.encode(pixels.to(self.vae.dtype))
        if not self.is_drawn:
            latents = found.latents
        else:
            posterior = found.latent_dist
            latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(self.vae.dtype)
        return (latents - self._shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, h, w) -> float32 pixels (B, 3, H, W) in [-1, 1]."""
        given = latents.to(self.vae.dtype) / self.vae.config.scaling_factor + self._shift
        return self.vae.decode(given).sample.float().clamp(-1, 1)

    @property
    def _shift(self) -> float:
        return getattr(self.vae.config, "shift_factor", None) or 0.0

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
