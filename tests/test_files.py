"""A diffusion model's files: noise levels are the schedulers' own, and a community checkpoint gives exactly its weights."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import save_file

from tests.tiny_denoisers import make_pixart, make_sana, make_sdxl, make_unet
from training.denoisers import DenoiserConfig
from training.denoisers.files import levels_of, network_facts
from training.objective import add_noise, target_of

NAMES = {
    r"^conv_in\.": "input_blocks.0.0.",
    r"^time_embedding\.linear_1\.": "time_embed.0.",
    r"^time_embedding\.linear_2\.": "time_embed.2.",
    r"^add_embedding\.linear_1\.": "label_emb.0.0.",
    r"^add_embedding\.linear_2\.": "label_emb.0.2.",
    r"^conv_norm_out\.": "out.0.",
    r"^conv_out\.": "out.2.",
    r"^mid_block\.resnets\.0\.": "middle_block.0.",
    r"^mid_block\.attentions\.0\.": "middle_block.1.",
    r"^mid_block\.resnets\.1\.": "middle_block.2.",
    r"^down_blocks\.0\.resnets\.0\.": "input_blocks.1.0.",
    r"^down_blocks\.0\.attentions\.0\.": "input_blocks.1.1.",
    r"^down_blocks\.0\.downsamplers\.0\.conv\.": "input_blocks.2.0.op.",
    r"^down_blocks\.1\.resnets\.0\.": "input_blocks.3.0.",
    r"^down_blocks\.1\.attentions\.0\.": "input_blocks.3.1.",
    r"^up_blocks\.0\.resnets\.(\d)\.": r"output_blocks.\1.0.",
    r"^up_blocks\.0\.attentions\.(\d)\.": r"output_blocks.\1.1.",
    r"^up_blocks\.1\.resnets\.0\.": "output_blocks.2.0.",
    r"^up_blocks\.1\.resnets\.1\.": "output_blocks.3.0.",
    r"^up_blocks\.1\.attentions\.0\.": "output_blocks.2.1.",
    r"^up_blocks\.1\.attentions\.1\.": "output_blocks.3.1.",
}
"""Of a U-Net of two blocks of one layer each, in diffusers and in Stable Diffusion's own code."""
IN_RESNETS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def in_own_layout(network: Any) -> dict[str, torch.Tensor]:
    """A U-Net's weights as Stable Diffusion's authors name them, beside some of a VAE and a text encoder."""
    found = {
        "first_stage_model.decoder.conv_out.bias": torch.zeros(3),
        "cond_stage_model.transformer.text_model.final_layer_norm.bias": torch.zeros(4),
    }
    for name, weight in network.state_dict().items():
        named = name
        for here, there in NAMES.items():
            named = re.sub(here, there, named)
        for here, there in IN_RESNETS.items():
            named = named.replace(f".{here}.", f".{there}.") if ".resnets." in name else named
        # A block's upsampler stands behind the attention where there is one.
        behind = "output_blocks.1.2.conv." if "up_blocks.0.attentions.0.norm.weight" in network.state_dict() else ""
        named = named.replace("up_blocks.0.upsamplers.0.conv.", behind or "output_blocks.1.1.conv.")
        found[f"model.diffusion_model.{named}"] = weight.contiguous()
    assert len(found) == len(network.state_dict()) + 2
    return found


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_unet(tmp_path_factory.mktemp("unet"))


@pytest.mark.parametrize("make", [make_unet, make_sdxl])
def test_a_single_file_gives_exactly_its_weights(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "base")
    base, path = DenoiserConfig(model=str(folder)).load(), tmp_path / "community.safetensors"
    with torch.no_grad():
        for weight in base.network.parameters():
            weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 10
    save_file(in_own_layout(base.network), path)
    found = DenoiserConfig(model=str(folder), single_file=str(path), gradient_checkpointing=True).load()
    given = found.network.state_dict()
    assert given.keys() == base.network.state_dict().keys()
    assert all(torch.equal(given[name], weight) for name, weight in base.network.state_dict().items())
    assert not any(p.requires_grad or p.is_meta for p in found.network.parameters()) and not found.network.training
    assert type(found) is type(base) and found.vae_facts == base.vae_facts
    identity = found.identity()
    assert identity["single_file"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert identity | {"single_file": None} == base.identity()
    half = DenoiserConfig(model=str(folder), single_file=str(path), dtype="bfloat16").load(with_vae=False)
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("make", [make_unet, make_sana])
def test_a_single_file_in_the_layout_of_diffusers_will_do(make: Any, tmp_path: Path) -> None:
    folder = make(tmp_path)
    other = DenoiserConfig(model=str(folder)).load(with_vae=False).network.state_dict()
    save_file({name: weight + 1 for name, weight in other.items()}, tmp_path / "one.safetensors")
    config = DenoiserConfig(model=str(folder), single_file=str(tmp_path / "one.safetensors"))
    found = config.load(with_vae=False).network.state_dict()
    assert all(torch.equal(found[name], weight + 1) for name, weight in other.items())


def test_a_wrong_single_file_is_told_in_one_line(unet: Path, tmp_path: Path) -> None:
    base = DenoiserConfig(model=str(unet)).load()
    whole = in_own_layout(base.network)
    other = in_own_layout(DenoiserConfig(model=str(make_unet(tmp_path / "wide", width=24))).load().network)
    sdxl = in_own_layout(DenoiserConfig(model=str(make_sdxl(tmp_path / "sdxl"))).load().network)
    files = {
        "lacks_one": {name: w for name, w in whole.items() if not name.endswith("middle_block.0.in_layers.0.weight")},
        "other_width": other,
        "other_family": sdxl,
        "no_network": {"first_stage_model.decoder.conv_out.bias": torch.zeros(3)},
    }
    for name, weights in files.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in (*files, "garbage", "text"):
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(
            ValueError, match=r"holds no UNet2DConditionModel of the shape that .* has: name its "
        ) as told:
            DenoiserConfig(model=str(unet), single_file=str(path)).load()
        assert str(path) in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(FileNotFoundError, match=r"single_file .*away.safetensors is not there: name a .safetensors"):
        DenoiserConfig(model=str(unet), single_file=str(tmp_path / "away.safetensors")).load()
    with pytest.raises(ValueError, match=r"only .safetensors, as other formats may run code"):
        DenoiserConfig(model=str(unet), single_file="model.ckpt")
    pixart = DenoiserConfig(model=str(make_pixart(tmp_path / "pixart")), single_file=str(path))
    with pytest.raises(ValueError, match=r"is for U-Nets and SANA, .* holds a PixArtTransformer2DModel: leave it out"):
        pixart.load()


def test_a_single_file_of_another_prediction_type_is_refused(tmp_path: Path) -> None:
    """Files of SDXL models that predict v hold an empty tensor of this name."""
    path = tmp_path / "v.safetensors"
    for kind in ("v_prediction", "epsilon"):
        folder = make_unet(tmp_path / kind, prediction_type=kind)  # type: ignore[arg-type]
        weights = in_own_layout(DenoiserConfig(model=str(folder)).load(with_vae=False).network)
        save_file(weights | {"v_pred": torch.zeros(0)}, path)
        config = DenoiserConfig(model=str(folder), single_file=str(path))
        if kind == "v_prediction":
            assert config.load(with_vae=False).prediction_type == kind
        else:
            with pytest.raises(
                ValueError, match=r"predicts v_prediction, the scheduler of .* says epsilon: name a model"
            ):
                config.load()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_levels_are_those_of_the_scheduler(kind: str) -> None:
    given = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": kind}
    euler = EulerDiscreteScheduler(**given, rescale_betas_zero_snr=kind == "v_prediction")
    levels = levels_of(dict(euler.config), "model")
    assert levels.kind == kind and torch.equal(levels.times, torch.arange(1000.0))
    ddim = DDIMScheduler.from_config(euler.config)
    latents, noise, times = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    assert torch.allclose(add_noise(latents, noise, times, levels), ddim.add_noise(latents, noise, times), atol=1e-6)
    target = noise if kind == "epsilon" else ddim.get_velocity(latents, noise, times)
    assert torch.allclose(target_of(latents, noise, times, levels), target, atol=1e-6)
    assert float(levels.signal[-1]) == 0 if kind == "v_prediction" else float(levels.signal[-1]) > 0.05


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flows_levels_are_those_of_its_schedulers(shift: float) -> None:
    """Of SD3's and Lumina's kind of settings, whose every level is one of ours, and of SANA's, whose steps lie between them."""
    euler = FlowMatchEulerDiscreteScheduler(shift=shift)
    levels = levels_of(json.loads(euler.to_json_string()), "model")
    assert levels.kind == "flow_prediction" and len(levels) == 1000
    assert torch.allclose(levels.deviation, euler.sigmas.flip(0)) and torch.allclose(
        levels.times, euler.timesteps.flip(0)
    )
    assert torch.allclose(levels.signal + levels.deviation, torch.ones(1000)) and float(levels.signal[-1]) == 0
    latents, noise, times = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([7, 700])
    expected = euler.scale_noise(latents, levels.times[times], noise)
    assert torch.allclose(add_noise(latents, noise, times, levels), expected, atol=1e-6)

    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    same = levels_of(dict(solver.config), "model")
    assert torch.equal(same.deviation, levels.deviation) and torch.equal(same.times, levels.times)
    solver.set_timesteps(20)
    sigmas = solver.sigmas[:-1]
    beside = torch.bucketize(sigmas, same.deviation).clamp(1, 999)
    assert bool(((same.deviation[beside - 1] <= sigmas) & (sigmas <= same.deviation[beside])).all())
    assert torch.equal((sigmas * 1000).long(), solver.timesteps)


def test_levels_that_settings_do_not_tell_are_refused() -> None:
    dynamic = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    for facts, told in (
        (dynamic, r"choose a model whose shift is one number"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"}, r"EDMEulerScheduler, tells neither betas"),
        (
            {"_class_name": "SCMScheduler", "prediction_type": "trigflow"},
            r"SCMScheduler, tells neither betas nor a flow",
        ),
        ({"beta_schedule": "linear", "prediction_type": "sample"}, r"predicts sample: only epsilon, v_prediction and"),
    ):
        with pytest.raises(ValueError, match=told):
            levels_of(facts, "model")


def test_what_is_no_pipeline_is_told(unet: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"holds neither unet/config.json nor transformer/config.json, or was never"
    ):
        network_facts(DenoiserConfig(model=str(tmp_path)))
    (make_sana(tmp_path) / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no scheduler/scheduler_config.json, or was never"):
        DenoiserConfig(model=str(tmp_path)).load()
