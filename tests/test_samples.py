"""One sample, read: mirrored or not, and what is damaged is told."""

from __future__ import annotations

import ast
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.pixels import as_array, open_picture
from pipeline.shards import View
from tests.told_views import make_told_view
from training.batches import BatchConfig
from training.samples import Sample, SampleReader, read_npy
from training.shard_cache import open_shards

CONFIG = BatchConfig(
    seed=1, phase=0, resolution=8, batch=12, micro_batch=12, latent_shape=(4, 4, 4), steps=1000, tokenizer="t5",
    empty_ids=(1,), caption_drop=0.3, crop="random",
)  # fmt: skip


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    return make_told_view(tmp_path_factory.mktemp("told"), ["a cat", "a dog left of it", "a fox", "a hen", "a cow", ""])


def read(view: View, config: BatchConfig, positions: int = 40) -> dict[tuple[int, int], Sample]:
    """Each row at many positions."""
    reader = SampleReader(view, config, open_shards([view], None, 1))
    return {(row, p): reader.read(p, row) for row in range(len(view)) for p in range(positions)}


def test_half_of_the_pictures_are_mirrored_and_nothing_else_moves(view: View) -> None:
    plain, flipped = read(view, CONFIG), read(view, replace(CONFIG, flip=True))
    mirrored = set()
    for place, sample in flipped.items():
        as_it_is = plain[place]
        assert sample.reason is None
        assert np.array_equal(sample.noise, as_it_is.noise) and np.array_equal(sample.ids, as_it_is.ids)
        if np.array_equal(sample.picture, as_it_is.picture):
            assert sample.sizes == as_it_is.sizes
        else:
            mirrored.add(place)
            assert np.array_equal(sample.picture[:, :, ::-1], as_it_is.picture)
    positions = {p for _, p in mirrored}
    assert 10 <= len(positions) <= 30  # of 40
    assert mirrored == {(row, p) for row in (0, 2, 3, 4) for p in positions}  # not "left", not the one that is not told


def test_the_left_edge_of_a_mirrored_crop_is_that_of_the_mirrored_picture(view: View) -> None:
    """SDXL is told where the crop lies in the picture that it sees a part of."""
    seen = set()
    for (row, _), sample in read(view, replace(CONFIG, flip=True)).items():
        whole = as_array(open_picture(view.read(row, "image")))
        left = int(sample.sizes[3])
        there = [bool(np.array_equal(one[:, :, left : left + 8], sample.picture)) for one in (whole, whole[:, :, ::-1])]
        assert any(there)
        seen.add((whole.shape[2], left, there.index(True)))
    assert {(10, left, side) for left in (0, 1, 2) for side in (0, 1)} <= seen


def test_the_left_edge_counts_from_the_edge_that_packing_cut_off(tmp_path: Path) -> None:
    """A square of 8 cut at 5 of a picture 30 wide: mirrored, it begins at 30 - 5 - 8."""
    view = make_told_view(tmp_path, ["a cat"], facts={"scaled_width": 30}, columns={"crop_left": 5, "crop_top": 0})
    assert {sample.sizes[3] for sample in read(view, replace(CONFIG, flip=True)).values()} == {5, 30 - 5 - 8}
    halved = replace(CONFIG, flip=True, resolution=4)
    assert {sample.sizes[3] for sample in read(view, halved).values()} == {2.5, 15 - 2.5 - 4}


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_shard_gives_bad_samples_that_say_so(tmp_path: Path, damage: str) -> None:
    view = make_told_view(tmp_path, ["a cat"] * 6)
    shard, offset, size = view.place(4, "image") or ("", 0, 0)
    path = tmp_path / shard
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: offset + size // 2])
    else:
        spot = offset + size - 20
        path.write_bytes(data[:spot] + bytes([data[spot] ^ 1]) + data[spot + 1 :])
    reader = SampleReader(view, CONFIG, open_shards([view], None, 1))
    samples = [reader.read(0, row) for row in range(6)]
    bad = {row: sample.reason for row, sample in enumerate(samples) if sample.reason}
    assert set(bad) == {"missing": {3, 4, 5}, "cut": {4, 5}, "flipped": {4}}[damage]
    assert {"missing": "FileNotFoundError", "cut": "its image is damaged", "flipped": "its image is damaged"}[
        damage
    ] in str(bad[4])
    assert samples[4].shard == shard and samples[4].key == "0004" and not samples[4].picture.any()


@given(shape=st.lists(st.integers(0, 5), max_size=4), kind=st.sampled_from(["<u2", "<i4", "<f2", ">f4", "|u1"]))
def test_npy_files_are_read_without_ast(shape: list[int], kind: str) -> None:
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(kind)
    out = io.BytesIO()
    np.save(out, array)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ast, "literal_eval", None)  # threads must not meet in it
        found = read_npy(out.getvalue())
    assert np.array_equal(found, array) and found.dtype == array.dtype and found.flags.writeable
    for broken in (out.getvalue()[:-1], out.getvalue()[1:], b"", b"\x93NUMPY"):
        if broken != out.getvalue()[:-1] or array.size:
            with pytest.raises(ValueError):
                read_npy(broken)


def test_pickles_are_no_npy_files_of_numbers() -> None:
    out = io.BytesIO()
    np.save(out, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="no npy file of numbers"):
        read_npy(out.getvalue())
