"""The published architectures with random weights, built where they run: no hub, no file. `gpu.py` trains on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline.vaes import VaeFacts
from training.batches import Batch
from training.configuration import DenoiserConfig, LanguageModelConfig, Phase, SpeedConfig, TrainingConfig
from training.connectors import ConnectorConfig, LaViConfig, TSCConfig
from training.denoisers.denoiser import Denoiser
from training.denoisers.pixart import PixArt
from training.denoisers.sdxl import SDXL
from training.denoisers.unet import UNet
from training.language_models import LanguageModel

from .published_configs import DENOISERS, LANGUAGE_MODELS, Facts

T5_XL, T5_LARGE = "google/flan-t5-xl", "google-t5/t5-large"
SD_15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SD_XL = "stabilityai/stable-diffusion-xl-base-1.0"
PIXART = "PixArt-alpha/PixArt-XL-2-512x512"


@dataclass(frozen=True, kw_only=True)
class Case:
    """Which models are joined, and at what size."""

    name: str
    language_model: str
    denoiser: str
    kind: type[Denoiser]
    connector: ConnectorConfig
    resolution: int
    micro_batches: tuple[int, ...]
    """Tried in order; the first is what a plain loop on a small GPU would have."""
    tokens: int = 128
    language_model_facts: Facts
    denoiser_facts: Facts

    def training(self, micro_batch: int, speed: SpeedConfig) -> TrainingConfig:
        """A run whose steps are one micro-batch."""
        phase = Phase(
            view="synthetic",
            resolution=self.resolution,
            samples=micro_batch,
            batch=micro_batch,
            micro_batch=micro_batch,
        )
        return TrainingConfig(
            connector=self.connector,
            language_model=LanguageModelConfig(
                model=self.language_model, dtype="bfloat16", max_length=self.tokens, tokenizer="t5"
            ),
            denoiser=DenoiserConfig(model=self.denoiser, dtype="bfloat16"),
            phases=(phase,),
            precision="bf16",
            speed=speed,
        )

    def batch(self, size: int, denoiser: Denoiser, *, latents: bool = False) -> Batch:
        """A batch of noise with prompts of full length, as the loader would give it."""
        shape = denoiser.latent_shape(self.resolution)
        drawn = (2 * shape[0], *shape[1:])
        side = self.resolution
        return Batch(
            positions=list(range(size)),
            keys=[str(number) for number in range(size)],
            pixels=None if latents else torch.rand(size, 3, side, side) * 2 - 1,
            latents=torch.rand(size, *drawn) if latents else None,
            ids=list(np.random.default_rng(0).integers(3, 100, (size, self.tokens), dtype=np.int32)),
            beside_ids=[],
            sizes=torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32).repeat(size, 1),
            timesteps=torch.randint(0, denoiser.steps, (size,)),
            noise=torch.randn(size, *shape),
            posterior_noise=torch.randn(size, *shape),
            weights=torch.ones(size),
            bad=[],
        )


def _case(name: str, language_model: str, denoiser: str, kind: type[Denoiser], **rest: Any) -> Case:
    return Case(
        name=name,
        language_model=language_model,
        denoiser=denoiser,
        kind=kind,
        language_model_facts=LANGUAGE_MODELS[language_model],
        denoiser_facts=DENOISERS[denoiser],
        **rest,
    )


_TSC_XL = TSCConfig(width=2048, time_width=2048, pooled_width=1280)
CASES = (
    _case("sd15-512", T5_XL, SD_15, UNet, connector=TSCConfig(), resolution=512, micro_batches=(8, 32, 64)),
    _case("sdxl-512", T5_XL, SD_XL, SDXL, connector=_TSC_XL, resolution=512, micro_batches=(8, 16, 32)),
    _case("sdxl-1024", T5_XL, SD_XL, SDXL, connector=_TSC_XL, resolution=1024, micro_batches=(2, 4, 8)),
    _case(
        "pixart-512",
        T5_LARGE,
        PIXART,
        PixArt,
        connector=LaViConfig(in_width=1024, width=4096),
        resolution=512,
        micro_batches=(8, 32),
    ),
)


def toy(case: Case) -> Case:
    """The same architecture at a size that a processor runs in no time."""
    text = case.language_model_facts | {
        "vocab_size": 100, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
    }  # fmt: skip
    pooled = 8 if case.connector.pooled_width else None
    network = dict(case.denoiser_facts[case.kind.subfolder])
    if case.kind is PixArt:
        network |= {
            "num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16,
            "num_layers": 1,
        }  # fmt: skip
    else:
        levels = len(network["block_out_channels"])
        network |= {
            "block_out_channels": [8] * levels, "attention_head_dim": 2, "cross_attention_dim": 16, "norm_num_groups": 4,
            "layers_per_block": 1, "transformer_layers_per_block": 1,
        }  # fmt: skip
    if pooled:
        network |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 6 * 4 + pooled}
    vae = case.denoiser_facts["vae"] | {
        "block_out_channels": [4] * 4, "layers_per_block": 1, "norm_num_groups": 2,
    }  # fmt: skip
    connector: ConnectorConfig = LaViConfig(in_width=16, width=16)
    if isinstance(case.connector, TSCConfig):
        connector = TSCConfig(
            in_width=16, width=16, blocks=1, heads=2, queries=4, time_channels=8, time_width=8, pooled_width=pooled
        )
    return replace(
        case,
        connector=connector,
        resolution=64,
        micro_batches=(1, 2),
        tokens=8,
        language_model_facts=text,
        denoiser_facts=case.denoiser_facts | {case.kind.subfolder: network, "vae": vae},
    )


class _Prompts:
    """What a language model asks of its tokenizer, without a vocabulary."""

    pad = 0

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def tokenize(self, texts: list[str]) -> list[np.ndarray]:
        return [np.ones(1, np.int32) for _ in texts]


def build_language_model(case: Case, config: TrainingConfig, device: torch.device) -> LanguageModel:
    """A T5 encoder with random weights in bfloat16."""
    from transformers import T5Config, T5EncoderModel

    facts = {name: value for name, value in case.language_model_facts.items() if name != "model_type"}
    with device:
        module = T5EncoderModel(T5Config(**facts | {"is_encoder_decoder": False, "use_cache": False}))
    module = module.to(torch.bfloat16).eval().requires_grad_(False)
    return LanguageModel(config.language_model, _Prompts(case.tokens), module)  # type: ignore[arg-type]


def build_denoiser(case: Case, config: TrainingConfig, device: torch.device) -> Denoiser:
    """Network and VAE with random weights in float32, as published."""
    import diffusers

    facts = case.denoiser_facts
    with device:
        network = getattr(diffusers, case.kind.network_class).from_config(facts[case.kind.subfolder])
        vae = diffusers.AutoencoderKL.from_config(facts["vae"])
    known = VaeFacts(
        kind="AutoencoderKL",
        channels=facts["vae"]["latent_channels"],
        factor=2 ** (len(facts["vae"]["block_out_channels"]) - 1),
        scaling_factor=facts["vae"].get("scaling_factor", 0.18215),
        shift_factor=0.0,
        force_upcast=False,
    )
    for module in (network, vae):
        module.eval().requires_grad_(False)
    return case.kind(config.denoiser, network, vae, facts["scheduler"], known).to(device)
