"""Squares of pictures, as every VAE here is given them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.pixels import as_array, open_picture, square


def shown(image: Image.Image, resolution: int, corner: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    return as_array(square(image, resolution, corner))


def test_square_resizes_the_short_side_and_crops() -> None:
    picture = np.zeros((8, 16, 3), dtype=np.uint8)
    picture[:, 8:] = 255
    image = Image.fromarray(picture)
    assert np.array_equal(shown(image, 8, (0.0, 0.5)), np.full((3, 8, 8), -1.0))
    assert np.array_equal(shown(image, 8, (1.0, 0.5)), np.full((3, 8, 8), 1.0))
    middle = shown(image, 8)
    assert (middle[:, :, :4] == -1).all() and (middle[:, :, 4:] == 1).all()
    assert shown(image, 4).shape == (3, 4, 4) and shown(image, 12).dtype == np.float32


def test_bytes_are_opened_as_colours_or_refused() -> None:
    out = io.BytesIO()
    Image.new("L", (5, 4), 255).save(out, "PNG")
    image = open_picture(out.getvalue())
    assert image.mode == "RGB" and as_array(image).shape == (3, 4, 5) and (as_array(image) == 1).all()
    for broken in (b"", b"no picture", out.getvalue()[:50]):
        with pytest.raises(OSError):
            open_picture(broken)
