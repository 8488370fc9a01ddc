"""Captions a second through the pretokenize stage, beside the bare tokenizer on the same list.

    python -m benchmarks.tokens                                        # the shapes world's T5 and CLIP, 20,000 captions
    python -m benchmarks.tokens 20000 google/flan-t5-xl Qwen/Qwen3-4B  # other tokenizers

Rounds alternate between the two, and the best of each counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from examples.shapes.recipe import CLIP, T5
from examples.shapes.words import dense_caption
from examples.shapes.world import draw_scenes
from pipeline.captions import TokenizerConfig
from stages.pretokenize import Pretokenize, PretokenizeConfig

ROUNDS = 5


def main() -> None:
    """Prints one line a tokenizer."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    models = sys.argv[2:]
    configs = [T5, CLIP] if not models else [TokenizerConfig(name="model", model=m, id_type="int32") for m in models]
    rng = np.random.default_rng(0)
    scenes = draw_scenes(rng, count, (0.2, 0.3, 0.3, 0.2))
    captions = [dense_caption(scenes.facts(number), rng) for number in range(count)]
    for config in configs:
        stage = Pretokenize(PretokenizeConfig(tokenizer=config))
        stage.load()
        bare = stage._tokenizer.bare
        batches = pa.table({"caption": captions}).to_batches(stage.batch_size)
        tables = [pa.Table.from_batches([batch]) for batch in batches]
        lists = [table.column("caption").to_pylist() for table in tables]

        def ours(tables: list[pa.Table] = tables, stage: Pretokenize = stage) -> Any:
            return [
                pa.array(stage.process(table)[name], stage.writes.field(name).type)
                for table in tables
                for name in stage.writes.names
            ]

        def theirs(lists: list[list[str]] = lists, bare: Any = bare, config: TokenizerConfig = config) -> Any:
            return [bare(part, truncation=True, max_length=config.max_length) for part in lists]

        seconds = _best(ours, theirs)
        tokens = sum(len(array.flatten()) for array in ours())
        print(
            f"{config.name}: {count / seconds[0]:,.0f} captions/s, {tokens / seconds[0]:,.0f} tokens/s; bare tokenizer "
            f"{count / seconds[1]:,.0f} captions/s; {seconds[1] / seconds[0]:.0%} of it"
        )


def _best(*calls: Callable[[], Any]) -> list[float]:
    """Seconds of each call, the best of alternating rounds."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for seconds, call in zip(found, calls, strict=True):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return [min(seconds) for seconds in found]


if __name__ == "__main__":
    main()
