"""PDQ: the same bits as the reference implementation, near ones for the same picture, far ones for others."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from stages.pdq import pdq_hash
from tests.hostile_files import encode, scene


def waves(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A picture by a formula, so that its hash can be written down: uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width] / np.array([[[height]], [[width]]])
    channels = [sum(np.sin((3 + i * k) * x + (5 - i + k + seed) * y * k + i) for k in range(1, 7)) for i in range(3)]
    return (np.stack(channels, axis=-1) * 20 + 128).astype(np.uint8)


def distance(a: bytes, b: bytes) -> int:
    return (int.from_bytes(a) ^ int.from_bytes(b)).bit_count()


GOLDEN = {  # (width, height) -> its hash and quality
    (64, 64): ("faa4000355463ffd5554000100037ffe55780001ffff55540003fffe5555ffff", 100),
    (70, 60): ("bbb4400315463ddcd57468a942033ffc755800019fff355440039ffe2555cfff", 100),
    (130, 300): ("aaa400035546fffd557400010057fffc15580003fffe55540023fffe1155bfff", 100),
    (301, 200): ("aaad000355562ffd5574000115577ffc05780003fffe55540003fffe0555afff", 100),
    (511, 400): ("aaa500035556affd55f400010557fffc057800037ffe55540003fffe0155bfff", 100),
    (128, 511): ("aaad00035556bffd557400010157fffc05580003fffe55540003fffe0155bfff", 100),
}


@pytest.mark.parametrize("size", GOLDEN, ids=str)
def test_the_bits_are_the_references(size: tuple[int, int]) -> None:
    """Written down from pdqhash 0.2.8, Facebook's own code; it takes grey as fractions, we as bytes."""
    bits, quality = pdq_hash(waves(*size))
    expected, expected_quality = GOLDEN[size]
    assert distance(bits, bytes.fromhex(expected)) <= 6 and abs(quality - expected_quality) <= 1


def test_scaled_and_compressed_pictures_are_near_and_others_far() -> None:
    large = waves(1200, 900)
    small = np.asarray(Image.fromarray(large).resize((300, 225), Image.Resampling.BOX))
    poor = np.asarray(Image.open(io.BytesIO(encode(small, quality=40))))
    bits = pdq_hash(large)[0]
    assert distance(bits, pdq_hash(small)[0]) <= 16 and distance(bits, pdq_hash(poor)[0]) <= 31
    assert distance(bits, pdq_hash(waves(1200, 900, seed=4))[0]) > 80
    assert distance(bits, pdq_hash(large[:, ::-1])[0]) > 80


def test_grey_is_the_colours_own() -> None:
    grey = waves(100, 90)[..., :1]
    assert pdq_hash(grey) == pdq_hash(np.repeat(grey, 3, axis=2))


def test_quality_tells_plain_pictures() -> None:
    assert pdq_hash(np.full((80, 90, 3), 77, np.uint8))[1] == 0
    assert pdq_hash(scene(300, 200))[1] < pdq_hash(waves(300, 200))[1]


@pytest.mark.parametrize("shape", [(1, 1, 3), (4, 900, 3), (5, 5, 3), (5, 4000, 1), (1023, 5, 3), (1025, 1025, 3)])
def test_any_size_has_an_answer(shape: tuple[int, int, int]) -> None:
    bits, quality = pdq_hash(np.zeros(shape, np.uint8))
    assert len(bits) == 32 and quality == 0
