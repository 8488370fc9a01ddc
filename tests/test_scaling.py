"""What is stored of a picture: upright, whole, as good as a full decode, and the same every time."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw

from stages.pdq import pdq_hash
from stages.pictures import Picture, PictureRules
from stages.scaling import make_picture
from tests.hostile_files import encode, noise, pictures, scene
from tests.test_colours import wide_gamut

RULES: dict[str, Any] = {
    "min_edge": 16,
    "max_edge": 512,
    "max_pixels": 4_000_000,
    "max_aspect_ratio": 4.0,
    "quality": 95,
}


def made(data: bytes, **rules: Any) -> Picture:
    return make_picture(data, PictureRules(**{**RULES, **rules}))


def pixels(picture: Picture) -> np.ndarray:
    """As any decoder sees what is stored: uint8 (height, width, 3)."""
    assert picture.image is not None, picture.reason
    image = Image.open(io.BytesIO(picture.image))
    assert image.format in ("JPEG", "MPO") and image.mode == "RGB" and image.getexif().get(0x0112, 1) == 1
    assert image.size == (picture.width, picture.height)
    return np.asarray(image)


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 12) -> bool:
    return a.shape == b.shape and float(np.abs(a.astype(int) - b.astype(int)).max()) <= tolerance


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels; 40 is hard to see."""
    return float(10 * np.log10(255**2 / max(np.mean((a.astype(float) - b) ** 2), 1e-9)))


def photograph(width: int, height: int) -> np.ndarray:
    """A spectrum as photographs have it, with edges drawn over: uint8 (height, width, 3)."""
    rng = np.random.default_rng(width)
    waves = np.fft.rfft2(rng.standard_normal((height, width, 3)), axes=(0, 1))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    found = np.fft.irfft2(waves / (frequency**1.35)[..., None], s=(height, width), axes=(0, 1))
    found = 0.4 * found + 0.6 * found.mean(axis=-1, keepdims=True)
    image = Image.fromarray((found / found.std() * 48 + 120).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(20):
        left, top, colour = rng.integers(width), rng.integers(height), tuple(int(c) for c in rng.integers(256, size=3))
        draw.ellipse([left, top, left + width // 8, top + height // 9], outline=colour, width=3)
    return np.asarray(image)


@pytest.mark.parametrize("name", pictures())
def test_odd_pictures_look_as_they_should(name: str) -> None:
    if name == "png interlaced by its word only":
        return
    assert psnr(pixels(made(pictures()[name][0])), scene()) > (30 if name == "gif" else 33)


def test_a_small_plain_jpeg_keeps_its_bytes() -> None:
    data = encode(scene(), quality=90)
    picture = made(data)
    assert picture.image is data and (picture.width, picture.height) == (64, 48) == (
        picture.original_width,
        picture.original_height,
    )
    assert made(encode(scene(600, 512))).image == encode(scene(600, 512))
    assert made(encode(scene(600, 513))).image != encode(scene(600, 513))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("edge", [512, 24])
def test_exif_orientation_is_applied(orientation: int, edge: int) -> None:
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
    data = encode(np.ascontiguousarray(turns[undo](upright)), quality=100, subsampling=0, exif=exif)
    picture = made(data, max_edge=edge)
    expected = upright if edge == 512 else cv2.resize(upright, (32, 24), interpolation=cv2.INTER_AREA)
    assert psnr(pixels(picture), expected) > 33
    assert (picture.original_width, picture.original_height) == (64, 48)
    assert (picture.image is data) == (orientation == 1 and edge == 512)


def test_a_profile_is_applied_and_goes() -> None:
    data = encode(scene(), quality=100, subsampling=0, icc_profile=wide_gamut())
    picture = made(data)
    assert close(pixels(picture), scene()[..., [1, 0, 2]]) and b"ICC_PROFILE" not in (picture.image or b"")


@pytest.mark.parametrize("size", [(257, 193), (275, 258), (375, 300), (525, 394), (600, 515), (830, 780), (1600, 1540)])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_scaled_decoding_is_as_good_as_compressing_the_result(size: tuple[int, int], subsampling: int) -> None:
    """Against all pixels decoded and means taken over areas: it differs no more than quality 95 does by itself."""
    data = encode(photograph(*size), quality=90, subsampling=subsampling)
    picture = made(data, max_edge=128)
    full = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    wanted = cv2.resize(full, (picture.width or 0, picture.height or 0), interpolation=cv2.INTER_AREA)
    compressed = np.asarray(Image.open(io.BytesIO(encode(wanted, quality=95))))
    assert psnr(pixels(picture), wanted) > psnr(compressed, wanted) - 2.5
    assert min(picture.width or 0, picture.height or 0) == 128


def test_a_small_jpeg_is_read_to_its_end() -> None:
    data = encode(noise(), quality=90)
    assert made(data).image is data
    assert [made(data[:-cut]).reason for cut in (1, 2, 3, 50)] == ["truncated"] * 4


def test_the_hash_is_the_upright_pictures() -> None:
    large = photograph(1200, 900)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(np.rot90(large), exif=exif)
    hashes = [made(d).pdq for d in (encode(large), encode(large, "PNG"), turned, encode(cv2.resize(large, (400, 300))))]
    bits = [int.from_bytes(h or b"") for h in (*hashes, pdq_hash(large)[0])]
    assert max((a ^ b).bit_count() for a in bits for b in bits) <= 31 and all(len(h or b"") == 32 for h in hashes)


@pytest.mark.parametrize(
    ("mode", "size"),
    [("keep_ratio_largest", (60, 45)), ("center_crop", (60, 60)), ("border", (60, 60)), ("no", (80, 60))],
)
def test_other_ways_to_resize_are_img2datasets(mode: str, size: tuple[int, int]) -> None:
    width, height = 80, 60
    picture = made(encode(scene(width, height) if mode == "no" else scene(240, 180)), max_edge=60, resize_mode=mode)
    assert pixels(picture).shape == (*size[::-1], 3)
    assert picture.original_width == (80 if mode == "no" else 240)


def test_the_same_bytes_every_time() -> None:
    for data in (encode(photograph(1100, 800)), encode(scene(), "PNG"), encode(scene())):
        assert made(data) == made(data)


def test_flipped_bytes_never_raise() -> None:
    rng = np.random.default_rng(7)
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        whole = encode(scene(24, 24), name)
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(len(data), size=4):
                data[place] = rng.integers(256)
            assert isinstance(made(bytes(data)), Picture)
