"""A file's bytes → an upright sRGB JPEG of the wanted size, and its perceptual hash. Runs in a decoder's process.

Each picture is decoded once. JPEGs go through libjpeg-turbo (simplejpeg), which scales by 2, 4 or 8 while it decodes;
anything unusual, and every other format, goes through PIL.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from .colours import colour_transform, to_rgb, to_srgb
from .pdq import pdq_hash
from .pictures import Box, Header, Picture, PictureRules, read_header, shrinker

# By how much a JPEG may be scaled while it is decoded, and how many times as large as wanted it must then be still. Halving
# changes less (41 dB on photographs, against decoding all and taking means over areas) than compressing the result at quality
# 95 does (37 dB). A quarter changes more, unless there is half as much again to take means over.
_SCALES = ((8, 1.5), (4, 1.5), (2, 1.0))
_HASHED_EDGE = 256  # pixels of the shorter side that are enough for the hash, which makes 64 of them
_TURNS = {  # EXIF orientation -> what puts pixels (height, width, 3) upright (Exif 2.32, tag 0x0112)
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a),
}


def make_picture(data: bytes, rules: PictureRules, boxes: Sequence[Box] = ()) -> Picture:
    """The picture in `data` as it is stored, or why there is none; never raises for the data's sake.

    boxes: parts of the picture to blur.
    """
    try:
        header = read_header(data, rules)
        if isinstance(header, Picture):
            return header
        with header.image:
            return _made(data, header, rules, boxes)
    except MemoryError:
        return Picture(reason="decode_memory")


def warm_up(rules: PictureRules) -> None:
    """Has the libraries take now what they take once, so that it does not count as a picture's."""
    out = io.BytesIO()
    Image.effect_noise((rules.min_edge + 80, rules.min_edge + 80), 80).convert("RGB").save(out, "PNG")
    make_picture(out.getvalue(), rules, [(0.0, 0.0, 1.0, 1.0)] if rules.blur else ())


def _made(data: bytes, header: Header, rules: PictureRules, boxes: Sequence[Box]) -> Picture:
    width, height = header.upright
    found: dict[str, Any] = {"original_width": width, "original_height": height}
    ours = rules.resize_mode == "keep_ratio" and not boxes
    edge = rules.max_edge if ours else max(width, height)
    try:
        if ours and _is_plain(header) and min(width, height) <= edge:
            grey = _decode_jpeg(data, header, "GRAY", _HASHED_EDGE)  # to its end, though at a fraction of its size
            if grey is not None:
                return Picture(**found, image=data, width=width, height=height, **_hashed(grey))
        pixels = _upright(_rgb(data, header, edge), header.orientation)
        image = _encode(pixels, rules.quality) if ours else b""
    except MemoryError:
        return Picture(**found, reason="decode_memory")
    except Exception as error:  # PIL's readers raise anything at all for broken pixels
        memory = isinstance(error, cv2.error) and error.code == cv2.Error.STS_NO_MEM
        return Picture(**found, reason="decode_memory" if memory else "truncated")
    height, width = pixels.shape[:2]
    if not ours:
        image = _resized(pixels, rules, boxes)
        height, width = simplejpeg.decode_jpeg_header(image)[:2]
    return Picture(**found, image=image, width=width, height=height, **_hashed(pixels))


def _is_plain(header: Header) -> bool:
    """Whether any decoder shows the JPEG as we do: colour, upright, sRGB."""
    image = header.image
    upright = header.format == "JPEG" and image.mode == "RGB" and header.orientation == 1
    return upright and colour_transform(image.info.get("icc_profile"), "RGB") is None


def _rgb(data: bytes, header: Header, edge: int) -> np.ndarray:
    """sRGB pixels (height, width, 3) as they lie, with at most `edge` on the shorter side."""
    image, size = header.image, _shrunk(header.image.size, edge)
    if header.format == "JPEG" and image.mode == "RGB":
        pixels = _decode_jpeg(data, header, "RGB", edge)
        if pixels is not None:
            return to_srgb(_resize(pixels, size), image.info.get("icc_profile"))
    if header.format == "PNG":
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # checksums, which loading does not look at
    image.load()
    return _resize(np.asarray(to_rgb(image)), size)


def _decode_jpeg(data: bytes, header: Header, colours: str, edge: int) -> np.ndarray | None:
    """Pixels of a JPEG without a flaw, scaled down where that leaves enough; None where PIL had better look at it.
    Raises ValueError where data is missing, wherever in the file.
    """
    width, height = header.image.size
    factor = next((f for f, spare in _SCALES if min(width, height) >= f * edge * spare), 1)
    try:
        return simplejpeg.decode_jpeg(
            data,
            colours,
            min_height=-(-height // factor),
            min_width=-(-width // factor),
            min_factor=factor,
        )
    except ValueError as error:
        if "remature end" in str(error):
            raise
        if "nsufficient memory" in str(error):
            raise MemoryError from None
        return None


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_TURNS[orientation](pixels)) if orientation in _TURNS else pixels


def _shrunk(size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Width and height with at most `edge` pixels on the shorter side."""
    scale = min(edge / min(size), 1)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """To that width and height, which are smaller or the same: each new pixel is the mean of the area that it covers."""
    height, width = pixels.shape[:2]
    if (width, height) == size:
        return pixels
    # Up to this ratio a triangle of one pixel to each side (variance 1/6) is as wide as the area (ratio**2 / 12): the result
    # is the same to 0.1 dB, in a quarter of the time.
    near = width < 2**0.5 * size[0]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR if near else cv2.INTER_AREA)


def _encode(pixels: np.ndarray, quality: int) -> bytes:
    """As img2dataset does it, so that the same pixels are the same bytes."""
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return bytes(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def _hashed(pixels: np.ndarray) -> dict[str, Any]:
    bits, quality = pdq_hash(pixels)
    return {"pdq": bits, "pdq_quality": quality}


def _resized(pixels: np.ndarray, rules: PictureRules, boxes: Sequence[Box]) -> bytes:
    """By img2dataset, from the picture as it should be seen."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "BMP")
    resize = shrinker(rules.max_edge, rules.quality, rules.resize_mode)
    image, _, _, _, _, error = resize(out, [list(box) for box in boxes] or None)
    if error:
        raise RuntimeError(f"img2dataset: {error}")  # ends the process, and the picture's row with it
    return image
