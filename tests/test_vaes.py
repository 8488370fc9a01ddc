"""What a VAE's configuration says is what diffusers makes of it, and what cannot be used is refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from examples.shapes.recipe import BASE
from pipeline.vaes import encode_pixels, load_vae, vae_facts, vae_id
from tests.tiny_denoisers import make_sana
from tests.training_fixtures import make_denoiser


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_denoiser(tmp_path_factory.mktemp("base"), drawn=True)


def without(folder: Path, target: Path, *names: str) -> str:
    """A copy of the VAE whose configuration says nothing of these."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))
    return str(target)


def test_facts_are_what_the_loaded_vae_says(base: Path, tmp_path: Path) -> None:
    silent = ("scaling_factor", "shift_factor", "latent_channels")  # as Stable Diffusion 1.5's older configuration is
    folders = [str(base / "vae"), f"{BASE}/vae", str(make_sana(tmp_path / "sana") / "vae")]
    folders.append(without(base / "vae", tmp_path / "kl", *silent))
    for folder in folders:
        facts, vae = vae_facts(folder, None, ""), load_vae(folder, None, "", "float32")
        assert facts.scaling_factor == vae.config.scaling_factor
        assert facts.shift_factor == (vae.config.get("shift_factor") or 0)
        assert facts.channels == vae.config.latent_channels and facts.kind == type(vae).__name__
        mean, deviation = encode_pixels(vae, torch.zeros(2, 3, 24, 24))
        assert mean.shape == (2, facts.channels, 24 // facts.factor, 24 // facts.factor)
        assert (deviation is not None) is facts.is_drawn
        assert not any(p.requires_grad for p in vae.parameters()) and not vae.training
    assert vae_facts(str(base), None, "vae") == vae_facts(folders[0], None, "")


def test_a_vae_is_known_by_its_files(base: Path, tmp_path: Path) -> None:
    assert vae_id(str(base), None, "vae") == vae_id(str(base / "vae"), "any", "")
    assert vae_id(without(base / "vae", tmp_path / "other", "scaling_factor"), None, "") != vae_id(
        str(base), None, "vae"
    )
    assert vae_id("org/name", "abc", "vae") == "org/name/vae@abc" and vae_id("org/name", None, "") == "org/name@main"


def test_what_is_no_vae_is_told(base: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"vae/config.json is not there: name the folder of a VAE"):
        vae_facts(str(tmp_path), None, "vae")
    with pytest.raises(
        ValueError, match="is a UNet2DConditionModel: only AutoencoderKL, AutoencoderTiny, AutoencoderDC are known"
    ):
        vae_facts(str(base), None, "unet")


def test_the_facts_of_dc_ae(tmp_path: Path) -> None:
    """The configuration of SANA's AutoencoderDC (f32c32), and one that says only what it is: diffusers' defaults are the same."""
    said = {"_class_name": "AutoencoderDC", "latent_channels": 32, "scaling_factor": 0.41407}
    said |= {"encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024]}
    for config, scale in ((said, 0.41407), ({"_class_name": "AutoencoderDC"}, 1.0)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        facts = vae_facts(str(tmp_path), None, "")
        assert (facts.factor, facts.channels, facts.scaling_factor, facts.is_drawn) == (32, 32, scale, False)


def test_a_vae_that_overflows_in_float16_is_held_in_float32(base: Path, tmp_path: Path) -> None:
    """SDXL's says so; Stable Diffusion 1.5's is silent, and may be cast."""
    assert json.loads((base / "vae" / "config.json").read_text())["force_upcast"] is True
    overflowing, silent = str(base / "vae"), without(base / "vae", tmp_path / "silent", "force_upcast")
    for folder, dtype, held in (
        (overflowing, "float16", torch.float32),
        (overflowing, "bfloat16", torch.bfloat16),
        (silent, "float16", torch.float16),
        (silent, "float32", torch.float32),
    ):
        vae = load_vae(folder, None, "", dtype)
        assert {p.dtype for p in vae.parameters()} == {held}
        assert vae_facts(folder, None, "").dtype(dtype) == str(held).removeprefix("torch.")
