"""What is exported is what was trained: in ELLA's layout, in a folder that diffusers loads, as LoRA that others load; and the
card says what the run recorded.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from jobs.export import ExportOptions, export, main
from jobs.recipe import Recipe
from pipeline.fingerprint import plain
from pipeline.storage import Folder
from stages.source import Source
from tests.training_fixtures import WIDTH, language_model_config, make_world, training_config, tsc_config
from training.bridge import Bridge, Conditioning
from training.checkpoints import State, load_bridge, write_release
from training.configuration import DenoiserConfig, LanguageModelConfig, LoRAConfig, Phase, TrainingConfig
from training.connectors import LaViConfig, MLPConfig, TSCConfig
from training.ella import RELEASED, load_ella, save_ella
from training.loop import train
from training.lora import T5, UNET

BASE = {"scheduler": "DDIMScheduler", "unet": "UNet2DConditionModel", "vae": "AutoencoderTiny"}
PROMPTS = ["red round", "small blue left"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """With two releases: ELLA's connector, trained, and LaVi-Bridge's with LoRA in both models, drawn."""
    root = make_world(tmp_path_factory.mktemp("world"))
    index = {name: ["diffusers", kind] for name, kind in BASE.items()}
    index |= {name: [None, None] for name in ("text_encoder", "tokenizer", "safety_checker", "feature_extractor")}
    (root / "models" / "base" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1", **index})
    )
    phase = Phase(view="small", resolution=8, samples=36, batch=12, micro_batch=12, rate=1e-2)
    lora = LoRAConfig(targets=T5, rank=2, alpha=6.0, dropout=0.1)
    lavi = training_config(
        root,
        connector=LaViConfig(in_width=WIDTH, width=WIDTH, use_mask="mask"),
        language_model=language_model_config(root, lora=lora),
        denoiser=DenoiserConfig(model=str(root / "models" / "base"), lora=replace(lora, targets=UNET)),
        phases=(phase,),
        ema_decay=None,
    )
    made = Recipe(
        name="tiny",
        source=Source(path=str(root / "pairs.parquet"), url_column="url", text_column="text"),
        dataset=str(root / "dataset"),
        stages=(),
        runs=str(root / "runs"),
        trainings={"tsc": training_config(root), "lavi": lavi},
    )
    train(made.trainings["tsc"], dataset=Folder(url=made.dataset), run=made.run_folder("tsc"))
    language_model, denoiser = lavi.language_model.load(), lavi.denoiser.load()
    bridge = Bridge(lavi.connector, language_model_lora=language_model.lora, denoiser_lora=denoiser.lora)
    torch.manual_seed(5)
    for parameter in bridge.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    facts = {"connector": plain(lavi.connector), "beside": None}
    facts |= {"language_model": language_model.identity(), "denoiser": denoiser.identity()}
    write_release(made.run_folder("lavi"), facts, State(samples=36), bridge, None)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tokens_of(recipe: Recipe, training: str, bridge: Bridge) -> torch.Tensor:
    language_model = replace(recipe.trainings[training].language_model, lora=None).load()
    hidden, mask = language_model.encode(language_model.tokenize(PROMPTS))
    with torch.no_grad():
        return bridge(hidden, mask, torch.tensor([3.0, 900.0])).tokens


def released_layout() -> dict[str, list[int]]:
    """Names and shapes in the file that ELLA's authors released."""
    layout = {
        "time_embedding.linear_1": [768, 320],
        "time_embedding.linear_2": [768, 768],
        "connector.time_aware_linear": [768, 768],
        "connector.proj_in": [768, 2048],
    }
    for block in (f"connector.perceiver_blocks.{number}" for number in range(6)):
        layout |= {f"{block}.attn.out_proj": [768, 768]}
        layout |= {f"{block}.mlp.c_fc": [3072, 768], f"{block}.mlp.c_proj": [768, 3072]}
        layout |= {f"{block}.{norm}.linear": [1536, 768] for norm in ("ln_1", "ln_2", "ln_ff")}
    shapes = {f"{name}.weight": shape for name, shape in layout.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layout.items()}
    for block in (f"connector.perceiver_blocks.{number}" for number in range(6)):
        shapes |= {f"{block}.attn.in_proj_weight": [2304, 768], f"{block}.attn.in_proj_bias": [2304]}
    return shapes | {"connector.latents": [64, 768]}


def test_ellas_file_has_the_released_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TrainingConfig(
        connector=TSCConfig(),
        language_model=LanguageModelConfig(model="google/flan-t5-xl", dtype="float16"),
        denoiser=DenoiserConfig(model="stable-diffusion-v1-5/stable-diffusion-v1-5"),
        phases=(Phase(view="512", resolution=512, samples=256, batch=256, micro_batch=8),),
    )
    recipe = Recipe(
        name="ella", source=Source(path="pairs.parquet"), dataset=str(tmp_path), stages=(), runs=str(tmp_path),
        trainings={"tsc": config},
    )  # fmt: skip
    bridge = Bridge(config.connector).eval()
    names = {"model": "google/flan-t5-xl@main", "prediction_type": "epsilon"}
    facts = {"connector": plain(config.connector), "language_model": names, "denoiser": names, "beside": None}
    write_release(recipe.run_folder("tsc"), facts, State(samples=256), bridge, None)
    assert [path.name for path in export(recipe, ExportOptions(to="ella", out=tmp_path / "out"))] == [
        "README.md",
        RELEASED,
    ]
    found = load_file(tmp_path / "out" / RELEASED)
    assert {name: list(tensor.shape) for name, tensor in found.items()} == released_layout()
    assert len(found) == 93 and sum(t.numel() for t in found.values()) == 66_820_608
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    loaded = load_ella(tmp_path / "out" / RELEASED)
    hidden, mask, times = torch.randn(1, 5, 2048), torch.ones(1, 5, dtype=torch.bool), torch.tensor([500.0])
    with torch.no_grad():
        ours, theirs = bridge.half().float()(hidden, mask, times), loaded(hidden, mask, times)
    assert torch.equal(ours.tokens, theirs.tokens) and not any(p.requires_grad for p in loaded.parameters())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"`{RELEASED}` holds the weights of `ELLA()`" in card and "padded to 128 tokens" in card
    assert ModelCard(card).data.base_model == [config.denoiser.model, config.language_model.model]


def test_ellas_file_of_another_size_says_so(recipe: Recipe, tmp_path: Path) -> None:
    options = ExportOptions(to="ella", out=tmp_path / "one")
    assert [path.name for path in export(recipe, options)] == ["README.md", "ella-tsc.safetensors"]
    loaded = load_ella(tmp_path / "one" / "ella-tsc.safetensors", tsc_config())
    config = recipe.trainings["tsc"]
    released = load_bridge(
        recipe.run_folder("tsc") / "release",
        language_model=config.language_model.load(),
        denoiser=config.denoiser.load(with_vae=False),
    )
    assert torch.equal(tokens_of(recipe, "tsc", loaded), tokens_of(recipe, "tsc", released.half().float()))
    card = (tmp_path / "one" / "README.md").read_text()
    assert "ELLA(time_channel=8, time_embed_dim=8, width=16, layers=2, heads=2, num_latents=4, input_dim=16)" in card
    assert "without sight of pads" in card and "diffusers" not in card.split("---")[1]
    with pytest.raises(ValueError, match=r"connector\.latents has shape"):
        load_ella(tmp_path / "one" / "ella-tsc.safetensors", replace(tsc_config(), queries=5))
    with pytest.raises(FileNotFoundError, match=r"name ELLA's \.safetensors file"):
        load_ella(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("connector", "problem"),
    [
        (MLPConfig(), "knows the tsc alone, this connector is a mlp: export to diffusers instead"),
        (TSCConfig(timestep="adaln_zero"), "knows no tsc with timestep 'adaln_zero'"),
        (TSCConfig(timestep="off"), "knows no tsc with timestep 'off'"),
        (TSCConfig(layers=3), "knows no tsc with layers 3"),
        (TSCConfig(pooled_width=1280), "knows no tsc with pooled_width 1280"),
    ],
)
def test_what_ellas_code_does_not_know_is_refused(
    connector: MLPConfig | TSCConfig, problem: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=problem):
        save_ella({}, connector, tmp_path / "x.safetensors")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="big has values that float16 cannot hold"):
        save_ella({"big": torch.tensor([1e6])}, TSCConfig(), tmp_path / "x.safetensors")


def test_the_diffusers_folder_draws_as_the_release(recipe: Recipe, tmp_path: Path) -> None:
    for training in recipe.trainings:
        one, two = tmp_path / f"{training}_one", tmp_path / f"{training}_two"
        for out in (one, two):
            export(recipe, ExportOptions(training=training, out=out))
        assert contents(one) == contents(two)
        config = recipe.trainings[training]
        language_model, denoiser = config.language_model.load(), config.denoiser.load(with_vae=False)
        bridge = load_bridge(recipe.run_folder(training) / "release", language_model=language_model, denoiser=denoiser)
        pipeline = DiffusionPipeline.from_pretrained(
            str(one), custom_pipeline=str(one / "pipeline.py"), trust_remote_code=True
        )
        noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 900.0])
        with torch.no_grad():
            ours = bridge(*language_model.encode(language_model.tokenize(PROMPTS)), times)
            other = pipeline.attached.language_model
            theirs = pipeline.attached.bridge(*other.encode(other.tokenize(PROMPTS)), times)
            assert torch.equal(ours.tokens, theirs.tokens)
            pipeline.attached.detach()  # the network alone
            drawn = pipeline.unet(noisy, times, theirs.tokens, encoder_attention_mask=theirs.mask).sample
            assert torch.equal(denoiser.predict(noisy, times, ours), drawn)


def test_each_lora_is_loaded_by_its_own_library(recipe: Recipe, tmp_path: Path) -> None:
    from peft import PeftModel

    config = recipe.trainings["lavi"]
    export(recipe, ExportOptions(training="lavi", out=tmp_path / "out"))
    language_model, denoiser = config.language_model.load(), config.denoiser.load(with_vae=False)
    load_bridge(recipe.run_folder("lavi") / "release", language_model=language_model, denoiser=denoiser)

    plain_network = UNet2DConditionModel.from_pretrained(config.denoiser.model, subfolder="unet")
    bare = replace(config.denoiser, lora=None).load(with_vae=False)
    plain_network.load_lora_adapter(load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors"), prefix="unet")
    noisy, times = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 900.0])
    text = Conditioning(torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1)), None)
    with torch.no_grad():
        expected, unchanged = denoiser.predict(noisy, times, text), bare.predict(noisy, times, text)
        assert torch.allclose(plain_network(noisy, times, text.tokens).sample, expected, atol=1e-6)
    assert not torch.allclose(expected, unchanged, atol=1e-4)

    untouched = replace(config.language_model, lora=None).load()
    ids = language_model.tokenize(PROMPTS)
    before, _ = untouched.encode(ids)
    untouched.module = PeftModel.from_pretrained(untouched.module, str(tmp_path / "out" / "language_model_lora"))
    after, _ = untouched.encode(ids)
    expected, _ = language_model.encode(ids)
    assert torch.allclose(after, expected, atol=1e-6) and not torch.allclose(after, before, atol=1e-4)


def test_the_card_says_what_was_recorded(recipe: Recipe, tmp_path: Path) -> None:
    dataset, runs = Folder(url=recipe.dataset), Path(recipe.runs)
    settings = {
        "recaption": {
            "engine": {"model": "org/captioner", "revision": "abc"},
            "prompts": [{"name": "dense", "text": "Describe it.\nAll of it."}],
        },
        "clip_filter": {"min_score": 0.2, "min_gain": None},
        "pack_small": {"where": "clip_score >= 0.22 | false"},
    }
    info = json.loads(dataset.read("views/small.json"))
    info["made_by"] = {name: {"version": 1, "identity": {}, "settings": told} for name, told in settings.items()}
    dataset.write("views/small.json", json.dumps(info).encode())
    stage = {"in": 1200, "kept": 1000, "dropped": {"low_clip_score": 150}, "failed": {"http_404": 50}}
    for time, build, stages in (
        ("1", {"job": "build", "recipe": "tiny"}, {"clip_filter": {**stage, "in": 7}}),
        ("2", {"job": "build", "recipe": "tiny"}, {"clip_filter": stage}),
        ("3", {"job": "build", "recipe": "other"}, {"clip_filter": {**stage, "in": 8}}),
        ("4", {"job": "build", "recipe": "tiny"}, {"clip_filter": {"computed": 3}}),
    ):
        dataset.write(f"runs/{time}/run.json", json.dumps({**build, "stages": stages}).encode())
    scores = {"colour": {"raw": 0.7, "shuffled": 0.3, "corrected": 0.567, "interval": [0.5, 0.6]}, "n": 40}
    (runs / "evaluation").mkdir(parents=True)
    (runs / "evaluation" / "evaluation.json").write_text(json.dumps({"oracle": {"tsc": scores}, "gain": {}}))
    export(recipe, ExportOptions(out=tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    front = ModelCard(card).data
    assert (front.library_name, front.pipeline_tag, front.tags) == (
        "diffusers", "text-to-image", ["densebridge", "tsc"],
    )  # fmt: skip
    assert front.base_model is None  # folders are no names on the hub
    for line in (
        "# tiny: tsc",
        "trained on 84 samples",
        "Captions by org/captioner@abc, which was asked:\n\n> Describe it.\n> All of it.",
        "CLIP filter: min_score 0.2.",
        "Pictures and texts of `pairs.parquet`.",
        "| small | 24 | 8 px | t5 8 | `clip_score >= 0.22 \\| false` |",
        "| clip_filter | 1,200 | 1,000 | low_clip_score 150 | http_404 50 |",
        "| language model | max length | 8 |",
        "weight decay 0.01, betas [0.9, 0.999], clip 1.0, caption drop 0.1, ema decay 0.9, precision no, seed 3",
        "| tsc | 40 | 0.567 [0.500, 0.600] |",
    ):
        assert line in card, line
    log = [json.loads(line) for line in (runs / "tsc" / "log.jsonl").read_text().splitlines()]
    first = [line["loss"] for line in log if line["phase"] == 0]
    assert f"| small | 8 px | 48 | 12 | 0.01 constant | {first[0]:.4f} → {first[-1]:.4f} |" in card


def test_what_cannot_be_exported_is_told(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ELLA's code knows the tsc alone, this connector is a lavi"):
        export(recipe, ExportOptions(training="lavi", to="ella", out=tmp_path / "a"))
    release = recipe.run_folder("lavi") / "release"
    with pytest.raises(ValueError, match="holds another connector than training 'tsc'"):
        export(recipe, ExportOptions(release=release, out=tmp_path / "a"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(FileExistsError, match="full is not empty: name another folder with --out"):
        export(recipe, ExportOptions(out=tmp_path / "full"))
    with pytest.raises(FileNotFoundError, match="run `densebridge train` for training 'tsc' first"):
        export(replace(recipe, runs=str(tmp_path / "none")), ExportOptions(out=tmp_path / "a"))
    assert not (tmp_path / "a").exists() and contents(tmp_path / "full") == {"mine": b""}


def test_a_lora_beside_a_tsc_does_not_fit_ellas_file(recipe: Recipe, tmp_path: Path) -> None:
    facts = json.loads((recipe.run_folder("tsc") / "release" / "connector.json").read_text())
    bridge = Bridge(tsc_config(), denoiser_lora={"conv.lora_A": torch.nn.Linear(2, 2)})
    write_release(tmp_path / "run", facts, State(), bridge, None)
    with pytest.raises(ValueError, match="a connector alone, this release a denoiser_lora too"):
        export(recipe, ExportOptions(release=tmp_path / "run" / "release", to="ella", out=tmp_path / "out"))


def test_the_command_names_its_files(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("jobs.export.parse", lambda *_: (recipe, ExportOptions(to="ella", out=tmp_path / "out")))
    assert main(["tiny"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(tmp_path / "out" / "README.md"),
        str(tmp_path / "out" / "ella-tsc.safetensors"),
    ]


def test_another_file_is_no_ella(tmp_path: Path) -> None:
    save_file({"connector.latents": torch.zeros(4, 16)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is missing: is it another connector"):
        load_ella(tmp_path / "x.safetensors", tsc_config())
