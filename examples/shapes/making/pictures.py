"""Training pictures as the pipeline will see them: photos of any size, through JPEG and the model's own resize."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from ..world import Scenes, render_photo


def photo_jpeg(scenes: Scenes, n: int, rng: np.random.Generator) -> bytes:
    """Scene n as the bytes of a JPEG file, quality 80 to 95."""
    out = io.BytesIO()
    Image.fromarray(render_photo(scenes, n, rng)).save(
        out, "JPEG", quality=int(rng.integers(80, 96)), subsampling=0 if rng.random() < 0.7 else 2
    )
    return out.getvalue()


def as_seen(scenes: Scenes, rng: np.random.Generator, side: int) -> np.ndarray:
    """The photos after JPEG, bicubic resize of the short edge and centre crop: uint8 (N, side, side, 3)."""
    out = np.empty((len(scenes), side, side, 3), np.uint8)
    for n in range(len(scenes)):
        image = Image.open(io.BytesIO(photo_jpeg(scenes, n, rng)))
        short = min(image.size)
        left, top = (image.width - short) // 2, (image.height - short) // 2
        square = image.crop((left, top, left + short, top + short))
        out[n] = np.asarray(square.resize((side, side), Image.Resampling.BICUBIC))
    return out
