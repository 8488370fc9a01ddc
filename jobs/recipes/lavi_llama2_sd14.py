"""LaVi-Bridge: Llama-2 7B and Stable Diffusion 1.4, an adapter between them and LoRA in both. Zhao et al. 2024, arXiv 2403.07860.

    densebridge build lavi_llama2_sd14
    densebridge train lavi_llama2_sd14 --processes 8
    densebridge generate lavi_llama2_sd14 --prompt "A red vintage car parked beside a small wooden house …"

Source, dataset folder and contact are set as `jobs/dense_captions.py` says, which also tells of our data.

290.8 million parameters are trained: an adapter 4096-2432-768 (228.9), LoRA of rank 32 in Llama's attention (33.6) and in the
U-Net's residual blocks, attention and GEGLU (28.3). Hardware and time of the paper: 48 hours on 8 A100; 7 billion weights in
float32 are 28 GB beside all else, so 80 GB each here. Nobody has run this very recipe through yet. What to expect (paper,
table 1), T5-large in brackets: short prompts FID 21.80 (23.11), aesthetics 5.88 (5.88), CLIP score .317 (.316); long prompts
aesthetics 6.36 (6.31), CLIP score .323 (.319); T2I-CompBench colour .486 (.389), shape .429 (.355), texture .506 (.452), spatial
.191 (.158), non-spatial .311 (.307), complex .309 (.307).

As published: rates 1e-4, in Llama 5e-6; AdamW, weight decay 0.01, clip 1.0; all in float32 (the authors' advice, their issue 6);
77 tokens, pads seen by Llama and U-Net, for no mask is passed; dropout 0.1 in the adapter; Llama's last layer, after its norm.
Not as published: all that lavi_t5_sd14 says, and the pads, which are the end token here where theirs became unknown words.
The last layer is known to be the wrong one for decoders in general (Wang et al. 2025, arXiv 2506.08210); with LoRA inside the
model it can learn to be another, so it stays. `--lavi.language-model.layers mean` reads the mean of all, each normalised.
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

PLACES = places("lavi_llama2_sd14")

# Pin: put the commit you downloaded. None is the main branch, whose files may change.
LLAMA_REVISION: str | None = None
SD14_REVISION: str | None = None

SD14 = "CompVis/stable-diffusion-v1-4"
LLAMA = TokenizerConfig(name="llama2", model="meta-llama/Llama-2-7b-hf", revision=LLAMA_REVISION, max_length=77)

STAGES = (
    *captioned_pictures(PLACES.contact),  # download, deduplicate, embed, recaption, score
    Pretokenize(PretokenizeConfig(tokenizer=LLAMA)),
    ClipFilter(ClipFilterConfig(min_score=0.20)),
    Pack(
        PackConfig(
            view="512-lavi-llama2",
            resolution=512,
            tokenizers=(LLAMA,),
            where="least(width, height) >= 512 AND clip_score >= 0.22",
        )
    ),
)

recipe = Recipe(
    name="lavi_llama2_sd14",
    source=PLACES.source,
    dataset=PLACES.dataset,
    stages=STAGES,
    runs=PLACES.runs,
    trainings={
        "lavi": TrainingConfig(
            connector=LaViConfig(in_width=4096, dropout=0.1),
            language_model=LanguageModelConfig(
                model=LLAMA.model,
                revision=LLAMA_REVISION,
                max_length=LLAMA.max_length,
                padding="fixed",
                pads="seen",
                tokenizer=LLAMA.name,
                lora=LoRAConfig(targets=lora.LLAMA, dropout=0.1, rate_scale=0.05),
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
                Phase(
                    view="512-lavi-llama2", resolution=512, samples=40_000 * 256, batch=256, micro_batch=4, rate=1e-4
                ),
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
