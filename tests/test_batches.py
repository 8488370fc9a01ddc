"""The order of the samples: a pure function of the position, whatever the processes; bad samples keep their slot."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.pixels import as_array, open_picture
from pipeline.shards import View
from stages.buckets import Bucket, plan_crop
from tests.training_fixtures import make_denoiser, make_view
from training.batches import Batch, BatchConfig, Batches, check_images

CONFIG = BatchConfig(
    seed=1, phase=0, resolution=8, batch=12, micro_batch=12, latent_shape=(4, 4, 4), steps=1000, tokenizer="t5",
    empty_ids=(1,), caption_drop=0.3, crop="random", drawn_latents=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    return make_view(tmp_path_factory.mktemp("data"), "small", 30, "any", broken=(3,))


def take(view: View, config: BatchConfig, count: int, position: int = 0) -> list[Batch]:
    with Batches([view], config, position) as batches:
        return [next(batches) for _ in range(count)]


def facts(batches: list[Batch]) -> dict[int, tuple]:
    """Per position: everything that the sample is made of."""
    found = {}
    for batch in batches:
        for n, position in enumerate(batch.positions):
            assert position not in found and batch.posterior_noise is not None
            tensors = (batch.pixels[n], batch.noise[n], batch.posterior_noise[n])
            digests = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in tensors]
            ids, time, weight = batch.ids[n].tolist(), int(batch.timesteps[n]), float(batch.weights[n])
            found[position] = (batch.keys[n], *digests, ids, time, weight)
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_processes_and_micro_batches_change_nothing(view: View, world: int) -> None:
    expected = facts(take(view, CONFIG, 5))
    assert sorted(expected) == list(range(60))
    keys = [expected[p][0] for p in range(60)]
    assert len(set(keys[:30])) == 30 and len(set(keys[30:])) == 30 and keys[:30] != keys[30:]
    dropped = sum(expected[p][4] == [1] for p in range(60))
    assert 8 <= dropped <= 30
    for micro in {m for m in (1, 2, 3, 6, 12) if 12 // world % m == 0}:
        found: dict[int, tuple] = {}
        for rank in range(world):
            config = replace(CONFIG, world=world, rank=rank, micro_batch=micro, threads=3)
            mine = facts(take(view, config, 5 * (12 // world // micro)))
            assert not set(mine) & set(found)
            found |= mine
        assert found == expected


def test_a_stream_can_begin_anywhere(view: View) -> None:
    straight, resumed = facts(take(view, CONFIG, 4)), facts(take(view, CONFIG, 2, position=24))
    assert resumed == {p: straight[p] for p in range(24, 48)}
    with pytest.raises(ValueError, match="position 5 is not at the edge of a global batch of 12"):
        Batches([view], CONFIG, 5)


def test_a_cut_jpeg_keeps_its_slot(view: View) -> None:
    batches = take(view, replace(CONFIG, micro_batch=6), 10)
    bad = [one for batch in batches for one in batch.bad]
    assert [one.key for one in bad] == ["0003", "0003"]
    weights = {p: float(w) for batch in batches for p, w in zip(batch.positions, batch.weights, strict=True)}
    assert {p for p, weight in weights.items() if weight == 0} == {one.position for one in bad}
    assert all(batch.pixels.shape == (6, 3, 8, 8) and bool(batch.pixels.isfinite().all()) for batch in batches)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="global batch of 12 does not divide into 5 processes"):
        replace(CONFIG, world=5, micro_batch=2)


def test_a_caption_is_picked_by_weight_and_nothing_else_moves(tmp_path: Path) -> None:
    """Of one manifest: where the view tells of one kind, or of two."""
    both = make_view(tmp_path, "short", 60, "any", short=True)
    first = replace(both.info, tokenizers={"t5": both.info.tokenizers["t5"] | {"captions": [["long", 1.0]]}})
    alone = View(both.dataset, first)
    config = replace(CONFIG, batch=60, micro_batch=60, caption_drop=0.1)
    picked, plain = facts(take(both, config, 20)), facts(take(alone, config, 20))
    shorter: dict[str, int] = {"short": 0, "long": 0}
    for position, (key, *rest) in picked.items():
        other = plain[position]
        number, dropped = int(key), other[4] == [1]
        assert (key, *rest[:3], rest[4]) == (*other[:4], other[5])  # pixels, noise, time
        if number % 3 and number % 7 == 0:
            assert (dropped or other[6] == 0) and rest[5] == 1  # the only kind it has is the short one
        elif not number % 3 or dropped:
            assert rest[3] == other[4]
        else:
            kind = "long" if rest[3] == other[4] else "short"
            assert kind == "long" or rest[3] == other[4][-2:]
            shorter[kind] += len(other[4]) > 2  # else they are one and the same
    share = shorter["short"] / sum(shorter.values())
    assert sum(shorter.values()) > 400 and 0.19 < share < 0.31
    assert facts(take(both, config, 2, position=300)) == {p: picked[p] for p in range(300, 420)}


def test_latents_take_the_place_of_pixels(tmp_path: Path) -> None:
    base = make_denoiser(tmp_path / "base", drawn=True)
    view = make_view(tmp_path / "data", "small", 30, "any", vae=base / "vae", broken=(0,))
    config = replace(CONFIG, crop="center")
    pixels, latents = take(view, config, 3), take(view, replace(config, latents="view"), 3)
    for one, other in zip(pixels, latents, strict=True):
        assert (one.keys, one.positions) == (other.keys, other.positions) and one.latents is None is other.pixels
        assert other.latents.shape == (12, 8, 4, 4) and other.latents.dtype == torch.float32
        assert torch.equal(one.noise, other.noise) and torch.equal(one.posterior_noise, other.posterior_noise)
    bad = [one for batch in latents for one in batch.bad]
    assert {one.key for one in bad} == {"0000"} and all("has no latents" in one.reason for one in bad)
    wrong = take(view, replace(config, latents="view", latent_shape=(4, 8, 8)), 1)[0]
    assert not wrong.weights.any() and any(
        "its latents are (8, 4, 4), not (8, 8, 8)" in one.reason for one in wrong.bad
    )


def telling(view: View, **columns: list[int | None]) -> View:
    """The view with further columns in its manifest."""
    path = Path(view.dataset.url, view.info.manifest)
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.int32()))
    pq.write_table(table, path)
    return View(view.dataset, replace(view.info, manifest_sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


def sizes_by_key(view: View, config: BatchConfig, count: int = 2) -> dict[str, list[float]]:
    return {
        key: sizes.tolist()
        for batch in take(view, config, count)
        for key, sizes in zip(batch.keys, batch.sizes, strict=True)
    }


def test_sizes_are_those_of_the_picture_as_it_came(tmp_path: Path) -> None:
    """(original height, width, crop top, left, target height, width) of pictures that came three times as large, whether the
    view holds them whole or as the squares that the build cut out; and at half the view's resolution.
    """
    keep = make_view(tmp_path / "keep", "small", 24, "any", side=16)
    widths = keep.manifest.column("width").to_pylist()
    assert set(widths) == {16, 17, 18} and set(keep.manifest.column("height").to_pylist()) == {16}
    came = {"original_width": [3 * width for width in widths], "original_height": [48] * 24}
    config = replace(CONFIG, crop="center", resolution=16)
    keys = [f"{number:04d}" for number in range(24)]
    expected = {key: [48, 3 * w, 0, (w - 15) // 2, 16, 16] for key, w in zip(keys, widths, strict=True)}
    assert sizes_by_key(telling(keep, **came), config) == expected
    # Where nothing is known, a picture came as it is; where there is a null, too.
    packed = {key: [16, w, *expected[key][2:]] for key, w in zip(keys, widths, strict=True)}
    bare = make_view(tmp_path / "bare", "small", 24, "any", side=16)
    assert sizes_by_key(bare, config) == packed
    assert sizes_by_key(telling(bare, original_width=[None] * 24, original_height=[None] * 24), config) == packed

    crops = [plan_crop(3 * w, 48, Bucket(width=16, height=16)) for w in widths]
    cut = make_view(tmp_path / "square", "small", 24, "any", side=16)
    flat = pq.read_table(path := Path(cut.dataset.url, cut.info.manifest)).drop_columns(["width"])
    pq.write_table(flat.append_column("width", pa.array([16] * 24, pa.int32())), path)
    places = {"crop_left": [crop.left for crop in crops if crop], "crop_top": [crop.top for crop in crops if crop]}
    square = telling(cut, **came, **places)
    told = {key: [48, 3 * w, 0, crop.left, 16, 16] for key, w, crop in zip(keys, widths, crops, strict=True) if crop}
    assert {left for _, _, _, left, _, _ in told.values()} == {0, 1} and sizes_by_key(square, config) == told
    halved = {key: [h, w, top / 2, left / 2, 8, 8] for key, (h, w, top, left, _, _) in told.items()}
    assert sizes_by_key(square, replace(config, resolution=8)) == halved


def test_a_view_that_tells_no_sizes_is_refused(tmp_path: Path) -> None:
    view = make_view(tmp_path, "small", 24, "any")
    path = Path(view.dataset.url, view.info.manifest)
    pq.write_table(pq.read_table(path).drop_columns(["width"]), path)
    view = View(view.dataset, replace(view.info, manifest_sha256=hashlib.sha256(path.read_bytes()).hexdigest()))
    with pytest.raises(ValueError, match="view 'small' does not tell how large its pictures are: pack again"):
        check_images(view, 8)


def test_sizes_tell_where_a_random_crop_lies(tmp_path: Path) -> None:
    view = make_view(tmp_path, "small", 24, "any", side=16)
    corners = set()
    for batch in take(view, replace(CONFIG, resolution=16), 6):
        for key, sizes, pixels in zip(batch.keys, batch.sizes.int().tolist(), batch.pixels, strict=True):
            image = open_picture(view.read(int(key), "image"))
            height, width, top, left, *wanted = sizes
            assert (width, height) == image.size and wanted == [16, 16]
            assert np.array_equal(as_array(image)[:, top : top + 16, left : left + 16], pixels.numpy())
            corners.add((width, left))
    assert {(18, 0), (18, 1), (18, 2), (17, 0), (17, 1), (16, 0)} <= corners
