"""VAEs, the same way in build and training: what a configuration says of one, and pixels to the latents' mean and deviation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fingerprint import model_id

# What diffusers takes where a configuration is silent (Stable Diffusion 1.5's is, of its scale).
_SILENT: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {"latent_channels": 4, "block_out_channels": (64,), "scaling_factor": 0.18215},
    "AutoencoderTiny": {"latent_channels": 4, "encoder_block_out_channels": (64,) * 4, "scaling_factor": 1.0},
    "AutoencoderDC": {"latent_channels": 32, "encoder_block_out_channels": (128,) * 6, "scaling_factor": 1.0},
}


@dataclass(frozen=True, kw_only=True)
class VaeFacts:
    """What can be known of a VAE without its weights."""

    kind: str
    """AutoencoderKL, whose latents are drawn from a posterior, or AutoencoderTiny and AutoencoderDC (SANA's), which give them."""
    channels: int
    """Of the latents."""
    factor: int
    """Pixels a side that become one latent."""
    scaling_factor: float
    """What latents are multiplied with before the denoiser sees them."""
    shift_factor: float
    """What is taken off them before."""
    force_upcast: bool
    """Whether its activations overflow in float16, as SDXL's do. A configuration that is silent, as Stable Diffusion 1.5's,
    is older than the setting and of a VAE that does not."""

    @property
    def is_drawn(self) -> bool:
        """Whether latents have a deviation."""
        return self.kind == "AutoencoderKL"

    def dtype(self, wanted: str) -> str:
        """The number type that it is loaded in where `wanted` is asked for: float32 in place of a float16 that overflows."""
        return "float32" if wanted == "float16" and self.force_upcast else wanted


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
    said = json.loads(path.read_text())
    kind = said.get("_class_name")
    if kind not in _SILENT:
        raise ValueError(f"{model}/{subfolder} is a {kind}: only {', '.join(_SILENT)} are known")
    found = _SILENT[kind] | {name: value for name, value in said.items() if value is not None}
    blocks = found["block_out_channels" if kind == "AutoencoderKL" else "encoder_block_out_channels"]
    return VaeFacts(
        kind=kind,
        channels=found["latent_channels"],
        factor=2 ** (len(blocks) - 1),
        scaling_factor=found["scaling_factor"],
        shift_factor=found.get("shift_factor", 0.0),
        force_upcast=found.get("force_upcast", False),
    )


def load_vae(model: str, revision: str | None, subfolder: str, dtype: str) -> Any:
    """The VAE with its weights, frozen, on the CPU, in `VaeFacts.dtype` of `dtype`. Raises OSError or ValueError in one line that
    says what is missing.
    """
    import diffusers
    import torch

    facts = vae_facts(model, revision, subfolder)
    vae = getattr(diffusers, facts.kind).from_pretrained(
        model,
        revision=revision,
        subfolder=subfolder,
        torch_dtype=getattr(torch, facts.dtype(dtype)),
        use_safetensors=True,
    )
    return vae.eval().requires_grad_(False)


def encode_pixels(vae: Any, pixels: Any) -> tuple[Any, Any]:
    """pixels (B, 3, H, W) in [-1, 1] -> mean and deviation of the latents, (B, C, h, w) each in the VAE's dtype, unscaled;
    no deviation (None) where the VAE has no posterior.
    """
    import torch

    with torch.no_grad():
        found = vae.encode(pixels.to(vae.dtype), return_dict=False)[0]
    return (found, None) if isinstance(found, torch.Tensor) else (found.mean, found.std)
