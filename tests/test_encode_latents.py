"""What the VAE makes of a view's pictures: what it would make in training, told where it is none, kept while pictures stay."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from examples.shapes.recipe import BASE
from pipeline.captions import TokenizerConfig
from pipeline.compute import Progress
from pipeline.pixels import as_array, open_picture, square
from pipeline.plan import make_plan
from pipeline.runner import run_plan
from pipeline.stage import Stage, check_stages
from pipeline.storage import Folder
from pipeline.tables import read_payloads, read_table
from pipeline.vaes import encode_pixels, load_vae, vae_facts
from stages.encode_latents import EncodeLatents, EncodeLatentsConfig
from stages.ingest import ingest
from stages.pack import Pack, PackConfig
from tests.small_stages import SmallConfig, small_source
from tests.small_views import Facts, jpeg
from tests.tiny_denoisers import make_sana
from tests.training_fixtures import make_denoiser

SHAPES = EncodeLatentsConfig(view="v", vae=BASE, device="cpu")


def encode(config: EncodeLatentsConfig, pictures: list[bytes]) -> dict[str, Any]:
    stage = EncodeLatents(config)
    stage.load()
    return dict(stage.process(pa.table({stage.reads[0]: pa.array(pictures, pa.binary())})))


def arrays(found: dict[str, Any]) -> list[np.ndarray]:
    return [np.load(io.BytesIO(data), allow_pickle=False) for data in found["latents_v"]]


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_denoiser(tmp_path_factory.mktemp("base"), drawn=True)


def test_latents_are_those_of_the_middle_square(kl: Path, tmp_path: Path) -> None:
    """For the shapes world's VAE, one with a posterior and SANA's, at any size and with any neighbours."""
    pictures = [jpeg(24, 24), jpeg(40, 24, 1), jpeg(24, 36, 2), jpeg(16, 20, 3), jpeg(24, 24, 4)]
    for model in (BASE, str(kl), str(make_sana(tmp_path))):
        found = encode(replace(SHAPES, vae=model), pictures)
        assert found["status"] == ["kept"] * 5 and found["reason"] == [None] * 5
        vae, facts = load_vae(model, None, "vae", "float32"), vae_facts(model, None, "vae")
        for latents, data in zip(arrays(found), pictures, strict=True):
            image = open_picture(data)
            pixels = as_array(square(image, min(image.size), (0.5, 0.5)))
            parts = [p for p in encode_pixels(vae, torch.from_numpy(pixels)[None]) if p is not None]
            expected = torch.cat(parts, dim=1)[0].numpy()
            assert latents.dtype == np.dtype("<f2") and latents.shape == expected.shape
            assert latents.shape == (facts.channels * len(parts), *(side // facts.factor for side in pixels.shape[1:]))
            assert np.allclose(latents, expected, rtol=2e-3, atol=2e-3)
        assert (found["latents_v_width"], found["latents_v_height"]) == (
            [latents.shape[2] for latents in arrays(found)],
        ) * 2


def test_a_bucket_is_taken_whole(kl: Path) -> None:
    (latents,) = arrays(encode(replace(SHAPES, vae=str(kl), crop="none", stored_dtype="float32"), [jpeg(40, 24)]))
    assert latents.shape == (8, 12, 20) and latents.dtype == np.float32


def test_what_is_no_picture_or_does_not_divide_is_told() -> None:
    found = encode(SHAPES, [b"no picture", jpeg(24, 24)[:-60], jpeg(24, 24), jpeg(25, 25), jpeg(25, 24)])
    assert found["reason"] == ["not_an_image", "not_an_image", None, "not_a_multiple_of_patch", None]
    assert found["status"] == ["failed", "failed", "kept", "failed", "kept"]
    assert [data is None for data in found["latents_v"]] == [True, True, False, True, False]


def test_latents_that_overflow_are_told_and_leave_the_others_alone(kl: Path, tmp_path: Path) -> None:
    """As SDXL's VAE does in float16: here its last layer is scaled until one of two pictures is beyond 16 bits."""
    pictures = [jpeg(24, 24, seed) for seed in range(2)]
    usual = [np.abs(one[:4]).max().astype(float) for one in arrays(encode(replace(SHAPES, vae=str(kl)), pictures))]
    vae = load_vae(str(kl), None, "vae", "float32")
    with torch.no_grad():
        vae.quant_conv.weight[:4] *= 65504 / np.sqrt(usual[0] * usual[1])
        vae.quant_conv.bias[:4] *= 65504 / np.sqrt(usual[0] * usual[1])
    vae.save_pretrained(tmp_path / "vae")
    found = encode(replace(SHAPES, vae=str(tmp_path)), pictures)
    larger = int(usual[1] > usual[0])
    assert found["reason"][larger] == "latents_not_finite" and found["latents_v"][larger] is None
    assert (
        found["reason"][1 - larger] is None and np.isfinite(np.load(io.BytesIO(found["latents_v"][1 - larger]))).all()
    )


def test_the_view_is_told_which_vae(kl: Path) -> None:
    tiny, drawn = EncodeLatents(SHAPES), EncodeLatents(replace(SHAPES, vae=str(kl / "vae"), subfolder=""))
    assert tiny.companion_of == "v" and tiny.view_facts["latents"]["statistics"] == ["mean"]
    facts = drawn.view_facts["latents"]
    assert (facts["statistics"], facts["channels"], facts["scaling_factor"]) == (["mean", "std"], 4, 0.5)
    assert facts["vae"] == EncodeLatents(replace(SHAPES, vae=str(kl))).view_facts["latents"]["vae"] != BASE
    assert facts["vae"] != tiny.view_facts["latents"]["vae"]


def test_a_vae_that_overflows_in_float16_is_held_in_float32(kl: Path) -> None:
    """Its latents are then those of float32, and the dataset keeps them under that name."""
    half, full = (EncodeLatents(replace(SHAPES, vae=str(kl), dtype=dtype)) for dtype in ("float16", "float32"))
    assert half.view_facts == full.view_facts and half.view_facts["latents"]["weights_dtype"] == "float32"
    assert half.config_id == full.config_id
    half.load()
    assert half._vae.dtype == torch.float32


def test_only_what_changes_latents_is_in_the_folder_name(kl: Path) -> None:
    before = EncodeLatents(SHAPES).config_id
    for change in ({"batch_size": 3}, {"device": "cuda"}, {"threads": 1}, {"vae": f"{BASE}/vae", "subfolder": ""}):
        assert EncodeLatents(replace(SHAPES, **change)).config_id == before, change
    for change in (
        {"vae": str(kl)},
        {"dtype": "float16"},
        {"stored_dtype": "float32"},
        {"crop": "none"},
        {"view": "w"},
    ):
        assert EncodeLatents(replace(SHAPES, **change)).config_id != before, change
    for wrong in ({"dtype": "int8"}, {"stored_dtype": "bfloat16"}, {"crop": "random"}, {"threads": 0}):
        with pytest.raises(ValueError, match=f"latents of view 'v': {next(iter(wrong))}"):
            replace(SHAPES, **wrong)


def test_another_caption_leaves_latents_alone(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    tokenizers = (TokenizerConfig(name="t5", model=str(tmp_path)),)
    dataset = Folder(url=str(tmp_path / "data"))
    partitions = ingest(dataset, small_source(tmp_path, [str(n) for n in range(7)]))

    def build(suffix: str) -> tuple[Counter[str], list[bytes]]:
        views = [Pack(PackConfig(view=v, resolution=r, tokenizers=tokenizers)) for v, r in (("v", 24), ("w", 16))]
        latents = [EncodeLatents(replace(SHAPES, view=view)) for view in ("v", "w")]
        stages: list[Stage] = [Facts(SmallConfig(suffix=suffix)), *views, *latents]
        check_stages(stages)
        computed: Counter[str] = Counter()

        def report(progress: Progress) -> None:
            computed[progress.stage] += progress.computed

        run_plan(dataset, stages, make_plan(dataset, stages, partitions), report, runner="local")
        tables = [t.tables["encode_latents_w"] for t in make_plan(dataset, stages, partitions).tickets]
        return +computed, [
            data for t in tables for data in read_payloads(dataset, t, read_table(dataset, t), "latents_w")
        ]

    first, before = build("")
    assert first == dict.fromkeys(("facts", "pack_v", "pack_w", "encode_latents_v", "encode_latents_w"), 7)
    again, after = build(" red")
    assert set(again) == {"facts", "pack_v", "pack_w"} and after == before and len(after) == 7
