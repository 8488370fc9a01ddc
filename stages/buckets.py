"""A view's aspect-ratio buckets, which of them a picture goes into, and the crop that puts it there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

LEAST_AREA = 0.9  # of resolution², as the smallest bucket of SDXL's list has
MOST_RATIO = 4
STEP = 8  # pixels that are one pixel of the usual VAE's latents


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A size that pictures are cut to, pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, kw_only=True)
class Crop:
    """How a picture is brought to a bucket's size: scaled to `width` x `height`, then cut out at `left`, `top`; pixels."""

    width: int
    height: int
    left: int
    top: int


def make_buckets(resolution: int) -> tuple[Bucket, ...]:
    """The buckets around resolution², by rising width over height.

    All sides that are multiples of a sixteenth of the resolution (in whole eights of pixels), whose area is 90 % to 100 % of
    resolution² and whose ratio is 4 at most. At 1024 that is the list of SDXL (Podell et al. 2023, arXiv 2307.01952,
    appendix I) and, for symmetry, the one bucket whose mirror image alone it has: 704 wide, 1344 high. Raises ValueError
    for a resolution of which there are none.
    """
    step = max(STEP, resolution // 16 // STEP * STEP)
    area = resolution * resolution
    sides = range(step, resolution * 2 + 1, step)  # a ratio of 4 makes the longer side twice the resolution
    found = [
        Bucket(width=width, height=height)
        for width in sides
        for height in sides
        if LEAST_AREA * area <= width * height <= area and max(width, height) <= MOST_RATIO * min(width, height)
    ]
    if not found:
        raise ValueError(f"there are no buckets around {resolution} pixels: choose a multiple of {STEP}")
    largest = {Fraction(b.width, b.height): b for b in sorted(found, key=lambda b: b.width)}  # of each ratio
    return tuple(largest[ratio] for ratio in sorted(largest))


def choose_bucket(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket whose aspect ratio is nearest to the picture's, as factors go; of two as near the first."""
    ratio = math.log(width / height)
    return min(buckets, key=lambda b: abs(math.log(b.width / b.height) - ratio))


def plan_crop(width: int, height: int, bucket: Bucket) -> Crop | None:
    """How a picture of this size comes to the bucket's: scaled until it just covers it, and cut about its middle. None for
    a picture that would have to be scaled up.
    """
    if width < bucket.width or height < bucket.height:
        return None
    # One side fits exactly. In whole numbers, so that no rounding error makes it one pixel more.
    if width * bucket.height >= height * bucket.width:
        scaled = (2 * width * bucket.height + height) // (2 * height), bucket.height
    else:
        scaled = bucket.width, (2 * height * bucket.width + width) // (2 * width)
    left, top = (scaled[0] - bucket.width) // 2, (scaled[1] - bucket.height) // 2
    return Crop(width=scaled[0], height=scaled[1], left=left, top=top)


def cut(data: bytes, crop: Crop, bucket: Bucket, quality: int) -> bytes | None:
    """The picture's crop as a JPEG of this quality, scaled with area interpolation; None if it cannot be read."""
    import cv2

    kind = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION  # what is stored is upright already
    image = cv2.imdecode(np.frombuffer(data, np.uint8), kind)
    if image is None:
        return None
    if image.shape[:2] != (crop.height, crop.width):
        image = cv2.resize(image, (crop.width, crop.height), interpolation=cv2.INTER_AREA)
    image = image[crop.top : crop.top + bucket.height, crop.left : crop.left + bucket.width]
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
