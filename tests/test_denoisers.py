"""The frozen diffusion model: latents and pixels as diffusers makes them, gradient to the tokens alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.vaes import encode_pixels
from tests.tiny_denoisers import make_pixart, make_sana, make_sdxl, make_unet, random_conditioning, random_latents
from tests.training_fixtures import WIDTH, make_denoiser
from training.bridge import Conditioning
from training.denoisers import Denoiser, DenoiserConfig


@pytest.fixture(scope="module", params=[False, True], ids=["tiny", "kl"])
def denoiser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Denoiser:
    folder = make_denoiser(tmp_path_factory.mktemp("base"), drawn=request.param)
    return DenoiserConfig(model=str(folder)).load()


def test_latents_are_scaled_and_shaped(denoiser: Denoiser) -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert denoiser.latent_shape(8) == (4, 4, 4) and denoiser.latent_shape(8, 12) == (4, 4, 6)
    latents = denoiser.encode_images(pixels)
    encoded = denoiser.vae.encode(pixels)
    raw = encoded.latent_dist.mean if denoiser.vae_facts.is_drawn else encoded.latents
    assert torch.allclose(latents, raw * denoiser.vae.config.scaling_factor)
    assert torch.allclose(denoiser.decode(latents), denoiser.vae.decode(raw).sample.clamp(-1, 1), atol=1e-6)
    noise = torch.ones(2, 4, 4, 4)
    drawn = denoiser.encode_images(pixels, noise)
    expected = latents + encoded.latent_dist.std * 0.5 if denoiser.vae_facts.is_drawn else latents
    assert torch.allclose(drawn, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"resolution 9 is not a multiple of 2, the VAE's patch: choose another"):
        denoiser.latent_shape(9)
    with pytest.raises(ValueError, match="resolution 9x8 is not a multiple of 2"):
        denoiser.latent_shape(8, 9)


def test_gradient_reaches_tokens_and_no_weight(denoiser: Denoiser) -> None:
    tokens = torch.randn(2, 3, WIDTH, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    denoiser.predict(
        torch.randn(2, 4, 4, 4), torch.tensor([1, 900]), Conditioning(tokens, mask)
    ).square().sum().backward()
    assert (
        tokens.grad is not None and tokens.grad[0, :2].any() and not tokens.grad[0, 2].any() and tokens.grad[1, 2].any()
    )
    assert all(p.grad is None for module in (denoiser.network, denoiser.vae) for p in module.parameters())


def test_schedule_and_identity(denoiser: Denoiser) -> None:
    assert denoiser.steps == 1000 and denoiser.levels.signal[-1] == 0 and denoiser.prediction_type == "v_prediction"
    assert denoiser.identity()["prediction_type"] == "v_prediction" and denoiser.width == WIDTH


def test_a_cast_denoiser_is_cast_throughout(tmp_path: Path) -> None:
    half = DenoiserConfig(model=str(make_denoiser(tmp_path)), dtype="bfloat16", gradient_checkpointing=True).load()
    assert {p.dtype for m in (half.network, half.vae) for p in m.parameters()} == {torch.bfloat16}
    tokens = torch.randn(1, 3, WIDTH, requires_grad=True)
    predicted = half.predict(torch.randn(1, 4, 4, 4), torch.tensor([5]), Conditioning(tokens, None))
    predicted.float().sum().backward()
    assert predicted.dtype == torch.bfloat16 and tokens.grad is not None and tokens.grad.any()
    assert half.decode(half.encode_images(torch.zeros(1, 3, 8, 8))).dtype == torch.float32


def test_what_cannot_be_driven_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"predicts sample: only epsilon, v_prediction and flow_prediction"):
        DenoiserConfig(model=str(make_denoiser(tmp_path, prediction_type="sample"))).load()
    with pytest.raises(ValueError, match=r"denoiser.dtype is 'int8'"):
        DenoiserConfig(model="x", dtype="int8")  # type: ignore[arg-type]


def test_stored_latents_are_drawn_as_pictures_are(denoiser: Denoiser) -> None:
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    parts = [part for part in encode_pixels(denoiser.vae, pixels) if part is not None]
    for drawn in (noise, None):
        assert torch.allclose(denoiser.draw_stored(torch.cat(parts, 1), drawn), denoiser.encode_images(pixels, drawn))


def test_without_its_vae_it_still_knows_its_latents(denoiser: Denoiser) -> None:
    bare = denoiser.config.load(with_vae=False).to("cpu")
    assert bare.vae is None and bare.vae_facts == denoiser.vae_facts and bare.latent_shape(8) == (4, 4, 4)


@pytest.fixture(scope="module", params=[make_unet, make_sdxl, make_pixart, make_sana], ids=lambda make: make.__name__)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(request.param(tmp_path_factory.mktemp("family")))


def test_checkpointing_computes_twice_and_changes_nothing(family: str) -> None:
    found = []
    for checkpointing in (False, True):
        denoiser = DenoiserConfig(model=family, gradient_checkpointing=checkpointing).load(with_vae=False)
        attention = next(m for name, m in denoiser.network.named_modules() if name.endswith("attn2"))
        calls: list[int] = []
        attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        given = random_conditioning(denoiser)
        predicted = denoiser.predict(random_latents(denoiser), denoiser.levels.times[[3, 700]], given)
        predicted.square().sum().backward()
        assert len(calls) == (2 if checkpointing else 1)
        found.append((predicted, given.tokens.grad))
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


def test_a_network_in_bfloat16_is_near_the_exact_one(family: str) -> None:
    exact, half = (DenoiserConfig(model=family, dtype=dtype).load(with_vae=False) for dtype in ("float32", "bfloat16"))
    given, latents, times = random_conditioning(exact), random_latents(exact), exact.levels.times[[3, 700]]
    expected, found = (denoiser.predict(latents, times, given) for denoiser in (exact, half))
    assert found.dtype == torch.bfloat16 and {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05
    found.float().square().sum().backward()
    assert given.tokens.grad is not None and bool(given.tokens.grad.isfinite().all())


def test_what_no_file_drives_is_told_with_what_is_known(tmp_path: Path) -> None:
    path = make_unet(tmp_path) / "unet" / "config.json"
    said = json.loads(path.read_text())
    known = "choose a model with an SD 1.x, SD 2.x or SDXL U-Net, or a PixArt or SANA transformer"
    for change, told in (
        ({"_class_name": "FluxTransformer2DModel"}, "holds a FluxTransformer2DModel, which no file"),
        ({"addition_embed_type": "text"}, "holds a UNet2DConditionModel with 'text' added, which no file"),
    ):
        path.write_text(json.dumps(said | change))
        with pytest.raises(ValueError, match=rf"{told} of training/denoisers drives: {known}$"):
            DenoiserConfig(model=str(tmp_path)).load()
    path.write_text(json.dumps(said | {"in_channels": 9}))
    with pytest.raises(ValueError, match=r"reads 9 channels and its VAE gives 4, so it wants more than a text"):
        DenoiserConfig(model=str(tmp_path)).load()


def test_models_that_want_more_than_a_text_are_refused(tmp_path: Path) -> None:
    make_denoiser(tmp_path)
    (tmp_path / "model_index.json").write_text('{"requires_aesthetics_score": true}')
    with pytest.raises(
        ValueError, match=r"wants more than a text \(a class, or an aesthetic score, as SDXL's refiner\)"
    ):
        DenoiserConfig(model=str(tmp_path)).load()
    (tmp_path / "model_index.json").unlink()
    facts = tmp_path / "unet" / "config.json"
    facts.write_text(facts.read_text().replace('"class_embed_type": null', '"class_embed_type": "projection"'))
    with pytest.raises(ValueError, match="wants more than a text"):
        DenoiserConfig(model=str(tmp_path)).load()
