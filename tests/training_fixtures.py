"""A tiny world for the trainer's tests: random models of the real classes, and a view packed by the real writer."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.captions import TokenizerConfig, load_tokenizer, tokenizer_facts, tokenizer_id
from pipeline.shards import View, ViewInfo
from pipeline.storage import Folder
from stages.encode_latents import EncodeLatents, EncodeLatentsConfig
from tests.shard_writing import ShardSample, write_shard
from training.configuration import Phase, TrainingConfig
from training.connectors import TSCConfig
from training.denoisers import DenoiserConfig
from training.journal import MEASURED
from training.language_models import LanguageModelConfig

WORDS = ["red", "green", "blue", "round", "square", "left", "right", "big", "small"]
LENGTH = 8
WIDTH = 16
TOKENS = tokenizer_facts(TokenizerConfig(name="t5", model="any", max_length=LENGTH))


def make_language_model(folder: Path, *, layers: int = 1) -> Path:
    """A T5 encoder of width 16 with its tokenizer."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(1)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *(("▁" + word, -2.0) for word in WORDS), ("▁", -4.0)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, num_heads=2, d_ff=32, num_layers=layers, dropout_rate=0.0,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_denoiser(folder: Path, *, prediction_type: str = "v_prediction", drawn: bool = False) -> Path:
    """U-Net, VAE (a posterior where `drawn`) and schedule; latents are half as wide as pixels."""
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(2)
    UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
    ).save_pretrained(folder / "unet")
    vae = (
        AutoencoderKL(
            block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=2, scaling_factor=0.5,
        )
        if drawn
        else AutoencoderTiny(
            encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), scaling_factor=2.0,
        )
    )  # fmt: skip
    vae.save_pretrained(folder / "vae")
    DDIMScheduler(
        prediction_type=prediction_type,
        rescale_betas_zero_snr=prediction_type == "v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    ).save_pretrained(folder / "scheduler")
    return folder


def make_view(
    dataset: Path,
    view: str,
    samples: int,
    tokenizer: str,
    *,
    side: int = 8,
    broken: tuple[int, ...] = (),
    short: bool = False,
    vae: Path | None = None,
    others: Sequence[TokenizerConfig] = (),
    buckets: Sequence[tuple[int, int]] = (),
    shards: int = 2,
    first: int = 0,
) -> View:
    """Packs `samples` random pictures with random captions; those in `broken` are cut before the end of their JPEG. `short`:
    two of three have a short caption too, every seventh that alone. `vae`: with its latents of those that are whole.
    `others`: with further tokenizers' tokens, of captions of some of `WORDS`. `buckets`: pictures of these sizes (width,
    height) by turns. `shards`: files that they lie in. `first`: of the keys, and another than 0 makes other samples.
    """
    rng = np.random.default_rng(7 + first)
    crop = "none" if buckets else "center"
    latents_config = EncodeLatentsConfig(view=view, vae=str(vae), subfolder="", device="cpu", crop=crop)
    encode = EncodeLatents(latents_config) if vae else None
    if encode:
        encode.load()
    packed = []
    tokenizers = {config.name: load_tokenizer(config) for config in others}
    for number in range(samples):
        width, height = buckets[number % len(buckets)] if buckets else (side + number % 3, side)
        pixels = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        jpg = io.BytesIO()
        pixels.save(jpg, "JPEG")
        data = jpg.getvalue()[:-40] if number in broken else jpg.getvalue()
        ids = np.append(rng.integers(3, 3 + len(WORDS), size=rng.integers(1, LENGTH)), 1).astype(np.int32)
        tokens = {"t5": ids}
        if short and number % 3:
            tokens = {"t5_short": ids[-2:]} if number % 7 == 0 else {"t5": ids, "t5_short": ids[-2:]}
        caption = " ".join(WORDS[number % len(WORDS) :][: 1 + number % 4])
        tokens |= {name: tokenizer.tokenize([caption])[0] for name, tokenizer in tokenizers.items()}
        latents = None
        if encode:
            found = encode.process(pa.table({encode.reads[0]: pa.array([data], pa.binary())}))[f"latents_{view}"][0]
            latents = None if found is None else np.load(io.BytesIO(found))
        packed.append(
            ShardSample(
                key=f"{first + number:04d}", jpg=data, width=pixels.width, height=pixels.height, facts={}, tokens=tokens,
                latents=latents,
            )
        )  # fmt: skip
    version = f"views/{view}/1"
    (dataset / version).mkdir(parents=True)
    edges = [samples * n // shards for n in range(shards + 1)]
    tables = [
        write_shard(dataset / version / f"shard-{n}.tar", f"{version}/shard-{n}.tar", packed[edges[n] : edges[n + 1]])
        for n in range(shards)
    ]
    manifest = pa.concat_tables(tables, promote_options="default")
    if buckets:
        manifest = manifest.append_column("bucket", pa.array([f"{one.width}x{one.height}" for one in packed]))
    pq.write_table(manifest, dataset / version / "manifest.parquet")
    info = ViewInfo(
        view=view,
        version="1",
        resolution=side,
        samples=samples,
        manifest=f"{version}/manifest.parquet",
        manifest_sha256=hashlib.sha256((dataset / version / "manifest.parquet").read_bytes()).hexdigest(),
        tokenizers={
            "t5": TOKENS | {"id": tokenizer, "captions": [["long", 3.0], ["short", 1.0]] if short else [["long", 1.0]]},
            **{config.name: tokenizer_facts(config) for config in others},
        },
        companions=encode.view_facts if encode else {},
        shape="buckets" if buckets else "keep",
    )
    (dataset / "views" / f"{view}.json").write_text(json.dumps(asdict(info)))
    return View.open(Folder(url=str(dataset)), view)


def make_world(root: Path) -> Path:
    """`models/`, and `dataset/` with the views "small" (24 samples, 8 px) and "large" (18 samples, 16 px)."""
    language_model = make_language_model(root / "models" / "t5")
    make_denoiser(root / "models" / "base")
    name = tokenizer_id(str(language_model), None)
    make_view(root / "dataset", "small", 24, name)
    make_view(root / "dataset", "large", 18, name, side=16)
    return root


def language_model_config(root: Path, **changes: object) -> LanguageModelConfig:
    """The tiny T5."""
    settings = {"model": str(root / "models" / "t5"), "max_length": LENGTH, **changes}
    return LanguageModelConfig(**settings)  # type: ignore[arg-type]


def tsc_config() -> TSCConfig:
    """A TSC between the tiny models."""
    return TSCConfig(
        in_width=WIDTH, width=WIDTH, blocks=2, heads=2, queries=4, time_channels=8, time_width=8, use_mask="mask"
    )


def training_config(root: Path, **changes: object) -> TrainingConfig:
    """Two phases of 4 and 3 steps of 12 samples."""
    settings = {
        "connector": tsc_config(),
        "language_model": language_model_config(root),
        "denoiser": DenoiserConfig(model=str(root / "models" / "base")),
        "phases": (
            Phase(view="small", resolution=8, samples=48, batch=12, micro_batch=6, rate=1e-2, warmup_samples=24),
            Phase(view="large", resolution=16, samples=36, batch=12, micro_batch=6, rate=5e-3, schedule="cosine"),
        ),
        "ema_decay": 0.9,
        "checkpoint_every": 12,
        "log_every": 2,
        "measure_peak": False,
        "seed": 3,
    }
    return TrainingConfig(**{**settings, **changes})  # type: ignore[arg-type]


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, but for what they say of the machine."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def assert_same_run(run: Path, other: Path) -> None:
    """Bit for bit: losses by step and timestep, gradients, and all that is released."""
    for name in ("connector", "ema.connector"):
        ours, theirs = (load_file(one / "release" / f"{name}.safetensors") for one in (run, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert log_of(run) == log_of(other)
