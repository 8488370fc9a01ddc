"""What a picture must be, what its header alone tells, and what came of it. Decodes no pixel: `scaling.py` does that.

The header is read before anything is decoded: a file of 1 MB can claim 400 megapixels.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# First bytes of pictures that we know but do not take: TIFF, Photoshop, icons, JPEG 2000, JPEG XL (AVIF, HEIF: "ftyp").
_OTHER_FORMATS = (b"II*\0", b"MM\0*", b"8BPS", b"\0\0\1\0", b"\0\0\0\x0cjP", b"\xff\x0a", b"\0\0\0\x0cJXL")
_ORIENTATION = 0x0112  # Exif 2.32
_MOST_SIDE = 2**31 - 1  # of a claim; so that it fits its column
_LYING = (5, 6, 7, 8)  # orientations that swap width and height

Reason = Literal[
    "not_an_image",
    "unsupported_format",
    "too_many_pixels",
    "too_small",
    "bad_aspect_ratio",
    "animated",
    "truncated",
    "decode_memory",
    "decode_timeout",
    "decode_died",
]
SIZE_REASONS = ("too_many_pixels", "too_small", "bad_aspect_ratio")
ResizeMode = Literal["keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"]
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, as shares of the picture's width and height."""


@dataclass(frozen=True, kw_only=True)
class PictureRules:
    """Which pictures are taken, and how they are stored."""

    min_edge: int
    """Pixels of the shorter side, at least."""
    max_edge: int
    """Pixels of the shorter side (as `resize_mode` says) above which a picture is scaled down."""
    max_pixels: int
    """Width times height, at most; checked before decoding."""
    max_aspect_ratio: float
    """Longer over shorter side, at most."""
    quality: int
    """JPEG quality of what had to be changed."""
    resize_mode: ResizeMode = "keep_ratio"
    """As img2dataset names them."""
    blur: bool = False
    """Whether boxes may come with a picture."""

    def refuse_size(self, width: int, height: int) -> Reason | None:
        """What a picture's size alone forbids."""
        short, long = sorted((width, height))
        if short * long > self.max_pixels:
            return "too_many_pixels"
        if short < max(self.min_edge, 1):
            return "too_small"
        if long > self.max_aspect_ratio * short:
            return "bad_aspect_ratio"
        return None


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What came of a file: a JPEG to store, or why there is none."""

    reason: Reason | None = None
    """None where there is an image. `truncated`: the header is fine, but the pixels cannot be read to the end;
    `decode_memory`, `decode_timeout`, `decode_died`: decoding took more memory or time than it may, or its process."""
    image: bytes | None = None
    """An upright RGB JPEG: the file as it came where it was one already, and small enough."""
    width: int | None = None
    """Pixels of `image`."""
    height: int | None = None
    original_width: int | None = None
    """Pixels of the upright picture as it came; known wherever the header could be read."""
    original_height: int | None = None
    pdq: bytes | None = None
    """PDQ hash (Facebook, 2019) of the upright picture, 32 bytes; two of the same picture differ in few bits."""
    pdq_quality: int | None = None
    """0 to 100: how much there is in the picture to tell it by."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself before a pixel is decoded."""

    image: Image.Image
    """Opened, not loaded."""
    format: str
    """One of FORMATS."""
    orientation: int
    """EXIF's, 1 to 8; 1 is upright."""

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height as it is to be seen."""
        width, height = self.image.size
        return (height, width) if self.orientation in _LYING else (width, height)


def read_header(data: bytes, rules: PictureRules) -> Header | Picture:
    """The header of a picture that may be decoded, or what came of the file; raises MemoryError at most."""
    canvas = _webp_canvas(data)
    if canvas and canvas[0] * canvas[1] > rules.max_pixels:  # PIL would make room for it when it opens it
        return Picture(reason="too_many_pixels", original_width=canvas[0], original_height=canvas[1])
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # PIL's own, which would not tell the size
    try:
        # Only these decoders are ever tried: PIL knows forty more, and each is somewhere to break in.
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Exception:  # PIL's readers raise anything at all for broken headers
        known = data.startswith(_OTHER_FORMATS) or data[4:8] == b"ftyp"
        return Picture(reason="unsupported_format" if known else "not_an_image")
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    name = "JPEG" if image.format == "MPO" else str(image.format)  # a phone's JPEG with a second image behind it
    header = Header(image=image, format=name, orientation=_orientation(image))
    width, height = (min(side, _MOST_SIDE) for side in header.upright)
    reason = rules.refuse_size(width, height) or _refuse_frames(image)
    return Picture(reason=reason, original_width=width, original_height=height) if reason else header


def _refuse_frames(image: Image.Image) -> Reason | None:
    """Asked last, because GIF has to skip through its first frame for it."""
    try:
        animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except MemoryError:
        raise
    except Exception:  # a GIF that breaks off within its first frame
        return "truncated"
    return "animated" if animated else None


def _orientation(image: Image.Image) -> int:
    """As the header has it. Not by `getexif()`, which for a PNG loads the pixels to look behind them."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif") or b"")
        found = int(exif.get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # broken EXIF says nothing; the picture itself may be fine
        return 1
    return found if 1 <= found <= 8 else 1


def _webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height that a WebP file claims (RFC 9649); None for other files."""
    kind = data[12:16]
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    width, height = struct.unpack("<HH", data[26:30])
    return width & 0x3FFF, height & 0x3FFF


@lru_cache(maxsize=4)
def shrinker(edge: int, quality: int, mode: ResizeMode = "keep_ratio") -> Any:
    """img2dataset's Resizer, which blurs too: to so many pixels at most (area interpolation), JPEG of that quality; what is
    small enough keeps its bytes where it is a JPEG. The one place that imports img2dataset: two seconds, and 200 MB.
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it asks the network for its newest version on import
    os.environ.setdefault("WANDB_MODE", "disabled")
    from img2dataset.blurrer import BoundingBoxBlurrer
    from img2dataset.resizer import Resizer

    return Resizer(
        image_size=edge,
        resize_mode=mode,
        resize_only_if_bigger=True,
        encode_quality=quality,
        encode_format="jpg",
        skip_reencode=True,
        blurrer=BoundingBoxBlurrer(),
    )
