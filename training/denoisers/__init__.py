"""The frozen diffusion models that connectors drive. One file each says where its conditioning enters."""

from __future__ import annotations

from pipeline.vaes import vae_facts
from training.configuration import DenoiserConfig
from training.lora import add_lora

from .denoiser import Denoiser, check_latents
from .files import VAE, network_facts, read_facts

__all__ = ["Denoiser", "DenoiserConfig", "check_latents", "load_denoiser"]


def load_denoiser(config: DenoiserConfig, *, with_vae: bool = True) -> Denoiser:
    """The frozen parts, on the CPU. Raises OSError or ValueError in one line that says what is missing."""
    found = network_facts(config)
    index = read_facts(config, "", "model_index.json") or {}
    if found.get("class_embed_type") is not None or index.get("requires_aesthetics_score"):
        raise ValueError(
            f"{config.model} wants more than a text (a class, or an aesthetic score, as SDXL's refiner): choose a text-to-image "
            "model"
        )
    match found.get("_class_name"):
        case "UNet2DConditionModel" if found.get("addition_embed_type") == "text_time":
            from .sdxl import SDXL

            kind: type[Denoiser] = SDXL
        case "UNet2DConditionModel" if found.get("addition_embed_type") is None:
            from .unet import UNet

            kind = UNet
        case "PixArtTransformer2DModel" | "Transformer2DModel" if found.get("norm_type") == "ada_norm_single":
            from .pixart import PixArt

            kind = PixArt
        case "SanaTransformer2DModel":
            from .sana import Sana

            kind = Sana
        case other:
            added = found.get("addition_embed_type")
            raise ValueError(
                f"{config.model} holds a {other}{f' with {added!r} added' if added else ''}, which no file of "
                "training/denoisers drives: choose a model with an SD 1.x, SD 2.x or SDXL U-Net, or a PixArt or SANA transformer"
            )
    channels = vae_facts(config.model, config.revision, VAE).channels
    if found.get("in_channels", channels) != channels:
        raise ValueError(
            f"{config.model} reads {found['in_channels']} channels and its VAE gives {channels}, so it wants more than a text "
            "(inpainting, upscaling): choose a text-to-image model"
        )
    denoiser = kind.load(config, with_vae=with_vae)
    if config.lora:
        denoiser.lora = add_lora(denoiser.network, config.lora, config.model)
    return denoiser
