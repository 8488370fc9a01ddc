"""ELLA's ablation of language models, its largest row: LLaMA-2 13B drives Stable Diffusion 1.5 through a resampler that knows
no timestep. Hu et al. 2024, arXiv 2403.05135, table 5.

    densebridge build ella_llama2
    densebridge train ella_llama2 --processes 8

Source, dataset folder and contact are set as `jobs/dense_captions.py` says, which also tells of the data, ours and ELLA's.

What to expect of `resampler_6` after 140,000 steps (paper, table 5), beside the other language models of that table:

    language model    T2I-CompBench colour, shape, texture   DPG-Bench
    CLIP (SD 1.5)     .375 .358 .416                         63.18
    TinyLlama 1.1B    .417 .392 .464                         70.27
    T5-XL             .557 .452 .520                         71.70
    LLaMA-2 13B       .447 .398 .514                         72.05

(shape and texture of the CLIP row are SD 1.4's, a slip of the paper: its table 3 has .372 and .416 for SD 1.5).

`tsc`, with the timestep, has no published row; nor has `tsc_mean`, which reads the mean of all layers, each normalised. The last
layer, which the paper's rows read, is known to be the wrong one for decoders (Wang et al. 2025, arXiv 2506.08210).

Hardware and time: the paper tells none for this row. 13 billion weights in float16 are 26 GB beside denoiser and activations:
8 A100-80G, or `--resampler-6.language-model.quantize 8bit` on 40 GB. Estimated: its forward pass over 128 tokens is 3.3 TFLOP a
sample (2 x 13 billion x 128), U-Net and VAE 2.8; 36 million samples then take about seven days on 8 A100-80G, were they used as
in the paper's main run (46 TFLOP/s each). Nobody has run this very recipe through yet.

What is not the paper's word: that pads are hidden from the connector, as in ella_tinyllama; batch, caption drop, clipping and
precision, as in ella_sd15. 69,179,904 parameters in the TSC and 46,518,528 in the resampler follow from the width of 5120.
"""

from __future__ import annotations

import dataclasses

from jobs.dense_captions import captioned_pictures, no_judge, places
from jobs.recipe import Evaluation, Recipe
from pipeline.captions import TokenizerConfig
from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.pack import Pack, PackConfig
from stages.pretokenize import Pretokenize, PretokenizeConfig
from training.configuration import DenoiserConfig, LanguageModelConfig, Phase, SpeedConfig, TrainingConfig
from training.connectors import TSCConfig

PLACES = places("ella_llama2")

# Pin: put the commit you downloaded. None is the main branch, whose files may change.
LLAMA_REVISION: str | None = None
SD15_REVISION: str | None = None

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
LLAMA = TokenizerConfig(name="llama2", model="meta-llama/Llama-2-13b-hf", revision=LLAMA_REVISION, max_length=128)

STAGES = (
    *captioned_pictures(PLACES.contact),  # download, deduplicate, embed, recaption, score
    Pretokenize(PretokenizeConfig(tokenizer=LLAMA)),
    ClipFilter(ClipFilterConfig(min_score=0.20)),
    Pack(
        PackConfig(
            view="512-llama2",
            resolution=512,
            tokenizers=(LLAMA,),
            where="least(width, height) >= 512 AND clip_score >= 0.22",
        )
    ),
)

RESAMPLER = TrainingConfig(
    connector=TSCConfig(in_width=5120, timestep="off", use_mask="mask"),
    language_model=LanguageModelConfig(
        model=LLAMA.model,
        revision=LLAMA_REVISION,
        dtype="float16",
        max_length=LLAMA.max_length,
        padding="fixed",
        tokenizer=LLAMA.name,
    ),
    denoiser=DenoiserConfig(model=SD15, revision=SD15_REVISION, dtype="bfloat16"),
    phases=(Phase(view="512-llama2", resolution=512, samples=140_000 * 256, batch=256, micro_batch=16, rate=1e-4),),
    weight_decay=0.01,
    clip=None,  # as IP-Adapter's
    caption_drop=0.1,
    precision="bf16",
    checkpoint_every=5_000 * 256,
    log_every=50,
    threads=8,
    # NeMo's table for a frozen SD 1.5: layout +23 %, compiled blocks +6 %; the next batch is encoded during the step.
    speed=SpeedConfig(channels_last=True, compile="transformers"),
)
TSC = dataclasses.replace(RESAMPLER, connector=TSCConfig(in_width=5120, use_mask="mask"))

recipe = Recipe(
    name="ella_llama2",
    source=PLACES.source,
    dataset=PLACES.dataset,
    stages=STAGES,
    runs=PLACES.runs,
    trainings={
        "resampler_6": RESAMPLER,
        "tsc": TSC,
        "tsc_mean": dataclasses.replace(TSC, language_model=dataclasses.replace(TSC.language_model, layers="mean")),
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
        arms={"base": None, "resampler_6": "resampler_6", "tsc": "tsc", "tsc_mean": "tsc_mean"},
        gains={"resampler_over_base": ("resampler_6", "base"), "timestep": ("tsc", "resampler_6")},
        resolution=512,
        steps=50,
        guidance=12.0,  # ELLA's test setting, as are steps and sampler
        sampler="dpm++",
    ),
)
