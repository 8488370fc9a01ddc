"""Validation: it changes nothing, it is the same whoever does it and whenever, and what it calls the best is."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples.shapes.recipe import JUDGE
from pipeline.captions import TokenizerConfig, tokenizer_id
from pipeline.shards import View
from pipeline.storage import Folder
from tests.tiny_denoisers import POOLED_WIDTH, make_sana, make_sdxl, make_unet
from tests.tiny_language_models import WIDTH, make_language_model
from tests.training_fixtures import LENGTH, make_denoiser, make_view, training_config
from tests.training_fixtures import make_language_model as make_t5
from training import loop, lora
from training.batches import Batches
from training.checkpoints import State
from training.configuration import (
    DenoiserConfig,
    LanguageModelConfig,
    LoRAConfig,
    Phase,
    TrainingConfig,
    ValidationConfig,
)
from training.connectors import ConnectorConfig, LaViConfig, QueriesConfig, TSCConfig
from training.encoding import encode
from training.generation import generate
from training.loop import train
from training.processes import start_processes
from training.releases import load_bridge, read_release
from training.step import losses_of
from training.validation import Validation, grid_of

PROMPTS = ("red round", "green square left", "blue")
LOOKED = ValidationConfig(
    every=24, resolution=8, view="held", samples=10, prompts=PROMPTS, steps=2, guidance=3.0, batch=4
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The view "small" is trained on, "held" is not; "latents" holds latents of what "small" does."""
    root = tmp_path_factory.mktemp("world")
    make_denoiser(root / "models" / "base", drawn=True)
    name = tokenizer_id(str(make_t5(root / "models" / "t5")), None)
    vae = root / "models" / "base" / "vae"
    make_view(root / "dataset", "small", 24, name)
    make_view(root / "dataset", "latents", 24, name, vae=vae)
    make_view(root / "dataset", "held", 9, name, vae=vae, first=100, broken=(4,))
    return root


def config_of(world: Path, validation: ValidationConfig | None = LOOKED, **changes: object) -> TrainingConfig:
    """Two phases of 4 and 2 steps of 12 samples."""
    phases = (
        Phase(view="small", resolution=8, samples=48, batch=12, micro_batch=6, rate=1e-2),
        Phase(view="latents", resolution=8, samples=24, batch=12, micro_batch=6, rate=5e-3, latents="view"),
    )
    return training_config(world, **{"phases": phases, "validation": validation, **changes})


def dataset(world: Path) -> Folder:
    return Folder(url=str(world / "dataset"))


def lines_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def weights_of(release: Path) -> dict[str, torch.Tensor]:
    return {f"{p.name}/{name}": t for p in release.glob("*.safetensors") for name, t in load_file(p).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def looked(world: Path) -> Path:
    config = config_of(world, dataclasses.replace(LOOKED, clip=JUDGE))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    train(config, dataset=dataset(world), run=world / "looked")
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    return world / "looked"


def test_a_run_that_is_looked_at_trains_the_same_weights(world: Path, looked: Path, tmp_path: Path) -> None:
    train(config_of(world, None), dataset=dataset(world), run=tmp_path)
    assert_same_weights(looked / "release", tmp_path / "release")
    assert not (tmp_path / "best").exists()


def test_every_so_many_samples_something_is_found(looked: Path) -> None:
    lines = lines_of(looked)
    assert [line["samples"] for line in lines] == [0, 24, 48, 72]
    assert [line["phase"] for line in lines] == [0, 0, 0, 1]
    for line in lines:
        assert line["held_out_bad"] == 1 and len(line["held_out_bins"]) == 10
        assert line["held_out_loss"] > 0 and len(line["clip_scores"]) == 3
        assert line["clip_score"] == pytest.approx(np.mean(line["clip_scores"]), abs=1e-4)
        with Image.open(looked / line["pictures"]) as grid:
            assert grid.size == (16, 16)
    board = EventAccumulator(str(looked / "tensorboard")).Reload()
    assert board.Tags()["images"] == ["validation/pictures"]
    assert [e.step for e in board.Scalars("validation/held_out_loss")] == [0, 24, 48, 72]
    assert len({line["held_out_loss"] for line in lines}) == 4
    assert len({(looked / line["pictures"]).read_bytes() for line in lines}) == 4


def test_figures_are_those_of_the_averaged_weights(world: Path, looked: Path) -> None:
    """The pictures are what `generate` draws with the release."""
    config = config_of(world)
    language_model, denoiser = config.language_model.load(), config.denoiser.load()
    bridge = load_bridge(looked / "release", language_model=language_model, denoiser=denoiser, weights="ema")
    drawn = generate(
        language_model=language_model, bridge=bridge, denoiser=denoiser, prompts=PROMPTS, resolution=8, steps=2,
        guidance=3.0, seeds=[0, 1, 2], batch=4,
    )  # fmt: skip
    with Image.open(looked / lines_of(looked)[-1]["pictures"]) as grid:
        assert np.array_equal(np.asarray(grid), grid_of(drawn))


def test_the_loss_is_that_of_whole_samples_with_their_captions(world: Path, looked: Path) -> None:
    """By hand, before the first step: each sample once, none with the empty prompt, the broken one left out."""
    config = config_of(world)
    parts = loop.load_parts(config, start_processes(config))
    view = View.open(dataset(world), "held")
    validation = Validation(config, view, parts, world / "by hand", {}, State())
    parts.bridge.eval()
    losses, keys = [], []
    with Batches([view], validation._batch_config()) as batches, torch.no_grad():
        for batch in islice(batches, 3):
            kept = [i for i, weight in enumerate(batch.weights) if weight and batch.positions[i] < len(view)]
            assert all(len(batch.ids[i]) > 1 for i in kept)
            losses += losses_of(parts, encode(parts, batch, ""), "")[kept].tolist()
            keys += [batch.keys[i] for i in kept]
    assert sorted(keys) == [f"{number:04d}" for number in range(100, 109) if number != 104]
    assert lines_of(looked)[0]["held_out_loss"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_best_is_kept_and_says_why(world: Path, looked: Path, tmp_path: Path) -> None:
    lines = lines_of(looked)
    best = min(lines, key=lambda line: line["held_out_loss"])
    said = read_release(looked / "best")
    assert said["samples"] == best["samples"]
    assert said["validation"]["metric"] == "held_out_loss"
    assert {name: said["validation"][name] for name in ("held_out_loss", "clip_score")} == {
        name: best[name] for name in ("held_out_loss", "clip_score")
    }
    by_score = dataclasses.replace(LOOKED, clip=JUDGE, best="clip_score", view=None)
    train(config_of(world, by_score), dataset=dataset(world), run=tmp_path)
    lines = lines_of(tmp_path)
    assert read_release(tmp_path / "best")["samples"] == max(lines, key=lambda line: line["clip_score"])["samples"]
    assert "held_out_loss" not in lines[0]
    config = config_of(world)
    load_bridge(
        tmp_path / "best", language_model=config.language_model.load(), denoiser=config.denoiser.load()
    )  # a release as any other


def test_stopped_and_resumed_nothing_is_repeated_or_left_out(
    world: Path, looked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM where a validation is due, which then waits for the next sitting, and where none is."""
    stop_at = [24, 60]
    config = config_of(world, dataclasses.replace(LOOKED, clip=JUDGE), checkpoint_every=24)
    commit = loop._commit

    def interrupted(sitting, state, *rest):
        if state.samples + 2 * 12 in stop_at:  # seen at the edge of the next step
            os.kill(os.getpid(), signal.SIGTERM)
        commit(sitting, state, *rest)

    monkeypatch.setattr(loop, "_commit", interrupted)
    for samples in stop_at:
        with pytest.raises(SystemExit):
            train(config, dataset=dataset(world), run=tmp_path)
        assert all(line["samples"] < samples for line in lines_of(tmp_path))
    train(config, dataset=dataset(world), run=tmp_path)
    assert lines_of(tmp_path) == lines_of(looked)
    for name in ("release", "best"):
        assert_same_weights(tmp_path / name, looked / name)
    train(config, dataset=dataset(world), run=tmp_path)  # there is nothing left to do
    assert lines_of(tmp_path) == lines_of(looked)


def test_after_a_crash_what_was_found_since_the_checkpoint_is_found_again(
    world: Path, looked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, commit = config_of(world, dataclasses.replace(LOOKED, clip=JUDGE), checkpoint_every=36), loop._commit

    def crash(sitting, state, *rest):
        commit(sitting, state, *rest)
        if state.samples == 60:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_commit", crash)
        with pytest.raises(KeyboardInterrupt):
            train(config, dataset=dataset(world), run=tmp_path)
    assert [line["samples"] for line in lines_of(tmp_path)] == [0, 24, 48]
    sorted(tmp_path.glob("checkpoint-*"))[-1].joinpath("checkpoint.json").unlink()  # so it goes on from 36
    train(config, dataset=dataset(world), run=tmp_path)
    assert lines_of(tmp_path) == lines_of(looked)
    assert_same_weights(tmp_path / "best", looked / "best")


def test_settings_may_change_between_sittings(
    world: Path, looked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may even come and go; figures of other settings are not compared."""
    phases = config_of(world).phases
    train(config_of(world, None, phases=phases[:1]), dataset=dataset(world), run=tmp_path)
    loss = ValidationConfig(every=12, resolution=8, view="held", batch=3, best="off")
    train(config_of(world, loss), dataset=dataset(world), run=tmp_path)
    assert [line["samples"] for line in lines_of(tmp_path)] == [48, 60, 72]
    assert not (tmp_path / "best").exists() and not (tmp_path / "validation").exists()
    assert_same_weights(tmp_path / "release", looked / "release")


def test_two_processes_find_what_one_does(world: Path, looked: Path, tmp_path: Path) -> None:
    """Three prompts and three batches, the last not full, are no even shares."""
    script = tmp_path / "two.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.test_validation import JUDGE, LOOKED, config_of, dataset; from training.loop import train\n"
        "import dataclasses\n"
        "if __name__ == '__main__':\n"
        "    world = Path(sys.argv[1])\n"
        "    config = config_of(world, dataclasses.replace(LOOKED, clip=JUDGE))\n"
        "    train(config, dataset=dataset(world), run=Path(sys.argv[2]))\n"
    )
    paths = str(Path(__file__).parents[1])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(world)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "run")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = lines_of(tmp_path / "run"), lines_of(looked)
    assert [line["samples"] for line in ours] == [line["samples"] for line in theirs]
    assert ours[0]["held_out_loss"] == pytest.approx(theirs[0]["held_out_loss"], rel=1e-9)  # the same weights
    of_bins = [[one or 0.0 for one in line["held_out_bins"]] for line in (ours[0], theirs[0])]
    assert of_bins[0] == pytest.approx(of_bins[1], rel=1e-9)
    for one, two in zip(ours, theirs, strict=True):
        assert one["held_out_loss"] == pytest.approx(two["held_out_loss"], rel=1e-4)
        assert one["clip_score"] == pytest.approx(two["clip_score"], abs=1e-2)
        assert one["held_out_bad"] == two["held_out_bad"]
    assert read_release(tmp_path / "run" / "best")["samples"] == read_release(looked / "best")["samples"]


def test_the_vae_is_there_only_while_it_is_needed(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phase = Phase(view="latents", resolution=8, samples=24, batch=12, micro_batch=6, latents="view")
    seen = []
    run = Validation.run

    def watched(self, state, journal):
        run(self, state, journal)
        seen.append((self._parts.denoiser.vae, self._vae is None))

    monkeypatch.setattr(Validation, "run", watched)
    losses = []
    for number, latents in enumerate(("off", "view")):
        validation = dataclasses.replace(LOOKED, latents=latents, prompts=PROMPTS if latents == "off" else ())
        train(config_of(world, validation, phases=(phase,)), dataset=dataset(world), run=tmp_path / str(number))
        losses.append([line["held_out_loss"] for line in lines_of(tmp_path / str(number))])
    assert seen == [(None, False)] * 2 + [(None, True)] * 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # up to the latents' 16 bits


CELLS: dict[str, tuple[str, str, ConnectorConfig, dict]] = {
    "sdxl": (
        "t5", "sdxl",
        TSCConfig(
            in_width=WIDTH, width=WIDTH, blocks=1, heads=2, queries=4, time_channels=8, time_width=8,
            pooled_width=POOLED_WIDTH,
        ), {},
    ),
    "lora and a flow": ("llama", "sana", LaViConfig(in_width=WIDTH, width=WIDTH, hidden_width=8), {"lora": True}),
    "queries": (
        "t5", "unet", QueriesConfig(in_width=WIDTH, width=WIDTH, blocks=1, heads=2, queries=4), {"beside": True},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cells")
    for name in ("t5", "llama", "clip"):
        make_language_model(root / name, name)
    for name, make in (("unet", make_unet), ("sdxl", make_sdxl), ("sana", make_sana)):
        make(root / name, width=WIDTH)
    others = [TokenizerConfig(name=name, model=str(root / name), max_length=LENGTH) for name in ("llama", "clip")]
    of_t5 = tokenizer_id(str(root / "t5"), None)
    make_view(root / "dataset", "small", 8, of_t5, others=others)
    make_view(root / "dataset", "held", 6, of_t5, others=others, first=100)
    return root


@pytest.mark.parametrize("name", CELLS)
def test_whatever_is_trained_is_looked_at_and_not_changed(cells: Path, tmp_path: Path, name: str) -> None:
    """Two steps with dropout in every LoRA, each followed by a validation."""
    language_model, denoiser, connector, more = CELLS[name]

    def model(name: str, **changes: object) -> LanguageModelConfig:
        return LanguageModelConfig(model=str(cells / name), tokenizer=name, max_length=LENGTH, **changes)  # type: ignore[arg-type]

    adapters = [
        LoRAConfig(targets=targets, rank=2, dropout=0.3) if more.get("lora") else None
        for targets in (lora.LLAMA, (lora.ATTENTION,))
    ]
    config = TrainingConfig(
        connector=connector,
        language_model=model(language_model, lora=adapters[0]),
        denoiser=DenoiserConfig(model=str(cells / denoiser), lora=adapters[1]),
        beside=model("clip") if more.get("beside") else None,
        phases=(Phase(view="small", resolution=8, samples=8, batch=4, micro_batch=4, rate=1e-2),),
    )
    validation = dataclasses.replace(LOOKED, every=4)
    for run, settings in (("alone", None), ("looked", validation)):
        train(dataclasses.replace(config, validation=settings), dataset=dataset(cells), run=tmp_path / run)
    assert_same_weights(tmp_path / "alone" / "release", tmp_path / "looked" / "release")
    losses = [line["held_out_loss"] for line in lines_of(tmp_path / "looked")]
    assert len(losses) == 3 and len(set(losses)) == 3


def test_what_cannot_work_is_told_before_the_first_step(world: Path, tmp_path: Path) -> None:
    for changes, said in (
        ({"view": None, "prompts": ()}, "nothing to look at: set its view, or its prompts"),
        ({"prompts": (), "clip": "any"}, "validation.clip scores pictures of validation.prompts, which are empty"),
        ({"best": "clip_score"}, "validation.best is 'clip_score', which is not measured: set validation.clip"),
        ({"every": 0}, "validation.every is 0"),
        ({"guidance": -1.0}, "validation.guidance is -1.0"),
        ({"sampler": "eular"}, "validation.sampler is 'eular': choose one of auto, ddim"),
    ):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(LOOKED, **changes)
    for changes, said in (
        ({"view": "small"}, "validation.view 'small' is trained on: pack a view of samples that are held out"),
        ({"view": "latents"}, "validation.view 'latents' is trained on"),
        ({"view": None, "resolution": 9}, "resolution 9 is not a multiple of 2"),
        ({"resolution": 16}, "view 'held' holds images of 8 px, the phase wants 16"),
        ({"steps": 1001}, "validation.steps is 1001: the denoiser has 1000"),
        ({"clip": str(tmp_path / "none")}, r"^validation.clip '.*none' cannot be loaded: .*"),
    ):
        with pytest.raises(ValueError, match=said):
            train(
                config_of(world, dataclasses.replace(LOOKED, **changes)), dataset=dataset(world), run=tmp_path / "run"
            )
    assert not (tmp_path / "run" / "log.jsonl").exists()
    with pytest.raises(FileNotFoundError, match="has no view 'other'"):
        other = dataclasses.replace(LOOKED, view="other")
        train(config_of(world, other), dataset=dataset(world), run=tmp_path / "run")


def test_samples_that_are_trained_on_are_no_held_out_ones(world: Path, tmp_path: Path) -> None:
    name = tokenizer_id(str(world / "models" / "t5"), None)
    make_view(tmp_path, "small", 24, name)
    make_view(tmp_path, "held", 9, name, first=20)
    config = config_of(world, phases=config_of(world).phases[:1])
    with pytest.raises(ValueError, match=r"4 of the 9 samples of validation.view 'held' are in view 'small' too"):
        train(config, dataset=Folder(url=str(tmp_path)), run=tmp_path / "run")
    make_view(tmp_path / "broken", "small", 24, name)
    make_view(tmp_path / "broken", "held", 2, name, first=50, broken=(0, 1))
    with pytest.raises(
        ValueError, match=r"none of the 2 samples of validation.view 'held' can be used: OSError: image"
    ):
        train(config, dataset=Folder(url=str(tmp_path / "broken")), run=tmp_path / "other")


def test_a_view_of_another_tokenizer_is_refused(world: Path, tmp_path: Path) -> None:
    make_view(tmp_path, "small", 24, tokenizer_id(str(world / "models" / "t5"), None))
    make_view(tmp_path, "held", 9, "another", first=100)
    with pytest.raises(ValueError, match="view 'held': tokens 't5' were made by another"):
        config = config_of(world, phases=config_of(world).phases[:1])
        train(config, dataset=Folder(url=str(tmp_path)), run=tmp_path / "run")


def test_figures_that_were_measured_otherwise_are_not_compared(world: Path, tmp_path: Path) -> None:
    view = View.open(dataset(world), "held")

    def looks(**changes: object) -> Validation:
        found = Validation.__new__(Validation)
        found._settings, found._view, found._run = dataclasses.replace(LOOKED, **changes), view, tmp_path
        found._how = found._measured_how()
        return found

    (tmp_path / "best").mkdir()
    said = {"validation": {"metric": "held_out_loss", "held_out_loss": 0.5, "how": looks()._how}}
    (tmp_path / "best" / "connector.json").write_text(json.dumps(said))
    assert [looks()._is_best(value, False) for value in (0.4, 0.5, 0.6, None)] == [True, False, False, False]
    assert looks()._is_best(0.6, True)  # the first of a run
    assert not looks(prompts=("red",), every=3)._is_best(0.6, False)
    for changes in ({"seed": 1}, {"batch": 3}, {"samples": 5}, {"clip": JUDGE, "best": "clip_score"}):
        assert looks(**changes)._is_best(0.6, False)


def test_a_grid_is_as_square_as_can_be() -> None:
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] + np.zeros((5, 2, 2, 3), dtype=np.uint8) + 1
    grid = grid_of(pictures)
    assert grid.shape == (4, 6, 3) and grid[::2, ::2, 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert grid_of(pictures[:1]).shape == (2, 2, 3)


def test_when_it_is_due() -> None:
    looks = Validation.__new__(Validation)
    looks._settings, looks._config = dataclasses.replace(LOOKED, every=10), SimpleNamespace(samples=44)  # type: ignore[assignment]
    found, last = [], -1
    for samples in range(0, 45, 4):
        if looks.due(State(samples=samples, validated=last)):
            found.append(last := samples)
    assert found == [0, 12, 20, 32, 40, 44]
    assert not looks.due(State(samples=44, validated=44)) and looks.due(State(samples=12, validated=8))
