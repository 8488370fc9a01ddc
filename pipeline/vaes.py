"""VAEs, the same way in build and training: what a configuration says of one, and pixels to the latents' mean and deviation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fingerprint import model_id

# Where a configuration is silent (Stable Diffusion 1.5's is), as diffusers has it.
_SCALING = {"AutoencoderKL": 0.18215, "AutoencoderTiny": 1.0}


@dataclass(frozen=True, kw_only=True)
class VaeFacts:
    """What can be known of a VAE without its weights."""

    kind: str
    """AutoencoderKL, whose latents are drawn from a posterior, or AutoencoderTiny, which gives them."""
    channels: int
    """Of the latents."""
    factor: int
    """Pixels a side that become one latent."""
    scaling_factor: float
    """What latents are multiplied with before the denoiser sees them."""
    shift_factor: float
    """What is taken off them before."""

    @property
    def is_drawn(self) -> bool:
        """Whether latents have a deviation."""
        return self.kind == "AutoencoderKL"


def vae_id(model: str, revision: str | None, subfolder: str) -> str:
    """What identifies a VAE: `name/subfolder@revision` on a hub, a digest of its files for a local folder."""
    return model_id(Path(model, subfolder).as_posix(), revision)


def vae_facts(model: str, revision: str | None, subfolder: str) -> VaeFacts:
    """Read from the VAE's config.json. Raises OSError or ValueError in one line that says what is missing."""
    if Path(model).is_dir():
        path = Path(model, subfolder, "config.json")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: name the folder of a VAE")
    else:
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(model, "config.json", subfolder=subfolder or None, revision=revision))
    found = json.loads(path.read_text())
    kind = found.get("_class_name")
    if kind not in _SCALING:
        raise ValueError(f"{model}/{subfolder} is a {kind}: only AutoencoderKL and AutoencoderTiny are known")
    blocks = found.get("block_out_channels") or found.get("encoder_block_out_channels", (64,) * 4)
    return VaeFacts(
        kind=kind,
        channels=found.get("latent_channels", 4),
        factor=2 ** (len(blocks) - 1),
        scaling_factor=found.get("scaling_factor", _SCALING[kind]),
        shift_factor=found.get("shift_factor") or 0.0,
    )


def load_vae(model: str, revision: str | None, subfolder: str, dtype: str) -> Any:
    """The VAE with its weights, frozen, on the CPU. Raises OSError or ValueError in one line that says what is missing."""
    import diffusers
    import torch

    kind = getattr(diffusers, vae_facts(model, revision, subfolder).kind)
    vae = kind.from_pretrained(
        model, revision=revision, subfolder=subfolder, torch_dtype=getattr(torch, dtype), use_safetensors=True
    )
    return vae.eval().requires_grad_(False)


def encode_pixels(vae: Any, pixels: Any) -> tuple[Any, Any]:
    """pixels (B, 3, H, W) in [-1, 1] -> mean and deviation of the latents, (B, C, h, w) each in the VAE's dtype, unscaled;
    no deviation (None) where the VAE has no posterior.
    """
    import torch

    with torch.no_grad():
        found = vae.encode(pixels.to(vae.dtype))
    if hasattr(found, "latent_dist"):
        return found.latent_dist.mean, found.latent_dist.std
    return found.latents, None
