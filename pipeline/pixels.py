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


def cover_place(
    size: tuple[int, int], target: tuple[int, int], corner: tuple[float, float] = (0.5, 0.5)
) -> tuple[int, int, int, int]:
    """How `cover` brings a picture of `size` to `target` (width, height each): the size it scales it to, and left and top of
    what it cuts out, pixels.
    """
    scale = max(wanted / side for wanted, side in zip(target, size, strict=True))
    width, height = (max(wanted, round(side * scale)) for wanted, side in zip(target, size, strict=True))
    left, top = (
        int(fraction * (side - wanted) + 0.5)
        for fraction, side, wanted in zip(corner, (width, height), target, strict=True)
    )
    return width, height, left, top


def cover(image: Image.Image, target: tuple[int, int], corner: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """The picture scaled until it just covers `target` (width, height), and cropped to it at `corner` (fractions; the middle)."""
    width, height, left, top = cover_place(image.size, target, corner)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image.crop((left, top, left + target[0], top + target[1]))


def square(image: Image.Image, resolution: int, corner: tuple[float, float] = (0.5, 0.5)) -> Image.Image:
    """The picture with its short side at `resolution` pixels, cropped to a square at `corner`."""
    return cover(image, (resolution, resolution), corner)


def as_array(image: Image.Image) -> np.ndarray:
    """An RGB picture as float32 (3, height, width) in [-1, 1]."""
    pixels = np.array(image, dtype=np.float32)
    pixels /= 127.5  # in place: at this size fresh memory costs more than the sums
    pixels -= 1
    return pixels.transpose(2, 0, 1)
