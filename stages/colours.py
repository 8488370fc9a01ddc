"""An opened picture of any mode → 8-bit sRGB: palettes, alpha, grey, 16 bits, CMYK, colour profiles."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_LARGEST_PROFILE = 4 << 20  # bytes; printers' profiles have 2 MB
_SMALL_PROFILE = 1 << 16
_SAME = 3  # of 255: a profile that moves no colour of the probe by more is sRGB by another name
_SPACES = {"RGB": "RGB", "CMYK": "CMYK", "GRAY": "L"}  # a profile's colour space -> the mode of pictures that it is for


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture as sRGB in mode RGB: alpha on white, its colour profile applied. Loads the pixels; raises as PIL does."""
    transform = colour_transform(image.info.get("icc_profile"), _colour_mode(image))
    if image.mode.startswith("I"):  # 16-bit grey, whose conversion in PIL would clip at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    if image.has_transparency_data:
        upper = image if image.mode == "RGBA" else image.convert("RGBA")
        plain = Image.new("RGB", upper.size, "white")
        plain.paste(_converted(upper.convert("RGB"), transform), mask=upper.getchannel("A"))
        return plain
    return _converted(image, transform)


def to_srgb(pixels: np.ndarray, profile: bytes | None) -> np.ndarray:
    """RGB pixels (height, width, 3) of a picture with this colour profile, as sRGB."""
    transform = colour_transform(profile, "RGB")
    return pixels if transform is None else np.asarray(ImageCms.applyTransform(Image.fromarray(pixels), transform))


def colour_transform(profile: bytes | None, mode: str) -> Any:
    """What turns pictures of `mode` with this ICC profile into sRGB; None where there is nothing to turn, or the profile
    is broken or of another mode.
    """
    if not profile or len(profile) > _LARGEST_PROFILE:
        return None
    # Those of cameras and screens come again and again and are small; a large one must not stay at later pictures' cost.
    return _kept_transform(profile, mode) if len(profile) <= _SMALL_PROFILE else _transform(profile, mode)


@lru_cache(maxsize=64)
def _kept_transform(profile: bytes, mode: str) -> Any:
    return _transform(profile, mode)


def _transform(profile: bytes, mode: str) -> Any:
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if _SPACES.get(given.profile.xcolor_space.strip()) != mode:
            return None
        transform = ImageCms.buildTransform(given, _srgb(), mode, "RGB")
        if mode == "RGB":
            turned = np.asarray(ImageCms.applyTransform(_probe(), transform)).astype(int)
            if np.abs(turned - np.asarray(_probe())).max() <= _SAME:
                return None
    except MemoryError:
        raise
    except Exception:  # lcms and its wrapper raise several kinds for broken profiles
        return None
    return transform


@lru_cache(maxsize=1)
def _srgb() -> Any:
    return ImageCms.createProfile("sRGB")


@lru_cache(maxsize=1)
def _probe() -> Image.Image:
    """9 x 9 x 9 colours."""
    steps = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(81, 9, 3))


def _colour_mode(image: Image.Image) -> str:
    """The mode whose colours the picture's profile would speak of."""
    if image.mode in ("L", "LA", "1") or image.mode.startswith("I"):
        return "L"
    return "CMYK" if image.mode == "CMYK" else "RGB"


def _converted(image: Image.Image, transform: Any) -> Image.Image:
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    mode = "CMYK" if image.mode == "CMYK" else "L" if image.mode in ("L", "1") else "RGB"
    converted = ImageCms.applyTransform(image if image.mode == mode else image.convert(mode), transform)
    if converted is None:
        raise ValueError("the colour profile gave no picture")
    return converted
