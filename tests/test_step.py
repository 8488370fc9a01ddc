"""One step: several timesteps an encoding, what is not finite, half precision's scaler, and no generator of the process."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.captions import TokenizerConfig, tokenizer_id
from pipeline.storage import Folder
from tests.tiny_denoisers import POOLED_WIDTH, make_sdxl
from tests.tiny_language_models import WIDTH, make_language_model
from tests.training_fixtures import LENGTH, make_view, make_world, training_config
from training import loop, step
from training.batches import Batches
from training.bridge import Conditioning
from training.configuration import DenoiserConfig, LanguageModelConfig, LoRAConfig, Phase, TrainingConfig
from training.connectors import LaViConfig, TSCConfig
from training.encoding import Encoder, encode
from training.loop import train
from training.objective import add_noise, loss_weights, target_of
from training.parts import Parts, batch_config, load_parts
from training.processes import start_processes
from training.views import open_views


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SDXL with its own text beside the connector's, and a view whose second sample is broken."""
    root = tmp_path_factory.mktemp("sdxl")
    for name in ("t5", "clip"):
        make_language_model(root / name, name)
    make_sdxl(root / "sdxl", width=WIDTH)
    clip = TokenizerConfig(name="clip", model=str(root / "clip"), max_length=LENGTH)
    make_view(root / "dataset", "small", 4, tokenizer_id(str(root / "t5"), None), others=[clip], broken=(1,))
    return root


def sdxl_config(root: Path, **changes: Any) -> TrainingConfig:
    lora = LoRAConfig(targets=(r".*SelfAttention\.[qv]",), rank=2)
    settings = {
        "connector": TSCConfig(
            in_width=WIDTH, width=WIDTH, blocks=1, heads=2, queries=4, time_channels=8, time_width=8,
            pooled_width=POOLED_WIDTH,
        ),
        "language_model": LanguageModelConfig(model=str(root / "t5"), tokenizer="t5", max_length=LENGTH, lora=lora),
        "denoiser": DenoiserConfig(model=str(root / "sdxl")),
        "beside": LanguageModelConfig(model=str(root / "clip"), tokenizer="clip", max_length=LENGTH),
        "phases": (Phase(view="small", resolution=8, samples=8, batch=4, micro_batch=2),),
        "weighting": "min_snr",
        "gamma": 0.5,
        "clip": None,
    }  # fmt: skip
    return TrainingConfig(**{**settings, **changes})  # type: ignore[arg-type]


def explicit_gradient(parts: Parts, batches: list[Any], times: int) -> tuple[list[torch.Tensor], float, int]:
    """The gradient by a loop over samples and timesteps, one forward pass each; the mean loss, and the number of terms."""
    levels, total, plain, count = parts.denoiser.levels, torch.zeros(()), 0.0, 0
    for batch in batches:
        for n in range(len(batch.positions)):
            assert parts.beside is not None
            hidden, mask, _ = parts.language_model.encode_where_finite(batch.ids[n : n + 1], ["one"])
            tokens, seen, _ = parts.beside.encode_where_finite(batch.beside_ids[n : n + 1], ["one"])
            drawn = None if batch.posterior_noise is None else batch.posterior_noise[n : n + 1]
            latents = parts.denoiser.encode_images(batch.pixels[n : n + 1], drawn).float()
            for k in range(times if batch.weights[n] else 0):
                time = batch.timesteps[n * times + k][None]
                noise, told = batch.noise[n * times + k][None], levels.times[time]
                conditioning = parts.bridge(hidden, mask, told, Conditioning(tokens, seen))
                predicted = parts.denoiser.predict(
                    add_noise(latents, noise, time, levels), told, conditioning, batch.sizes[n : n + 1]
                )
                loss = (predicted - target_of(latents, noise, time, levels)).square().mean()
                total = total + loss * loss_weights("min_snr", 0.5, time, levels)[0]
                plain, count = plain + float(loss), count + 1
    return list(torch.autograd.grad(total / count, list(parts.bridge.parameters()))), plain / count, count


@pytest.mark.parametrize("times", [1, 3])
def test_several_timesteps_an_encoding_give_the_gradient_of_a_loop_over_them(
    sdxl: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """With SDXL's sizes and pooled text, tokens beside, a LoRA in the language model, min-SNR and a broken sample."""
    config = sdxl_config(sdxl, timesteps_per_encoding=times)
    parts = load_parts(config, start_processes(config))
    with torch.no_grad():  # a LoRA begins at zero, where half of it has no gradient
        for parameter in parts.bridge.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    view = open_views(config, Folder(url=str(sdxl / "dataset")))[0]
    with Batches(view, batch_config(config, 0, parts)) as source:
        batches = [next(source), next(source)]
    expected, loss, count = explicit_gradient(parts, batches, times)
    assert count == 3 * times
    runs: list[int] = []
    for module in (parts.language_model.module, parts.denoiser.vae.encoder):
        module.register_forward_hook(lambda *_: runs.append(1))
    found: list[torch.Tensor] = []

    def keep(config, parts, correction, rate):
        found.extend(parameter.grad * correction for parameter in parts.bridge.parameters())
        return 1.0, True

    monkeypatch.setattr(step, "_update", keep)
    asked = threading.Event()
    outcome = step.take_step(config, 0, parts, Encoder(parts, iter(batches), "0/0", ahead=False), 1e-3, asked)
    assert len(runs) == 4  # twice each, however many timesteps
    assert (outcome.unusable, [bad.key for bad in outcome.bad], len(outcome.keys)) == (1, ["0001"], 4)
    assert float(outcome.bins[1].sum()) == count
    assert float(outcome.bins[0].sum() / outcome.bins[1].sum()) == pytest.approx(loss, rel=1e-5)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()) + 1e-7)


def test_each_timestep_has_its_own_noise_wherever_it_is_drawn(sdxl: Path) -> None:
    """The first is that of one alone; and two processes draw what one does."""
    drawn, view = {}, open_views(sdxl_config(sdxl), Folder(url=str(sdxl / "dataset")))[0]
    parts = load_parts(sdxl_config(sdxl), start_processes(sdxl_config(sdxl)))
    for times in (1, 3):
        config = batch_config(sdxl_config(sdxl, timesteps_per_encoding=times), 0, parts)
        with Batches(view, config) as source, Batches(view, replace(config, world=2, rank=1)) as second:
            drawn[times], there, here = next(source), next(source), next(second)
        assert here.positions == there.positions == [2, 3]
        assert torch.equal(here.noise, there.noise) and torch.equal(here.timesteps, there.timesteps)
    assert torch.equal(drawn[3].noise[::3], drawn[1].noise)
    assert len({tuple(one.ravel().tolist()) for one in drawn[3].noise}) == 6
    found = encode(parts, drawn[3], "draws")
    for one in (found.latents, found.hidden, found.mask, found.sizes, found.weights):
        assert len(one) == 6 and torch.equal(one[0], one[2]) and torch.equal(one[3], one[5])


def global_states() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]


def test_steps_draw_from_no_generator_of_the_process(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose draws come from torch's generator: it is set before and put back afterwards."""
    config = training_config(
        world, connector=LaViConfig(in_width=16, width=16, dropout=0.2), phases=training_config(world).phases[:1]
    )
    taken, take_step = [], step.take_step

    def watched(*given, **named):
        before = global_states()
        with monkeypatch.context() as poison:
            for where, names in (
                (torch, ("randn", "rand", "randn_like", "rand_like", "randint", "randperm", "normal")),
                (np.random, ("rand", "randn", "random", "normal", "permutation", "shuffle", "randint")),
                (random, ("random", "randint", "choice", "shuffle", "gauss")),
            ):
                for name in names:
                    poison.setattr(where, name, None)
            outcome = take_step(*given, **named)
        assert global_states() == before
        taken.append(float(outcome.bins[0].sum()))
        return outcome

    monkeypatch.setattr(loop, "take_step", watched)
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
        train(config, dataset=Folder(url=str(world / "dataset")), run=tmp_path / str(seed))
        losses.append(taken.copy())
        taken.clear()
    assert losses[0] == losses[1] and len(losses[0]) == 4


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Makes one gradient infinite in these steps, counted from 1, while the loss is finite."""
    check, seen = step._check_reached, []

    def spoiled(bridge):
        check(bridge)
        seen.append(1)
        if len(seen) in steps:
            next(bridge.parameters()).grad[0] = torch.inf

    monkeypatch.setattr(step, "_check_reached", spoiled)


def test_gradients_that_are_not_finite_are_skipped_with_their_keys(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Folder(url=str(world / "dataset"))
    config = training_config(world, phases=training_config(world).phases[:1], skip_budget=1)
    with monkeypatch.context() as patch:
        spoil_gradients(patch, {2})
        result = train(config, dataset=dataset, run=tmp_path / "once")
    assert (result.steps, result.skipped, result.samples) == (4, 1, 48)
    with monkeypatch.context() as patch:
        spoil_gradients(patch, {2, 3})
        with pytest.raises(FloatingPointError, match=r"2 steps were not finite, skip_budget is 1: see skipped.jsonl"):
            train(config, dataset=dataset, run=tmp_path / "twice")
    lines = [json.loads(line) for line in (tmp_path / "twice" / "skipped.jsonl").read_text().splitlines()]
    assert [line["positions"] for line in lines] == [[12, 24], [24, 36]]
    assert all(line["loss"] > 0 and line["grad_norm"] is None for line in lines)
    parts = load_parts(config, start_processes(config))
    with Batches(open_views(config, dataset)[0], batch_config(config, 0, parts)) as source:
        keys = [key for _ in range(6) for key in next(source).keys]
    assert [line["keys"] for line in lines] == [keys[12:24], keys[24:36]]


def with_scaler(monkeypatch: pytest.MonkeyPatch, scale: float) -> torch.amp.GradScaler:
    """Lets runs on the CPU scale their gradients as fp16 does, from `scale` on: the real scaler, halved when it overflows."""
    start, scaler = start_processes, torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)

    def started(config):
        accelerator = start(config)
        accelerator.scaler = scaler
        monkeypatch.setattr(
            accelerator, "unscale_gradients", lambda: scaler.unscale_(accelerator._optimizers[-1].optimizer)
        )
        return accelerator

    monkeypatch.setattr(loop, "start_processes", started)
    return scaler


def test_a_scaler_that_overflows_lowers_itself_and_nothing_is_skipped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Folder(url=str(world / "dataset"))
    config = training_config(world, phases=training_config(world).phases[:1], skip_budget=0)
    plain = train(config, dataset=dataset, run=tmp_path / "plain").release
    scaler = with_scaler(monkeypatch, 16.0)
    scaled = train(config, dataset=dataset, run=tmp_path / "scaled").release
    assert scaler.get_scale() == 32.0  # after three good steps
    one, other = ((release / "connector.safetensors").read_bytes() for release in (plain, scaled))
    assert one == other  # powers of two
    spoil_gradients(monkeypatch, {1, 2})
    scaler.update(16.0)
    assert train(config, dataset=dataset, run=tmp_path / "lowered").skipped == 0
    assert scaler.get_scale() == 4.0


def test_a_scaler_with_nothing_left_to_lower_counts_skips(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients that no scale makes finite: 2, 1, then each step is skipped, until the budget ends the run."""
    scaler = with_scaler(monkeypatch, 2.0)
    spoil_gradients(monkeypatch, set(range(1, 99)))
    phases = (replace(training_config(world).phases[0], samples=240),)
    with pytest.raises(FloatingPointError, match="3 steps were not finite, skip_budget is 2"):
        train(
            training_config(world, phases=phases, skip_budget=2),
            dataset=Folder(url=str(world / "dataset")),
            run=tmp_path,
        )
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["positions"][0] for line in lines] == [24, 36, 48]
    assert scaler.get_scale() < 1
