"""Texts and pictures → vectors, by the CLIP that made the dataset's own, as the stages make them."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa

from jobs.recipe import Recipe
from pipeline.clip_models import TextEncoder
from pipeline.embeddings import IMAGES, TEXTS
from stages.clip import ClipConfig
from stages.embed import Embed


class QueryEncoder:
    """The recipe's CLIP; each half is loaded when it is first asked. Raises ValueError where the recipe has none."""

    def __init__(self, recipe: Recipe) -> None:
        self._pictures, self._texts = _config(recipe, IMAGES), _config(recipe, TEXTS)

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        config = self._texts
        return TextEncoder(config.model, config.revision, dtype=config.dtype, device=config.device)

    @cached_property
    def _embed(self) -> Embed:
        embed = Embed(self._pictures)
        embed.load()
        return embed

    def load(self) -> None:
        """Loads both halves, so that what is wrong with them shows now."""
        _ = self._text_encoder, self._embed

    def text(self, text: str) -> np.ndarray:
        """A unit vector, float32 (width,). Raises ValueError for a text with nothing in it."""
        if not text.strip():
            raise ValueError("the text is empty: say what to look for")
        return self._text_encoder.embed([_plain(text)])[0][0]

    def read_whole(self, text: str) -> bool:
        """Whether the model reads the whole text."""
        return int(self._text_encoder.embed([_plain(text)])[1][0]) <= self._text_encoder.window

    def picture(self, data: bytes) -> np.ndarray:
        """A unit vector, float32 (width,). Raises ValueError where the bytes are no picture."""
        (vector,) = self._embed.process(pa.table({"image": pa.array([data], pa.binary())}))["image_embedding"]
        if vector is None:
            raise ValueError("this is no picture that can be read: give a JPEG, PNG or WebP")
        return np.asarray(vector, np.float32)


def _plain(text: str) -> str:
    """Half of a surrogate pair, which JSON and file names may hold, is no text to a tokenizer."""
    return text.encode(errors="replace").decode()


def _config(recipe: Recipe, column: str) -> ClipConfig:
    config = next((s.config for s in reversed(recipe.stages) if column in s.writes.names), None)
    if not isinstance(config, ClipConfig):
        raise ValueError(
            f"recipe {recipe.name!r} has no stage that writes {column!r} with a CLIP, so no query can be embedded"
        )
    return config
