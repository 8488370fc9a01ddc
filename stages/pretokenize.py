"""captions → token ids of the chosen language model, cut at its length; they go into the shards, so training need not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.captions import TokenizerConfig, load_tokenizer, prompt_facts
from pipeline.stage import Columns, Needs, Stage


@dataclass(frozen=True, kw_only=True)
class PretokenizeConfig:
    """Which tokenizer."""

    tokenizer: TokenizerConfig
    """The language model's tokenizer, which captions it is given, and the most tokens of a caption."""
    batch_size: int = 1024
    """Samples worked on at a time."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=0.5))
    """What an actor takes."""


class Pretokenize(Stage):
    """Reads caption, short_caption, text (those kinds that are asked for); writes tokens_<name> and tokens_<name>_<kind>, null
    where a sample has no such caption. A row without any fails as `no_caption`. Have one such stage for each language model.
    """

    drops = False
    config: PretokenizeConfig

    def __init__(self, config: PretokenizeConfig) -> None:
        super().__init__(config)
        self.name = f"pretokenize_{config.tokenizer.name}"
        self.reads = tuple(config.tokenizer.columns.values())
        ids = pa.list_(pa.type_for_alias(config.tokenizer.id_type))
        self.writes = pa.schema([(column, ids) for column in config.tokenizer.columns])

    @property
    def spaces(self) -> dict[str, str]:
        """Whose ids are written."""
        return dict.fromkeys(self.writes.names, self.config.tokenizer.space)

    def identity(self) -> Any:
        """What decides the ids, with the tokenizer's files in place of its name; weights of captions are training's."""
        return prompt_facts(self.config.tokenizer)

    def load(self) -> None:
        """Loads the tokenizer."""
        self._tokenizer = load_tokenizer(self.config.tokenizer)

    def process(self, batch: pa.Table) -> Columns:
        """Tokenizes the batch, one kind of caption after the other."""
        found: dict[str, list[Any]] = {}
        has_any = np.zeros(batch.num_rows, dtype=bool)
        for column, source in self.config.tokenizer.columns.items():
            captions = batch.column(source)
            there = pc.fill_null(pc.not_equal(pc.utf8_trim_whitespace(captions), ""), False).to_numpy()
            found[column] = [None] * batch.num_rows
            ids = self._tokenizer.tokenize(captions.filter(pa.array(there)).to_pylist())
            for row, one in zip(np.flatnonzero(there).tolist(), ids, strict=True):
                found[column][row] = one
            has_any |= there
        status = {
            "status": np.where(has_any, "kept", "failed").tolist(),
            "reason": [None if has else "no_caption" for has in has_any.tolist()],
        }
        return {**found, **status}
