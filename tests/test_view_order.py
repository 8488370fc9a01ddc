"""What stands where in a phase's views: batches of one shape, mixtures by weight, windows of shards; and training on them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.captions import tokenizer_id
from pipeline.pixels import as_array, open_picture
from pipeline.shards import View
from pipeline.storage import Folder
from pipeline.vaes import encode_pixels, load_vae
from tests.training_fixtures import make_denoiser, make_view, make_world, training_config
from training import loop
from training.batches import Batch, BatchConfig, Batches
from training.checkpoints import latest_checkpoint
from training.configuration import Phase, TrainingConfig
from training.denoisers import DenoiserConfig
from training.loop import train

BUCKETS = ((16, 16), (20, 12), (16, 16), (12, 20), (16, 16))
CONFIG = BatchConfig(
    seed=1, phase=0, resolution=16, batch=6, micro_batch=6, latent_shape=(4, 8, 8), steps=1000, tokenizer="t5",
    empty_ids=(1,), drawn_latents=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`models/` and `dataset/` with the views "small", "large", "shaped" (35 samples in three buckets, six shards, latents) and
    "more" (24 squares of 16 px, eight shards).
    """
    root = make_world(tmp_path_factory.mktemp("world"))
    make_denoiser(root / "models" / "drawn", drawn=True)
    name, vae = tokenizer_id(str(root / "models" / "t5"), None), root / "models" / "drawn" / "vae"
    make_view(root / "dataset", "shaped", 35, name, side=16, buckets=BUCKETS, shards=6, vae=vae)
    make_view(root / "dataset", "more", 24, name, side=16, shards=8, vae=vae)
    return root


def opened(world: Path, *names: str) -> list[View]:
    return [View.open(Folder(url=str(world / "dataset")), name) for name in names]


def take(views: list[View], config: BatchConfig, count: int, position: int = 0) -> list[Batch]:
    with Batches(views, config, position) as batches:
        return [next(batches) for _ in range(count)]


def test_a_batch_is_of_one_bucket_and_its_pictures_are_as_they_were_packed(world: Path) -> None:
    views = opened(world, "shaped")
    seen: Counter[str] = Counter()
    shapes = set()
    for batch in take(views, CONFIG, 35):  # six epochs
        assert batch.pixels is not None and batch.posterior_noise is not None and not batch.bad
        height, width = batch.pixels.shape[2:]
        shapes.add((width, height))
        assert batch.noise.shape == batch.posterior_noise.shape == (6, 4, height // 2, width // 2)
        assert batch.sizes.tolist() == [[height, width, 0, 0, height, width]] * 6
        for key, pixels in zip(batch.keys, batch.pixels, strict=True):
            assert np.array_equal(pixels.numpy(), as_array(open_picture(views[0].read(int(key), "image"))))
            assert BUCKETS[int(key) % 5] == (width, height)
        seen.update(batch.keys)
    assert shapes == set(BUCKETS) and set(seen.values()) == {6}


def test_latents_of_buckets_are_those_of_their_pictures(world: Path) -> None:
    views, vae = opened(world, "shaped"), load_vae(str(world / "models" / "drawn"), None, "vae", "float32")
    pixels, latents = take(views, CONFIG, 8), take(views, replace(CONFIG, latents="view"), 8)
    for one, other in zip(pixels, latents, strict=True):
        assert one.keys == other.keys and not other.bad and one.pixels is not None and other.latents is not None
        expected = torch.cat([part for part in encode_pixels(vae, one.pixels) if part is not None], dim=1)
        assert torch.allclose(other.latents, expected, rtol=2e-3, atol=2e-3)
        assert torch.equal(one.noise, other.noise)


def facts(batches: list[Batch]) -> dict[int, tuple[str, bytes, int, tuple[int, ...]]]:
    return {
        position: (
            batch.keys[n],
            batch.noise[n].numpy().tobytes(),
            int(batch.timesteps[n]),
            tuple(batch.ids[n].tolist()),
        )
        for batch in batches
        for n, position in enumerate(batch.positions)
    }


@pytest.mark.parametrize("names", [("shaped",), ("more",), ("more", "shaped"), ("large", "more")])
@pytest.mark.parametrize("window", [0, 2])
def test_processes_and_starts_change_nothing(world: Path, names: tuple[str, ...], window: int) -> None:
    views = opened(world, *names)
    config = replace(CONFIG, window=window, view_weights=(1.0, 2.0)[: len(names)], batch=12, micro_batch=12)
    expected = facts(take(views, config, 7))
    for size in (1, 2, 3, 4):
        found = {}
        for rank in range(size):
            mine = replace(config, world=size, rank=rank, micro_batch=12 // size // (2 if size == 3 else 1))
            found |= facts(take(views, mine, 7 * (12 // size // mine.micro_batch)))
        assert found == expected
    assert facts(take(views, config, 3, position=48)) == {p: expected[p] for p in range(48, 84)}


def test_a_mixture_has_its_share_of_each_view_in_every_batch(world: Path) -> None:
    """Samples are mixed where all are squares, whole batches where one view has buckets."""
    views = opened(world, "large", "more")
    with Batches(views, replace(CONFIG, view_weights=(1.0, 2.0))) as batches:
        keys = [key for _ in range(24) for key in next(batches).keys]
        rows = batches.order.rows(np.arange(144))
    of_large = (rows < len(views[0])).reshape(-1, 6).sum(1)
    assert of_large.tolist() == [2] * 24
    assert keys == [f"{row if row < 18 else row - 18:04d}" for row in rows]
    first = rows[rows >= 18][:24]
    assert sorted(first - 18) == list(range(24))  # each of its samples once, before any comes again
    shaped = take(opened(world, "more", "shaped"), replace(CONFIG, view_weights=(1.0, 1.0), crop="random"), 20)
    assert len({batch.pixels.shape for batch in shaped if batch.pixels is not None}) == 3


def test_what_is_ahead_names_the_files_that_are_read(world: Path) -> None:
    (view,) = opened(world, "more")
    with Batches([view], replace(CONFIG, window=2, latents="view")) as batches:
        for position in range(0, 48, 6):
            ahead = batches.order.shards_ahead(position)
            shards = {
                view.manifest.column("shard")[int(row)].as_py()
                for row in batches.order.rows(np.arange(position, position + 6))
            }
            assert shards <= set(ahead) and len(ahead) <= 4
            assert all(Path(view.dataset.url, name).is_file() for name in ahead)


def phase(view: str | dict[str, float], **changes: object) -> Phase:
    settings = {"view": view, "resolution": 16, "samples": 48, "batch": 12, "micro_batch": 6, "rate": 1e-2, **changes}
    return Phase(**settings)  # type: ignore[arg-type]


def config_of(world: Path, *phases: Phase, **changes: object) -> TrainingConfig:
    return training_config(
        world, phases=phases, denoiser=DenoiserConfig(model=str(world / "models" / "drawn")), **changes
    )


def weights_of(run: Path) -> bytes:
    return (run / "release" / "connector.safetensors").read_bytes()


def test_a_run_over_buckets_mixtures_and_windows_goes_on_to_the_same_weights(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Folder(url=str(world / "dataset"))
    config = config_of(
        world,
        phase("shaped", window=2),
        phase({"shaped": 1, "more": 2}, latents="view"),
        phase({"large": 1, "more": 3}),
    )
    result = train(config, dataset=dataset, run=tmp_path / "straight")
    assert (result.samples, result.bad, result.skipped) == (144, 0, 0)
    taken = loop.take_step
    for stop in (3, 6, 10):  # once inside each phase
        left = iter(range(stop - (latest_step(tmp_path / "run"))))

        def step(*given: object, left: object = left, **named: object) -> object:
            if next(left, None) is None:  # type: ignore[call-overload]
                raise KeyboardInterrupt
            return taken(*given, **named)  # type: ignore[arg-type]

        monkeypatch.setattr(loop, "take_step", step)
        with pytest.raises(KeyboardInterrupt):
            train(config, dataset=dataset, run=tmp_path / "run")
        assert latest_step(tmp_path / "run") == stop
    monkeypatch.setattr(loop, "take_step", taken)
    train(config, dataset=dataset, run=tmp_path / "run")
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "straight")
    told = json.loads((latest(tmp_path / "run") / "checkpoint.json").read_bytes())["facts"]["phases"]
    assert [sorted(one["views"]) for one in told] == [["shaped"], ["more", "shaped"], ["large", "more"]]
    for changed, problem in (
        (phase({"large": 2, "more": 3}), r"views.large.weight is 1 there and 2 here"),
        (phase({"large": 1, "more": 3}, window=1), "window is 0 there and 1 here"),
        (phase({"large": 1}), "views.more"),
    ):
        with pytest.raises(ValueError, match=problem):
            train(replace(config, phases=(*config.phases[:2], changed)), dataset=dataset, run=tmp_path / "run")


def latest(run: Path) -> Path:
    path = latest_checkpoint(run)
    assert path is not None
    return path


def latest_step(run: Path) -> int:
    return json.loads((latest(run) / "checkpoint.json").read_bytes())["state"]["step"] if run.exists() else 0


def test_what_does_not_fit_is_refused_in_one_line(world: Path, tmp_path: Path) -> None:
    name = tokenizer_id(str(world / "models" / "t5"), None)
    make_view(tmp_path, "odd", 8, name, side=16, buckets=((16, 16), (15, 17)))
    make_view(tmp_path, "cut", 8, name, side=16, buckets=((16, 16), (20, 12)), vae=world / "models" / "drawn" / "vae")
    pointer = tmp_path / "views" / "cut.json"
    pointer.write_text(pointer.read_text().replace('"crop": "none"', '"crop": "center"'))
    dataset, here = Folder(url=str(world / "dataset")), Folder(url=str(tmp_path))
    for folder, asked, problem in (
        (dataset, phase("shaped", resolution=8), "buckets of 16 px, the phase wants 8"),
        (dataset, phase({"shaped": 1, "gone": 1}), "has no view 'gone'"),
        (dataset, phase({"small": 1, "more": 1}), "'small' holds images of 8 px, the phase wants 16"),
        (here, phase("odd"), "view 'odd' has a bucket that does not fit: resolution 15x17 is not a multiple of 2"),
        (
            here,
            phase("cut", latents="view"),
            "its latents are of squares, its pictures of many shapes: encode them with crop",
        ),
    ):
        with pytest.raises(ValueError if "no view" not in problem else FileNotFoundError, match=problem):
            train(config_of(world, asked), dataset=folder, run=tmp_path / "run")
    for settings, problem in (
        ({"view": {}}, "name a view, or several with weights above 0"),
        ({"view": {"a": 1, "b": 0}}, "weights above 0"),
        ({"view": "a", "window": -1}, "window is -1, it must be at least 0"),
        ({"view": {"a": 1, "b": 3}, "samples": 50}, "samples 50 is not a multiple of batch 12"),
    ):
        with pytest.raises(ValueError, match=problem):
            phase(**settings)  # type: ignore[arg-type]
