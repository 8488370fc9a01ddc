"""Generation: a pure function of prompt and seed, guided against the true empty prompt, connector at every step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_denoisers import make_unet
from tests.training_fixtures import WIDTH, language_model_config, make_world, tsc_config
from training.bridge import Bridge
from training.connectors import MLPConfig, TSCConfig
from training.denoisers import Denoiser, DenoiserConfig
from training.generation import generate, start_noise
from training.language_models import LanguageModel
from training.samplers import scheduler_of

PROMPTS = ["red round", "blue square big", "", "green"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def language_model(root: Path) -> LanguageModel:
    return language_model_config(root).load()


@pytest.fixture(scope="module")
def denoiser(root: Path) -> Denoiser:
    denoiser = DenoiserConfig(model=str(root / "models" / "base")).load()
    for name, parameter in denoiser.network.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out" in name:
            parameter.data *= 10  # random weights hardly listen to the text
    return denoiser


@pytest.fixture(scope="module")
def bridge() -> Bridge:
    torch.manual_seed(0)
    bridge = Bridge(tsc_config()).eval()
    for parameter in bridge.parameters():
        parameter.data *= 3
    return bridge


def draw(language_model: LanguageModel, bridge: Bridge | None, denoiser: Denoiser, **changes: object) -> np.ndarray:
    settings = {"prompts": PROMPTS, "seeds": [1, 2, 3, 4], "resolution": 8, "steps": 4, "guidance": 3.0, "batch": 4}
    parts = {"language_model": language_model, "bridge": bridge, "denoiser": denoiser}
    return generate(**parts, **{**settings, **changes})  # type: ignore[arg-type]


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


def test_an_image_depends_on_prompt_and_seed_alone(
    language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser
) -> None:
    images = draw(language_model, bridge, denoiser)
    assert images.shape == (4, 8, 8, 3) and images.dtype == np.uint8 and images.std() > 5
    assert np.array_equal(images, draw(language_model, bridge, denoiser))
    assert close(images, draw(language_model, bridge, denoiser, batch=3))
    assert not close(images, draw(language_model, bridge, denoiser, prompts=["left small"] * 4))
    turned = draw(language_model, bridge, denoiser, prompts=PROMPTS[::-1], seeds=[4, 3, 2, 1], batch=2)
    assert close(images, turned[::-1])
    assert not close(images, draw(language_model, bridge, denoiser, seeds=[5, 6, 7, 8]))
    assert not np.array_equal(start_noise(1, (4, 4, 4)), start_noise(2, (4, 4, 4)))


def test_guidance_is_against_the_empty_prompt(
    language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser
) -> None:
    """The empty prompt is therefore the one that guidance does not change."""
    plain, guided = (draw(language_model, bridge, denoiser, guidance=g) for g in (1.0, 50.0))
    assert close(plain[2], guided[2])
    assert not np.array_equal(plain[[0, 1, 3]], guided[[0, 1, 3]])


def test_it_is_the_pipeline_of_diffusers(language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser) -> None:
    """Without a connector: what `StableDiffusionPipeline` draws from the same embeddings and noise."""
    from diffusers import StableDiffusionPipeline

    seen = LanguageModel(replace(language_model.config, pads="seen"), language_model.tokenizer, language_model.module)
    pipeline = StableDiffusionPipeline(
        vae=denoiser.vae, text_encoder=None, tokenizer=None, unet=denoiser.network, scheduler=scheduler_of(denoiser),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    hidden = seen.encode(seen.tokenize([*PROMPTS, ""]))[0]
    assert not close(draw(seen, None, denoiser), draw(seen, None, denoiser, guidance=4.0))  # so that guidance shows
    expected = pipeline(
        prompt_embeds=hidden[:4], negative_prompt_embeds=hidden[4:].expand(4, -1, -1), num_inference_steps=4,
        guidance_scale=3.0, height=8, width=8, output_type="np",
        latents=torch.from_numpy(np.stack([start_noise(seed, (4, 4, 4)) for seed in (1, 2, 3, 4)])),
    ).images  # fmt: skip
    assert close(draw(seen, None, denoiser), (expected * 255).round().astype(np.uint8))


def test_the_connector_runs_at_every_step(
    language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    at = bridge.connector.at

    def spy(text: torch.Tensor, mask: torch.Tensor, timestep: torch.Tensor) -> object:
        seen.append(timestep.unique().tolist())
        return at(text, mask, timestep)

    monkeypatch.setattr(bridge.connector, "at", spy)
    draw(language_model, bridge, denoiser)
    assert seen == [[999], [749], [499], [249]]


def test_what_cannot_work_is_refused(language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser) -> None:
    with pytest.raises(ValueError, match="4 prompts and 1 seeds"):
        draw(language_model, bridge, denoiser, seeds=[1])
    longest = LanguageModel(
        replace(language_model.config, padding="longest"), language_model.tokenizer, language_model.module
    )
    blind = Bridge(replace(tsc_config(), use_mask="all"))
    with pytest.raises(ValueError, match="use_mask 'all' sees pads"):
        draw(longest, blind, denoiser)


def test_prompts_of_unequal_length_and_a_second_encoder(root: Path, denoiser: Denoiser) -> None:
    """Padded to the longest of the batch under the mask: each is drawn as it is drawn alone."""
    language_model = language_model_config(root, padding="longest").load()
    torch.manual_seed(0)
    for bridge in (Bridge(tsc_config()), Bridge(MLPConfig(in_width=WIDTH, width=WIDTH))):
        for beside in (None, language_model):
            images = draw(language_model, bridge.eval(), denoiser, beside=beside)
            assert close(images, draw(language_model, bridge, denoiser, beside=beside, batch=1))


def test_a_negative_prompt(language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser) -> None:
    """What is against itself is as without guidance."""
    against = draw(language_model, bridge, denoiser, negative=PROMPTS[0])
    plain = draw(language_model, bridge, denoiser, guidance=1.0)
    assert close(against[0], plain[0]) and not close(against[1], plain[1])
    assert not close(against[1], draw(language_model, bridge, denoiser)[1])


def test_from_an_image(language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser) -> None:
    """The less strength, the nearer to it; the whole of it leaves nothing."""
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    start = {"image": image, "steps": 10, "guidance": 1.0}
    seen = denoiser.decode(denoiser.encode_images(torch.from_numpy(image).permute(2, 0, 1)[None] / 127.5 - 1))
    target = ((seen + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    far = [np.abs(draw(language_model, bridge, denoiser, strength=s, **start) - target).mean() for s in (0.1, 0.5, 1.0)]
    assert far[0] < far[1] < far[2]
    whole = draw(language_model, bridge, denoiser, strength=1.0, **start)
    assert close(whole, draw(language_model, bridge, denoiser, steps=10, guidance=1.0))
    for sampler in ("euler", "dpm++", "unipc", "euler_a"):
        near = draw(language_model, bridge, denoiser, strength=0.1, sampler=sampler, **start)
        assert np.abs(near - target).mean() < far[1], sampler


def test_nothing_is_left_where_the_first_noise_is_not_all_noise(
    root: Path, language_model: LanguageModel, bridge: Bridge, tmp_path: Path
) -> None:
    """Stable Diffusion's betas leave 7 % of the amplitude at the last timestep."""
    denoiser = DenoiserConfig(model=str(make_unet(tmp_path / "sd"))).load()
    assert 0.06 < float(denoiser.levels.signal[-1]) < 0.08
    image = np.full((8, 8, 3), 255, dtype=np.uint8)
    for sampler in ("auto", "euler", "dpm++"):
        whole = draw(language_model, bridge, denoiser, image=image, strength=1.0, sampler=sampler)
        assert np.array_equal(whole, draw(language_model, bridge, denoiser, sampler=sampler)), sampler


def test_the_bridge_can_be_trained_afterwards(
    language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is moved in inference mode could not be."""
    modes: list[bool] = []
    to = Bridge.to
    monkeypatch.setattr(
        Bridge, "to", lambda self, device: modes.append(torch.is_inference_mode_enabled()) or to(self, device)
    )
    draw(language_model, bridge, denoiser)
    assert modes == [False]


def test_offloaded_it_draws_the_same(
    language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    went: list[str] = []
    to = LanguageModel.to
    monkeypatch.setattr(LanguageModel, "to", lambda self, device: went.append(str(device)) or to(self, device))
    images = draw(language_model, bridge, denoiser, offload=True, batch=2)
    assert went == ["cpu"] * 4  # there and back for each batch
    assert np.array_equal(images, draw(language_model, bridge, denoiser, batch=2)) and len(went) == 6


def test_the_connector_adds_little_to_a_step() -> None:
    """TSC at its full size beside the U-Net of SD 1.5 at 512 pixels, a prompt of 128 tokens: at most 3 % more FLOPs a step."""
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
        bridge = Bridge(TSCConfig())
        hidden, mask, times = torch.empty(1, 128, 2048), torch.ones(1, 128, dtype=torch.bool), torch.empty(1)
        noisy = torch.empty(1, 4, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as once:
        text = bridge.read(hidden, mask)
    with torch.no_grad(), FlopCounterMode(display=False) as added:
        tokens = bridge.at(text, mask, times).tokens
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        network(noisy, times, tokens)
    assert sum(p.numel() for p in network.parameters()) == 859_520_964
    share = added.get_total_flops() / whole.get_total_flops()
    print(f"once {once.get_total_flops():.3g}, a step {added.get_total_flops():.3g} of {whole.get_total_flops():.3g}")
    assert 0.005 < share < 0.03


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strength": 0.0}, "strength is 0.0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": -1.0}, r"guidance is -1\.0"),
        ({"image": np.zeros((4, 8, 3), np.uint8)}, r"has shape \(4, 8, 3\): make it \(8, 8, 3\)"),
        ({"sampler": "plms"}, "there is no sampler 'plms'"),
    ],
)
def test_options_that_cannot_work(
    language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser, changes: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        draw(language_model, bridge, denoiser, **changes)
