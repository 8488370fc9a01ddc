"""LaVi-Bridge: T5-large and Stable Diffusion 1.4, an adapter between them and LoRA in both. Zhao et al. 2024, arXiv 2403.07860.

    densebridge build lavi_t5_sd14
    densebridge train lavi_t5_sd14 --processes 8
    densebridge generate lavi_t5_sd14 --prompt "A red vintage car parked beside a small wooden house …"

Source, dataset folder and contact are set as `jobs/dense_captions.py` says, which also tells of our data.

55.8 million parameters are trained: an adapter 1024-896-768 (21.25), LoRA of rank 32 in T5's attention (6.3) and in the U-Net's
residual blocks, attention and GEGLU (28.3). Hardware and time of the paper: 48 hours on 8 A100. Nobody has run this very recipe
through yet. What to expect (paper, table 1), the same with CLIP as language model in brackets: short prompts FID 23.11 (23.57),
aesthetics 5.88 (5.61), CLIP score .316 (.310); long prompts aesthetics 6.31 (6.00), CLIP score .319 (.312); T2I-CompBench colour
.389 (.358), shape .355 (.375), texture .452 (.451), spatial .158 (.130), non-spatial .307 (.301), complex .307 (.299).

As published: rates 1e-4, in T5 5e-6; AdamW, weight decay 0.01, clip 1.0; all in float32, as the authors advise (their issue 6);
77 tokens, pads seen by T5 and U-Net, for no mask is passed; dropout 0.1 in the adapter.
Not as published: the data (COCO 2017 and JourneyDB, about a million pairs, with their own captions); samples and batch, which
are not known (ten epochs of a million here, 59 a second if they take those 48 hours); dropout of the LoRA on what comes into
the matrices, not on what comes out; T5's own dropout, which their script leaves on; no flipped pictures, as captions say left and
right; and captions that are dropped for guidance (0.1), where theirs never are though guidance is used.
"""

from __future__ import annotations

from jobs.dense_captions import captioned_pictures, no_judge, places
from jobs.recipe import Evaluation, Recipe
from pipeline.captions import TokenizerConfig
from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.pack import Pack, PackConfig
from stages.pretokenize import Pretokenize, PretokenizeConfig
from training import lora
from training.configuration import DenoiserConfig, LanguageModelConfig, LoRAConfig, Phase, SpeedConfig, TrainingConfig
from training.connectors import LaViConfig

PLACES = places("lavi_t5_sd14")

# Pin: put the commit you downloaded. None is the main branch, whose files may change.
T5_REVISION: str | None = None
SD14_REVISION: str | None = None

SD14 = "CompVis/stable-diffusion-v1-4"
T5 = TokenizerConfig(name="t5large", model="google-t5/t5-large", revision=T5_REVISION, max_length=77)

STAGES = (
    *captioned_pictures(PLACES.contact),  # download, deduplicate, embed, recaption, score
    Pretokenize(PretokenizeConfig(tokenizer=T5)),
    ClipFilter(ClipFilterConfig(min_score=0.20)),
    Pack(
        PackConfig(
            view="512-lavi-t5",
            resolution=512,
            tokenizers=(T5,),
            where="least(width, height) >= 512 AND clip_score >= 0.22",
        )
    ),
)

recipe = Recipe(
    name="lavi_t5_sd14",
    source=PLACES.source,
    dataset=PLACES.dataset,
    stages=STAGES,
    runs=PLACES.runs,
    trainings={
        "lavi": TrainingConfig(
            connector=LaViConfig(in_width=1024, dropout=0.1),
            language_model=LanguageModelConfig(
                model=T5.model,
                revision=T5_REVISION,
                max_length=T5.max_length,
                padding="fixed",
                pads="seen",
                tokenizer=T5.name,
                lora=LoRAConfig(targets=lora.T5, dropout=0.1, rate_scale=0.05),
            ),
            denoiser=DenoiserConfig(
                model=SD14,
                revision=SD14_REVISION,
                # All is in float32, and LoRA in every block have activations held from the first one on. Checkpointed they fit at
                # this micro_batch, at the cost of one more forward pass of the denoiser.
                gradient_checkpointing=True,
                lora=LoRAConfig(
                    targets=lora.UNET,
                    dropout=0.1,
                ),
            ),
            phases=(
                Phase(view="512-lavi-t5", resolution=512, samples=40_000 * 256, batch=256, micro_batch=8, rate=1e-4),
            ),
            weight_decay=0.01,
            caption_drop=0.1,
            checkpoint_every=2_000 * 256,
            log_every=50,
            threads=8,
            # NeMo's table for a frozen SD 1.5: +23 %. Not compiled: the LoRA's dropout would draw otherwise.
            speed=SpeedConfig(channels_last=True),
        )
    },
    evaluation=Evaluation(
        judge=no_judge,
        base=LanguageModelConfig(
            model=SD14,
            revision=SD14_REVISION,
            subfolder="text_encoder",
            tokenizer_subfolder="tokenizer",
            max_length=77,
            pads="seen",
            tokenizer="clip",
        ),
        arms={"base": None, "lavi": "lavi"},
        gains={"lavi_over_base": ("lavi", "base")},
        resolution=512,
        steps=50,
        guidance=7.5,
        sampler="unipc",
    ),
)
