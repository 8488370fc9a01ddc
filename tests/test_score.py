"""Embeddings and scores: the same for a sample whatever its neighbours, of as much of the caption as the model reads."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from examples.shapes.making.measure import held_out
from examples.shapes.making.pictures import photo_jpeg
from examples.shapes.recipe import JUDGE
from examples.shapes.words import PROMPTS, styled_caption
from pipeline.clip_models import CHARACTERS, PASS, TextEncoder
from pipeline.stage import Columns, Stage, check_stages
from pipeline.tables import parquet_bytes
from stages.clip import EMBEDDING, matrix, stored
from stages.embed import Embed, EmbedConfig
from stages.score import Score, ScoreConfig
from stages.sentences import split_sentences
from tests.small_stages import Small, SmallConfig

SCENES, RNG = held_out(40, (0, 1, 1, 1))
PHOTOS = [photo_jpeg(SCENES, n, RNG) for n in range(40)]
CAPTIONS = [styled_caption(SCENES.facts(n), n % len(PROMPTS)) for n in range(40)]


def rows_of(stage: Stage, columns: Columns) -> list[dict[str, Any]]:
    return pa.Table.from_pydict(dict(columns), schema=stage.writes).to_pylist()


def loaded_score(model: str = JUDGE) -> Score:
    score = Score(ScoreConfig(model=model))
    score.load()
    return score


def given(embeddings: np.ndarray, captions: list[str], alts: list[str | None]) -> pa.Table:
    return pa.table({"image_embedding": list(embeddings), "caption": captions, "text": alts})


@pytest.fixture(scope="module")
def embeddings() -> np.ndarray:
    embed = Embed(EmbedConfig(model=JUDGE))
    embed.load()
    return np.stack(embed.process(pa.table({"image": PHOTOS}))["image_embedding"])


@pytest.fixture(scope="module")
def score() -> Score:
    return loaded_score()


def test_score_holds_the_texts_against_the_stored_picture(embeddings: np.ndarray, score: Score) -> None:
    right, wrong = CAPTIONS, [*CAPTIONS[1:], CAPTIONS[0]]
    alts: list[str | None] = [*CAPTIONS[:36], "", " \n", None, "x"]
    made = rows_of(score, score.process(given(embeddings, right, alts)))
    for image, caption, row in zip(embeddings.astype(np.float32), right, made, strict=True):
        assert abs(np.linalg.norm(image) - 1) < 1e-3
        assert abs(row["clip_score"] - image @ np.array(row["caption_embedding"])) < 1e-3
        sentences = row["sentence_scores"]
        assert len(sentences) == len(split_sentences(caption)) and all(-1 <= s <= 1 for s in sentences)
        assert row["min_sentence_score"] == min(sentences)
        assert abs(row["mean_sentence_score"] - np.mean(sentences)) < 1e-4
    assert [row["alt_score"] for row in made[:36]] == [row["clip_score"] for row in made[:36]]
    assert [row["alt_score"] for row in made[36:39]] == [None] * 3  # a blank alt text has no score
    others = score.process(given(embeddings, wrong, alts))["clip_score"]
    assert np.mean([row["clip_score"] for row in made]) > np.mean(others) + 0.3


def test_a_score_does_not_depend_on_the_batch(embeddings: np.ndarray, score: Score) -> None:
    """Not in its last bit: rows are computed in other company when a partition is redone in part."""
    table = given(embeddings, CAPTIONS, CAPTIONS[::-1])
    whole = rows_of(score, score.process(table))
    parts = [table.slice(0, 1), table.slice(1, 20), table.slice(21)]
    assert [row for part in parts for row in rows_of(score, score.process(part))] == whole
    embed = Embed(EmbedConfig(model=JUDGE))
    embed.load()
    alone = [embed.process(pa.table({"image": [photo]}))["image_embedding"][0] for photo in PHOTOS[: PASS // 4]]
    assert np.array_equal(np.stack(alone), embeddings[: len(alone)])


def test_equal_texts_are_embedded_once(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, passes = score._encoder, list[list[list[int]]]()
    plain = encoder._pass
    monkeypatch.setattr(encoder, "_pass", lambda rows, length: passes.append(rows) or plain(rows, length))
    texts = ["a red circle", "a square", "a red circle", "A long " + "red " * 30]
    vectors, tokens = encoder.embed(texts)
    assert sorted(ids for rows in passes for ids in rows) == sorted(encoder._tokenizer(sorted(set(texts)))["input_ids"])
    assert len(passes) == 2  # short ones and long ones
    assert np.array_equal(vectors[0], vectors[2]) and list(tokens[:3]) == [5, 4, 5]


def test_of_a_million_characters_few_are_looked_at(score: Score, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time by the tokenizer, and once in all, however few texts a pass is filled up from."""
    encoder, seen = score._encoder, list[int]()
    tokenizer = encoder._tokenizer

    class Counting:
        def __call__(self, texts: list[str], **options: Any) -> Any:
            seen.extend(map(len, texts))
            return tokenizer(texts, **options)

        def pad(self, *given: Any, **options: Any) -> Any:
            return tokenizer.pad(*given, **options)

    huge = "a red circle, " * 100_000
    monkeypatch.setattr(encoder, "_tokenizer", Counting())
    vectors, tokens = encoder.embed([huge, "a square"])
    assert sorted(seen) == [len("a square"), CHARACTERS] and encoder.window < tokens[0] < CHARACTERS
    monkeypatch.undo()
    given = tokenizer([huge[:1000]], truncation=True, max_length=encoder.window, return_tensors="pt")
    with torch.inference_mode():
        wanted = encoder._model(**given).text_embeds[0].numpy()  # the tokenizer's own way to cut keeps the last token
    assert np.abs(vectors[0] - wanted / np.linalg.norm(wanted)).max() < 1e-5


def test_a_picture_that_cannot_be_read_is_a_failed_row_and_alters_no_other(embeddings: np.ndarray) -> None:
    embed = Embed(EmbedConfig(model=JUDGE))
    embed.load()
    tiff = io.BytesIO()
    Image.new("RGB", (32, 32)).save(tiff, "TIFF")  # PIL would read it, but it is none of the formats that are taken
    broken = {0: b"", 3: b"no picture", PASS: PHOTOS[0][:100], PASS + 1: tiff.getvalue()}
    told = embed.process(pa.table({"image": [broken.get(n, p) for n, p in enumerate(PHOTOS)]}))
    assert [n for n, s in enumerate(told["status"]) if s == "failed"] == list(broken)
    assert [r for r in told["reason"] if r] == ["not_an_image"] * 4
    for n, found in enumerate(told["image_embedding"]):
        assert found is None if n in broken else np.array_equal(found, embeddings[n])
    assert embed.process(pa.table({"image": [b""]}))["image_embedding"] == [None]


def test_identity_has_the_weights_in_place_of_their_name(tmp_path: Path) -> None:
    copied = shutil.copytree(JUDGE, tmp_path / "copy")
    for stage, config in ((Embed, EmbedConfig), (Score, ScoreConfig)):
        here, there, coarse = (
            stage(config(**given)).config_id
            for given in (
                {"model": JUDGE},
                {"model": str(copied), "device": "cpu", "batch_size": 3},
                {"model": JUDGE, "dtype": "float16"},
            )
        )
        assert here == there != coarse


def test_padding_is_little(score: Score) -> None:
    padded = [score._encoder._padded(tokens) for tokens in range(1, 78)]
    assert sorted(set(padded)) == [8, 16, 24, 32, 48, 64, 77] and padded == sorted(padded)
    assert all(tokens <= length for tokens, length in enumerate(padded, 1))


def model_of(folder: Path, positions: int) -> str:
    """An untrained CLIP that reads so many tokens, with a tokenizer that says another number; or a SigLIP."""
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = dict(
        vocab_size=759, max_position_embeddings=positions, bos_token_id=0, eos_token_id=1, pad_token_id=1, **tower
    )
    vision = dict(image_size=24, patch_size=6, **tower)
    torch.manual_seed(0)
    if positions == 64:
        SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        SiglipImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder)
    else:
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
        shutil.copy(Path(JUDGE) / "processor_config.json", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(JUDGE) / name, folder)
    return str(folder)


@pytest.mark.parametrize("positions", [77, 248])
def test_long_captions_are_read_as_far_as_the_model_can(tmp_path: Path, positions: int) -> None:
    model = model_of(tmp_path, positions)
    score = loaded_score(model)
    start = "There is a red circle here. " * 10  # 70 tokens and the two at the ends
    captions = [
        start + "A small square.",
        start + "There is a large blue square in the top left corner.",
        "a " * 300 + ".",
    ]
    made = rows_of(score, score.process(given(np.eye(3, 24, dtype=np.float16), captions, [""] * 3)))
    assert score._encoder.window == positions
    assert [row["clip_tokens"] for row in made] == [76, 84, 303]
    assert [row["clip_truncated"] for row in made] == [False, positions == 77, True]
    assert [row["sentences_truncated"] for row in made] == [0, 0, 1]
    other = start + "There is a large blue square in the bottom right corner."
    again = rows_of(score, score.process(given(np.eye(3, 24, dtype=np.float16)[1:2], [other], [""])))[0]
    assert (again["caption_embedding"] == made[1]["caption_embedding"]) == (positions == 77)  # what it did not read
    assert again["sentence_scores"] != made[1]["sentence_scores"]  # … the sentences tell


@pytest.mark.parametrize("positions", [64, 77, 248])
def test_the_halves_compute_what_the_whole_model_does(tmp_path: Path, positions: int) -> None:
    model = model_of(tmp_path, positions)
    whole, tokenizer = AutoModel.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    texts, padding = CAPTIONS[:3], "max_length" if positions == 64 else True
    ids = tokenizer(texts, padding=padding, max_length=64, truncation=True, return_tensors="pt")["input_ids"]
    encoder = TextEncoder(model, None)
    with torch.inference_mode():
        wanted = whole.get_text_features(input_ids=ids).pooler_output.numpy()
        pictures = [Image.open(io.BytesIO(photo)).convert("RGB") for photo in PHOTOS[:3]]
        pixels = AutoImageProcessor.from_pretrained(model, backend="pil")(images=pictures, return_tensors="pt")
        seen = whole.get_image_features(**pixels).pooler_output.numpy()
    vectors, _ = encoder.embed(texts)
    assert np.abs(vectors - wanted / np.linalg.norm(wanted, axis=1, keepdims=True)).max() < 1e-5
    embed = Embed(EmbedConfig(model=model))
    embed.load()
    found = np.stack(embed.process(pa.table({"image": PHOTOS[:3]}))["image_embedding"])
    assert np.abs(found - seen / np.linalg.norm(seen, axis=1, keepdims=True)).max() < 1e-3


def test_a_model_that_embeds_no_pictures_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(ValueError, match="is a t5 model: pictures and texts are embedded by clip or siglip"):
        Embed(EmbedConfig(model=str(tmp_path))).load()


def test_embeddings_are_kept_in_16_bits() -> None:
    """Through parquet, and beside rows that were taken over from an earlier table, which come as plain numbers."""
    vectors = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    first = pa.table({"e": pa.array(stored(vectors), EMBEDDING)})
    back = pq.read_table(pa.BufferReader(parquet_bytes(first)))
    assert back.schema.field("e").type == EMBEDDING and np.array_equal(
        matrix(back.column("e")), vectors.astype(np.float16)
    )
    mixed = pa.array([stored(vectors)[0], *back.column("e").to_pylist()[1:]], EMBEDDING)
    assert parquet_bytes(pa.table({"e": mixed})) == parquet_bytes(first)
    assert np.array_equal(matrix(back.slice(1, 2).column("e")), vectors[1:].astype(np.float16))


def test_a_new_caption_opens_no_picture() -> None:
    """What is known of the picture alone is made before the captions, and what needs them reads no picture."""
    assert Embed.reads == ("image",) and not Embed.drops and "image" not in Score.reads


def test_pictures_and_texts_of_two_models_are_refused() -> None:
    class Captions(Small):
        name = "captions"
        writes = pa.schema([("image", pa.binary()), ("caption", pa.string())])

    def stages(model: str, revision: str | None) -> list[Stage]:
        embed = Embed(EmbedConfig(model="a/clip", revision="1"))
        return [Captions(SmallConfig()), embed, Score(ScoreConfig(model=model, revision=revision, dtype="float16"))]

    check_stages(stages("a/clip", "1"))
    for model, revision, named in (("b/clip", "1", "b/clip@1"), ("a/clip", None, "a/clip@main")):
        with pytest.raises(
            ValueError, match=rf"'score' is set for {named}, but 'image_embedding'.* was made by a/clip@1"
        ):
            check_stages(stages(model, revision))
