"""token ids → the language model's hidden states, where disk is cheaper than running it. Seldom: see `check_rows`."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.captions import TokenizerConfig, load_tokenizer, prompt_facts
from pipeline.devices import device_of
from pipeline.fingerprint import model_id
from pipeline.stage import Columns, Needs, Stage
from pipeline.text_models import hidden_states, load_text_model, width_of


@dataclass(frozen=True, kw_only=True)
class EncodeFeaturesConfig:
    """Which view's captions, which language model, and how much disk it may take."""

    view: str
    """Name of the view; its pack stage stands before this one."""
    tokenizer: TokenizerConfig
    """The one whose tokens are read: those of its first kind of caption."""
    model: str
    """Folder or hub name of the language model."""
    width: int
    """Width of its hidden states, which loading checks."""
    revision: str | None = None
    """Commit of the hub repository; pin it."""
    subfolder: str = ""
    """Of `model`, where the weights lie."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Weights are loaded in float32 and cast whole, as in training."""
    padding: Literal["fixed", "none"] = "fixed"
    """Store `max_length` hidden states, those of pads too, which connectors without a mask read (ELLA's TSC); or only those of
    the caption's own tokens."""
    max_gigabytes: float = 100.0
    """Most that the features of all rows may take, unless forced."""
    force: bool = False
    """Write them however much it is."""
    device: str = "auto"
    """Where the model runs: `auto` is cuda where there is one."""
    batch_size: int = 64
    """Captions encoded at a time."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=2.0, gpus=1.0, memory_gb=8))
    """What an actor takes."""

    def __post_init__(self) -> None:
        for name, choices in (("dtype", ("float32", "float16", "bfloat16")), ("padding", ("fixed", "none"))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"features of view {self.view!r}: {name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        if self.tokenizer.max_length == "flexible":
            raise ValueError(
                f"features of view {self.view!r} need a tokenizer with a max_length: 'flexible' has no bound"
            )
        if self.width < 1 or self.max_gigabytes <= 0:
            raise ValueError(f"features of view {self.view!r}: width and max_gigabytes must be above 0")


class EncodeFeatures(Stage):
    """Reads tokens_<tokenizer> of the view's samples; writes features_<view> beside the shards: an npy array (length, width)
    of float16, the last hidden state. Rows whose features are not finite fail.

    It reads the view's pictures as well, only to be given the view's samples and no others.
    """

    not_fingerprinted = ("batch_size", "device", "needs", "max_gigabytes", "force")
    drops = False
    config: EncodeFeaturesConfig

    def __init__(self, config: EncodeFeaturesConfig) -> None:
        super().__init__(config)
        self.name = f"encode_features_{config.view}"
        self.column = f"features_{config.view}"
        self.companion_of = config.view
        self._tokens = next(iter(config.tokenizer.columns))
        self.reads = (self._tokens, f"packed_image_{config.view}")
        self.writes = pa.schema([(f"{self.column}_length", pa.int32()), (f"{self.column}_crc32", pa.uint32())])
        self.payload = {self.column: "features.npy"}

    @property
    def spaces(self) -> dict[str, str]:
        """Whose ids are read."""
        return {self._tokens: self.config.tokenizer.space}

    def identity(self) -> Any:
        """What decides the features, with the weights and the tokenizer's files in place of their names."""
        config = self.config
        made_by = {"model": model_id(config.model, config.revision), "subfolder": config.subfolder}
        return {**made_by, "dtype": config.dtype, "padding": config.padding, "tokens": prompt_facts(config.tokenizer)}

    @property
    def view_facts(self) -> dict[str, Any]:
        """What the view says of its features."""
        told = {"tokenizer": self.config.tokenizer.name, "layer": "last", "width": self.config.width}
        return {"features": {**self.identity(), **told, "stored_dtype": "float16"}}

    def check_rows(self, rows: int) -> None:
        """Refuses features that would fill the disk; tokens of 16 bits are a two-thousandth of T5-XL's features."""
        config = self.config
        assert isinstance(config.tokenizer.max_length, int)
        each = config.tokenizer.max_length * config.width * 2
        size = rows * each / 1e9
        if size > config.max_gigabytes and not config.force:
            raise ValueError(
                f"stage {self.name!r}: features of {rows:,} samples, {each / 1024:,.0f} KiB each, take up to {size:,.0f} GB, "
                f"and max_gigabytes is {config.max_gigabytes:,g}: leave the stage out (tokens take 0.25 KiB, and the language "
                "model is the cheaper part of a training step), or set force"
            )

    def load(self) -> None:
        """Loads the language model. Raises ValueError where its width is another."""

        config = self.config
        device = device_of(config.device)
        self._tokenizer = load_tokenizer(config.tokenizer)
        self._model = load_text_model(config.model, config.revision, config.subfolder, config.dtype).to(device)
        if width_of(self._model) != config.width:
            raise ValueError(
                f"stage {self.name!r}: width is {config.width}, {config.model} has {width_of(self._model)}"
            )

    def process(self, batch: pa.Table) -> Columns:
        """Encodes the batch's captions in one forward pass."""
        ids = [None if row is None else np.asarray(row) for row in batch.column(self._tokens).to_pylist()]
        features = iter(self._encode([one for one in ids if one is not None]))
        rows = [self._ended("no_caption") if one is None else self._row(next(features)) for one in ids]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _encode(self, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Token ids -> features, float16 (length, width) each."""
        if not ids:
            return []
        is_fixed = self.config.padding == "fixed"
        length = self._tokenizer.limit if is_fixed else max(map(len, ids))
        hidden, _ = hidden_states(self._model, ids, length=length, pad=self._tokenizer.pad, pads="hidden")
        with np.errstate(over="ignore"):  # what becomes infinite is told row by row
            found = hidden.float().cpu().numpy().astype("<f2")
        return [one if is_fixed else one[: len(own)] for one, own in zip(found, ids, strict=True)]

    def _row(self, features: np.ndarray) -> dict[str, Any]:
        if not np.isfinite(features).all():
            return self._ended("features_not_finite")
        out = io.BytesIO()
        np.save(out, features, allow_pickle=False)
        return self._ended(None) | {
            self.column: out.getvalue(),
            f"{self.column}_length": len(features),
            f"{self.column}_crc32": zlib.crc32(out.getvalue()),
        }

    def _ended(self, reason: str | None) -> dict[str, Any]:
        blank = dict.fromkeys((self.column, *self.writes.names))
        return blank | {"status": "failed" if reason else "kept", "reason": reason}
