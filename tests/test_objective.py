"""The maths of a step, against diffusers and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.denoisers.files import levels_of
from training.objective import (
    BINS,
    NoiseLevels,
    TimestepConfig,
    add_noise,
    binned,
    min_snr_weights,
    noise_at,
    rng,
    sample_losses,
    target_of,
    timesteps_at,
)


def test_randomness_depends_on_every_part_of_its_key_and_on_nothing_else() -> None:
    first = rng(1, 0, 5, "noise").random(4)
    np.random.seed(0), torch.manual_seed(0)
    rng(1, 0, 4, "noise").random(10_000)
    assert np.array_equal(rng(1, 0, 5, "noise").random(4), first)
    for other in (rng(2, 0, 5, "noise"), rng(1, 1, 5, "noise"), rng(1, 0, 6, "noise"), rng(1, 0, 5, "drop")):
        assert not np.isin(other.random(4), first).any()
    assert noise_at(1, 0, 2**40, (4, 3, 3)).dtype == np.float32


def test_noise_is_standard_normal_over_positions() -> None:
    noise = np.stack([noise_at(0, 0, position, (4, 4, 4)) for position in range(2000)])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert np.abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_uniform_timesteps_are_stratified(batch: int) -> None:
    for start in range(0, 20 * batch, batch):
        times = np.sort(timesteps_at(TimestepConfig(), 0, 0, start, batch, 1000))
        assert (np.abs(times - (np.arange(batch) + 0.5) * 1000 / batch) <= 500 / batch + 1).all()


def test_timesteps_are_uniform_and_their_order_is_random() -> None:
    drawn = np.stack([timesteps_at(TimestepConfig(), 0, 0, start * 8, 8, 1000) for start in range(500)])
    assert drawn.min() < 5 and drawn.max() > 994
    assert np.abs(drawn.mean(0) - 499.5).max() < 50  # no slot of the batch is fixed to a level


def test_high_noise_takes_its_share() -> None:
    config = TimestepConfig(kind="high_noise", share=0.7, floor=0.7)
    drawn = np.concatenate([timesteps_at(config, 0, 0, start * 10, 10, 1000) for start in range(300)])
    assert (drawn >= 700).mean() == pytest.approx(0.7 + 0.3 * 0.3, abs=0.01)
    assert drawn[drawn < 700].mean() == pytest.approx(350, abs=20)
    plain = TimestepConfig(kind="high_noise", share=0.0)
    assert np.array_equal(timesteps_at(plain, 0, 0, 0, 10, 1000), timesteps_at(TimestepConfig(), 0, 0, 0, 10, 1000))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noising_and_target_are_those_of_diffusers(prediction_type: str) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(prediction_type=prediction_type, rescale_betas_zero_snr=True)
    levels, times = levels_of(dict(scheduler.config), "any"), torch.tensor([0, 500, 999])
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(
        add_noise(latents, noise, times, levels), scheduler.add_noise(latents, noise, times), atol=1e-6
    )
    expected = noise if prediction_type == "epsilon" else scheduler.get_velocity(latents, noise, times)
    assert torch.allclose(target_of(latents, noise, times, levels), expected, atol=1e-6)


def test_losses_are_per_sample_in_float32() -> None:
    losses = sample_losses(torch.ones(2, 1, 2, 2, dtype=torch.float16), torch.tensor([1.0, 3.0])[:, None, None, None])
    assert losses.tolist() == [0.0, 4.0] and losses.dtype == torch.float32


def test_min_snr_weights() -> None:
    alphas, times = torch.tensor([0.99, 0.5, 0.0]), torch.arange(3)  # signal to noise 99, 1, 0

    def weights(kind: str) -> list[float]:
        levels = NoiseLevels(kind=kind, signal=alphas.sqrt(), deviation=(1 - alphas).sqrt(), times=times.float())
        return min_snr_weights(5, times, levels).tolist()

    assert weights("epsilon") == pytest.approx([5 / 99, 1, 1], rel=1e-4)
    assert weights("v_prediction") == pytest.approx([5 / 100, 1 / 2, 0], rel=1e-4)


def test_flow_is_that_of_diffusers() -> None:
    """Noise levels, what the network is told, and noising, with SANA's shift of 3; levels run the other way there."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    levels = levels_of({"prediction_type": "flow_prediction", "flow_shift": 3.0}, "any")
    assert torch.allclose(
        levels.deviation.flip(0), scheduler.sigmas[:-1] if len(scheduler.sigmas) > 1000 else scheduler.sigmas
    )
    assert torch.allclose(levels.times.flip(0), scheduler.timesteps, atol=1e-3)
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0, 500, 999])
    expected = scheduler.scale_noise(latents, scheduler.timesteps.flip(0)[times], noise)
    assert torch.allclose(add_noise(latents, noise, times, levels), expected, atol=1e-5)
    assert torch.equal(target_of(latents, noise, times, levels), noise - latents)


def test_bins_sum_what_counts() -> None:
    sums = binned(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 5, 999]), 1000)
    assert sums[0].tolist() == [1.0] + [0.0] * (BINS - 2) + [4.0]
    assert sums[1].sum() == 2


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"timesteps.share is 1.5"):
        TimestepConfig(share=1.5)
    with pytest.raises(ValueError, match=r"any predicts sample: only epsilon, v_prediction and flow_prediction"):
        levels_of(
            {"_class_name": "DDIMScheduler", "prediction_type": "sample", "beta_start": 0.1, "beta_end": 0.2}, "any"
        )
