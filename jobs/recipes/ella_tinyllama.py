"""ELLA's ablation of connectors: TinyLlama drives Stable Diffusion 1.5 through each of them. Hu et al. 2024, arXiv 2403.05135,
table 6.

    densebridge build ella_tinyllama
    densebridge train ella_tinyllama --training tsc --processes 8

Source, dataset folder and contact are set as `jobs/dense_captions.py` says, which also tells of the data, ours and ELLA's.

What to expect after 140,000 steps (paper, table 6; SD 1.5 with its own CLIP: DPG-Bench 63.18):

    training       parameters   T2I-CompBench colour, shape, texture   DPG-Bench
    mlp             2,164,224   .326 .320 .396                         62.55
    resampler_1     8,712,192   .357 .334 .412                         66.39
    resampler_6    44,159,232   .417 .392 .464                         70.27
    adaln_zero     73,907,712   .477 .381 .496                         70.43
    tsc            66,820,608   .501 .425 .518                         72.91

Hardware and time: the paper tells none for the ablation; half of its main run's steps are three to four days on 8 A100-40G.
Nobody has run this very recipe through yet.

What is not the paper's word: which of TinyLlama's checkpoints (the chat model here); where AdaLN-Zero's gates stand (the count
fits those after attention and feed-forward); what the connector sees of pads (nothing here: what a decoder makes of them means
nothing, whereas the released T5 weights see them). Batch, caption drop, clipping and precision: ella_sd15.
The last layer is what the paper's rows read. For decoders it is known to be the wrong one, and the mean of all layers, each
normalised, to be better (Wang et al. 2025, arXiv 2506.08210): `tsc_mean` is that, a row that nobody has published.
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
from training.connectors import MLPConfig, TSCConfig

PLACES = places("ella_tinyllama")

# Pin: put the commit you downloaded. None is the main branch, whose files may change.
TINYLLAMA_REVISION: str | None = None
SD15_REVISION: str | None = None

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TINYLLAMA = TokenizerConfig(
    name="tinyllama", model="TinyLlama/TinyLlama-1.1B-Chat-v1.0", revision=TINYLLAMA_REVISION, max_length=128
)

STAGES = (
    *captioned_pictures(PLACES.contact),  # download, deduplicate, embed, recaption, score
    Pretokenize(PretokenizeConfig(tokenizer=TINYLLAMA)),
    ClipFilter(ClipFilterConfig(min_score=0.20)),
    Pack(
        PackConfig(
            view="512-tinyllama",
            resolution=512,
            tokenizers=(TINYLLAMA,),
            where="least(width, height) >= 512 AND clip_score >= 0.22",
        )
    ),
)

TSC = TrainingConfig(
    connector=TSCConfig(use_mask="mask"),
    language_model=LanguageModelConfig(
        model=TINYLLAMA.model,
        revision=TINYLLAMA_REVISION,
        dtype="float16",
        max_length=TINYLLAMA.max_length,
        padding="fixed",
        tokenizer=TINYLLAMA.name,
    ),
    denoiser=DenoiserConfig(model=SD15, revision=SD15_REVISION, dtype="bfloat16"),
    phases=(Phase(view="512-tinyllama", resolution=512, samples=140_000 * 256, batch=256, micro_batch=16, rate=1e-4),),
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
RESAMPLER = TSCConfig(timestep="off", use_mask="mask")

recipe = Recipe(
    name="ella_tinyllama",
    source=PLACES.source,
    dataset=PLACES.dataset,
    stages=STAGES,
    runs=PLACES.runs,
    trainings={
        "tsc": TSC,
        "adaln_zero": dataclasses.replace(TSC, connector=TSCConfig(timestep="adaln_zero", use_mask="mask")),
        "resampler_6": dataclasses.replace(TSC, connector=RESAMPLER),
        "resampler_1": dataclasses.replace(TSC, connector=dataclasses.replace(RESAMPLER, blocks=1)),
        "mlp": dataclasses.replace(TSC, connector=MLPConfig()),
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
        arms={
            "base": None,
            "mlp": "mlp",
            "resampler_1": "resampler_1",
            "resampler_6": "resampler_6",
            "adaln_zero": "adaln_zero",
            "tsc": "tsc",
            "tsc_mean": "tsc_mean",
        },
        gains={"tsc_over_base": ("tsc", "base"), "timestep": ("tsc", "resampler_6"), "mean": ("tsc_mean", "tsc")},
        resolution=512,
        steps=50,
        guidance=12.0,  # ELLA's test setting, as are steps and sampler
        sampler="dpm++",
    ),
)
