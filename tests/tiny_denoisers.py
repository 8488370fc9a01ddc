"""Tiny random models of every family of denoisers, as the diffusers folders that the real ones come in, and what their tests
have in common.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from training.bridge import Conditioning
from training.denoisers import Denoiser

POOLED_WIDTH = 8
"""Of the text as one vector that the tiny SDXL wants."""


def make_unet(
    folder: Path, *, width: int = 16, prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
) -> Path:
    """Stable Diffusion 1.x (epsilon) or 2.x (v): U-Net, VAE with a posterior (pixels / 2) and schedule."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(2)
    UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2, norm_num_groups=4, cross_attention_dim=width,
    ).save_pretrained(folder / "unet")  # fmt: skip
    _make_vae(folder)
    is_v = prediction_type == "v_prediction"
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
        rescale_betas_zero_snr=is_v, timestep_spacing="trailing" if is_v else "leading", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    ).save_pretrained(folder / "scheduler")  # fmt: skip
    return folder


def make_sdxl(folder: Path, *, width: int = 16) -> Path:
    """SDXL: a U-Net that is told a pooled text of `POOLED_WIDTH` and six sizes, VAE (pixels / 2) and schedule."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    torch.manual_seed(3)
    UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(2, 4), norm_num_groups=4, cross_attention_dim=width,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * 4,
    ).save_pretrained(folder / "unet")  # fmt: skip
    _make_vae(folder)
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    return folder


def make_pixart(folder: Path, *, width: int = 16, additional_conditions: bool = False) -> Path:
    """PixArt: transformer with a learned variance, VAE (pixels / 2) and schedule. With `additional_conditions` it is told size
    and ratio, as PixArt-alpha's of 1024 pixels is.
    """
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    torch.manual_seed(4)
    PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, sample_size=128 if additional_conditions else 4, patch_size=2, caption_channels=width,
        use_additional_conditions=additional_conditions,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    _make_vae(folder)
    DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear").save_pretrained(
        folder / "scheduler"
    )
    return folder


def make_sana(folder: Path, *, width: int = 16) -> Path:
    """SANA: flow-matching transformer, AutoencoderDC (pixels / 2, 8 channels, no posterior) and schedule."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel

    torch.manual_seed(5)
    SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=width,
        sample_size=4, patch_size=1,
    ).save_pretrained(folder / "transformer")  # fmt: skip
    AutoencoderDC(
        latent_channels=8, encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.41407,
    ).save_pretrained(folder / "vae")  # fmt: skip
    DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, beta_schedule="linear"
    ).save_pretrained(folder / "scheduler")
    return folder


def _make_vae(folder: Path) -> None:
    """An AutoencoderKL as Stable Diffusion's: 4 channels."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=2, scaling_factor=0.5,
    ).save_pretrained(folder / "vae")  # fmt: skip


def own_scheduler(denoiser: Denoiser) -> Any:
    """The scheduler that its folder names."""
    import diffusers

    return getattr(diffusers, denoiser.scheduler["_class_name"]).from_config(denoiser.scheduler)


def denoised(
    denoiser: Denoiser,
    latents: torch.Tensor,
    conditioning: Conditioning,
    sizes: torch.Tensor | None = None,
    steps: int = 3,
) -> torch.Tensor:
    """Latents as diffusers' pipelines denoise them without guidance, by the model's own scheduler and our `predict`."""
    scheduler = own_scheduler(denoiser)
    scheduler.set_timesteps(steps)
    latents = latents * scheduler.init_noise_sigma
    with torch.no_grad():
        for step in scheduler.timesteps:
            noisy = scheduler.scale_model_input(latents, step)
            predicted = denoiser.predict(noisy, step.expand(len(noisy)), conditioning, sizes)
            latents = scheduler.step(predicted, step, latents).prev_sample
    return latents


def random_conditioning(denoiser: Denoiser, count: int = 2, length: int = 3) -> Conditioning:
    """Tokens, of which the first sample's last is hidden, and a pooled vector where the denoiser wants one, to be
    differentiated by.
    """
    draw = torch.Generator().manual_seed(6)
    mask = torch.ones(count, length, dtype=torch.bool)
    mask[0, -1] = False
    tokens = torch.randn(count, length, denoiser.width, generator=draw).requires_grad_()
    pooled = None
    if denoiser.pooled_width:
        pooled = torch.randn(count, denoiser.pooled_width, generator=draw).requires_grad_()
    return Conditioning(tokens, mask, pooled)


def random_latents(denoiser: Denoiser, count: int = 2, side: int = 8, seed: int = 7) -> torch.Tensor:
    """Latents of pictures of `side` pixels."""
    return torch.randn(count, *denoiser.latent_shape(side), generator=torch.Generator().manual_seed(seed))


def check_gradients(denoiser: Denoiser) -> None:
    """Gradients reach the tokens that may be seen and the pooled vector, no other token, and no weight; pictures need not be
    square.
    """
    conditioning = random_conditioning(denoiser)
    tokens, pooled = conditioning.tokens, conditioning.pooled
    times = denoiser.levels.times[torch.tensor([3, 700])]
    predicted = denoiser.predict(random_latents(denoiser), times, conditioning)
    assert predicted.shape == (2, *denoiser.latent_shape(8)) and predicted.dtype == denoiser.network.dtype
    predicted.float().square().sum().backward()
    assert tokens.grad is not None and (tokens.grad.abs().sum(-1) > 0).tolist() == [[True, True, False], [True] * 3]
    assert pooled is None or (pooled.grad is not None and bool(pooled.grad.abs().sum(-1).all()))
    assert all(p.grad is None for module in (denoiser.network, denoiser.vae) for p in module.parameters())
    wide = (2, *denoiser.latent_shape(8, 16))
    with torch.no_grad():
        assert denoiser.predict(torch.zeros(wide), times, conditioning).shape == wide
