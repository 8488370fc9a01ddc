"""What `embed` and `score` share: which CLIP or SigLIP, the half of it that each loads, and vectors that can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.devices import device_of
from pipeline.fingerprint import model_id, plain
from pipeline.stage import Needs, Stage

EMBEDDING = pa.list_(pa.float16())
"""Type of a column of embeddings: unit vectors, as clip-retrieval keeps them."""


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Which CLIP, and where. Embeddings of two models cannot be compared: give `embed` and `score` the same one."""

    model: str
    """Folder or hub name of a CLIP (or Long-CLIP, or SigLIP) model in transformers' format."""
    revision: str | None = None
    """Commit of the hub repository; pin it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the weights."""
    device: str = "auto"
    """Where the model runs: `auto` is cuda where there is one."""
    batch_size: int = 128
    """Samples worked on at a time."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=1.0, gpus=0.25, memory_gb=4))
    """What an actor takes."""

    @property
    def space(self) -> str:
        """Names the space in which the embeddings lie, for `check_stages`."""
        return f"{self.model}@{self.revision or 'main'}"

    def identity(self) -> Any:
        """What the embeddings depend on: the settings, with the model's weights in place of its name."""
        settings = plain(self, frozenset(Stage.not_fingerprinted))
        return {**settings, "model": model_id(self.model, self.revision), "revision": None}


PASS = 32
"""Rows of each forward pass, the last of them filled up: the last bits of a row depend on the shape of the pass, and so a
row's embedding would depend on how many others were embedded with it."""
CHARACTERS = 8192
"""Characters of a text that are looked at: far more than any window holds, while a page's alt text may have a million."""


def load_half(config: ClipConfig, half: Literal["text", "vision"]) -> Any:
    """One half of the model with its projection into the common space; safetensors only, no remote code. `config.json` says
    whether it is a CLIP (Long-CLIP is one with more positions) or a SigLIP. Raises ValueError for another kind.
    """
    import torch
    import transformers

    kinds = {
        "clip": {
            "text": transformers.CLIPTextModelWithProjection,
            "vision": transformers.CLIPVisionModelWithProjection,
        },
        "siglip": {"text": transformers.SiglipTextModel, "vision": transformers.SiglipVisionModel},
    }
    device = device_of(config.device)
    pinned: dict[str, Any] = {"revision": config.revision, "trust_remote_code": False}
    whole = transformers.AutoConfig.from_pretrained(config.model, **pinned)
    if whole.model_type not in kinds:
        raise ValueError(
            f"{config.model} is a {whole.model_type} model: pictures and texts are embedded by clip or siglip"
        )
    part = whole.text_config if half == "text" else whole.vision_config
    if whole.model_type == "clip":
        part.projection_dim = whole.projection_dim  # the halves' own field is not always set; the whole's counts
    dtype, kind = getattr(torch, config.dtype), kinds[whole.model_type][half]
    model = kind.from_pretrained(config.model, config=part, dtype=dtype, use_safetensors=True, **pinned)
    return model.to(device).eval().requires_grad_(False)


class TextEncoder:
    """A model's text half and its tokenizer: texts → unit vectors, each the same whatever it is embedded with."""

    def __init__(self, config: ClipConfig) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision, trust_remote_code=False)
        self._model = load_half(config, "text")
        # Not the tokenizer's model_max_length, which may be of another model or no number at all.
        self.window: int = self._model.config.max_position_embeddings
        """Tokens that the model reads, start and end included; longer texts are cut."""
        self._is_siglip = self._model.config.model_type.startswith("siglip")

    def embed(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors, float32 (N, width), and how many tokens each text has in its first `CHARACTERS`, cut or not, int (N,).

        Equal texts are embedded once. A forward pass holds texts of about one length, so that little of it is padding.
        """
        unique = list(dict.fromkeys(texts))
        found = self._tokenizer([text[:CHARACTERS] for text in unique], verbose=False)["input_ids"]
        tokens = dict(zip(unique, found, strict=True))
        groups: dict[int, list[str]] = {}
        for text, ids in tokens.items():
            groups.setdefault(self._padded(len(ids)), []).append(text)
        vectors: dict[str, np.ndarray] = {}
        for length, group in groups.items():
            for start in range(0, len(group), PASS):
                chosen = group[start : start + PASS]
                vectors |= zip(chosen, self._pass([tokens[text] for text in chosen], length), strict=True)
        return np.stack([vectors[text] for text in texts]), np.array([len(tokens[text]) for text in texts])

    def _padded(self, tokens: int) -> int:
        """Tokens of the forward pass for a text of this many: 8, 16, 24, 32, 48, 64, 96, … and the window at most."""
        if self._is_siglip:
            return self.window  # it was trained on texts of one length, and sees their padding
        step = max(8, 2 ** (tokens - 1).bit_length() // 4)
        return min(-(-tokens // step) * step, self.window)

    def _pass(self, rows: list[list[int]], length: int) -> np.ndarray:
        import torch
        from transformers.data.data_collator import pad_without_fast_tokenizer_warning

        # Of what is too long, the token that ends a text stays: the models read the text off it.
        cut = [ids if len(ids) <= length else [*ids[: length - 1], ids[-1]] for ids in rows]
        given = pad_without_fast_tokenizer_warning(
            self._tokenizer, {"input_ids": cut}, padding="max_length", max_length=length, return_tensors="pt"
        )
        names = ("input_ids",) if self._is_siglip else ("input_ids", "attention_mask")
        filled = {n: torch.cat([given[n], given[n][-1:].expand(PASS - len(rows), -1)]) for n in names}
        with torch.inference_mode():
            vectors = unit_vectors(self._model(**{n: t.to(self._model.device) for n, t in filled.items()}))
        return vectors[: len(rows)]


def unit_vectors(output: Any) -> np.ndarray:
    """What either half of a model puts out at length one, float32 (N, width): their products are cosines."""
    features = next(output[name] for name in ("text_embeds", "image_embeds", "pooler_output") if name in output)
    vectors = features.float().cpu().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stored(vectors: np.ndarray) -> list[np.ndarray]:
    """Embeddings as they are written, float16, one a row."""
    return list(vectors.astype(np.float16))


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of embeddings as float32 (N, width)."""
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.astype(np.float32).reshape(len(column), -1)
