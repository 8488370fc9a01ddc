"""Buckets: SDXL's list at every size, one for every picture, and the crop that loses least."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stages.buckets import LEAST_AREA, STEP, Bucket, choose_bucket, cut, make_buckets, plan_crop

# Height and width, arXiv 2307.01952, appendix I.
SDXL = """
512 2048, 512 1984, 512 1920, 512 1856, 576 1792, 576 1728, 576 1664, 640 1600, 640 1536, 704 1472, 704 1408, 704 1344,
768 1344, 768 1280, 832 1216, 832 1152, 896 1152, 896 1088, 960 1088, 960 1024, 1024 1024, 1024 960, 1088 960, 1088 896,
1152 896, 1152 832, 1216 832, 1280 768, 1344 768, 1408 704, 1472 704, 1536 640, 1600 640, 1664 576, 1728 576, 1792 576,
1856 512, 1920 512, 1984 512, 2048 512
"""
SIDES = st.integers(1, 6000)
RESOLUTIONS = st.integers(1, 256).map(lambda n: n * STEP)


def test_at_1024_they_are_sdxls_and_its_one_missing_mirror_image() -> None:
    printed = {tuple(map(int, pair.split())) for pair in SDXL.split(",")}
    ours = {(bucket.height, bucket.width) for bucket in make_buckets(1024)}
    assert len(printed) == 40 and ours == printed | {(1344, 704)}
    assert {(bucket.height * 2, bucket.width * 2) for bucket in make_buckets(512)} == ours


@given(RESOLUTIONS)
def test_they_have_the_area_that_a_model_is_trained_at(resolution: int) -> None:
    buckets = make_buckets(resolution)
    if resolution in (8, 16, 24, 32, 40, 48, 56) or resolution % 128 == 0:
        assert Bucket(width=resolution, height=resolution) in buckets
    assert {(b.height, b.width) for b in buckets} == {(b.width, b.height) for b in buckets}
    for bucket in buckets:
        assert bucket.width % STEP == bucket.height % STEP == 0
        assert LEAST_AREA * resolution**2 <= bucket.width * bucket.height <= resolution**2
        assert 1 / 4 <= bucket.width / bucket.height <= 4
    ratios = [bucket.width / bucket.height for bucket in buckets]
    assert ratios == sorted(set(ratios))


def test_a_size_without_buckets_says_so() -> None:
    with pytest.raises(ValueError, match="no buckets around 10 pixels: choose a multiple of 8"):
        make_buckets(10)


@given(SIDES, SIDES, RESOLUTIONS)
def test_every_picture_has_a_bucket_and_none_is_nearer(width: int, height: int, resolution: int) -> None:
    buckets = make_buckets(resolution)
    chosen = choose_bucket(width, height, buckets)
    away = [abs(math.log(b.width / b.height) - math.log(width / height)) for b in buckets]
    assert away[buckets.index(chosen)] == min(away)
    assert choose_bucket(chosen.width, chosen.height, buckets) == chosen


@given(SIDES, SIDES, st.integers(1, 300), st.integers(1, 300))
def test_a_crop_covers_its_bucket_and_loses_no_more_than_it_must(width: int, height: int, wide: int, high: int) -> None:
    bucket = Bucket(width=wide, height=high)
    crop = plan_crop(width, height, bucket)
    if width < wide or height < high:
        assert crop is None  # it would have to be scaled up
        return
    assert crop and crop.width <= width and crop.height <= height
    assert (crop.width == wide and crop.height >= high) or (crop.height == high and crop.width >= wide)
    assert abs(crop.width * height - crop.height * width) <= max(width, height) / 2  # the ratio, to half a pixel
    assert 0 <= crop.left * 2 <= crop.width - wide <= crop.left * 2 + 1
    assert 0 <= crop.top * 2 <= crop.height - high <= crop.top * 2 + 1


def test_what_is_cut_is_the_middle() -> None:
    """Three stripes, of which the outer ones go."""
    pixels = np.zeros((60, 180, 3), np.uint8)
    pixels[:, 60:120] = (250, 20, 30)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=98)
    bucket = Bucket(width=30, height=30)
    crop = plan_crop(180, 60, bucket)
    assert crop and (crop.width, crop.height, crop.left, crop.top) == (90, 30, 30, 0)
    done = cut(data.getvalue(), crop, bucket, 98)
    assert done and done == cut(data.getvalue(), crop, bucket, 98)
    found = np.asarray(Image.open(io.BytesIO(done))).astype(int)
    assert found.shape == (30, 30, 3) and abs(found[:, 2:-2] - (250, 20, 30)).max() < 16
    assert cut(b"no picture", crop, bucket, 98) is None
