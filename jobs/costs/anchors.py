"""What to plan with where nothing is measured or stated: rates, shares and sizes by the kind of stage, and who published them.

They are orders of magnitude. A stage of another kind has none, and its cost is left open rather than guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.stage import Stage
from stages.captioning.with_openai import OpenAIConfig
from stages.captioning.with_vllm import VLLMConfig
from stages.clip_filter import ClipFilter
from stages.deduplicate import Deduplicate
from stages.download import Download
from stages.embed import Embed
from stages.heads import Heads
from stages.pack import Pack
from stages.percentile import Percentile
from stages.pretokenize import Pretokenize
from stages.prune import Prune
from stages.recaption import Recaption
from stages.score import Score

ROW = 100
"""Bytes of a table's row that holds no more than key, ends, digest and some numbers."""
SOURCE_ROW = 200
"""Bytes of a partition's row: key, URL, alt text."""


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Of one kind of stage."""

    gpu: float | None = None
    """Rows a second of a whole GPU."""
    core: float | None = None
    """Rows a second of a core."""
    keep: float = 1.0
    """Share of the rows that go on: all, the dearest case, but where something else was published."""
    size: float = ROW
    """Bytes for each row that is kept."""
    source: str
    """Where the rate is from."""

    def rate_of(self, stage: Stage) -> float | None:
        """Rows a second of an actor that has the stage's share of a GPU, or its cores; None where it has none of what counts."""
        if self.gpu:
            return self.gpu * stage.needs.gpus or None
        return self.core * stage.needs.cpus or None if self.core else None


def anchor_of(stage: Stage) -> Anchor | None:
    """What was published of such a stage."""
    match stage:
        case Download():
            return Anchor(
                core=50,
                keep=0.8,
                size=picture_bytes(stage.config.max_edge),
                source="20 to 84 pictures a second and core (img2dataset's README); 70 to 95 % of URLs still answer (its "
                "issues 242, 391 and 277); sizes as if all were max_edge",
            )
        case Embed():
            return Anchor(gpu=900, size=1600, source="ViT-L/14 on an A100, below 950 (clip-retrieval's issue 368)")
        case Score():
            return Anchor(
                gpu=900, size=1700, source="as an embedding: ViT-L/14 on an A100 (clip-retrieval's issue 368)"
            )
        case Recaption():
            return _captions(stage)
        case Pretokenize():
            ids = 2 * int(stage.config.tokenizer.max_length)  # at most
            return Anchor(core=2900, size=ROW + ids, source="2,900 captions a second and core by a fast tokenizer")
        case Pack():
            size = picture_bytes(stage.config.resolution) + 3000
            return Anchor(
                core=50, size=size, source="decode, resize to 512, encode: 35 to 60 pictures a second and core"
            )
        case Deduplicate() | Heads() | Percentile() | ClipFilter() | Prune():
            return Anchor(
                core=10_000, source="columns alone, no picture and no model of size: nobody published a figure"
            )
    return None


def picture_bytes(edge: int) -> float:
    """Of a JPEG at quality 95 whose shorter edge has so many pixels: 0.1 MB at 512 (img2dataset: 30 GB a million at 256)."""
    return 100e3 * (edge / 512) ** 2


def _captions(stage: Recaption) -> Anchor:
    """By engine. A caption is 800 to 900 characters (ShareGPT4V)."""
    if isinstance(stage.config.engine, OpenAIConfig):
        return Anchor(size=1000, source="servers differ")
    if isinstance(stage.config.engine, VLLMConfig):
        return Anchor(
            gpu=10, size=1000, source="7 to 8 B on an A100 with continuous batching: plan 8 to 15 captions a second"
        )
    return Anchor(gpu=1, size=1000, source="7 B on an A100 through transformers: 0.5 to 2 captions a second")
