"""LoRA: where they lie, what they change, and that a run with them stops, goes on, divides and is released as any other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline.storage import Folder
from tests.training_fixtures import WIDTH, language_model_config, make_world, training_config
from training import loop
from training.bridge import Bridge, Conditioning
from training.checkpoints import latest_checkpoint
from training.configuration import DenoiserConfig, LoRAConfig, Phase, TrainingConfig
from training.connectors import LaViConfig, build_connector
from training.loop import train
from training.lora import LLAMA, PIXART, T5, UNET, add_lora
from training.processes import start_processes
from training.releases import load_bridge

ADAPTERS = {
    "t5 and sd": LaViConfig(in_width=1024, width=768),
    "llama and sd": LaViConfig(in_width=4096, width=768),
    "t5 and pixart": LaViConfig(in_width=1024, width=4096),
}


def published(model: str) -> nn.Module:
    """An architecture as its authors published it, without weights."""
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
    from transformers import LlamaConfig, LlamaModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        match model:
            case "sd":  # CompVis/stable-diffusion-v1-4
                return UNet2DConditionModel(
                    sample_size=64, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280),
                    layers_per_block=2, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3, attention_head_dim=8,
                    cross_attention_dim=768,
                )  # fmt: skip
            case "pixart":  # PixArt-alpha/PixArt-XL-2-512x512
                return PixArtTransformer2DModel(
                    sample_size=64, num_layers=28, num_attention_heads=16, attention_head_dim=72, in_channels=4,
                    out_channels=8, patch_size=2, cross_attention_dim=1152, caption_channels=4096,
                    use_additional_conditions=False,
                )  # fmt: skip
            case "t5":  # google-t5/t5-large, its encoder
                return T5EncoderModel(
                    T5Config(vocab_size=32128, d_model=1024, d_kv=64, num_heads=16, d_ff=4096, num_layers=24)
                )
            case _:  # meta-llama/Llama-2-7b-hf
                return LlamaModel(
                    LlamaConfig(
                        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                        num_attention_heads=32, num_key_value_heads=32,
                    )
                )  # fmt: skip


def size(layers: dict[str, nn.Module]) -> int:
    return sum(parameter.numel() for layer in layers.values() for parameter in layer.parameters())


def test_parameters_are_those_of_lavi_bridge() -> None:
    """Its counts by model and by pairing, at rank 32."""
    targets = {"sd": UNET, "pixart": PIXART, "t5": T5, "llama": LLAMA}
    models = {name: published(name) for name in targets}
    assert [sum(p.numel() for p in model.parameters()) for model in models.values()] == [
        859_520_964, 610_856_096, 334_939_648, 6_607_343_616,
    ]  # fmt: skip
    lora = {name: add_lora(model, LoRAConfig(targets=targets[name]), name) for name, model in models.items()}
    assert {name: size(layers) for name, layers in lora.items()} == {
        "sd": 28_291_072, "pixart": 16_515_072, "t5": 6_291_456, "llama": 33_554_432,
    }  # fmt: skip
    assert [len(layers) // 2 for layers in lora.values()] == [224, 224, 96, 128]
    parts = {"resnets": 18_319_360, "attn": 6_377_472, "ff": 3_594_240}
    for name, count in parts.items():
        assert size({path: layer for path, layer in lora["sd"].items() if re.search(rf"\.{name}\d?\.", path)}) == count
    totals = {}
    for pairing, config in ADAPTERS.items():
        with torch.device("meta"):
            adapter = sum(p.numel() for p in build_connector(config).parameters())
        totals[pairing] = adapter + sum(size(lora[name]) for name in pairing.split(" and "))
    assert totals == {"t5 and sd": 55_837_056, "llama and sd": 290_765_696, "t5 and pixart": 136_095_232}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


def of_denoiser(**changes: object) -> LoRAConfig:
    return LoRAConfig(**{"targets": UNET, "rank": 2, "alpha": 3.0, **changes})  # type: ignore[arg-type]


def denoiser_config(world: Path, **changes: object) -> DenoiserConfig:
    return DenoiserConfig(model=str(world / "models" / "base"), **changes)  # type: ignore[arg-type]


def noisy() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(0)
    latents, tokens = (torch.randn(shape, generator=generator) for shape in ((2, 4, 4, 4), (2, 3, WIDTH)))
    return latents, torch.tensor([10.0, 900.0]), Conditioning(tokens, None)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_is_unchanged_at_first_whatever_its_dtype(world: Path, dtype: str) -> None:
    bare = denoiser_config(world, dtype=dtype).load()
    with_lora = denoiser_config(world, dtype=dtype, lora=of_denoiser(dropout=0.5)).load()
    Bridge(LaViConfig(in_width=WIDTH, width=WIDTH), denoiser_lora=with_lora.lora).train()
    expected, found = (one.predict(*noisy()) for one in (bare, with_lora))
    assert found.dtype == expected.dtype == getattr(torch, dtype) and torch.equal(found, expected)
    trained = {name for name, p in with_lora.network.named_parameters() if p.requires_grad}
    assert trained == {f"{path}.default.weight" for path in with_lora.lora if not path.endswith("dropout")}
    for path, layer in with_lora.lora.items():
        for weight in layer.parameters():
            assert weight.dtype == torch.float32 and bool((weight == 0).all()) is path.endswith("lora_B"), path
    for layer in with_lora.lora.values():
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)  # the dropout's
    changed = with_lora.predict(*noisy())
    assert changed.dtype == expected.dtype and not torch.equal(changed, expected)
    changed.float().square().sum().backward()  # of a mean, gradients would be too small for float16
    assert all(
        w.grad is not None and w.grad.abs().sum() > 0 for layer in with_lora.lora.values() for w in layer.parameters()
    )


def test_matrices_add_their_scaled_product(world: Path) -> None:
    """The same as layers with W + alpha / rank B A for weights, of linear layers and of convolutions."""
    bare, with_lora = denoiser_config(world).load(), denoiser_config(world, lora=of_denoiser()).load()
    for one in (bare, with_lora):
        one.network.double()
    layers = dict(bare.network.named_modules())
    for path in {path.rsplit(".", 1)[0] for path in with_lora.lora}:
        down, up = (with_lora.lora[f"{path}.lora_{name}"].weight.data for name in "AB")
        torch.nn.init.normal_(up, generator=torch.Generator().manual_seed(len(path)))
        layers[path].weight.data += 3.0 / 2 * torch.einsum("or...,ri...->oi...", up, down)
    expected, found = (one.predict(*noisy()) for one in (bare, with_lora))
    assert torch.allclose(found, expected, rtol=1e-9)


def test_patterns_that_match_nothing_are_refused(world: Path) -> None:
    with pytest.raises(
        ValueError, match=r"lora.targets: '.\*atn2.to_k' matches no linear .* of \S+/base; near are "
    ) as said:
        denoiser_config(world, lora=of_denoiser(targets=(*UNET, ".*atn2.to_k"))).load()
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k" in str(said.value) and "\n" not in str(
        said.value
    )
    with pytest.raises(ValueError, match=r"'to_q' matches no linear"):  # whole paths, not their ends
        denoiser_config(world, lora=of_denoiser(targets=("to_q",))).load()
    with pytest.raises(ValueError, match=r"'.\*norm1' matches no linear"):  # there, but neither linear nor convolution
        denoiser_config(world, lora=of_denoiser(targets=(".*norm1",))).load()
    lora = LoRAConfig(targets=LLAMA)
    with pytest.raises(ValueError, match=r"lora.targets: .*_proj' matches no .* of \S+/t5; .*SelfAttention"):
        language_model_config(world, lora=lora).load()
    with pytest.raises(ValueError, match=r"lora.targets: '\*.attn' is no regular expression: nothing to repeat"):
        LoRAConfig(targets=("*.attn",))


def test_dropout_follows_the_bridge(world: Path) -> None:
    denoiser = denoiser_config(world, lora=of_denoiser(dropout=0.5)).load()
    for layer in denoiser.lora.values():
        for weight in layer.parameters():
            torch.nn.init.normal_(weight, generator=torch.Generator().manual_seed(1))
    bridge = Bridge(LaViConfig(in_width=WIDTH, width=WIDTH), denoiser_lora=denoiser.lora)

    def differ() -> bool:
        one, other = (denoiser.predict(*noisy()) for _ in range(2))
        return not torch.equal(one, other)

    assert not differ()
    bridge.train()
    assert differ()
    bridge.eval()
    assert not differ()
    assert not denoiser.network.training


def config_of(world: Path, **changes: object) -> TrainingConfig:
    """A whole LaVi-Bridge: adapter, LoRA in both models, all with dropout; three steps."""
    settings = {
        "connector": LaViConfig(in_width=WIDTH, width=WIDTH, dropout=0.1, use_mask="mask"),
        "language_model": language_model_config(
            world, lora=LoRAConfig(targets=T5, rank=2, dropout=0.1, rate_scale=0.5)
        ),
        "denoiser": denoiser_config(world, lora=of_denoiser(dropout=0.1, rate_scale=2.0)),
        "phases": (Phase(view="small", resolution=8, samples=36, batch=12, micro_batch=6, rate=1e-2),),
    }
    return training_config(world, **{**settings, **changes})


def run(config: TrainingConfig, world: Path, folder: Path) -> Path:
    return train(config, dataset=Folder(url=str(world / "dataset")), run=folder).release


@pytest.fixture(scope="module")
def straight(world: Path) -> tuple[Path, loop.Parts]:
    """A finished run's folder, and its models."""
    kept: list[loop.Parts] = []
    with pytest.MonkeyPatch.context() as patch:
        load = loop.load_parts
        patch.setattr(loop, "load_parts", lambda *given: kept.append(load(*given)) or kept[0])
        run(config_of(world), world, world / "straight")
    return world / "straight", kept[0]


PARTS = ("connector", "language_model_lora", "denoiser_lora")


def assert_same_release(one: Path, other: Path, atol: float = 0.0) -> None:
    for name in (f"{prefix}{part}.safetensors" for prefix in ("", "ema.") for part in PARTS):
        ours, theirs = (load_file(folder / "release" / name) for folder in (one, other))
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.allclose(tensor, theirs[key], rtol=0, atol=atol), f"{name}: {key}"


def test_a_killed_run_goes_on_bit_equal(
    world: Path, straight: tuple[Path, loop.Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, averages, optimizer, and what dropout draws."""
    commit = loop._commit

    def crash(sitting, state, *rest):
        commit(sitting, state, *rest)
        if state.samples == 24:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_commit", crash)
        with pytest.raises(KeyboardInterrupt):
            run(config_of(world), world, tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000000012"]
    run(config_of(world), world, tmp_path)
    assert_same_release(tmp_path, straight[0])
    lora = replace(config_of(world).denoiser.lora, rank=3)  # type: ignore[type-var]
    with pytest.raises(ValueError, match=r"cannot be resumed: denoiser.lora.rank is 2 there and 3 here"):
        run(config_of(world, denoiser=denoiser_config(world, lora=lora)), world, tmp_path)


def test_two_processes_train_as_one(world: Path, straight: tuple[Path, loop.Parts], tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "import sys; from pathlib import Path\n"
        "from tests.test_lora import config_of, run\n"
        "if __name__ == '__main__':\n"
        "    run(config_of(Path(sys.argv[1])), Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "    from accelerate import PartialState; assert PartialState().num_processes == 2\n"
    )
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script), str(world)]
    environment = {
        **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path / "run")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_release(tmp_path / "run", straight[0], atol=5e-5)


def test_a_checkpoint_holds_what_is_trained_and_no_more(straight: tuple[Path, loop.Parts]) -> None:
    folder, parts = straight
    bridge, newest = parts.bridge, latest_checkpoint(folder)
    assert newest is not None
    trained = sum(parameter.numel() for parameter in bridge.parameters())
    models = (parts.language_model.module, parts.denoiser.network, parts.denoiser.vae)
    assert trained == sum(p.numel() for p in bridge.connector.parameters()) + sum(
        p.numel() for model in models for p in model.parameters() if p.requires_grad
    )
    for name, count in (("trained", 1), ("ema", 1), ("optimizer", 2)):
        tensors = load_file(newest / f"{name}.safetensors")
        steps = sum(tensor.numel() for key, tensor in tensors.items() if key.startswith("step/"))
        assert sum(tensor.numel() for tensor in tensors.values()) - steps == count * trained
    released = load_file(folder / "release" / "denoiser_lora.safetensors")
    assert set(released) == {f"{path}.weight" for path in parts.denoiser.lora if not path.endswith("dropout")}
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight" in released


def test_a_release_drives_fresh_models_as_the_trained_ones(
    world: Path, straight: tuple[Path, loop.Parts], tmp_path: Path
) -> None:
    folder, parts = straight
    config = config_of(world)

    @torch.no_grad()
    def told(language_model, bridge, denoiser) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, mask = language_model.encode(language_model.tokenize(["red round", "small blue left"]))
        latents, times, _ = noisy()
        conditioning = bridge(hidden, mask, times)
        return conditioning.tokens, denoiser.predict(latents, times, conditioning)

    language_model, denoiser = config.language_model.load(), config.denoiser.load()
    bridge = load_bridge(folder / "release", language_model=language_model, denoiser=denoiser, weights="last")
    parts.bridge.eval()
    for ours, theirs in zip(
        told(language_model, bridge, denoiser), told(parts.language_model, parts.bridge, parts.denoiser), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert not any(p.requires_grad for model in (bridge, denoiser.network) for p in model.parameters())
    averaged = load_bridge(folder / "release", language_model=language_model, denoiser=denoiser)
    assert not torch.equal(
        told(language_model, averaged, denoiser)[1], told(parts.language_model, parts.bridge, parts.denoiser)[1]
    )
    with pytest.raises(ValueError, match=r"does not fit: denoiser.lora is .* there and None here"):
        load_bridge(folder / "release", language_model=language_model, denoiser=denoiser_config(world).load())


def test_each_part_learns_at_its_own_rate(world: Path, tmp_path: Path) -> None:
    """Adam's first step is as long as the rate, so what B has become tells it."""
    phase = Phase(view="small", resolution=8, samples=12, batch=12, micro_batch=12, rate=1e-2)
    release = run(config_of(world, phases=(phase,), weight_decay=0.0, ema_decay=None), world, tmp_path)
    for part, rate in (("language_model_lora", 0.5e-2), ("denoiser_lora", 2e-2)):
        after = load_file(release / f"{part}.safetensors")
        steps = torch.cat([tensor.abs().flatten() for name, tensor in after.items() if "lora_B" in name])
        assert steps.max() <= rate * 1.0001 and steps.quantile(0.9) > 0.9 * rate


def test_half_models_train_float32_matrices(world: Path, tmp_path: Path) -> None:
    config = config_of(world)
    half = config_of(
        world,
        language_model=replace(config.language_model, dtype="bfloat16"),
        denoiser=replace(config.denoiser, dtype="bfloat16"),
        weight_decay=0.0,
    )
    release = run(half, world, tmp_path)
    start = loop.load_parts(half, start_processes(half)).bridge.state_dict()
    for part in PARTS[1:]:
        for name, tensor in load_file(release / f"{part}.safetensors").items():
            path, own = name.rsplit(".", 1)
            assert tensor.dtype == torch.float32 and tensor.isfinite().all()
            assert not torch.equal(tensor, start[f"{part}.{path.replace('.', '/')}.{own}"]), name


def test_gradient_checkpointing_changes_nothing(world: Path, straight: tuple[Path, loop.Parts], tmp_path: Path) -> None:
    """What dropout drew is drawn again where activations are computed twice."""
    config = config_of(world)
    run(replace(config, denoiser=replace(config.denoiser, gradient_checkpointing=True)), world, tmp_path)
    assert_same_release(tmp_path, straight[0], atol=1e-6)
