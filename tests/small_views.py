"""A stage that gives all that a view is packed from, for tests of what comes after."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.stage import Columns
from tests.small_stages import Small


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(256, size=(height // 4, width // 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, "JPEG", quality=95)
    return out.getvalue()


class Facts(Small):
    """url → all that a view is packed from; `suffix` changes captions and no picture."""

    name = "facts"
    reads = ("url",)
    not_fingerprinted = ()
    writes = pa.schema(
        [
            *((name, pa.int32()) for name in ("width", "height")),
            *((name, pa.string()) for name in ("caption",)),
            *((name, pa.float32()) for name in ("clip_score", "alt_score")),
            ("alt_supported", pa.bool_()),
            ("tokens_t5", pa.list_(pa.uint16())),
        ]
    )
    payload = {"image": "jpg"}

    def process(self, batch: pa.Table) -> Columns:
        numbers = [int(url) for url in batch.column("url").to_pylist()]
        one = [1] * len(numbers)
        return {
            **{"width": [24 + 4 * n for n in numbers], "height": [24] * len(numbers)},
            **{"caption": [f"{n}{self.config.suffix}" for n in numbers], "clip_score": one, "alt_score": one},
            **{"alt_supported": [False] * len(numbers), "tokens_t5": [[n, 1] for n in numbers]},
            "image": [jpeg(24 + 4 * n, 24, n) for n in numbers],
        }
