"""The maths of a step, against diffusers and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from training.denoisers.files import levels_of
from training.objective import (
    BINS,
    LOWEST_SNR,
    NoiseLevels,
    TimestepConfig,
    add_noise,
    binned,
    loss_weights,
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
        times = np.sort(timesteps_at(TimestepConfig(), 0, 0, start, batch, 1000)[:, 0])
        assert (np.abs(times - (np.arange(batch) + 0.5) * 1000 / batch) <= 500 / batch + 1).all()


def test_timesteps_are_uniform_and_their_order_is_random() -> None:
    drawn = np.stack([timesteps_at(TimestepConfig(), 0, 0, start * 8, 8, 1000) for start in range(500)])
    assert drawn.min() < 5 and drawn.max() > 994
    assert np.abs(drawn.mean(0) - 499.5).max() < 50  # no slot of the batch is fixed to a level


def test_several_timesteps_a_sample_are_stratified_over_the_batch_and_within_it() -> None:
    """A batch of 6 with 4 each fills 24 slices of the distribution, and a sample each quarter, in no fixed order."""
    uniform = timesteps_at(TimestepConfig(), 3, 1, 12, 6, 2400, per_sample=4)
    assert uniform.shape == (6, 4)
    assert np.array_equal(np.sort(uniform.ravel()) // 100, np.arange(24))
    assert np.array_equal(uniform // 600, np.tile(np.arange(4), (6, 1)))
    assert len({tuple(np.argsort(column)) for column in uniform.T}) > 1
    # The same draws through other distributions; of a mixture, each sample gets its share of both parts.
    middle = timesteps_at(TimestepConfig(kind="logit_normal"), 3, 1, 12, 6, 2400, per_sample=4)
    assert np.array_equal(np.argsort(middle.ravel()), np.argsort(uniform.ravel()))
    high = timesteps_at(TimestepConfig(kind="high_noise", share=0.5, floor=0.6), 3, 1, 12, 6, 2400, per_sample=4)
    assert (high[:, :2] >= 0.6 * 2400).all() and np.array_equal(high[:, 2] // 1200, np.zeros(6))


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (0.8, 0.5)])
def test_logit_normal_has_its_quantiles(mean: float, deviation: float) -> None:
    """Against the closed form, and against draws of diffusers' training scripts."""
    from diffusers.training_utils import compute_density_for_timestep_sampling
    from scipy.stats import norm

    config = TimestepConfig(kind="logit_normal", mean=mean, deviation=deviation)
    drawn = np.concatenate([timesteps_at(config, 0, 0, start * 64, 64, 1000)[:, 0] for start in range(64)])
    shares = np.array([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    expected = 1000 / (1 + np.exp(-(mean + deviation * norm.ppf(shares))))
    assert np.abs(np.quantile(drawn, shares) - expected).max() < 8
    theirs = compute_density_for_timestep_sampling(
        "logit_normal", 200_000, logit_mean=mean, logit_std=deviation, generator=torch.Generator().manual_seed(0)
    )
    assert np.abs(np.quantile(drawn, shares) - 1000 * np.quantile(theirs.numpy(), shares)).max() < 10
    assert drawn.min() >= 0 and drawn.max() <= 999


def test_extreme_logit_normals_stay_inside() -> None:
    for mean in (-80.0, 80.0):
        drawn = timesteps_at(TimestepConfig(kind="logit_normal", mean=mean, deviation=9.0), 0, 0, 0, 500, 1000)
        assert set(drawn.ravel()) == {0 if mean < 0 else 999}


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


def test_loss_weights() -> None:
    alphas, times = torch.tensor([0.99, 0.5, 0.0]), torch.arange(3)  # signal to noise 99, 1, 0

    def weights(weighting: str, kind: str) -> list[float]:
        levels = NoiseLevels(kind=kind, signal=alphas.sqrt(), deviation=(1 - alphas).sqrt(), times=times.float())
        return loss_weights(weighting, 5, times, levels).tolist()

    assert weights("plain", "epsilon") == weights("plain", "flow_prediction") == [1, 1, 1]
    assert weights("min_snr", "epsilon") == pytest.approx([5 / 99, 1, 1], rel=1e-4)
    assert weights("min_snr", "v_prediction") == pytest.approx([5 / 100, 1 / 2, 0], rel=1e-4)
    assert weights("debiased", "epsilon") == pytest.approx([99**-0.5, 1, 4e-5**-0.5], rel=1e-4)
    assert weights("debiased", "v_prediction") == pytest.approx([99**0.5 / 100, 1 / 2, 0], rel=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_weights_are_those_of_an_independent_formula(kind: str) -> None:
    """On DDPM's betas, whose last level is the lowest that debiased weights were found with: against the signal-to-noise ratio
    by which diffusers' scripts weigh, in float64, and against losses of x_0 that predictions are turned into.
    """
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, prediction_type=kind)
    levels, times = levels_of(dict(scheduler.config), "any"), torch.arange(1000)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    snr = compute_snr(scheduler, times)
    assert LOWEST_SNR <= float(snr.min()) < 1.01 * LOWEST_SNR  # never clamped here
    one = torch.ones(1000, dtype=torch.float64)
    min_snr = torch.stack([snr, 5 * one], dim=1).min(dim=1).values / (snr if kind == "epsilon" else snr + 1)
    assert torch.allclose(loss_weights("min_snr", 5, times, levels).double(), min_snr, rtol=1e-3)
    # An error e of the prediction is one of sigma / alpha e (epsilon) or sigma e (v) in x_0, and of 1 / alpha times that of v
    # in epsilon: the debiased weight of the error that it makes in epsilon must be the same for both.
    alpha, sigma = scheduler.alphas_cumprod.sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    of_epsilon = torch.ones_like(one) if kind == "epsilon" else alpha
    debiased = of_epsilon.square() * (sigma / alpha)
    assert torch.allclose(loss_weights("debiased", 5, times, levels).double(), debiased, rtol=1e-3)


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
    with pytest.raises(ValueError, match=r"any predicts sample: only epsilon, v_prediction and flow_prediction"):
        levels_of(
            {"_class_name": "DDIMScheduler", "prediction_type": "sample", "beta_start": 0.1, "beta_end": 0.2}, "any"
        )
