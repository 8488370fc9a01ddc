"""SANA (Xie et al. 2024, arXiv 2410.10629), the flow-matching transformer.

The conditioning enters as in PixArt: through the model's own caption projection and norm (2304, the width of Gemma-2-2b) and
then through the cross-attention of every block, under its mask. It was chosen over Lumina-Image 2.0 and SD3.5 because of this:
its text stands apart from the picture and is one sequence of one width, where Lumina joins text and picture in one
self-attention after a refiner of the text, and SD3.5 wants three encoders' tokens and a pooled vector. OpenUni, the best of
the connectors on public data, drives it too.
"""

from __future__ import annotations

import torch

from training.bridge import Conditioning

from .denoiser import Denoiser


class Sana(Denoiser):
    """SANA's transformer."""

    network_class = "SanaTransformer2DModel"
    subfolder = "transformer"

    @property
    def width(self) -> int:
        """Width of the tokens that the caption projection takes."""
        return int(self.network.config.caption_channels)

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
            encoder_hidden_states=conditioning.tokens.to(dtype),
            encoder_attention_mask=conditioning.mask,
            timestep=times * self.network.config.timestep_scale,
            return_dict=False,
        )[0]
