"""ELLA for Stable Diffusion 1.5: a TSC between flan-T5-XL and the U-Net, on captions by LLaVA. Hu et al. 2024,
arXiv 2403.05135.

    densebridge build ella_sd15                   # on a cluster: densebridge submit build ella_sd15 --address …
    densebridge train ella_sd15 --processes 8
    densebridge generate ella_sd15 --prompt "A red vintage car parked beside a small wooden house …"

Source, dataset folder and contact are set as `jobs/dense_captions.py` says, which also tells of the data, ours and ELLA's.

Hardware and time: 280,000 steps of 256 took seven days on 8 A100-40G in the paper, that is about 118 pictures a second.
Nobody has run this very recipe through yet.
What to expect at the end of the first phase (paper, tables 3 and 4), base in brackets: DPG-Bench 74.91 (63.18),
T2I-CompBench colour .691 (.375), shape .494 (.372), texture .631 (.416), spatial .187 (.120).
The second phase at 1024 is the paper's for SDXL (100,000 pictures, rate 1e-5); for SD 1.5 it states none.

Where the paper is silent (caption drop, no clipping, no warm-up) the values are those of the code it was built on,
tencent-ailab/IP-Adapter; the batch follows from the numbers: 34 million samples in 140,000 steps make 256. Not that code's is
the precision: it trains in fp16, this in bf16.
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

PLACES = places("ella_sd15")

# Pin: put the commit you downloaded. None is the main branch, whose files may change.
T5_REVISION: str | None = None
SD15_REVISION: str | None = None

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
T5 = TokenizerConfig(name="t5", model="google/flan-t5-xl", revision=T5_REVISION, max_length=128)

LARGE_ENOUGH = "least(width, height) >= 512 AND clip_score >= 0.22"

STAGES = (
    *captioned_pictures(PLACES.contact),  # download, deduplicate, embed, recaption, score
    Pretokenize(PretokenizeConfig(tokenizer=T5)),
    # Cosines of ViT-L/14 are low; where to cut depends on the source: look at the report's histogram before you settle.
    ClipFilter(ClipFilterConfig(min_score=0.20)),
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
    name="ella_sd15",
    source=PLACES.source,
    dataset=PLACES.dataset,
    stages=STAGES,
    runs=PLACES.runs,
    trainings={
        "tsc": TrainingConfig(
            connector=TSCConfig(),  # the released layout: 93 tensors, 66,820,608 parameters
            # float16 cast whole, 128 tokens, pads seen by the TSC: the features of the released weights.
            language_model=LanguageModelConfig(
                model=T5.model,
                revision=T5_REVISION,
                dtype="float16",
                max_length=T5.max_length,
                padding="fixed",
                tokenizer=T5.name,
            ),
            # bfloat16, which needs no loss scaling on the way back through the U-Net. On a V100: float16 and "fp16".
            denoiser=DenoiserConfig(model=SD15, revision=SD15_REVISION, dtype="bfloat16"),
            phases=(
                Phase(view="512", resolution=512, samples=280_000 * 256, batch=256, micro_batch=16, rate=1e-4),
                Phase(view="1024", resolution=1024, samples=391 * 256, batch=256, micro_batch=4, rate=1e-5),
            ),
            weight_decay=0.01,
            clip=None,  # as IP-Adapter's
            caption_drop=0.1,
            precision="bf16",
            checkpoint_every=5_000 * 256,
            log_every=50,
            validation=ValidationConfig(  # the work of about 500 training samples, so 0.2 %
                every=1_000 * 256,
                resolution=512,
                view="held-out",
                prompts=PROMPTS,
                guidance=12.0,
                sampler="dpm++",
                batch=16,
                clip=CLIP,
                clip_revision=CLIP_REVISION,
            ),
            threads=8,
            # NeMo's table for a frozen SD 1.5: layout +23 %, compiled blocks +6 %; the next batch is encoded during the step.
            speed=SpeedConfig(channels_last=True, compile="transformers"),
        )
    },
    evaluation=Evaluation(
        judge=no_judge,
        base=LanguageModelConfig(
            model=SD15,
            revision=SD15_REVISION,
            subfolder="text_encoder",
            tokenizer_subfolder="tokenizer",
            dtype="float16",
            max_length=77,
            pads="seen",
            tokenizer="clip",
        ),
        arms={"base": None, "tsc": "tsc"},
        gains={"tsc_over_base": ("tsc", "base")},
        resolution=512,
        steps=50,
        guidance=12.0,  # ELLA's test setting, as are steps and sampler
        sampler="dpm++",
    ),
)
