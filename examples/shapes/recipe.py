"""The shapes world's recipe: two CPU cores, no GPU, no model hub; about ten minutes from URLs to pictures.

    python -m examples.shapes.demo                        # server, build, three trainings, evaluation, page
    densebridge build examples/shapes/recipe.py           # the build alone, from the source that the demo left

Models are the real classes with the small trained weights of `examples/shapes/weights`; everything else is what a
recipe for real models has too (see `jobs/recipes/ella_sd15.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

from examples.shapes.judge import ShapesJudge
from examples.shapes.words import PROMPTS
from jobs.recipe import Evaluation, Recipe
from pipeline.captions import TokenizerConfig
from pipeline.stage import Needs
from stages.captioning.guards import GuardsConfig
from stages.captioning.prompts import PromptConfig
from stages.captioning.with_transformers import TransformersConfig
from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.deduplicate import Deduplicate, DeduplicateConfig
from stages.download import Download, DownloadConfig
from stages.embed import Embed, EmbedConfig
from stages.fetch import FetchConfig
from stages.pack import Pack, PackConfig
from stages.pretokenize import Pretokenize, PretokenizeConfig
from stages.recaption import Recaption, RecaptionConfig
from stages.score import Score, ScoreConfig
from stages.source import Source
from training.configuration import (
    DenoiserConfig,
    LanguageModelConfig,
    Phase,
    TimestepConfig,
    TrainingConfig,
    ValidationConfig,
)
from training.connectors import ConnectorConfig, MLPConfig, TSCConfig

WEIGHTS = Path(__file__).parent / "weights"
BASE = str(WEIGHTS / "base")
BUILD = Path(os.environ.get("SHAPES_BUILD", "build/demo"))  # where the demo lays everything down

T5 = TokenizerConfig(name="t5", model=str(WEIGHTS / "language_model"), max_length=128)
JUDGE = str(WEIGHTS / "clip")  # one model embeds the pictures and, after the captions, scores them
CLIP = TokenizerConfig(name="clip", model=str(WEIGHTS / "base" / "tokenizer"), max_length=77)
SMALL, LIGHT = Needs(cpus=0.5), Needs(cpus=0.1)

STAGES = (
    Download(
        DownloadConfig(
            fetch=FetchConfig(
                user_agent="densebridge-demo/0.1 (+https://example.org/contact)",
                timeout=2.0,
                retries=1,
                backoff=0.1,
                per_host_rate=1000.0,  # all pictures are one host's, and it is ours
                allow_private_hosts=True,  # the world's server is on this machine
            ),
            min_edge=16,
            max_edge=96,
            batch_size=128,
            needs=LIGHT,
        )
    ),
    Deduplicate(DeduplicateConfig()),
    Embed(EmbedConfig(model=JUDGE, needs=SMALL)),
    Recaption(
        RecaptionConfig(
            engine=TransformersConfig(
                model=str(WEIGHTS / "captioner"), max_new_tokens=110, dtype="float32", batch_size=128
            ),
            prompts=tuple(PromptConfig(name=f"style_{n}", text=text) for n, text in enumerate(PROMPTS)),
            guards=GuardsConfig(openings="kept"),  # the world's own captions begin so, and its base model knows them
            needs=Needs(cpus=1.0),
        )
    ),
    Score(ScoreConfig(model=JUDGE, needs=SMALL)),
    Pretokenize(PretokenizeConfig(tokenizer=T5, needs=LIGHT)),
    Pretokenize(PretokenizeConfig(tokenizer=CLIP, needs=LIGHT)),
    ClipFilter(ClipFilterConfig(min_score=0.65, min_alt_score=0.3)),
    Pack(PackConfig(view="16", resolution=16, tokenizers=(T5, CLIP), quality=98, needs=LIGHT)),
    # As in ELLA, the second resolution takes the better part: larger pictures, higher scores.
    Pack(
        PackConfig(
            view="24",
            resolution=24,
            tokenizers=(T5, CLIP),
            where="least(width, height) >= 64 AND clip_score >= 0.78",
            quality=98,
            needs=LIGHT,
        )
    ),
)

T5_MODEL = LanguageModelConfig(model=T5.model, max_length=T5.max_length, padding="longest", tokenizer="t5")
CLIP_MODEL = LanguageModelConfig(
    model=f"{BASE}/text_encoder",
    tokenizer_model=f"{BASE}/tokenizer",
    max_length=77,
    padding="longest",
    tokenizer="clip",
)


# Twelve prompts, none of which is among the evaluation's; 1.6 % of the training's time.
VALIDATION = ValidationConfig(
    every=300 * 48,
    resolution=24,
    prompts=tuple(ShapesJudge(count=12, seed=980_001).prompts()),
    steps=15,
    guidance=3.0,
    batch=24,
    clip=JUDGE,
)


def training(connector: ConnectorConfig, language_model: LanguageModelConfig) -> TrainingConfig:
    """Two phases, 16 pixels and then 24, the same for every arm; three quarters of the timesteps lie where places and
    colours are decided.
    """
    return TrainingConfig(
        connector=connector,
        language_model=language_model,
        denoiser=DenoiserConfig(model=BASE),
        phases=(
            Phase(view="16", resolution=16, samples=650 * 48, batch=48, micro_batch=48, rate=2e-3, warmup_samples=4800),
            Phase(
                view="24",
                resolution=24,
                samples=200 * 48,
                batch=48,
                micro_batch=48,
                rate=1.5e-3,
                schedule="cosine",
                warmup_samples=960,
            ),
        ),
        betas=(0.9, 0.99),
        timesteps=TimestepConfig(kind="high_noise", share=0.75, floor=0.6),
        checkpoint_every=200 * 48,
        log_every=25,
        validation=VALIDATION,
        threads=1,
    )


TSC = TSCConfig(
    in_width=128, width=128, blocks=3, heads=4, queries=24, time_channels=64, time_width=128, use_mask="mask"
)
MLP = MLPConfig(in_width=128, width=128, use_mask="mask")

recipe = Recipe(
    name="shapes",
    dataset=str(BUILD / "dataset"),
    source=Source(path=str(BUILD / "source.parquet"), partition_size=500),
    stages=STAGES,
    runs=str(BUILD / "runs"),
    trainings={
        "tsc": training(TSC, T5_MODEL),
        "mlp": training(MLP, T5_MODEL),
        "clip_mlp": training(MLP, CLIP_MODEL),
    },
    evaluation=Evaluation(
        judge=ShapesJudge,
        base=CLIP_MODEL,
        arms={
            "base": None,
            "clip_mlp": "clip_mlp",
            "mlp": "mlp",
            "tsc": "tsc",
        },
        gains={
            "tsc_over_base": ("tsc", "base"),
            "mlp_over_base": ("mlp", "base"),
            "clip_mlp_over_base": ("clip_mlp", "base"),
            "tsc_over_clip_mlp": ("tsc", "clip_mlp"),
        },
        resolution=24,
        steps=15,
        guidance=3.0,
        batch=64,
    ),
)
