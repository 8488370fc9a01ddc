"""Every mode of picture as sRGB: what it is meant to look like."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from stages.colours import colour_transform, to_rgb, to_srgb
from tests.hostile_files import encode, png16, scene


def shown(data: bytes) -> np.ndarray:
    image = to_rgb(Image.open(io.BytesIO(data)))
    assert image.mode == "RGB"
    return np.asarray(image)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 0) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(int) - b.astype(int)).max()) <= tolerance


def wide_gamut() -> bytes:
    """A profile like sRGB but for its primaries, which are far out: red and green exchanged, so that any eye sees it."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    entries = {bytes(data[p : p + 4]): p for p in range(132, 132 + 12 * int.from_bytes(data[128:132]), 12)}
    red, green = (entries[name] for name in (b"rXYZ", b"gXYZ"))
    data[red : red + 4], data[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(data)


def test_sixteen_bit_grey() -> None:
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    expected = np.repeat((ramp / 257)[..., None], 3, axis=2).round().astype(np.uint8)
    assert close(shown(encode(Image.fromarray(ramp), "PNG")), expected)


def test_sixteen_bit_colour() -> None:
    assert close(shown(png16(scene().astype(np.uint16) * 257)), scene())


def test_cmyk() -> None:
    data = encode(Image.fromarray(scene()).convert("CMYK"), quality=100, subsampling=0)
    assert close(shown(data), scene(), 12)


def test_grey_and_palette() -> None:
    grey = scene()[..., 0]
    assert close(shown(encode(grey, "PNG")), np.repeat(grey[..., None], 3, axis=2))
    coloured = Image.fromarray(scene()).quantize(256)
    assert close(shown(encode(coloured, "PNG")), np.asarray(coloured.convert("RGB")))
    assert close(shown(encode(Image.fromarray(grey > 99), "PNG"))[..., 0], (grey > 99).astype(np.uint8) * 255)


def test_alpha_is_laid_on_white() -> None:
    white = np.full((48, 64, 3), 255, np.uint8)
    clear = Image.fromarray(np.dstack([scene(), np.zeros((48, 64), np.uint8)]))
    assert close(shown(encode(clear, "PNG")), white)
    half = Image.fromarray(np.dstack([np.zeros((48, 64, 3), np.uint8), np.full((48, 64), 128, np.uint8)]))
    assert close(shown(encode(half, "WEBP", lossless=True)), np.full((48, 64, 3), 127), 1)
    grey = Image.fromarray(np.dstack([np.full((48, 64), 9, np.uint8), np.zeros((48, 64), np.uint8)]), "LA")
    assert close(shown(encode(grey, "PNG")), white)
    palette = Image.fromarray(np.zeros((48, 64), np.uint8)).convert("P")
    assert close(shown(encode(palette, "PNG", transparency=0)), white)
    assert close(shown(encode(np.zeros((48, 64, 3), np.uint8), "PNG", transparency=(0, 0, 0))), white)


def test_a_profile_is_applied_whatever_the_mode() -> None:
    image, profile = Image.fromarray(scene()), wide_gamut()
    expected = np.asarray(image)[..., [1, 0, 2]]
    assert close(shown(encode(image, "PNG", icc_profile=profile)), expected, 4)
    assert close(to_srgb(scene(), profile), expected, 4)
    clear = Image.fromarray(np.dstack([scene(), np.full((48, 64), 255, np.uint8)]))
    assert close(shown(encode(clear, "PNG", icc_profile=profile)), expected, 4)


def test_srgb_by_any_name_changes_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert colour_transform(profile, "RGB") is None
    assert to_srgb(scene(), profile).tolist() == scene().tolist()


@pytest.mark.parametrize("profile", [b"", b"nonsense", b"\0" * 500, bytes(5 << 20), wide_gamut()[:300]])
def test_profiles_that_are_none_are_left_alone(profile: bytes) -> None:
    assert colour_transform(profile, "RGB") is None


def test_a_profile_of_another_mode_is_left_alone() -> None:
    assert colour_transform(wide_gamut(), "CMYK") is None and colour_transform(wide_gamut(), "L") is None


def test_damaged_profiles_never_raise() -> None:
    rng, whole = np.random.default_rng(3), wide_gamut()
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.integers(len(data), size=3):
            data[place] = rng.integers(256)
        assert to_srgb(scene(), bytes(data)).shape == (48, 64, 3)
