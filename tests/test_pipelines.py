"""Pipelines of diffusers under a bridge: what `generate` draws, in all that is built upon them, and the hooks' own rules."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny_language_models
from tests.tiny_denoisers import POOLED_WIDTH, make_pixart, make_sana, make_sdxl, make_unet
from tests.training_fixtures import WIDTH, language_model_config, make_language_model, tsc_config
from training.bridge import Bridge
from training.configuration import LoRAConfig
from training.connectors import LaViConfig, MLPConfig, QueriesConfig
from training.denoisers import Denoiser, DenoiserConfig
from training.generation import generate, start_noise
from training.language_models import LanguageModel, LanguageModelConfig
from training.lora import ATTENTION
from training.pipelines import attach
from training.samplers import scheduler_of

PROMPTS = ["red round", "blue square big left small green"]
SEEDS = (1, 2)
MAKERS: dict[str, Callable[[Path], Path]] = {
    "unet": make_unet,
    "sdxl": make_sdxl,
    "pixart": make_pixart,
    "sana": make_sana,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipelines")
    make_language_model(root / "models" / "t5")
    for name, make in MAKERS.items():
        make(root / name)
    return root


@pytest.fixture(scope="module")
def language_model(root: Path) -> LanguageModel:
    return language_model_config(root).load()


def load_denoiser(root: Path, family: str = "unet") -> Denoiser:
    denoiser = DenoiserConfig(model=str(root / family)).load()
    for name, parameter in denoiser.network.named_parameters():
        if "attn2.to_v" in name or "attn2.to_out" in name:
            parameter.data *= 10  # random weights hardly listen to the text
    return denoiser


def make_bridge(config: Any) -> Bridge:
    torch.manual_seed(0)
    bridge = Bridge(config).eval().requires_grad_(False)
    for parameter in bridge.parameters():
        parameter.data *= 3
    return bridge


def pipeline_of(denoiser: Denoiser, kind: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    import diffusers

    pipeline_class = getattr(diffusers, kind)
    missing = {
        name: None
        for name in pipeline_class._get_signature_keys(pipeline_class)[0]
        if name.startswith(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    }
    found = {
        "vae": denoiser.vae,
        denoiser.subfolder: denoiser.network,
        "scheduler": scheduler_of(denoiser, "auto"),
        **missing,
        **parts,
    }
    if "safety_checker" in missing:
        found["requires_safety_checker"] = False
    pipeline = pipeline_class(**found)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(denoiser: Denoiser, side: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([start_noise(seed, denoiser.latent_shape(side)) for seed in SEEDS]))


def ours(language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser, **changes: Any) -> np.ndarray:
    settings = {"prompts": PROMPTS, "seeds": SEEDS, "resolution": 8, "steps": 2, "guidance": 3.0, "batch": 2}
    return generate(language_model=language_model, bridge=bridge, denoiser=denoiser, **{**settings, **changes})


def theirs(pipeline: Any, told: dict[str, torch.Tensor], **changes: Any) -> np.ndarray:
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 8, "width": 8, "output_type": "np"}
    return (pipeline(**told, **{**settings, **changes}).images * 255).round().astype(np.uint8)


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1


@pytest.mark.parametrize(
    ("family", "kind", "side"),
    [
        ("unet", "StableDiffusionPipeline", 8),
        ("sdxl", "StableDiffusionXLPipeline", 8),
        ("pixart", "PixArtSigmaPipeline", 8),
        ("sana", "SanaPipeline", 32),
    ],
)
def test_a_pipeline_draws_what_generate_draws(
    root: Path, language_model: LanguageModel, family: str, kind: str, side: int
) -> None:
    denoiser = load_denoiser(root, family)
    bridge = make_bridge(replace(tsc_config(), pooled_width=POOLED_WIDTH if family == "sdxl" else None))
    expected = ours(language_model, bridge, denoiser, resolution=side)
    assert not close(expected, ours(language_model, bridge, denoiser, resolution=side, prompts=PROMPTS[::-1]))
    pipeline = pipeline_of(denoiser, kind)
    settings: dict[str, Any] = {"latents": noise(denoiser, side), "height": side, "width": side}
    if family in ("pixart", "sana"):
        settings["use_resolution_binning"] = False
    if family == "sana":
        settings["sigmas"] = [1.0, 0.5]
    negative = ours(language_model, bridge, denoiser, resolution=side, negative="small")
    assert not close(expected, negative)
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        assert close(expected, theirs(pipeline, attached.encode(PROMPTS), **settings))
        assert close(negative, theirs(pipeline, attached.encode(PROMPTS, "small"), **settings))


@pytest.fixture
def denoiser(root: Path) -> Denoiser:
    return load_denoiser(root)


@pytest.fixture(scope="module")
def bridge() -> Bridge:
    return make_bridge(tsc_config())


def masked_bridge() -> Bridge:
    """Its tokens come with a mask."""
    return make_bridge(MLPConfig(in_width=WIDTH, width=WIDTH))


@pytest.mark.parametrize(
    "config",
    [
        MLPConfig(in_width=WIDTH, width=WIDTH),
        QueriesConfig(in_width=WIDTH, width=WIDTH, queries=3, blocks=1, heads=2),
    ],
    ids=["mlp", "queries"],
)
def test_masks_and_appended_queries_come_through(
    root: Path, language_model: LanguageModel, denoiser: Denoiser, config: Any
) -> None:
    """... and the tokens of a second text encoder behind the connector's."""
    bridge = make_bridge(config)
    alone = ours(language_model, bridge, denoiser)
    both = ours(language_model, bridge, denoiser, beside=language_model)
    assert not close(alone, both)
    pipeline = pipeline_of(denoiser)
    for beside, expected in ((None, alone), (language_model, both)):
        with attach(pipeline, language_model=language_model, bridge=bridge, beside=beside) as attached:
            assert close(expected, theirs(pipeline, attached.encode(PROMPTS), latents=noise(denoiser, 8)))


def test_hidden_states_of_all_layers(tmp_path: Path, denoiser: Denoiser) -> None:
    """They stand side by side in the embeddings."""
    folder = tiny_language_models.make_language_model(tmp_path / "llama", "llama")
    language_model = LanguageModelConfig(model=str(folder), max_length=16, layers="all").load()
    bridge, prompts = (
        make_bridge(replace(tsc_config(), layers=tiny_language_models.DEPTH)),
        ["red circle", "big square"],
    )
    bridge.layers.weights.data = torch.tensor([1.0, -2.0, 0.5])
    expected, pipeline = ours(language_model, bridge, denoiser, prompts=prompts), pipeline_of(denoiser)
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        told = attached.encode(prompts)
        assert told["prompt_embeds"].shape == (2, 16, tiny_language_models.DEPTH * WIDTH + 1)
        assert close(expected, theirs(pipeline, told, latents=noise(denoiser, 8)))


def test_half_precision(language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser) -> None:
    """Embeddings come in the pipeline's dtype, the connector computes in its own."""
    expected, pipeline = ours(language_model, bridge, denoiser), pipeline_of(denoiser).to(torch.bfloat16)
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        told = attached.encode(PROMPTS)
        assert told["prompt_embeds"].dtype == torch.bfloat16
        assert attached.told(told["prompt_embeds"], 7).tokens.dtype == torch.float32
        drawn = theirs(pipeline, told, latents=noise(denoiser, 8).to(torch.bfloat16))
        assert np.abs(drawn.astype(int) - expected).mean() < 5


def test_several_pictures_a_prompt(language_model: LanguageModel, denoiser: Denoiser) -> None:
    pipeline = pipeline_of(denoiser)
    with attach(pipeline, language_model=language_model, bridge=masked_bridge()) as attached:
        told, start = attached.encode(PROMPTS), noise(denoiser, 8)
        drawn = theirs(pipeline, told, latents=start.repeat_interleave(2, 0), num_images_per_prompt=2)
        assert close(drawn[::2], drawn[1::2]) and close(drawn[::2], theirs(pipeline, told, latents=start))
        alone = theirs(pipeline, attached.encode(PROMPTS[0]), latents=start[:1])
        assert close(alone, drawn[:1]) and not close(drawn[:1], drawn[2:3])


def test_image_to_image(
    language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    expected = ours(language_model, bridge, denoiser, image=picture, strength=0.7, steps=4)
    assert not close(expected, ours(language_model, bridge, denoiser, steps=4))
    pipeline = pipeline_of(denoiser, "StableDiffusionImg2ImgPipeline")
    module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: noise(denoiser, 8))
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        told = attached.encode(PROMPTS)
        drawn = pipeline(
            **told, image=denoiser.encode_images(pixels), strength=0.7, num_inference_steps=4, guidance_scale=3.0,
            output_type="np",
        ).images  # fmt: skip
    assert close(expected, (drawn * 255).round().astype(np.uint8))


def test_inpainting(language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser) -> None:
    """Where all is to be painted it is text to image; where nothing is, the text is not heard."""
    expected = ours(language_model, bridge, denoiser)
    pipeline = pipeline_of(denoiser, "StableDiffusionInpaintPipeline")
    picture, start = torch.rand(1, 3, 8, 8) * 2 - 1, noise(denoiser, 8)
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        told, other = attached.encode(PROMPTS), attached.encode(PROMPTS[::-1])
        whole, nothing = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
        settings = {"image": picture, "latents": start, "strength": 1.0}
        assert close(expected, theirs(pipeline, told, mask_image=whole, **settings))
        kept = [
            theirs(pipeline, one, mask_image=nothing, generator=torch.Generator().manual_seed(0), **settings)
            for one in (told, other)
        ]
        assert close(*kept) and not close(kept[0], expected)


def test_control_nets(language_model: LanguageModel, denoiser: Denoiser) -> None:
    """One or several: they are told what the U-Net is told, under the mask, which their own call does not take."""
    from diffusers import ControlNetModel

    torch.manual_seed(5)
    nets = [
        ControlNetModel.from_unet(denoiser.network, conditioning_embedding_out_channels=(8, 8)) for _ in range(2)
    ]  # fmt: skip
    for net in nets:
        for parameter in [*net.controlnet_down_blocks.parameters(), *net.controlnet_mid_block.parameters()]:
            torch.nn.init.normal_(parameter, std=0.3)
    bridge, start, control = masked_bridge(), noise(denoiser, 8), torch.rand(1, 3, 8, 8)
    expected = ours(language_model, bridge, denoiser)
    for controlnet, image, none in ((nets[0], control, 0.0), (nets, [control, control], [0.0, 0.0])):
        pipeline = pipeline_of(denoiser, "StableDiffusionControlNetPipeline", controlnet=controlnet)
        with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
            told = attached.encode(PROMPTS)
            settings = {"image": image, "latents": start}
            unheard = theirs(pipeline, told, controlnet_conditioning_scale=none, **settings)
            assert close(expected, unheard)
            drawn = theirs(pipeline, told, **settings)
            assert not close(drawn, expected)
            for embeddings in (told["prompt_embeds"], told["negative_prompt_embeds"]):
                embeddings[..., :-1] += 9 * (embeddings[..., -1:] == 0)  # pads, which the mask hides
            assert close(drawn, theirs(pipeline, told, **settings))
            assert theirs(pipeline, told, guess_mode=True, **settings).std() > 0


def test_an_ip_adapter(language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser) -> None:
    torch.manual_seed(6)
    expected, pipeline, network = ours(language_model, bridge, denoiser), pipeline_of(denoiser), denoiser.network
    layers = [name.removesuffix(".processor") for name in network.attn_processors if "attn2" in name]
    weights = {
        f"{2 * number + 1}.to_{part}_ip.weight": torch.randn(network.get_submodule(name).to_q.out_features, WIDTH)
        for number, name in enumerate(layers)
        for part in "kv"
    }
    image = {"proj.weight": torch.randn(4 * WIDTH, 6), "proj.bias": torch.zeros(4 * WIDTH)}
    image |= {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    pipeline.load_ip_adapter(
        {"image_proj": image, "ip_adapter": weights}, subfolder="", weight_name="", image_encoder_folder=None
    )
    for given in (bridge, masked_bridge()):
        with attach(pipeline, language_model=language_model, bridge=given) as attached:
            told = attached.encode(PROMPTS)
            settings = {"latents": noise(denoiser, 8), "ip_adapter_image_embeds": [torch.randn(2, 1, 6)]}
            drawn = theirs(pipeline, told, **settings)
            pipeline.set_ip_adapter_scale(0.0)
            unheard = theirs(pipeline, told, **settings)
            pipeline.set_ip_adapter_scale(1.0)
            assert not close(drawn, unheard)
            assert given is not bridge or close(unheard, expected)


def test_a_lora_of_the_users_and_an_offloaded_network(
    language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser
) -> None:
    from accelerate import cpu_offload_with_hook
    from peft import LoraConfig

    plain = ours(language_model, bridge, denoiser)
    torch.manual_seed(7)
    denoiser.network.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    expected, start = ours(language_model, bridge, denoiser), noise(denoiser, 8)
    assert not close(plain, expected)
    pipeline = pipeline_of(denoiser)
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        told = attached.encode(PROMPTS)
        assert close(expected, theirs(pipeline, told, latents=start))
        cpu_offload_with_hook(denoiser.network, "cpu")  # replaces its `forward`, as enable_model_cpu_offload does
        assert close(expected, theirs(pipeline, told, latents=start))
    with attach(pipeline, language_model=language_model, bridge=bridge):
        assert close(expected, theirs(pipeline, told, latents=start))


def test_a_lora_of_the_bridges_own(root: Path, language_model: LanguageModel) -> None:
    """LaVi-Bridge's is heard beside one of the user's, which peft would have instead of it."""
    config = LoRAConfig(targets=(ATTENTION,), rank=2, alpha=2.0)
    denoiser = DenoiserConfig(model=str(root / "unet"), lora=config).load()
    torch.manual_seed(8)
    bridge = Bridge(LaViConfig(in_width=WIDTH, width=WIDTH), denoiser_lora=denoiser.lora).eval().requires_grad_(False)
    for parameter in bridge.parameters():
        parameter.data = torch.randn_like(parameter) * 0.4
    expected, pipeline, start = ours(language_model, bridge, denoiser), pipeline_of(denoiser), noise(denoiser, 8)
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        told = attached.encode(PROMPTS)
        assert close(expected, theirs(pipeline, told, latents=start))
        path = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
        down, up = torch.randn(2, 16), torch.zeros(16, 2)
        pipeline.load_lora_weights(
            {f"unet.{path}.lora_A.weight": down, f"unet.{path}.lora_B.weight": up}, adapter_name="mine"
        )
        assert close(expected, theirs(pipeline, told, latents=start))
        pipeline.unet.get_submodule(path).lora_B["mine"].weight.data += 5
        assert not close(expected, theirs(pipeline, told, latents=start))
        pipeline.delete_adapters("mine")
        assert close(expected, theirs(pipeline, told, latents=start))
        pipeline.unload_lora_weights()
        with pytest.raises(ValueError, match="not in the pipeline's network: make the pipeline with unet="):
            attached.encode(PROMPTS)


def test_a_compiled_network(language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser) -> None:
    expected, pipeline = ours(language_model, bridge, denoiser), pipeline_of(denoiser)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        assert close(expected, theirs(pipeline, attached.encode(PROMPTS), latents=noise(denoiser, 8)))


def test_what_does_not_depend_on_the_timestep_is_read_once(
    language_model: LanguageModel, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, pipeline = make_bridge(tsc_config()), pipeline_of(denoiser)
    reads: list[int] = []
    times: list[float] = []
    read, at = bridge.connector.read, bridge.connector.at
    monkeypatch.setattr(bridge.connector, "read", lambda *a: reads.append(len(a[0])) or read(*a))
    monkeypatch.setattr(bridge.connector, "at", lambda *a: times.extend(a[2].unique().tolist()) or at(*a))
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        told = attached.encode(PROMPTS)
        theirs(pipeline, told)
        assert reads == [4] and times == pipeline.scheduler.timesteps.tolist()
        embeddings, when = told["prompt_embeds"], torch.tensor(3)
        first = attached.told(embeddings, when).tokens
        assert torch.equal(first, attached.told(embeddings, when).tokens) and len(reads) == 2
        embeddings[..., 0] += 1  # in place: the same tensor says something else
        assert not torch.equal(first, attached.told(embeddings, when).tokens) and len(reads) == 3
        del embeddings, told
        assert len(attached._read) == 0  # nothing is kept of embeddings that are gone


def test_what_does_not_fit_is_refused(
    language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipeline_of(denoiser)

    def fails(words: str, config: Any, target: Any = pipeline, lora: torch.nn.Module | None = None) -> None:
        other = Bridge(config)
        if lora:
            other.denoiser_lora = torch.nn.ModuleDict({"down/to_q": lora})
        with pytest.raises(ValueError, match=words):
            attach(target, language_model=language_model, bridge=other)

    fails("takes text of width 16, the bridge gives 32", replace(tsc_config(), width=32))
    fails("takes text of pooled_width None, the bridge gives 8", replace(tsc_config(), pooled_width=8))
    fails("in_width is 24, .* gives 16", replace(tsc_config(), in_width=24))
    fails("not in the pipeline's network", tsc_config(), lora=torch.nn.Linear(2, 2))
    xl = pipeline_of(load_denoiser(root, "sdxl"), "StableDiffusionXLPipeline")
    fails("takes text of pooled_width 8, the bridge gives None", tsc_config(), xl)
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        fails(r"a bridge is attached to this UNet2DConditionModel already: call its detach\(\) first", tsc_config())
        with pytest.raises(ValueError, match="2 prompts and 3 negative ones"):
            attached.encode(PROMPTS, ["", "", ""])
        with pytest.raises(ValueError, match=r"with \*\*attached.encode\(prompts\) in place of a prompt"):
            theirs(pipeline, {"prompt_embeds": torch.ones(1, 4, 16), "negative_prompt_embeds": torch.ones(1, 4, 16)})
        pipeline.to(torch.float16)
        encode = language_model.encode
        monkeypatch.setattr(
            language_model, "encode", lambda *a, **k: (encode(*a, **k)[0] * 1e6, encode(*a, **k)[1]), raising=False
        )
        with pytest.raises(ValueError, match="are too large for"):
            attached.encode(PROMPTS)
        pipeline.to(torch.float32)
    # After the block the pipeline is as it was.
    plain = {"prompt_embeds": torch.ones(1, 4, 16), "negative_prompt_embeds": torch.zeros(1, 4, 16)}
    assert theirs(pipeline, plain).shape == (1, 8, 8, 3)


def test_a_pipeline_that_takes_no_negative_prompt(root: Path, language_model: LanguageModel, bridge: Bridge) -> None:
    from diffusers import SanaSprintPipeline, SCMScheduler

    denoiser = load_denoiser(root, "sana")
    scheduler = SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    pipeline = pipeline_of(denoiser, "SanaSprintPipeline", scheduler=scheduler)
    with attach(pipeline, language_model=language_model, bridge=bridge) as attached:
        told = attached.encode(PROMPTS)
        assert {*told} == {"prompt_embeds", "prompt_attention_mask"}
        assert {*told} <= {*inspect.signature(SanaSprintPipeline.__call__).parameters}
        with pytest.raises(ValueError, match="SanaSprintPipeline takes no negative prompt: leave it out"):
            attached.encode(PROMPTS, "small")


def test_the_bridge_can_be_trained_afterwards(
    language_model: LanguageModel, bridge: Bridge, denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is moved in inference mode could not be."""
    modes: list[bool] = []
    to = torch.nn.Module.to
    monkeypatch.setattr(
        type(bridge.connector), "to", lambda self, d: modes.append(torch.is_inference_mode_enabled()) or to(self, d)
    )
    with (
        attach(pipeline_of(denoiser), language_model=language_model, bridge=bridge) as attached,
        torch.inference_mode(),
    ):
        attached.encode(PROMPTS)
    assert modes == [False]
