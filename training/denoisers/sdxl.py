"""Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952).

The conditioning enters twice: its tokens through cross-attention (width 2048), and the text as one vector (1280), which is added
to the time embedding together with the picture's sizes and crop (section 2.2, "micro-conditioning").
"""

from __future__ import annotations

import torch

from training.bridge import Conditioning

from .denoiser import Denoiser

SIZES = 6
"""Numbers that tell of a picture's sizes and crop."""


class SDXL(Denoiser):
    """SDXL's U-Net."""

    network_class = "UNet2DConditionModel"
    subfolder = "unet"

    @property
    def width(self) -> int:
        """Width of the tokens that cross-attention reads."""
        return int(self.network.config.cross_attention_dim)

    @property
    def pooled_width(self) -> int:  # type: ignore[override]
        """What the added embedding takes besides the sizes' sinusoids."""
        config = self.network.config
        return int(config.projection_class_embeddings_input_dim - SIZES * config.addition_time_embed_dim)

    def predict(
        self,
        noisy: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        sizes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Denoiser.predict`. Raises ValueError where the conditioning has no pooled vector. Sizes stay in float32, as the
        network makes sinusoids of them: bfloat16 knows no 1001.
        """
        if conditioning.pooled is None:
            raise ValueError(
                f"{self.config.model} wants pooled text: set connector.pooled_width to {self.pooled_width}"
            )
        dtype = self.network.dtype
        if sizes is None:
            sizes = self.whole(noisy)
        return self.network(
            noisy.to(dtype),
            times,
            conditioning.tokens.to(dtype),
            encoder_attention_mask=conditioning.mask,
            added_cond_kwargs={"text_embeds": conditioning.pooled.to(dtype), "time_ids": sizes.float()},
            return_dict=False,
        )[0]

    def whole(self, noisy: torch.Tensor) -> torch.Tensor:
        """The sizes of whole pictures of these latents' size: float32 (B, 6)."""
        height, width = (side * self.vae_facts.factor for side in noisy.shape[2:])
        return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32, device=noisy.device).expand(
            len(noisy), -1
        )
