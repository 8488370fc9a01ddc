"""A picture's bytes → what a VAE is given, the same way in build and training."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def open_picture(data: bytes) -> Image.Image:
    """The decoded picture, RGB. Raises OSError where the bytes are none, or cut."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it


def square_place(
    size: tuple[int, int], resolution: int, corner: tuple[float, float] = (0.5, 0.5)
) -> tuple[int, int, int, int]:
    """How `square` brings a picture of `size` (width, height) to a square: the size it scales it to, and left and top of
    what it cuts out, pixels.
    """
    scale = resolution / min(size)
    width, height = (max(resolution, round(side * scale)) for side in size)
    left, top = (
        int(fraction * (side - resolution) + 0.5) for fraction, side in zip(corner, (width, height), strict=True)
    )
    return width, height, left, top


def square(image: Image.Image, resolution: int, corner: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """The picture with its short side at `resolution` pixels, cropped to a square at `corner` (fractions; the middle)."""
    width, height, left, top = square_place(image.size, resolution, corner)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image.crop((left, top, left + resolution, top + resolution))


def as_array(image: Image.Image) -> np.ndarray:
    """An RGB picture as float32 (3, height, width) in [-1, 1]."""
    pixels = np.array(image, dtype=np.float32)
    pixels /= 127.5  # in place: at this size fresh memory costs more than the sums
    pixels -= 1
    return pixels.transpose(2, 0, 1)
