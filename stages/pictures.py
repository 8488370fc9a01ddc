"""Decides from its bytes whether a file is a picture we take, and makes it plain RGB, upright and whole.

The header is read before anything is decoded: a file of 1 MB can claim 400 megapixels. What OpenCV would get wrong
silently (EXIF orientation, 16 bits, alpha, palettes, grey) is put right here, because img2dataset's Resizer uses it.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# First bytes of pictures that we know but do not take: TIFF, Photoshop, icons, JPEG 2000, JPEG XL (AVIF, HEIF: "ftyp").
_OTHER_FORMATS = (b"II*\0", b"MM\0*", b"8BPS", b"\0\0\1\0", b"\0\0\0\x0cjP", b"\xff\x0a", b"\0\0\0\x0cJXL")
_TURNS = {  # EXIF orientation -> what puts it upright (Exif 2.32, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112

RefusalReason = Literal[
    "not_an_image",
    "unsupported_format",
    "too_many_pixels",
    "too_small",
    "bad_aspect_ratio",
    "animated",
    "truncated",
]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture that any decoder reads alike: 8-bit RGB, upright, no alpha."""

    data: bytes
    """The file as it came where it was such a JPEG already, else the same pixels as PNG."""
    width: int
    """Pixels, upright."""
    height: int
    format: str
    """What the file was: one of FORMATS."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a file is no picture for us. `truncated`: its header is fine, but its pixels cannot be read to the end."""

    reason: RefusalReason


def check_picture(data: bytes, *, min_edge: int, max_pixels: int, max_aspect_ratio: float) -> Picture | Refusal:
    """The picture in `data`, or why there is none; never raises for the data's sake.

    min_edge: pixels of the shorter side, at least; max_pixels: width times height, at most, checked before decoding;
    max_aspect_ratio: longer side over shorter side, at most.
    """
    try:
        # Only these decoders are ever tried: PIL knows forty more, and each is somewhere to break in.
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return Refusal(reason="too_many_pixels")
    except Exception:  # PIL's readers raise anything at all for broken headers
        known = data.startswith(_OTHER_FORMATS) or data[4:8] == b"ftyp"
        return Refusal(reason="unsupported_format" if known else "not_an_image")
    with image:
        refusal = _refuse_header(image, min_edge, max_pixels, max_aspect_ratio)
        if refusal is not None:
            return refusal
        try:
            image.load()
            plain, changed = _plain(image)
        except Exception:  # as above, for broken pixels
            return Refusal(reason="truncated")
    name = "JPEG" if image.format == "MPO" else str(image.format)
    if name != "JPEG" or changed:
        data = _png(plain)
    return Picture(data=data, width=plain.width, height=plain.height, format=name)


def refuse_size(width: int, height: int, *, min_edge: int, max_pixels: int, max_aspect_ratio: float) -> Refusal | None:
    """What a picture's size alone forbids; the limits are those of `check_picture`."""
    short, long = sorted((width, height))
    if short * long > max_pixels:
        return Refusal(reason="too_many_pixels")
    if short < max(min_edge, 1):
        return Refusal(reason="too_small")
    if long > max_aspect_ratio * short:
        return Refusal(reason="bad_aspect_ratio")
    return None


def _refuse_header(image: Image.Image, min_edge: int, max_pixels: int, max_aspect_ratio: float) -> Refusal | None:
    """What the header alone forbids. `animated` comes last, because GIF has to skip through its first frame for it."""
    refusal = refuse_size(*image.size, min_edge=min_edge, max_pixels=max_pixels, max_aspect_ratio=max_aspect_ratio)
    if refusal is not None:
        return refusal
    try:
        # MPO is a phone's JPEG with a preview or depth map behind it: one picture.
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception:  # a GIF that breaks off within its first frame
        return Refusal(reason="truncated")
    return Refusal(reason="animated") if animated else None


def _plain(image: Image.Image) -> tuple[Image.Image, bool]:
    """(the loaded image as upright RGB, whether that changed a pixel or its place)."""
    turn = _TURNS.get(_orientation(image))
    plain = image if image.mode == "RGB" and not image.has_transparency_data else _rgb(image)
    if turn is not None:
        plain = plain.transpose(turn)
    return plain, plain is not image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing; the picture itself may be fine
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, whose conversion in PIL would clip at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        upper = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", upper.size, "white"), upper).convert("RGB")
    return image.convert("RGB")


def _png(image: Image.Image) -> bytes:
    """Lossless, quick rather than small: it lives until it is resized. Profiles and EXIF stay behind."""
    image.info.clear()
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return out.getvalue()


def shrinker(short_side: int, quality: int) -> Any:
    """img2dataset's Resizer: short side to so many pixels at most (area interpolation), ratio kept, JPEG of that quality;
    a JPEG that is small enough keeps its bytes. The one place that imports img2dataset.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for its newest version on import
    os.environ.setdefault("WANDB_MODE", "disabled")
    from img2dataset.resizer import Resizer

    return Resizer(
        image_size=short_side,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_quality=quality,
        encode_format="jpg",
        skip_reencode=True,
    )
