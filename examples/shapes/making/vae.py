"""The VAE: an `AutoencoderTiny` distilled from a closed-form linear patch codec.

The codec (PCA of 4 x 4 patches to 24 numbers) exists at once, so the base model trains on its latents while the VAE is
still learning to produce and to read them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from torch.nn.functional import l1_loss, mse_loss, pixel_shuffle, pixel_unshuffle

from ..world import draw_scenes, render
from .clip import normalised
from .training import train

PATCH, CHANNELS, SCALE = 4, 24, 2.0  # the VAE's own latents are the codec's divided by SCALE, to suit its tanh clamp
SIDES = (16, 24)


class PatchCodec:
    """pictures (N, 3, S, S) in [-1, 1] <-> latents (N, 24, S/4, S/4) of standard deviation 1."""

    def __init__(self, scenes: int = 6000) -> None:
        rng = np.random.default_rng(10)
        pictures = [normalised(render(draw_scenes(rng, scenes, (4, 3, 2, 1)), side)) for side in SIDES]
        patches = torch.cat([pixel_unshuffle(p, PATCH).permute(0, 2, 3, 1).reshape(-1, 48) for p in pictures])
        self.mean = patches.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((patches - self.mean).T.double()))
        std = values.flip(0)[:CHANNELS].clamp(min=1e-9).sqrt()
        # Whitening by the root of the deviation keeps the strong components strong; then everything to unit deviation.
        gain = std.sqrt().reciprocal()
        gain = gain / ((gain * std) ** 2).mean().sqrt()
        basis = vectors.flip(1)[:, :CHANNELS]
        self.encoder, self.decoder = (basis * gain).T.float(), (basis / gain).float()

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents of pictures."""
        patches = pixel_unshuffle(pictures, PATCH) - self.mean[:, None, None]
        return torch.einsum("ck,nkhw->nchw", self.encoder, patches)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of latents."""
        patches = torch.einsum("kc,nchw->nkhw", self.decoder, latents)
        return pixel_shuffle(patches + self.mean[:, None, None], PATCH)


def make_vae(folder: Path, *, steps: int = 4000, batch: int = 32) -> None:
    """Builds, trains and saves the `AutoencoderTiny` into `folder`."""
    torch.manual_seed(4)
    rng = np.random.default_rng(4)
    codec = PatchCodec()
    vae = AutoencoderTiny(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(4, 2, 1),
        scaling_factor=SCALE,
        force_upcast=False,
    ).train()

    def loss_at(step: int) -> torch.Tensor:
        pictures = normalised(render(draw_scenes(rng, batch, (4, 3, 2, 1)), SIDES[step % len(SIDES)]))
        latents = codec.encode(pictures) / SCALE
        seen = vae.encode(pictures).latents
        drawn = vae.decode(latents + 0.04 * torch.randn_like(latents)).sample
        return mse_loss(seen, latents) + l1_loss(drawn, pictures) + 2 * mse_loss(drawn, pictures)

    train([vae], loss_at, name="vae", steps=steps, rate=2e-3, decay_from=0.3)
    vae.half().save_pretrained(folder)
