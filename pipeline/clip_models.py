"""CLIP and SigLIP, the same way in build and training: pictures and texts to vectors whose products are cosines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from .devices import device_of

PASS = 32
"""Rows of each forward pass, the last of them filled up: the last bits of a row depend on the shape of the pass, and so a
row's embedding would depend on how many others were embedded with it."""
CHARACTERS = 8192
"""Characters of a text that are looked at: far more than any window holds, while a page's alt text may have a million."""


def load_half(
    model: str, revision: str | None, half: Literal["text", "vision"], *, dtype: str = "float32", device: str = "auto"
) -> Any:
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
    pinned: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    whole = transformers.AutoConfig.from_pretrained(model, **pinned)
    if whole.model_type not in kinds:
        raise ValueError(f"{model} is a {whole.model_type} model: pictures and texts are embedded by clip or siglip")
    part = whole.text_config if half == "text" else whole.vision_config
    if whole.model_type == "clip":
        part.projection_dim = whole.projection_dim  # the halves' own field is not always set; the whole's counts
    kind = kinds[whole.model_type][half]
    module = kind.from_pretrained(model, config=part, dtype=getattr(torch, dtype), use_safetensors=True, **pinned)
    return module.to(device_of(device)).eval().requires_grad_(False)


class TextEncoder:
    """A model's text half and its tokenizer: texts → unit vectors, each the same whatever it is embedded with."""

    def __init__(self, model: str, revision: str | None, *, dtype: str = "float32", device: str = "auto") -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        self._model = load_half(model, revision, "text", dtype=dtype, device=device)
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
            vectors = _unit_vectors(self._model(**{n: t.to(self._model.device) for n, t in filled.items()}))
        return vectors[: len(rows)]


class PictureEncoder:
    """A model's vision half and its processor: pictures → unit vectors, each the same whatever it is embedded with."""

    def __init__(self, model: str, revision: str | None, *, dtype: str = "float32", device: str = "auto") -> None:
        from transformers import AutoImageProcessor

        self._model = load_half(model, revision, "vision", dtype=dtype, device=device)
        # On one fixed backend: two backends give different pixels.
        self._processor = AutoImageProcessor.from_pretrained(
            model, backend="pil", revision=revision, trust_remote_code=False
        )

    def to(self, device: Any) -> None:
        """Moves the weights."""
        self._model.to(device)

    def embed(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Unit vectors, float32 (N, width), of at least one picture; `PASS` in each forward pass."""
        starts = range(0, len(pictures), PASS)
        return np.concatenate([self._pass(pictures[start : start + PASS]) for start in starts])

    def _pass(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        import torch

        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        filled = torch.cat([pixels, pixels[-1:].expand(PASS - len(pixels), -1, -1, -1)])
        with torch.inference_mode():
            vectors = _unit_vectors(self._model(pixel_values=filled.to(self._model.device, self._model.dtype)))
        return vectors[: len(pictures)]


def _unit_vectors(output: Any) -> np.ndarray:
    """What either half of a model puts out at length one, float32 (N, width): their products are cosines."""
    features = next(output[name] for name in ("text_embeds", "image_embeds", "pooler_output") if name in output)
    vectors = features.float().cpu().numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
