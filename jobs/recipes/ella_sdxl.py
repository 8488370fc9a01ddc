"""ELLA for Stable Diffusion XL: a TSC as wide as SDXL's text (2048), with a pooled vector. Hu et al. 2024, arXiv 2403.05135.

    densebridge build ella_sdxl                   # the data and views of ella_sd15, the same files in the same folder
    densebridge train ella_sdxl --processes 8
    densebridge generate ella_sdxl --prompt "A red vintage car parked beside a small wooden house …"

Source, dataset folder and contact are set as `jobs/dense_captions.py` says, which also tells of the data, ours and ELLA's.

Hardware and time: about 14 days on 8 A100-40G in the paper (512 px on 34 million pictures, then 1024 px on 100,000 chosen for
quality, rate 1e-5 throughout). Nobody has run this very recipe through yet, and ELLA's SDXL weights were never released.
What to expect (paper, tables 3 and 4), base in brackets: DPG-Bench 80.23 (74.65), T2I-CompBench colour .726 (.637), shape
.563 (.541), texture .669 (.564), spatial .221 (.203).

What is not the paper's word: it states 0.47 billion parameters, and width and time embedding of 2048 give 466,546,688; its heads
are not known (8 here, as for SD 1.5). The pooled vector comes from attention pooling, as the authors say (ELLA issue 39), of a
size they do not tell: ours adds 15.2 million parameters. Steps are not stated either: one epoch of 34 million here, as in the
paper's ablations. Which pictures the second phase took is not described: here those of higher CLIP score.
Sizes and crops are told to SDXL as they are; the authors say nothing of it.
"""

from __future__ import annotations

from jobs.dense_captions import CLIP, CLIP_REVISION, HELD_OUT, PROMPTS, TRAINED, captioned_pictures, no_judge, places
from jobs.recipe import Evaluation, Recipe
from pipeline.captions import TokenizerConfig
from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.pack import Pack, PackConfig
from stages.pretokenize import Pretokenize, PretokenizeConfig
from training.configuration import (
    DenoiserConfig,
    LanguageModelConfig,
    Phase,
    SpeedConfig,
    TrainingConfig,
    ValidationConfig,
)
from training.connectors import TSCConfig

PLACES = places("ella_sdxl")

# Pin: put the commit you downloaded. None is the main branch, whose files may change.
T5_REVISION: str | None = None
SDXL_REVISION: str | None = None

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
T5 = TokenizerConfig(name="t5", model="google/flan-t5-xl", revision=T5_REVISION, max_length=128)
LARGE_ENOUGH = "least(width, height) >= 512 AND clip_score >= 0.22"

STAGES = (
    *captioned_pictures(PLACES.contact),  # download, deduplicate, embed, recaption, score
    Pretokenize(PretokenizeConfig(tokenizer=T5)),
    ClipFilter(ClipFilterConfig(min_score=0.20)),
    # The views of ella_sd15.
    Pack(
        PackConfig(
            view="512",
            resolution=512,
            tokenizers=(T5,),
            where=f"{LARGE_ENOUGH} AND {TRAINED}",
        )
    ),
    Pack(PackConfig(view="held-out", resolution=512, tokenizers=(T5,), where=f"{LARGE_ENOUGH} AND {HELD_OUT}")),
    Pack(
        PackConfig(
            view="1024",
            resolution=1024,
            tokenizers=(T5,),
            where=f"least(width, height) >= 1024 AND clip_score >= 0.26 AND {TRAINED}",
        )
    ),
)

recipe = Recipe(
    name="ella_sdxl",
    source=PLACES.source,
    dataset=PLACES.dataset,
    stages=STAGES,
    runs=PLACES.runs,
    trainings={
        "tsc": TrainingConfig(
            connector=TSCConfig(width=2048, time_width=2048, pooled_width=1280),
            language_model=LanguageModelConfig(
                model=T5.model,
                revision=T5_REVISION,
                dtype="float16",
                max_length=T5.max_length,
                padding="fixed",
                tokenizer=T5.name,
            ),
            # bfloat16 for the VAE as well: in float16 SDXL's overflows. Checkpointed to fit 40 GB at 1024 px; what it keeps is
            # computed anew on the way back, a forward pass more of the U-Net. With 80 GB try it without.
            denoiser=DenoiserConfig(model=SDXL, revision=SDXL_REVISION, dtype="bfloat16", gradient_checkpointing=True),
            phases=(
                Phase(view="512", resolution=512, samples=132_813 * 256, batch=256, micro_batch=8, rate=1e-5),
                Phase(view="1024", resolution=1024, samples=391 * 256, batch=256, micro_batch=2, rate=1e-5),
            ),
            weight_decay=0.01,
            clip=None,  # as IP-Adapter's
            caption_drop=0.1,
            precision="bf16",
            checkpoint_every=5_000 * 256,
            log_every=50,
            validation=ValidationConfig(  # at the first phase's size, which is nearly all of the run
                every=1_000 * 256,
                resolution=512,
                view="held-out",
                prompts=PROMPTS,
                guidance=7.5,
                sampler="dpm++",
                batch=8,
                clip=CLIP,
                clip_revision=CLIP_REVISION,
            ),
            threads=8,
            # NeMo's table for a frozen SD 1.5, not measured for SDXL: layout +23 %, compiled blocks +6 %; the next batch is
            # encoded during the step.
            speed=SpeedConfig(channels_last=True, compile="transformers"),
        )
    },
    # No arm for the base: SDXL's own text comes from two encoders at once, which is not drawn here.
    evaluation=Evaluation(
        judge=no_judge,
        arms={"tsc": "tsc"},
        gains={},
        resolution=1024,
        steps=50,
        guidance=7.5,
        sampler="dpm++",
    ),
)
