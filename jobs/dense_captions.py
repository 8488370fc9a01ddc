"""What the published recipes have in common: where things lie, and pictures from the web with dense captions and scores.

    export DENSEBRIDGE_SOURCE=/data/laion_coco_6plus DENSEBRIDGE_DATASET=/data/dense DENSEBRIDGE_RUNS=/data/runs
    export DENSEBRIDGE_CONTACT=you@example.org

All of them may share one dataset folder: pictures, captions and scores are then made once, and each recipe adds its tokens
and its views. A view of one name has one set of settings in all of them: building one recipe leaves the others' views alone.

The source is a folder of parquet files with the columns URL and TEXT. ELLA's was LAION and COYO with an aesthetic score
above 6 and a shorter edge of at least 512 pixels: 30 million pictures re-captioned by CogVLM (about 50 words each), and
4 million of JourneyDB with their own captions. It was not released. No CLIP filter is stated; ours is an addition.
Where the source has no such score, a stage after `captioned_pictures` computes it, and a view asks for it:
  Heads(HeadsConfig(model=CLIP, heads=(HeadConfig(name="aesthetic", weights="sac+logos+ava1-l14-linearMSE.pth"),)))
  where="aesthetic_score > 6 AND least(original_width, original_height) >= 512"

From published speeds: an A100 writes 0.5 to 2 captions a second through transformers, so a million takes eight of them one
to three days (8 to 15 a second are to be had with vLLM). The other stages are ten times faster and more. Disk: about 0.1 MB
a picture at 512, four times that at 1024.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.stage import Needs, Stage
from stages.captioning.prompts import DENSE
from stages.captioning.with_transformers import TransformersConfig
from stages.deduplicate import Deduplicate, DeduplicateConfig
from stages.download import Download, DownloadConfig
from stages.embed import Embed, EmbedConfig
from stages.fetch import FetchConfig
from stages.recaption import Recaption, RecaptionConfig
from stages.score import Score, ScoreConfig
from stages.source import Source

if TYPE_CHECKING:
    from training.evaluation.judge import Judge

# Pin: put the commit you downloaded. None is the main branch, whose files may change under a dataset half built.
LLAVA_REVISION: str | None = None
CLIP_REVISION: str | None = None

LLAVA = "llava-hf/llava-1.5-7b-hf"
CLIP = "openai/clip-vit-large-patch14"

# A key is a digest: one picture in 16,384, about 2,000 of 34 million, is held out for validation.
HELD_OUT, TRAINED = "key < '0004'", "key >= '0004'"
PROMPTS = (  # what dense captions are about: several objects, their colours and textures, and where they are
    "A red vintage car parked beside a small wooden house with a green door, and a tall pine tree behind it.",
    "A black cat with yellow eyes lying on a blue velvet armchair, next to a round table with a white vase of tulips.",
    "Three glass bottles, one green, one amber and one clear, in a row on a rough stone wall above the sea at dusk.",
    "An old man in a striped shirt and a straw hat reading a newspaper on a bench, with a brown dog asleep at his feet.",
)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where a recipe's things lie."""

    source: Source
    """The table of image-text pairs."""
    dataset: str
    """The dataset folder: s3://… or a disk that all nodes share."""
    runs: str
    """Folder of the recipe's trainings."""
    contact: str
    """Whom the servers that are asked for pictures may write to."""


def places(recipe: str) -> Places:
    """As the environment variables above say; the runs of each recipe are apart."""
    table = os.environ.get("DENSEBRIDGE_SOURCE", "set-DENSEBRIDGE_SOURCE-to-your-table.parquet")
    return Places(
        source=Source(path=table, url_column="URL", text_column="TEXT"),
        dataset=os.environ.get("DENSEBRIDGE_DATASET", "build/dense"),
        runs=f"{os.environ.get('DENSEBRIDGE_RUNS', 'build/runs')}/{recipe}",
        contact=os.environ.get("DENSEBRIDGE_CONTACT", "set DENSEBRIDGE_CONTACT"),
    )


def captioned_pictures(contact: str) -> tuple[Stage, ...]:
    """Download to score: pictures of at least 512 pixels, each once, with a dense caption by LLaVA-1.5 and CLIP's word on it.

    What language model will read the captions is not known here, so recipes for different ones share all of it.
    """
    return (
        Download(
            DownloadConfig(
                fetch=FetchConfig(user_agent=f"densebridge/0.1 (+{contact})"),
                min_edge=512,
                max_edge=1024,  # as large as the largest view asks for
                needs=Needs(cpus=1.0, memory_gb=4, actors=(1, 32)),
            )
        ),
        Deduplicate(DeduplicateConfig(near=31, needs=Needs(cpus=1.0, memory_gb=8))),  # 200 bytes a picture
        # Before the captions: another prompt then costs captions and texts, and no picture is embedded again. A captioner,
        # one that embeds and one that scores share a GPU. These two are hundreds of times as fast as a captioner: larger
        # pools of theirs would only break up GPUs of which captioners need three quarters.
        Embed(
            EmbedConfig(
                model=CLIP,
                revision=CLIP_REVISION,
                batch_size=256,
                needs=Needs(cpus=2.0, gpus=0.15, memory_gb=8, actors=(1, 2)),
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
                # ELLA gives no prompt, only its intent (section 3.2): main objects, surroundings, colour, texture, places.
                prompts=(DENSE,),
                needs=Needs(cpus=4.0, gpus=0.75, memory_gb=24, actors=(1, 64)),
            )
        ),
        Score(
            ScoreConfig(
                model=CLIP,
                revision=CLIP_REVISION,
                batch_size=256,
                needs=Needs(cpus=1.0, gpus=0.1, memory_gb=4, actors=(1, 2)),
            )
        ),
    )


def no_judge() -> Judge:
    """Says how the pictures are to be judged until a judge for real pictures is here."""
    raise ValueError(
        "this recipe has no judge: draw with `densebridge generate`, then score with DPG-Bench's own script"
    )
