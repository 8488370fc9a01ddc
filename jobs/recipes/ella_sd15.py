"""ELLA for Stable Diffusion 1.5: a TSC between flan-T5-XL and the U-Net, on captions by LLaVA. Hu et al. 2024,
arXiv 2403.05135.

    export ELLA_SOURCE=/data/laion_coco_6plus ELLA_DATASET=/data/ella ELLA_RUNS=/data/ella_runs
    densebridge build ella_sd15                   # on a cluster: densebridge submit build ella_sd15 --address …
    densebridge train ella_sd15 --processes 8
    densebridge generate ella_sd15 --prompt "A red vintage car parked beside a small wooden house …"

The source is a folder of parquet files with the columns URL and TEXT. ELLA's was LAION and COYO with an aesthetic score
above 6 and a shorter edge of at least 512 pixels: 30 million pictures re-captioned by CogVLM (about 50 words each), and
4 million of JourneyDB with their own captions. It was not released. No CLIP filter is stated; ours is an addition.
Where the source has no such score, a stage after `embed` computes it, and a view asks for it:
  Heads(HeadsConfig(model=CLIP, heads=(HeadConfig(name="aesthetic", weights="sac+logos+ava1-l14-linearMSE.pth"),)))
  where="aesthetic_score > 6 AND least(original_width, original_height) >= 512"

Hardware and time, from the paper and from published speeds; nobody has run this very recipe through yet:
  build     an A100 writes 0.5 to 2 captions a second through transformers, so a million takes eight of them one to
            three days (8 to 15 a second are to be had with vLLM). The other stages are ten times faster and more.
            Disk: about 0.1 MB a picture at 512, four times that at 1024.
  training  280,000 steps of 256: seven days on 8 A100-40G in the paper, that is about 118 pictures a second.
What to expect at the end of the first phase (paper, tables 3 and 4), base in brackets: DPG-Bench 74.91 (63.18),
T2I-CompBench colour .691 (.375), shape .494 (.372), texture .631 (.416), spatial .187 (.120).
The second phase at 1024 is the paper's for SDXL (100,000 pictures, rate 1e-5); for SD 1.5 it states none.

Where the paper is silent (batch, caption drop, precision, warm-up) the values are those of the code it was built on,
tencent-ailab/IP-Adapter, or follow from the numbers: 34 million samples in 140,000 steps make a batch of 256.
"""

from __future__ import annotations

import os

from jobs.recipe import Evaluation, Recipe
from pipeline.captions import TokenizerConfig
from pipeline.stage import Needs
from stages.captioning.prompts import DENSE
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
from training.configuration import DenoiserConfig, LanguageModelConfig, Phase, TrainingConfig
from training.connectors import TSCConfig
from training.evaluation.judge import Judge

SOURCE = os.environ.get("ELLA_SOURCE", "set-ELLA_SOURCE-to-your-table.parquet")
DATASET = os.environ.get("ELLA_DATASET", "build/ella_sd15/dataset")  # s3://… or a disk that all nodes share
RUNS = os.environ.get("ELLA_RUNS", "build/ella_sd15/runs")
CONTACT = os.environ.get("ELLA_CONTACT", "set ELLA_CONTACT")  # the servers you ask should know whom to write to

# Pin: put the commit you downloaded. None is the main branch, whose files may change under a dataset half built.
LLAVA_REVISION: str | None = None
CLIP_REVISION: str | None = None
T5_REVISION: str | None = None
SD15_REVISION: str | None = None

LLAVA = "llava-hf/llava-1.5-7b-hf"
CLIP = "openai/clip-vit-large-patch14"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
T5 = TokenizerConfig(name="t5", model="google/flan-t5-xl", revision=T5_REVISION, max_length=128)

STAGES = (
    Download(
        DownloadConfig(
            fetch=FetchConfig(user_agent=f"densebridge/0.1 (+{CONTACT})"),
            min_edge=512,
            max_edge=1024,  # as large as the larger view asks for
            needs=Needs(cpus=1.0, memory_gb=4, actors=(1, 32)),
        )
    ),
    Deduplicate(DeduplicateConfig(near=31, needs=Needs(cpus=1.0, memory_gb=8))),  # 200 bytes a picture
    # Before the captions: another prompt then costs captions and texts, and no picture is embedded again.
    Embed(
        EmbedConfig(
            model=CLIP,
            revision=CLIP_REVISION,
            batch_size=256,
            needs=Needs(cpus=2.0, gpus=0.15, memory_gb=8, actors=(1, 16)),  # shares a GPU with a captioner
        )
    ),
    Recaption(
        RecaptionConfig(
            engine=TransformersConfig(  # VLLMConfig, with a whole GPU for each actor, is several times as fast
                model=LLAVA,
                revision=LLAVA_REVISION,
                max_new_tokens=160,
                dtype="float16",  # as it was published
                batch_size=32,  # 14 GB of weights and 0.4 GB a picture: fits 40 GB
            ),
            # The paper gives no prompt, only its intent (section 3.2): main objects and surroundings, colour, texture, places.
            prompts=(DENSE,),
            needs=Needs(cpus=4.0, gpus=0.75, memory_gb=24, actors=(1, 64)),
        )
    ),
    Score(
        ScoreConfig(
            model=CLIP,
            revision=CLIP_REVISION,
            batch_size=256,
            needs=Needs(cpus=1.0, gpus=0.1, memory_gb=4, actors=(1, 16)),  # and so do the texts
        )
    ),
    Pretokenize(PretokenizeConfig(tokenizer=T5)),
    # Cosines of ViT-L/14 are low; where to cut depends on the source: look at the report's histogram before you settle.
    ClipFilter(ClipFilterConfig(min_score=0.20)),
    Pack(
        PackConfig(
            view="512",
            resolution=512,
            tokenizers=(T5,),
            where="least(width, height) >= 512 AND clip_score >= 0.22",
        )
    ),
    Pack(
        PackConfig(
            view="1024",
            resolution=1024,
            tokenizers=(T5,),
            where="least(width, height) >= 1024 AND clip_score >= 0.26",
        )
    ),
)


def no_judge() -> Judge:
    """Says how the pictures are to be judged until a judge for real pictures is here."""
    raise ValueError("ella_sd15 has no judge: draw with `densebridge generate`, then score with DPG-Bench's own script")


recipe = Recipe(
    name="ella_sd15",
    dataset=DATASET,
    source=Source(path=SOURCE, url_column="URL", text_column="TEXT"),
    stages=STAGES,
    runs=RUNS,
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
            caption_drop=0.1,
            precision="bf16",
            checkpoint_every=5_000 * 256,
            log_every=50,
            threads=8,
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
        sampler="dpm++",
        guidance=12.0,  # ELLA's test setting
    ),
)
