"""LaVi-Bridge: T5-large and PixArt-alpha's transformer, an adapter between them and LoRA in both. Zhao et al. 2024, arXiv
2403.07860.

    densebridge build lavi_t5_pixart
    densebridge train lavi_t5_pixart --processes 8
    densebridge generate lavi_t5_pixart --prompt "A red vintage car parked beside a small wooden house …"

Source, dataset folder and contact are set as `jobs/dense_captions.py` says, which also tells of our data.

136.1 million parameters are trained: an adapter 1024-2560-4096 (113.3), whose tokens pass PixArt's own frozen caption projection,
LoRA of rank 32 in T5's attention (6.3) and in the transformer's attention (16.5; the published script also names GEGLU, which
PixArt has none of). Hardware and time of the paper: 48 hours on 8 A100. Nobody has run this very recipe through yet. What to
expect (paper, table 2), PixArt-alpha with its own T5-XXL in brackets: T2I-CompBench colour .369 (.689), shape .332 (.558),
texture .455 (.704), spatial .173 (.208), non-spatial .310 (.318), complex .301 (.412); short prompts FID 23.02, aesthetics 6.15,
CLIP score .317; long prompts aesthetics 6.41, CLIP score .321.
So it loses half of the attribute binding of the model that it started from: the strongest published warning against a new
bridge to a transformer on a million pairs. Hold it against the base arm before you believe in yours.

As published: rates 2e-5, in T5 5e-6; 120 tokens under a mask, in T5 and in the transformer; half of the output channels are a
variance that the loss does not look at; AdamW, weight decay 0.01, clip 1.0; all in float32.
Not as published: what lavi_t5_sd14 says.
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

PLACES = places("lavi_t5_pixart")

# Pin: put the commit you downloaded. None is the main branch, whose files may change.
T5_REVISION: str | None = None
PIXART_REVISION: str | None = None

PIXART = "PixArt-alpha/PixArt-XL-2-512x512"
T5 = TokenizerConfig(name="t5large", model="google-t5/t5-large", revision=T5_REVISION, max_length=120)

STAGES = (
    *captioned_pictures(PLACES.contact),  # download, deduplicate, embed, recaption, score
    Pretokenize(PretokenizeConfig(tokenizer=T5)),
    ClipFilter(ClipFilterConfig(min_score=0.20)),
    Pack(
        PackConfig(
            view="512-lavi-pixart",
            resolution=512,
            tokenizers=(T5,),
            where="least(width, height) >= 512 AND clip_score >= 0.22",
        )
    ),
)

recipe = Recipe(
    name="lavi_t5_pixart",
    source=PLACES.source,
    dataset=PLACES.dataset,
    stages=STAGES,
    runs=PLACES.runs,
    trainings={
        "lavi": TrainingConfig(
            connector=LaViConfig(in_width=1024, width=4096, dropout=0.1, use_mask="mask"),
            language_model=LanguageModelConfig(
                model=T5.model,
                revision=T5_REVISION,
                max_length=T5.max_length,
                padding="fixed",
                tokenizer=T5.name,
                lora=LoRAConfig(targets=lora.T5, dropout=0.1, rate_scale=0.25),
            ),
            denoiser=DenoiserConfig(
                model=PIXART,
                revision=PIXART_REVISION,
                # All is in float32, and LoRA in every block have activations held from the first one on. Checkpointed they fit at
                # this micro_batch, at the cost of one more forward pass of the denoiser.
                gradient_checkpointing=True,
                lora=LoRAConfig(targets=lora.PIXART, dropout=0.1),
            ),
            phases=(
                Phase(
                    view="512-lavi-pixart", resolution=512, samples=40_000 * 256, batch=256, micro_batch=8, rate=2e-5
                ),
            ),
            weight_decay=0.01,
            caption_drop=0.1,
            checkpoint_every=2_000 * 256,
            log_every=50,
            threads=8,
            # Of worth for the VAE's convolutions. Not compiled: the LoRA's dropout would draw otherwise.
            speed=SpeedConfig(channels_last=True),
        )
    },
    evaluation=Evaluation(
        judge=no_judge,
        base=LanguageModelConfig(
            model=PIXART,
            revision=PIXART_REVISION,
            subfolder="text_encoder",
            tokenizer_subfolder="tokenizer",
            dtype="bfloat16",
            max_length=120,
            tokenizer="t5xxl",
        ),
        arms={"base": None, "lavi": "lavi"},
        gains={"lavi_over_base": ("lavi", "base")},
        resolution=512,
        steps=50,
        guidance=7.5,  # LaVi-Bridge's; PixArt's own is 4.5
        sampler="unipc",
    ),
)
