"""image embedding → numbers that small heads over CLIP read off it: aesthetics, watermarks, nudity. No picture is opened."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.fingerprint import file_digest
from pipeline.stage import Columns, Needs, Stage

from .clip import matrix
from .score import Score


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """One head: a chain of linear layers that ends in one number."""

    name: str
    """Names its column, `<name>_score`."""
    weights: str
    """State dict on this machine, .safetensors or .pth. LAION's aesthetic predictor V2 (christophschuhmann/
    improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE.pth) is five layers over ViT-L/14, from about 1 to 10."""
    between: Literal["nothing", "relu"] = "nothing"
    """What stands between the layers. LAION's aesthetic predictors have nothing (dropout is for training)."""
    ends_in: Literal["linear", "sigmoid"] = "linear"
    """sigmoid, where the number is a probability (nudity, watermark)."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"a head's name becomes a column: letters, digits and underscores, not {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """Which heads, and over which embeddings. Weights are data that somebody trained: mind their licence and their taste."""

    model: str
    """The CLIP model that embedded the pictures, as `embed` names it, and for which all the heads were trained."""
    revision: str | None = None
    """Its commit, as `embed` has it."""
    heads: tuple[HeadConfig, ...]
    """The heads, one column each."""
    batch_size: int = 4096
    """Embeddings worked on at a time."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=0.5))
    """What an actor takes."""

    def __post_init__(self) -> None:
        names = [head.name for head in self.heads]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"heads must be one or more, each with a name of its own, got {names}")
        taken = [name for name in names if f"{name}_score" in Score.writes.names]
        if taken:
            raise ValueError(f"head {taken[0]}: {taken[0]}_score is what the score stage writes; give it another name")


class Heads(Stage):
    """Reads image_embedding; writes a column of numbers for each head, rounded to four decimals.

    ELLA's own choice of pictures is then a view's condition: `aesthetic_score > 6 AND least(original_width, original_height)
    >= 512`.
    """

    name = "heads"
    reads = ("image_embedding",)
    drops = False
    config: HeadsConfig

    def __init__(self, config: HeadsConfig) -> None:
        super().__init__(config)
        self.writes = pa.schema([(f"{head.name}_score", pa.float32()) for head in config.heads])

    @property
    def spaces(self) -> dict[str, str]:
        """The model whose embeddings are read."""
        return {"image_embedding": f"{self.config.model}@{self.config.revision or 'main'}"}

    def identity(self) -> Any:
        """How each head computes, with the digest of its weights in place of their path. The model tells in the embeddings."""
        found = super().identity()["heads"]
        return {"heads": [{**f, "weights": _digest(h)} for f, h in zip(found, self.config.heads, strict=True)]}

    def load(self) -> None:
        """Reads the heads' weights."""
        self._layers = [read_layers(head) for head in self.config.heads]

    def process(self, batch: pa.Table) -> Columns:
        """Computes all the heads; a million multiplications a picture for LAION's."""
        embeddings = matrix(batch.column("image_embedding"))
        found: dict[str, list[float]] = {}
        for head, layers in zip(self.config.heads, self._layers, strict=True):
            wanted, given = layers[0][0].shape[1], embeddings.shape[1]
            if wanted != given:
                raise ValueError(
                    f"head {head.name}: {head.weights} is for embeddings of width {wanted}, {self.config.model} has {given}"
                )
            found[f"{head.name}_score"] = np.round(apply_head(head, layers, embeddings), 4).tolist()
        return found


Layers = list[tuple[np.ndarray, np.ndarray]]
"""Weight (out, in) and bias (out,) of each linear layer, float32, in order."""


def read_layers(head: HeadConfig) -> Layers:
    """The head's layers, as the shapes of its state dict tell. Raises ValueError for what is not a chain of linear layers."""
    tensors = _read_tensors(head)
    names = sorted((name for name in tensors if name.endswith("weight")), key=_natural)
    weights = [tensors.pop(name) for name in names]
    absent = (np.zeros(weight.shape[:1], np.float32) for weight in weights)
    biases = [tensors.pop(name.removesuffix("weight") + "bias", zero) for name, zero in zip(names, absent, strict=True)]
    fits = all(w.ndim == 2 and b.shape == w.shape[:1] for w, b in zip(weights, biases, strict=True))
    if tensors or not fits or [len(w) for w in weights] != [*(w.shape[1] for w in weights[1:]), 1]:
        told = [f"{name} {weight.shape}" for name, weight in zip(names, weights, strict=True)] + sorted(tensors)[:1]
        raise ValueError(
            f"head {head.name}: {head.weights} is no chain of linear layers to one number: {', '.join(told) or 'empty'}"
        )
    return list(zip(weights, biases, strict=True))


def apply_head(head: HeadConfig, layers: Layers, embeddings: np.ndarray) -> np.ndarray:
    """The head's number for each embedding: float32 (N, width) → (N,)."""
    values = embeddings
    for place, (weight, bias) in enumerate(layers):
        values = values @ weight.T + bias
        if head.between == "relu" and place < len(layers) - 1:
            values = np.maximum(values, 0)
    return 1 / (1 + np.exp(-values[:, 0])) if head.ends_in == "sigmoid" else values[:, 0]


def _read_tensors(head: HeadConfig) -> dict[str, np.ndarray]:
    import torch
    from safetensors.torch import load_file

    path = Path(head.weights)
    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        return {name: tensor.float().numpy() for name, tensor in found.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"head {head.name}: no weights at {head.weights}") from None
    except Exception as error:  # of a reader of any format; none of them runs what is in the file
        told = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise ValueError(f"head {head.name}: {head.weights} is no state dict of tensors ({told})") from None


def _natural(name: str) -> list[tuple[int, str]]:
    """So that layers.10 comes after layers.2."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _digest(head: HeadConfig) -> str:
    try:
        return file_digest(Path(head.weights))
    except FileNotFoundError:
        raise FileNotFoundError(f"head {head.name}: no weights at {head.weights}") from None
