"""The stages one by one: what each decides of a row, and that no row is ever lost."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from examples.shapes.making.measure import held_out
from examples.shapes.making.pictures import photo_jpeg
from examples.shapes.recipe import JUDGE
from examples.shapes.server import serve
from examples.shapes.source import BEHAVIOURS, Row, ShapesSource, picture, rows
from examples.shapes.words import PROMPTS, styled_caption
from pipeline.sample import sample_key
from pipeline.stage import Columns, Stage, check_stages
from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.deduplicate import Deduplicate, DeduplicateConfig
from stages.download import Download, DownloadConfig
from stages.embed import Embed, EmbedConfig
from stages.fetch import FetchConfig
from stages.recaption import RecaptionConfig, tidy
from stages.score import Score, ScoreConfig, split_sentences
from tests.small_stages import Small, SmallConfig


def rows_of(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


# -- download ----------------------------------------------------------------------------------------------------------

WORLD = ShapesSource(count=120, seed=6, **{name: 0.06 for name in BEHAVIOURS[1:] if name != "slow"}, slow=0.0)
ENDS = {
    "missing": ("failed", "http_404"),
    "truncated": ("failed", "truncated"),
    "html": ("failed", "not_an_image"),
    "opt_out": ("dropped", "opt_out"),
    "tiny": ("dropped", "too_small"),
}


def download(**changes: Any) -> Download:
    fetch = FetchConfig(allow_private_hosts=True, timeout=30.0, retries=1, backoff=0.01)
    stage = Download(DownloadConfig(**{"fetch": fetch, "min_edge": 16, "max_edge": 64, **changes}))
    stage.load()
    return stage


@pytest.fixture(scope="module")
def downloaded() -> Iterator[list[tuple[Row, dict[str, Any]]]]:
    """Every row of the world with what the stage wrote for it; the last three URLs are nobody's."""
    with serve(WORLD) as base:
        urls = [base + row.path for row in rows(WORLD)] + [f"{base}/nobody.jpg", "ftp://x/y.jpg", "http://"]
        made = rows_of(download().process(pa.table({"key": [sample_key(u) for u in urls], "url": urls})))
    assert len(made) == len(urls)
    assert [(r["status"], r["reason"]) for r in made[-3:]] == [
        ("failed", "http_404"), ("failed", "bad_scheme"), ("failed", "bad_url")
    ]  # fmt: skip
    yield list(zip(rows(WORLD), made))


def test_download_gives_every_row_a_typed_end(downloaded: list[tuple[Row, dict[str, Any]]]) -> None:
    seen = set()
    for row, made in downloaded:
        assert (made["status"], made["reason"]) == ENDS.get(row.behaviour, ("kept", None)), row
        assert set(made) == {*Download.writes.names, "image", "status", "reason", "transient"}
        kept = made["status"] == "kept"
        assert all((made[c] is not None) == kept for c in ("image", "width", "height", "sha256"))
        seen.add(row.behaviour)
    assert seen == set(BEHAVIOURS) - {"slow"}


def test_download_keeps_what_was_served(downloaded: list[tuple[Row, dict[str, Any]]]) -> None:
    for row, made in downloaded:
        if made["status"] == "kept":
            served = picture(WORLD, row)
            assert made["sha256"] == hashlib.sha256(served).hexdigest() and made["http_status"] == 200
            image = Image.open(io.BytesIO(made["image"]))
            assert image.size == (made["width"], made["height"]) and image.mode == "RGB"
            before = Image.open(io.BytesIO(served)).size
            assert min(image.size) == min(64, *before)
            if min(before) <= 64:
                assert made["image"] == served  # not compressed a second time


def test_download_tells_which_failures_may_pass() -> None:
    rows = rows_of(download().process(pa.table({"key": ["a", "b"], "url": ["http://127.0.0.1:9/x", "gopher://x/"]})))
    assert [(r["status"], r["reason"], r["transient"]) for r in rows] == [
        ("failed", "connection", True), ("failed", "bad_scheme", False)
    ]  # fmt: skip


def test_download_is_redone_for_another_size_but_not_for_more_patience() -> None:
    ids = [
        Download(DownloadConfig(**c)).config_id for c in ({}, {"fetch": FetchConfig(timeout=99.0)}, {"max_edge": 999})
    ]
    assert ids[0] == ids[1] != ids[2]
    with pytest.raises(ValueError, match="need 1 <= min_edge <= max_edge"):
        DownloadConfig(min_edge=9, max_edge=8)


# -- deduplicate -------------------------------------------------------------------------------------------------------


def test_deduplicate_keeps_the_first_over_all_batches() -> None:
    stage = Deduplicate(DeduplicateConfig())
    stage.load()
    digests = [hashlib.sha256(c.encode()).hexdigest() for c in "abacba"]
    made = [
        rows_of(stage.process(pa.table({"key": list(keys), "sha256": digests[s], "listed": [True] * 3})))
        for keys, s in (("uvw", slice(0, 3)), ("xyz", slice(3, 6)))
    ]
    flat = [(r["status"], r["reason"], r["duplicate_of"]) for batch in made for r in batch]
    first, again = ("kept", None, None), lambda key: ("dropped", "duplicate", key)
    assert flat == [first, first, again("u"), first, again("v"), again("u")]
    assert stage.ordered


def test_what_the_source_no_longer_lists_is_nobodys_original() -> None:
    """A picture under two URLs of which the first leaves the list stays, by the second."""
    stage = Deduplicate(DeduplicateConfig())
    stage.load()
    digest = hashlib.sha256(b"a").hexdigest()
    rows = rows_of(
        stage.process(pa.table({"key": list("uvwx"), "sha256": [digest] * 4, "listed": [False, False, True, True]}))
    )
    assert [r["duplicate_of"] for r in rows] == [None, "u", None, "w"]


# -- recaption, embed, score --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "whole", "tidied"),
    [
        ("  A red\n\ncube. ", True, "A red cube."),
        ("A red cube. It lies on", True, "A red cube. It lies on"),
        ("A red cube. It lies on", False, "A red cube."),
        ("A red cube that lies", False, "A red cube that lies"),
        ("", True, ""),
    ],
)
def test_an_answer_that_was_cut_ends_with_a_sentence(text: str, whole: bool, tidied: str) -> None:
    assert tidy(text, whole) == tidied


def test_recaption_needs_a_prompt() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        RecaptionConfig(model="m", prompts=())


@pytest.mark.parametrize(
    ("caption", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("It is 3.5 m high.  So there.\n", ["It is 3.5 m high.", "So there."]),
        ("No end", ["No end"]),
        ("", [""]),
        ("  ", ["  "]),
    ],
)
def test_sentences_are_never_none(caption: str, sentences: list[str]) -> None:
    assert split_sentences(caption) == sentences


@pytest.fixture(scope="module")
def scored() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What embed and score write of twelve pictures: six, then the same six with the captions of others."""
    scenes, rng = held_out(6, (0, 1, 1, 1))
    images = [photo_jpeg(scenes, n, rng) for n in range(6)] * 2
    right = [styled_caption(scenes.facts(n), n % len(PROMPTS)) for n in range(6)]
    captions, alts = [*right, *right[1:], right[0]], [*right[:4], "", " \n"] * 2
    embed, score = Embed(EmbedConfig(model=JUDGE)), Score(ScoreConfig(model=JUDGE))
    embed.load()
    score.load()
    embedded = embed.process(pa.table({"image": images}))
    texts = {"image_embedding": pa.array(embedded["image_embedding"], pa.list_(pa.float32())), "text": alts}
    return rows_of(embedded), rows_of(score.process(pa.table({**texts, "caption": captions})))


def test_score_holds_the_texts_against_the_stored_picture(
    scored: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    embedded, made = scored
    for picture_row, row in zip(embedded, made, strict=True):
        image, caption = picture_row["image_embedding"], row["caption_embedding"]
        assert abs(np.linalg.norm(image) - 1) < 1e-3 and np.array_equal(image, image.astype(np.float16))
        assert set(row) == set(Score.writes.names) and abs(row["clip_score"] - image @ caption) < 1e-3
        assert row["sentence_scores"] and all(-1 <= s <= 1 for s in row["sentence_scores"])
    right, wrong = ([row["clip_score"] for row in part] for part in (made[:6], made[6:]))
    assert np.mean(right) > np.mean(wrong) + 0.3
    assert [row["alt_score"] for row in made[:4]] == [row["clip_score"] for row in made[:4]]
    assert all(row["alt_score"] is None for row in (*made[4:6], *made[10:]))  # a blank alt text has no score


def test_a_new_caption_opens_no_picture(scored: tuple[list[dict[str, Any]], list[dict[str, Any]]]) -> None:
    """What is known of the picture alone is made before the captions, and what needs them reads no picture."""
    assert Embed.reads == ("image",) and not Embed.drops and "image" not in Score.reads
    embedded, _ = scored
    for once, again in zip(embedded[:6], embedded[6:], strict=True):
        assert np.array_equal(once["image_embedding"], again["image_embedding"])


def test_pictures_and_texts_of_two_models_are_refused() -> None:
    class Captions(Small):
        name = "captions"
        writes = pa.schema([("image", pa.binary()), ("caption", pa.string())])

    def stages(model: str, revision: str | None) -> list[Stage]:
        embed = Embed(EmbedConfig(model="a/clip", revision="1"))
        return [Captions(SmallConfig()), embed, Score(ScoreConfig(model=model, revision=revision, dtype="float16"))]

    check_stages(stages("a/clip", "1"))
    for model, revision, named in (("b/clip", "1", "b/clip@1"), ("a/clip", None, "a/clip@main")):
        with pytest.raises(ValueError, match=rf"'score' has the model {named}, but 'image_embedding'.* is of a/clip@1"):
            check_stages(stages(model, revision))


# -- clip_filter -------------------------------------------------------------------------------------------------------


def judge(config: ClipFilterConfig) -> list[tuple[str, str | None, bool]]:
    table = pa.table(
        {
            "key": list("abcd"),
            "clip_score": pa.array([0.3, 0.3, 0.2, 0.1], pa.float32()),
            "sentence_scores": [[0.3, 0.25], [0.3, 0.05], [0.2], [0.4]],
            "alt_score": pa.array([0.3, None, 0.1, 0.2], pa.float32()),
        }
    )
    return [(r["status"], r["reason"], r["alt_supported"]) for r in rows_of(ClipFilter(config).process(table))]


def test_clip_filter_decides_by_the_whole_then_by_the_weakest_sentence() -> None:
    low = ("dropped", "low_clip_score")
    assert judge(ClipFilterConfig(min_score=0.19)) == [
        ("kept", None, True), ("kept", None, False), ("kept", None, True), (*low, True)
    ]  # fmt: skip
    assert judge(ClipFilterConfig(min_score=0.25, min_sentence_score=0.2, min_alt_score=0.15)) == [
        ("kept", None, True), ("dropped", "low_sentence_score", False), (*low, False), (*low, True)
    ]  # fmt: skip
    assert all(status == "kept" for status, *_ in judge(ClipFilterConfig(min_score=-1.0)))


def test_a_score_that_is_no_number_is_no_pass() -> None:
    nan = float("nan")
    table = pa.table(
        {
            "key": list("ab"),
            "clip_score": pa.array([nan, 0.3], pa.float32()),
            "sentence_scores": [[0.3], [0.3, nan]],
            "alt_score": pa.array([nan, None], pa.float32()),
        }
    )
    config = ClipFilterConfig(min_score=-1.0, min_sentence_score=-1.0, min_alt_score=-1.0)
    found = ClipFilter(config).process(table)
    assert found["reason"] == ["low_clip_score", "low_sentence_score"] and found["alt_supported"] == [False, False]
