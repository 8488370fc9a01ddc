"""PixArt-alpha and PixArt-Sigma (Chen et al. 2023, arXiv 2310.00426; 2024, arXiv 2403.04692).

The conditioning enters through the model's own caption projection (4096 -> 1152, frozen like all else, as in LaVi-Bridge) and
then through the cross-attention of every block, under its mask. Half of the output channels are a variance, which neither
the loss nor our sampling looks at.
"""

from __future__ import annotations

import torch

from training.bridge import Conditioning

from .denoiser import Denoiser


class PixArt(Denoiser):
    """PixArt's transformer."""

    network_class = "PixArtTransformer2DModel"
    subfolder = "transformer"

    @property
    def width(self) -> int:
        """Width of the tokens that the caption projection takes: that of T5-XXL, 4096."""
        return int(self.network.config.caption_channels)

    def predict(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Denoiser.predict`. The 1024 model is told the wanted size and ratio, never how the picture came."""
        dtype, count = self.network.dtype, len(noisy)
        height, width = (float(side * self.vae_facts.factor) for side in noisy.shape[2:])
        told: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.network.use_additional_conditions:
            told["resolution"] = noisy.new_tensor([[height, width]], dtype=torch.float32).expand(count, -1)
            told["aspect_ratio"] = noisy.new_tensor([[height / width]], dtype=torch.float32).expand(count, -1)
        predicted = self.network(
            noisy.to(dtype),
            encoder_hidden_states=conditioning.tokens.to(dtype),
            encoder_attention_mask=conditioning.mask,
            timestep=times,
            added_cond_kwargs=told,
            return_dict=False,
        )[0]
        return predicted[:, : noisy.shape[1]]
