"""Pictures as the web has them, the usual and the hostile: taken as plain upright RGB, or refused before decoding."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.pictures import Picture, Refusal, check_picture

LIMITS: dict[str, Any] = {"min_edge": 16, "max_pixels": 4_000_000, "max_aspect_ratio": 4.0}


def scene(width: int = 64, height: int = 48) -> np.ndarray:
    """Smooth, with no symmetry, so that a wrong turn shows: uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1).astype(np.uint8)


def encode(array: np.ndarray | Image.Image, name: str = "JPEG", **options: Any) -> bytes:
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


def taken(data: bytes, **limits: Any) -> tuple[Picture, np.ndarray]:
    """The picture, and its pixels as the next stage will decode them: uint8 (height, width, 3)."""
    picture = check_picture(data, **{**LIMITS, **limits})
    assert isinstance(picture, Picture), picture
    image = Image.open(io.BytesIO(picture.data))
    assert image.mode == "RGB" and image.size == (picture.width, picture.height)
    assert image.getexif().get(0x0112, 1) == 1
    return picture, np.asarray(image)


def refused(data: bytes, **limits: Any) -> str:
    refusal = check_picture(data, **{**LIMITS, **limits})
    assert isinstance(refusal, Refusal), refusal
    return refusal.reason


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 12) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(int) - b.astype(int)).max()) <= tolerance


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, body: bytes = b"") -> bytes:
    """A grey PNG that claims a size, whatever its body holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    idat = png_chunk(b"IDAT", zlib.compress(body))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + idat + png_chunk(b"IEND", b"")


def test_a_plain_jpeg_keeps_its_bytes() -> None:
    data = encode(scene(), quality=90)
    picture, _ = taken(data)
    assert picture == Picture(data=data, width=64, height=48, format="JPEG")


@pytest.mark.parametrize("name", ["PNG", "WEBP", "GIF", "BMP"])
def test_other_formats_become_png(name: str) -> None:
    options = {"lossless": True} if name == "WEBP" else {}
    picture, pixels = taken(encode(scene(), name, **options))
    assert picture.format == name and picture.data.startswith(b"\x89PNG")
    assert close(pixels, scene(), 40 if name == "GIF" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    upright = scene()
    undo = {5: 5, 6: 8, 7: 7, 8: 6}.get(orientation, orientation)
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(turns[undo](upright))
    picture, pixels = taken(encode(stored, quality=100, subsampling=0, exif=exif))
    assert close(pixels, upright) and (picture.width, picture.height) == (64, 48)
    assert picture.data.startswith(b"\xff\xd8") == (orientation == 1)


def test_broken_exif_does_not_cost_the_picture() -> None:
    assert taken(encode(scene(), exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))[0].width == 64
    assert taken(encode(scene(), exif=b"Exif\0\0nonsense"))[0].width == 64


def test_sixteen_bit_grey() -> None:
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    _, pixels = taken(encode(Image.fromarray(ramp), "PNG"))
    assert close(pixels, np.repeat((ramp / 257)[..., None], 3, axis=2).round().astype(np.uint8), 0)


def test_cmyk() -> None:
    _, pixels = taken(encode(Image.fromarray(scene()).convert("CMYK"), quality=100, subsampling=0))
    assert close(pixels, scene())


def test_grey_and_palette() -> None:
    grey = scene()[..., 0]
    picture, pixels = taken(encode(grey, quality=100))
    assert picture.format == "JPEG" and close(pixels, np.repeat(grey[..., None], 3, axis=2))
    coloured = Image.fromarray(scene()).quantize(256)
    assert close(taken(encode(coloured, "PNG"))[1], np.asarray(coloured.convert("RGB")), 0)
    assert close(taken(encode(Image.fromarray(grey > 99), "PNG"))[1][..., 0], (grey > 99).astype(np.uint8) * 255, 0)


def test_alpha_is_laid_on_white() -> None:
    clear = Image.fromarray(np.dstack([scene(), np.zeros((48, 64), np.uint8)]))
    assert close(taken(encode(clear, "PNG"))[1], np.full((48, 64, 3), 255), 0)
    half = Image.fromarray(np.dstack([np.zeros((48, 64, 3), np.uint8), np.full((48, 64), 128, np.uint8)]))
    assert close(taken(encode(half, "WEBP", lossless=True))[1], np.full((48, 64, 3), 127), 1)
    palette = Image.fromarray(np.zeros((48, 64), np.uint8)).convert("P")
    assert close(taken(encode(palette, "PNG", transparency=0))[1], np.full((48, 64, 3), 255), 0)
    keyed = encode(np.zeros((48, 64, 3), np.uint8), "PNG", transparency=(0, 0, 0))
    assert close(taken(keyed)[1], np.full((48, 64, 3), 255), 0)


@pytest.mark.parametrize("name", ["GIF", "PNG", "WEBP"])
def test_animated(name: str) -> None:
    frames = [Image.fromarray(scene()[:, ::step]).resize((64, 48)) for step in (1, -1)]
    assert refused(encode(frames[0], name, save_all=True, append_images=frames[1:])) == "animated"


def test_a_phone_picture_with_a_second_image_behind_it() -> None:
    small = Image.fromarray(scene(32, 24))
    data = encode(scene(), "MPO", save_all=True, append_images=[small])
    picture, pixels = taken(data)
    assert (picture.format, picture.data) == ("JPEG", data) and close(pixels, scene(), 40)


@pytest.mark.parametrize("size", [(25_000, 25_000), (60_000, 60_000), (4_000, 1_001)])
def test_a_decompression_bomb_is_refused_by_its_header(size: tuple[int, int]) -> None:
    data = png_of(*size, body=bytes(1000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(data) == "too_many_pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


def test_a_webp_bomb_costs_no_memory() -> None:
    canvas = (16382).to_bytes(3, "little") * 2
    chunks = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    data = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(data) in ("too_many_pixels", "not_an_image")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated(name: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    data = encode(noise, name)
    assert refused(data[: int(len(data) * share)]) in ("truncated", "not_an_image")
    assert name != "JPEG" or refused(data[: int(len(data) * share)]) == "truncated"


def test_a_header_and_nothing_behind_it() -> None:
    assert refused(png_of(100, 100)) == "truncated"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"<!doctype html><title>404</title>", "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image"),
        (b"\xff\xd8\xff", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not_an_image"),
        (b"\0\0\0\x1cftypavif", "unsupported_format"),
        (encode(scene(), "TIFF"), "unsupported_format"),
        (encode(scene(), "ICO"), "unsupported_format"),
    ],
)
def test_files_that_are_not_taken(data: bytes, reason: str) -> None:
    assert refused(data) == reason


def test_limits() -> None:
    assert refused(encode(scene(8, 8))) == "too_small"
    assert refused(encode(scene(100, 15))) == "too_small"
    assert taken(encode(scene(16, 16)))[0].width == 16
    assert refused(encode(scene(16, 80))) == "bad_aspect_ratio"
    assert taken(encode(scene(16, 64)))[0].height == 64
    assert refused(encode(scene(64, 48)), max_pixels=64 * 48 - 1) == "too_many_pixels"


def test_flipped_bytes_never_raise() -> None:
    rng = np.random.default_rng(7)
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        whole = encode(scene(24, 24), name)
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(len(data), size=4):
                data[place] = rng.integers(256)
            assert isinstance(check_picture(bytes(data), **LIMITS), Picture | Refusal)
