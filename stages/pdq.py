"""PDQ, the perceptual hash of Facebook's ThreatExchange: 256 bits, of which few differ for a picture that was scaled or
compressed anew (a distance of up to 31 counts as the same picture there).

"The TMK+PDQF Video-Hashing Algorithm and the PDQ Image-Hashing Algorithm", 2019. Its steps are linear up to the last: two
box filters in each direction, 64 x 64 samples, a cosine transform; so they are done as products of small matrices.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

_SIDE = 64
_SMALLEST = 5  # pixels; what is smaller has no hash
_ENOUGH = 512  # pixels of the shorter side from which a picture is halved first: less has its own details still


def pdq_hash(pixels: np.ndarray) -> tuple[bytes, int]:
    """(32 bytes, quality from 0 to 100) of an upright picture, uint8 (height, width, 3) RGB or (height, width, 1) grey.
    Below a quality of 50 there is little to tell it by, and other pictures have the same hash.
    """
    grey = pixels[..., 0] if pixels.shape[2] == 1 else cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    while min(grey.shape) >= _ENOUGH:
        height, width = (side // 2 for side in grey.shape)
        grey = cv2.resize(grey[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    height, width = grey.shape
    if min(height, width) < _SMALLEST:
        return bytes(32), 0
    samples = _sampling(height) @ grey.astype(np.float32) @ _sampling(width).T
    waves = _cosines() @ samples @ _cosines().T
    median = np.partition(waves.ravel(), 127)[127]  # the lower one of 256
    # The first coefficient is the last bit.
    return np.packbits((waves > median).ravel()[::-1]).tobytes(), _quality(samples)


def _quality(samples: np.ndarray) -> int:
    """How much neighbours differ, in hundredths of the whole range; small steps do not count."""
    steps = (np.trunc(np.diff(samples, axis=axis) * (100 / 255)) for axis in (0, 1))
    return min(int(sum(np.abs(s).sum() for s in steps)) // 90, 100)


@lru_cache(maxsize=1024)
def _sampling(side: int) -> np.ndarray:
    """float32 (64, side): what takes 64 samples of `side` pixels that a box has gone over twice."""
    window = -(-side // (2 * _SIDE))
    ahead = (window + 2) // 2
    centres = ((np.arange(_SIDE) + 0.5) * side / _SIDE).astype(int)
    under = centres[:, None] + np.arange(window) + ahead - window  # the pixels under the second box, from 0 to side - 1
    inside = (under >= 0) & (under < side)
    first, last = (
        np.clip(under + ahead - window, 0, side),
        np.clip(under + ahead, 0, side),
    )  # under each one's first box
    share = inside / inside.sum(axis=1, keepdims=True) / np.maximum(last - first, 1)
    edges, rows = np.zeros((_SIDE, side + 1)), np.arange(_SIDE)[:, None]
    np.add.at(edges, (rows, first), share)
    np.add.at(edges, (rows, last), -share)
    return np.cumsum(edges, axis=1)[:, :side].astype(np.float32)


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """float32 (16, 64): the second to the seventeenth row of the cosine transform; the first is the mean."""
    wave, place = np.arange(1, 17)[:, None], np.arange(_SIDE)[None, :]
    return (np.sqrt(2 / _SIDE) * np.cos(np.pi / 2 / _SIDE * wave * (2 * place + 1))).astype(np.float32)
