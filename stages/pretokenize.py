"""caption → token ids of the chosen language model, cut at its length; they go into the shards, so training need not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.captions import TokenizerConfig, load_tokenizer, tokenize, tokenizer_id
from pipeline.stage import Columns, Needs, Stage


@dataclass(frozen=True, kw_only=True)
class PretokenizeConfig:
    """Which tokenizer."""

    tokenizer: TokenizerConfig
    """The language model's tokenizer, and the most tokens of a caption."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=0.5))
    """What an actor takes."""


class Pretokenize(Stage):
    """Reads caption; writes tokens_<name>. Have one such stage for each language model."""

    reads = ("caption",)
    drops = False
    config: PretokenizeConfig

    def __init__(self, config: PretokenizeConfig) -> None:
        super().__init__(config)
        self.name = f"pretokenize_{config.tokenizer.name}"
        self.column = f"tokens_{config.tokenizer.name}"
        self.writes = pa.schema([(self.column, pa.list_(pa.int32()))])

    def identity(self) -> Any:
        """The settings, with the tokenizer's files in place of its name."""
        tokenizer = self.config.tokenizer
        return {"tokenizer": tokenizer_id(tokenizer.model, tokenizer.revision), "max_length": tokenizer.max_length}

    def load(self) -> None:
        """Loads the tokenizer."""
        self._tokenizer = load_tokenizer(self.config.tokenizer)

    def process(self, batch: pa.Table) -> Columns:
        """Tokenizes the batch."""
        return {
            self.column: tokenize(
                self._tokenizer, batch.column("caption").to_pylist(), self.config.tokenizer.max_length
            )
        }
