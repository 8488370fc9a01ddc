"""Queries that a frozen language model answers drive SANA: the modern kind of connector, after OpenUni (Wu et al. 2025, arXiv
2505.23661) and MetaQuery (Pan et al. 2025, arXiv 2504.06256).

    densebridge build queries_sana
    densebridge train queries_sana --processes 8
    densebridge train queries_sana --training sana_1600m --processes 8
    densebridge generate queries_sana --prompt "A red vintage car parked beside a small wooden house …"

Source, dataset folder and contact are set as `jobs/dense_captions.py` says, which also tells of our data.

256 learned queries stand behind the prompt, Qwen3-1.7B reads both, and six transformer blocks make of the queries' hidden states
what SANA's caption projection takes: 307,398,912 parameters. Language model and SANA stay frozen.

What is published: OpenUni holds the best DPG-Bench of a learned connector on public data, 80.29 with InternVL3 1B and SANA
0.6B at 512 pixels, 83.08 with InternVL3 2B and SANA 1.6B at 1024 (GenEval .84 and .85). MetaQuery: 64 queries give GenEval .56
against .35 of untrained ones; alignment still rises to 256. SANA with its own Gemma-2-2b: DPG-Bench 83.6 (0.6B) and 84.8
(1.6B), which is what this has to be held against.

The base arm is not SANA's published setting: SANA's pipeline puts a long instruction ("complex human instruction") before each
prompt and drops its tokens from what Gemma-2-2b makes of both, and here Gemma reads the bare prompt. So take SANA's own figures
from its pipeline; a gain over this arm says less than it seems to. `sana_1600m` is in no arm, for the arms of an evaluation share
one resolution (512 here): `densebridge generate --training sana_1600m --resolution 1024` draws with it.

Not as published: the language model, of text alone; the data (OpenUni: 23 million pairs and then the 60,000 of BLIP3o, all
public); OpenUni's second stage, which trains SANA as well, so its figures are not to be expected in full; rate, schedule, batch
and samples, which are ours. Gradients go through the language model to the queries, so its activations are held: both models
are in bfloat16.

Hardware and time: OpenUni took 16 to 32 GPUs. Nobody has run this very recipe through yet. Estimated, without the VAE: a sample
takes 3.6 TFLOP (forward and back, 1.4 billion weights over 448 tokens and 0.6 billion over 256, and the six blocks trained), and
23 million take two to three days on 8 A100 at 15 to 28 % of their bf16 peak, which ELLA's main run and tuned trainers reach;
sana_1600m, of 1024 tokens and checkpointed, 13 TFLOP and five to nine days.
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
from training.connectors import QueriesConfig

PLACES = places("queries_sana")

# Pin: put the commit you downloaded. None is the main branch, whose files may change.
QWEN_REVISION: str | None = None
SANA_600M_REVISION: str | None = None
SANA_1600M_REVISION: str | None = None

SANA_600M = "Efficient-Large-Model/Sana_600M_512px_diffusers"
SANA_1600M = "Efficient-Large-Model/Sana_1600M_1024px_diffusers"
QWEN = TokenizerConfig(
    name="qwen3",
    model="Qwen/Qwen3-1.7B",
    revision=QWEN_REVISION,
    max_length=192,  # 128 of the caption, and the template's
    template="chat",  # the queries then stand where the answer would
    instruction="Draw this: ",
    id_type="int32",
)

STAGES = (
    *captioned_pictures(PLACES.contact),  # download, deduplicate, embed, recaption, score
    Pretokenize(PretokenizeConfig(tokenizer=QWEN)),
    ClipFilter(ClipFilterConfig(min_score=0.20)),
    Pack(
        PackConfig(
            view="512-qwen3",
            resolution=512,
            tokenizers=(QWEN,),
            where="least(width, height) >= 512 AND clip_score >= 0.22",
        )
    ),
    Pack(
        PackConfig(
            view="1024-qwen3",
            resolution=1024,
            tokenizers=(QWEN,),
            where="least(width, height) >= 1024 AND clip_score >= 0.26",
        )
    ),
)

SMALL = TrainingConfig(
    connector=QueriesConfig(in_width=2048, width=2304, queries=256, blocks=6, heads=16),
    language_model=LanguageModelConfig(
        model=QWEN.model,
        revision=QWEN_REVISION,
        dtype="bfloat16",
        max_length=QWEN.max_length,
        padding="longest",
        tokenizer=QWEN.name,
        template=QWEN.template,
        instruction=QWEN.instruction,
    ),
    denoiser=DenoiserConfig(model=SANA_600M, revision=SANA_600M_REVISION, dtype="bfloat16"),
    phases=(
        Phase(
            view="512-qwen3",
            resolution=512,
            samples=90_000 * 256,  # 23 million
            batch=256,
            micro_batch=16,
            rate=1e-4,
            warmup_samples=1_000 * 256,
            schedule="cosine",
        ),
    ),
    weight_decay=0.01,
    caption_drop=0.1,
    precision="bf16",
    checkpoint_every=5_000 * 256,
    log_every=50,
    threads=8,
    # Not measured for SANA. The queries are read by the language model, so that nothing is encoded ahead.
    speed=SpeedConfig(channels_last=True, compile="transformers"),
)
LARGE = dataclasses.replace(
    SMALL,
    # 1,024 tokens of a larger model: checkpointed to fit beside the language model's activations, for one more forward pass.
    denoiser=DenoiserConfig(
        model=SANA_1600M, revision=SANA_1600M_REVISION, dtype="bfloat16", gradient_checkpointing=True
    ),
    phases=(dataclasses.replace(SMALL.phases[0], view="1024-qwen3", resolution=1024, micro_batch=4),),
)

recipe = Recipe(
    name="queries_sana",
    source=PLACES.source,
    dataset=PLACES.dataset,
    stages=STAGES,
    runs=PLACES.runs,
    trainings={"sana_600m": SMALL, "sana_1600m": LARGE},
    evaluation=Evaluation(
        judge=no_judge,
        base=LanguageModelConfig(  # without SANA's instruction before the prompt: not as published
            model=SANA_600M,
            revision=SANA_600M_REVISION,
            subfolder="text_encoder",
            tokenizer_subfolder="tokenizer",
            dtype="bfloat16",
            max_length=300,
            tokenizer="gemma2",
        ),
        arms={"base": None, "sana_600m": "sana_600m"},
        gains={"queries_over_base": ("sana_600m", "base")},
        resolution=512,  # of all arms, hence none for sana_1600m
        steps=20,
        guidance=4.5,
    ),
)
