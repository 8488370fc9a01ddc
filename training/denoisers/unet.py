"""Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv 2112.10752).

The conditioning enters through the cross-attention of every transformer block, as keys and values; nowhere else.
"""

from __future__ import annotations

import torch

from training.bridge import Conditioning

from .denoiser import Denoiser


class UNet(Denoiser):
    """The U-Net of SD 1.x (epsilon, width 768) and 2.x (epsilon or v, width 1024)."""

    network_class = "UNet2DConditionModel"
    subfolder = "unet"

    @property
    def width(self) -> int:
        """Width of the tokens that cross-attention reads."""
        return int(self.network.config.cross_attention_dim)

    def predict(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Denoiser.predict`; `sizes` are not looked at."""
        dtype = self.network.dtype
        return self.network(
            noisy.to(dtype),
            times,
            conditioning.tokens.to(dtype),
            encoder_attention_mask=conditioning.mask,
            return_dict=False,
        )[0]
