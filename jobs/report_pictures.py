"""Pictures as the page carries them: inside it, as data URIs, and small."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

LARGEST = 256  # pixels; larger pictures are scaled down, so that a page of full-size photos stays small
PIXELATED = 128  # pixels up to which a picture is shown with its pixels visible instead of blurred


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture inside the page."""

    uri: str
    """A `data:` URI."""
    width: int
    height: int

    @property
    def is_tiny(self) -> bool:
        """Whether it is enlarged on the page and should not be blurred."""
        return max(self.width, self.height) <= PIXELATED


def show_bytes(data: bytes) -> Picture | None:
    """A picture file; None for bytes that are no picture."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format == "JPEG" and max(image.size) <= LARGEST:
                return _picture(data, "jpeg", image.size)
            return _jpeg(image.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
        return None


def show_pixels(pixels: np.ndarray) -> Picture:
    """uint8 (H, W, 3); lossless where it is tiny."""
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if max(image.size) > PIXELATED:
        return _jpeg(image)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return _picture(out.getvalue(), "png", image.size)


def _jpeg(image: Image.Image) -> Picture:
    image.thumbnail((LARGEST, LARGEST))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return _picture(out.getvalue(), "jpeg", image.size)


def _picture(data: bytes, kind: str, size: tuple[int, int]) -> Picture:
    return Picture(uri=f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width=size[0], height=size[1])
