"""What the shipped weights can do, measured on held-out data: the numbers of the card, and of the test that guards them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..oracle import fact_f1, read_caption, read_pictures, score_with_shuffle
from ..words import PROMPTS, dense_caption, styled_caption
from ..world import Scenes, draw_scenes, render
from .pictures import photo_jpeg

HELD_OUT = 77_001  # no training seed


def held_out(count: int, shares: tuple[float, ...], seed: int = HELD_OUT) -> tuple[Scenes, np.random.Generator]:
    """Scenes and the generator to go on with."""
    rng = np.random.default_rng(seed)
    return draw_scenes(rng, count, shares), rng


def measure_captioner(folder: Path, count: int = 200) -> dict[str, float]:
    """Fact F1 per kind over photos with one to four objects, all prompts in turn, through the recaption stage."""
    import pyarrow as pa

    from stages.captioning.guards import GuardsConfig
    from stages.captioning.prompts import PromptConfig
    from stages.captioning.with_transformers import TransformersConfig
    from stages.recaption import Recaption, RecaptionConfig

    scenes, rng = held_out(count, (1, 1, 1, 1))
    stage = Recaption(
        RecaptionConfig(
            engine=TransformersConfig(model=str(folder), dtype="float32", max_new_tokens=110, batch_size=count),
            prompts=tuple(PromptConfig(name=f"style_{n}", text=text) for n, text in enumerate(PROMPTS)),
            guards=GuardsConfig(openings="kept"),
        )
    )
    stage.load()
    photos = [photo_jpeg(scenes, n, rng) for n in range(count)]
    keys = [f"{n:08x}" for n in range(count)]
    captions = stage.process(pa.table({"key": keys, "image": photos}))["caption"]
    found = fact_f1([read_caption(c) for c in captions], [scenes.facts(n) for n in range(count)])
    return {kind: round(values["f1"], 4) for kind, values in found.items()}


def measure_clip(folder: Path, count: int = 400) -> dict[str, float]:
    """AUC of matched pairs against random ones, dense captions; and both means."""
    import pyarrow as pa

    from stages.embed import Embed, EmbedConfig
    from stages.score import Score, ScoreConfig

    scenes, rng = held_out(count, (1, 1, 1, 1))
    embed, score = Embed(EmbedConfig(model=str(folder))), Score(ScoreConfig(model=str(folder)))
    embed.load()
    score.load()
    photos = [photo_jpeg(scenes, n, rng) for n in range(count)]
    captions = [styled_caption(scenes.facts(n), n % len(PROMPTS)) for n in range(count)]
    images = embed.process(pa.table({"image": photos}))["image_embedding"]
    columns = {"image_embedding": images, "caption": captions, "text": [""] * count}
    texts = score.process(pa.table(columns))["caption_embedding"]
    return auc_of(np.stack(images).astype(np.float32) @ np.stack(texts).astype(np.float32).T)


def auc_of(similarity: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve of the diagonal (matched) against the rest (random) of a similarity matrix (N, N)."""
    matched = np.diag(similarity)
    random = np.sort(similarity[~np.eye(len(similarity), dtype=bool)])
    auc = np.searchsorted(random, matched).mean() / len(random)
    return {
        "auc": round(float(auc), 4),
        "matched": round(float(matched.mean()), 3),
        "random": round(float(random.mean()), 3),
    }


def measure_language_model(folder: Path, count: int = 200) -> dict[str, float]:
    """Share of scenes whose dense caption it paraphrases into the ordered form without one error; and of places right."""
    import torch
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    from ..words import ordered_caption

    scenes, rng = held_out(count, (0, 1, 1, 1))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    given = tokenizer([dense_caption(scenes.facts(n), rng) for n in range(count)], padding=True, return_tensors="pt")
    with torch.inference_mode():
        out = tokenizer.batch_decode(
            model.generate(**given, max_new_tokens=60, do_sample=False), skip_special_tokens=True
        )
    want = [ordered_caption(scenes.facts(n)) for n in range(count)]
    parts = [a.split(", ") == b.split(", ") for a, b in zip(out, want, strict=True)]
    places = [
        x == y for a, b in zip(out, want, strict=True) for x, y in zip(a.split(", "), b.split(", "), strict=False)
    ]
    return {"all_right": float(np.mean(parts)), "places_right": round(float(np.mean(places)), 4)}


def measure_vae(base: Path, count: int = 400) -> dict[str, float]:
    """Share of objects whose colour, shape and size survive encoding and decoding, per side."""
    from training.denoisers import DenoiserConfig

    from .clip import normalised

    denoiser = DenoiserConfig(model=str(base)).load()
    found = {}
    for side in (16, 24):
        scenes, _ = held_out(count, (1, 1, 1, 1))
        pixels = denoiser.decode(denoiser.encode_images(normalised(render(scenes, side))))
        read = read_pictures(((pixels + 1) * 127.5).clamp(0, 255).permute(0, 2, 3, 1).numpy())
        there = scenes.cells > 0
        found[f"full_{side}"] = round(float((read.cells == scenes.cells)[there].mean()), 4)
    return found


def measure_base(base: Path, side: int, count: int = 128) -> dict[str, dict[str, float]]:
    """Per number of objects, dense prompts: {measure: raw, measure_shuffled}. The base draws with its own text encoder."""
    from training.denoisers import DenoiserConfig
    from training.generation import generate
    from training.language_models import LanguageModelConfig

    denoiser = DenoiserConfig(model=str(base)).load()
    text = LanguageModelConfig(
        model=str(base / "text_encoder"), tokenizer_model=str(base / "tokenizer"), max_length=77, padding="longest"
    ).load()
    found = {}
    for objects in (1, 2, 3):
        scenes, rng = held_out(count, tuple(float(k == objects) for k in (1, 2, 3)), HELD_OUT + objects)
        prompts = [dense_caption(scenes.facts(n), rng) for n in range(count)]
        drawn = generate(
            language_model=text, bridge=None, denoiser=denoiser, prompts=prompts, resolution=side, steps=15,
            guidance=3.0, seeds=list(range(count)), batch=64,
        )  # fmt: skip
        scores = score_with_shuffle(read_pictures(drawn), scenes)
        found[f"{objects}_objects"] = {
            name: round(float(values.mean()), 3)
            for m, s in scores.items()
            for name, values in ((m, s.raw), (f"{m}_shuffled", s.shuffled))
        }
    return found
