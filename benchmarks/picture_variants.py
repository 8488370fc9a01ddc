"""Pictures with the statistics of natural ones, and what the web makes of a picture: for measuring near duplicates."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance


def natural_picture(rng: np.random.Generator, width: int = 400, height: int = 300) -> Image.Image:
    """Colours whose amplitude falls with frequency as in photographs (1/f, Field 1987), and a few shapes before them."""
    frequency = np.hypot(np.fft.rfftfreq(width), np.fft.fftfreq(height)[:, None])
    amplitude = 1 / np.maximum(frequency, 1 / max(width, height))
    phases = np.exp(2j * np.pi * rng.random((4, *amplitude.shape)))
    grey, *colours = np.fft.irfft2(amplitude * phases, s=(height, width))
    mixed = np.stack([grey + 0.4 * colour for colour in colours], axis=-1)
    pixels = (mixed - mixed.mean()) / mixed.std() * 45 + rng.uniform(90, 160)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(2, 7)):
        x, y, half_width, half_height = (
            int(rng.integers(*span)) for span in ((0, width), (0, height), (15, 90), (15, 90))
        )
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(box, fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return image


def jpeg(image: Image.Image, quality: int = 92) -> bytes:
    """The file."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _scaled(image: Image.Image, across: float, down: float) -> bytes:
    return jpeg(image.resize((round(image.width * across), round(image.height * down)), Image.Resampling.LANCZOS))


def _cropped(image: Image.Image, share: float) -> bytes:
    across, down = round(image.width * share), round(image.height * share)
    return jpeg(image.crop((across, down, image.width - across, image.height - down)))


def _with_logo(image: Image.Image) -> bytes:
    marked = image.copy()
    draw, (right, low) = ImageDraw.Draw(marked), marked.size
    draw.rectangle((right - 70, low - 30, right - 8, low - 8), fill="white")
    draw.text((right - 66, low - 26), "logo.com", fill="black")
    return jpeg(marked)


VARIANTS: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg 50": lambda image: jpeg(image, 50),
    "jpeg 20": lambda image: jpeg(image, 20),
    "half size": lambda image: _scaled(image, 0.5, 0.5),
    "double size": lambda image: _scaled(image, 2, 2),
    "10 % higher": lambda image: _scaled(image, 1, 1.1),
    "30 % brighter": lambda image: jpeg(ImageEnhance.Brightness(image).enhance(1.3)),
    "contrast 0.7": lambda image: jpeg(ImageEnhance.Contrast(image).enhance(0.7)),
    "grey": lambda image: jpeg(image.convert("L").convert("RGB")),
    "1 % cropped": lambda image: _cropped(image, 0.01),
    "2 % cropped": lambda image: _cropped(image, 0.02),
    "5 % cropped": lambda image: _cropped(image, 0.05),
    "logo": _with_logo,
    "mirrored": lambda image: jpeg(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
}
"""The picture as a file, changed (cropped: on each side)."""
