"""What a header tells: sizes, frames, orientation; all of it before a pixel is decoded."""

from __future__ import annotations

import resource
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.pictures import Header, Picture, PictureRules, read_header
from tests.hostile_files import bombs, encode, png, scene

RULES: dict[str, Any] = {
    "min_edge": 16,
    "max_edge": 512,
    "max_pixels": 4_000_000,
    "max_aspect_ratio": 4.0,
    "quality": 95,
}


def header(data: bytes, **rules: Any) -> Header | Picture:
    return read_header(data, PictureRules(**{**RULES, **rules}))


def refused(data: bytes, **rules: Any) -> tuple[str | None, int | None, int | None]:
    found = header(data, **rules)
    assert isinstance(found, Picture)
    return found.reason, found.original_width, found.original_height


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats_that_are_taken(name: str) -> None:
    found = header(encode(scene(), name))
    assert isinstance(found, Header) and (found.format, found.upright, found.orientation) == (name, (64, 48), 1)


def test_limits_and_what_is_told_of_the_refused() -> None:
    assert refused(encode(scene(8, 9))) == ("too_small", 8, 9)
    assert refused(encode(scene(100, 15))) == ("too_small", 100, 15)
    assert isinstance(header(encode(scene(16, 16))), Header)
    assert refused(encode(scene(16, 80))) == ("bad_aspect_ratio", 16, 80)
    assert isinstance(header(encode(scene(16, 64))), Header)
    assert refused(encode(scene(64, 48)), max_pixels=64 * 48 - 1) == ("too_many_pixels", 64, 48)


@pytest.mark.parametrize("orientation", [0, 1, 3, 5, 6, 7, 8, 9, 60_000])
def test_sizes_are_the_upright_pictures(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = header(encode(scene(), exif=exif))
    assert isinstance(found, Header) and found.upright == ((48, 64) if orientation in (5, 6, 7, 8) else (64, 48))
    assert refused(encode(scene(64, 8), exif=exif))[1:] == ((8, 64) if orientation in (5, 6, 7, 8) else (64, 8))


@pytest.mark.parametrize("name", [name for name, (_, ends) in bombs().items() if ends == ("too_many_pixels",)])
def test_bombs_cost_nothing(name: str) -> None:
    data = bombs()[name][0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refused(data)[0] == "too_many_pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes


def test_a_size_that_fits_no_column_is_told_as_the_largest_that_does() -> None:
    assert refused(png(2**32 - 1, 2**32 - 2)) == ("too_many_pixels", 2**31 - 1, 2**31 - 1)


def test_flipped_bytes_never_raise() -> None:
    rng = np.random.default_rng(7)
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        whole = encode(scene(24, 24), name)
        for _ in range(100):
            data = bytearray(whole)
            for place in rng.integers(min(len(data), 80), size=4):
                data[place] = rng.integers(256)
            assert isinstance(header(bytes(data)), Header | Picture)
