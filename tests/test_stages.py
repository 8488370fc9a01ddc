"""The stages one by one: what each decides of a row, and that no row is ever lost."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
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
from pipeline.captions import TokenizerConfig
from pipeline.plan import make_plan
from pipeline.runner import run_plan
from pipeline.sample import sample_key
from pipeline.shards import View, ViewInfo
from pipeline.stage import Columns, Stage, check_stages
from pipeline.storage import Folder
from stages.clip_filter import ClipFilter, ClipFilterConfig
from stages.download import Download, DownloadConfig
from stages.embed import Embed, EmbedConfig
from stages.fetch import FetchConfig
from stages.ingest import ingest
from stages.pack import Pack, PackConfig, check_condition, publish_view, select_rows
from stages.recaption import RecaptionConfig, tidy
from stages.score import Score, ScoreConfig, split_sentences
from tests.small_stages import Small, SmallConfig, small_source


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


# -- pack --------------------------------------------------------------------------------------------------------------

BATCH = pa.table(
    {
        "key": ["a", "b", "c"],
        "image": [b"1", b"2", b"3"],
        "width": pa.array([600, 512, 300], pa.int32()),
        "height": pa.array([512, 700, 900], pa.int32()),
        "caption": ["it's one", None, "three"],
        "clip_score": pa.array([0.3, 0.2, None], pa.float32()),
        "tokens_t5": [[1], [2], [3]],
    }
)


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ("true", "abc"),
        ("false", ""),
        ("least(width, height) >= 512 AND clip_score >= 0.25", "a"),
        ("clip_score >= 0.1", "ab"),  # NULL is not true
        ("caption IS NULL OR caption LIKE '%''s%'", "ab"),
        ("clip_score < 0.25) OR (width = 600", "ab"),
    ],
)
def test_a_condition_chooses_rows(where: str, keys: str) -> None:
    assert select_rows(BATCH, where, "v") == set(keys)


@pytest.mark.parametrize(
    "where",
    ["widht > 3", "width >", "", "caption > 3 +", "key IN (SELECT content FROM read_text('/etc/hosts'))", "1; DROP"],
)
def test_a_condition_that_is_none_is_told_in_one_line(where: str) -> None:
    with pytest.raises(ValueError, match=r"view 'v': its condition .* is not valid: \w+ Error") as raised:
        select_rows(BATCH, where, "v")
    assert "\n" not in str(raised.value) and "LINE 1" not in str(raised.value)


def test_a_condition_is_told_from_one_row_alone() -> None:
    """Else a view would depend on the batches that its rows came in, or on the day."""
    check_condition("width > 3 AND caption LIKE '%a%' -- as the paper does", "v")
    for where, said in (
        ("clip_score > (SELECT avg(clip_score) FROM samples)", "asks other rows"),
        ("random() < 0.5", r"random\(\) says another thing each time"),
        ("1=1) --", "is not valid: syntax error"),
        ("true) UNION (SELECT key FROM samples", "is not valid: syntax error"),
        ("true; DROP TABLE samples", "is not valid"),
    ):
        with pytest.raises(ValueError, match=said):
            check_condition(where, "v")


def test_a_condition_over_no_column_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r'"clip_scoer" not found .* "clip_score"'):
        select_rows(BATCH, "clip_scoer > 0.2", "v")


def test_views_are_checked() -> None:
    for wrong, message in (({"view": "a/b"}, "letters, digits and dashes"), ({"resolution": 0}, "at least 1 pixel")):
        with pytest.raises(ValueError, match=message):
            PackConfig(**{"view": "v", "resolution": 8, "tokenizers": (), **wrong})


class Facts(Small):
    """url → everything that a view is packed from. The picture's side and the token count are the URL's number."""

    name = "facts"
    reads = ("url",)
    writes = pa.schema(
        [
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("caption", pa.string()),
            ("clip_score", pa.float32()),
            ("alt_score", pa.float32()),
            ("alt_supported", pa.bool_()),
            ("tokens_t5", pa.list_(pa.int32())),
        ]
    )
    payload = {"image": "jpg"}

    def process(self, batch: pa.Table) -> Columns:
        sides = [int(url.rsplit("/", 1)[1]) for url in batch.column("url").to_pylist()]
        return {
            "width": sides,
            "height": [side + 2 for side in sides],
            "caption": [f"Größe {side}" for side in sides],
            "clip_score": [side / 100 for side in sides],
            "alt_score": [None] * len(sides),
            "alt_supported": [False] * len(sides),
            "tokens_t5": [list(range(side)) for side in sides],
            "image": [jpeg(side) for side in sides],
        }


def jpeg(side: int) -> bytes:
    pixels = np.random.default_rng(side).integers(256, size=(side + 2, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


def pack_views(tmp_path: Path, count: int, dataset: Folder) -> tuple[list[Stage], list[ViewInfo]]:
    """Builds two views of pictures with sides from 20 on; returns stages and the views' versions."""
    (tmp_path / "tokenizer").mkdir(exist_ok=True)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    t5 = TokenizerConfig(name="t5", model=str(tmp_path / "tokenizer"))
    packs = [
        Pack(PackConfig(view="small", resolution=24, tokenizers=(t5,))),
        Pack(PackConfig(view="large", resolution=32, tokenizers=(t5,), where="width >= 36")),
    ]
    stages: list[Stage] = [Facts(SmallConfig()), *packs]
    partitions = ingest(dataset, small_source(tmp_path, [f"u://{n}" for n in range(20, 20 + count)]))
    run_plan(dataset, stages, make_plan(dataset, stages, partitions), lambda _: None, runner="local")
    tickets = make_plan(dataset, stages, partitions).tickets
    return stages, [publish_view(dataset, pack, tickets) for pack in packs]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, list[ViewInfo]]:
    root = tmp_path_factory.mktemp("packed")
    dataset = Folder(url=str(root / "dataset"))
    return dataset, pack_views(root, 22, dataset)[1]


def test_views_take_what_their_condition_and_size_allow(packed: tuple[Folder, list[ViewInfo]]) -> None:
    dataset, (small, large) = packed
    assert (small.samples, large.samples) == (18, 6)  # sides 24 to 41, and 36 to 41
    for info, side in ((small, 24), (large, 32)):
        view = View.open(dataset, info.view)
        assert view.info == info and len(view) == view.manifest.num_rows == info.samples
        for row in range(len(view)):
            image = Image.open(io.BytesIO(view.read(row, "image")))
            width, height = (view.manifest.column(n)[row].as_py() for n in ("width", "height"))
            assert image.size == (width, height) and min(image.size) == side


def test_a_stage_may_not_hide_the_bytes_it_reads() -> None:
    """Else the second view would be packed from the first one's small pictures."""

    class Hiding(Facts):
        name = "hiding"
        reads = ("image",)

    with pytest.raises(ValueError, match="stage 'hiding' reads and writes the bytes 'image'"):
        check_stages([Facts(SmallConfig()), Hiding(SmallConfig())])


def test_a_column_that_nobody_writes_is_named_with_the_nearest() -> None:
    class Reader(Small):
        name = "reader"
        writes = pa.schema([])

    for column, near in (("captoin", "perhaps you meant caption"), ("zzz", "there are: alt_score, .*, key, .*, width")):
        Reader.reads = (column,)
        with pytest.raises(
            ValueError, match=f"stage 'reader' reads '{column}', which no stage before it writes: {near}"
        ):
            check_stages([Facts(SmallConfig()), Reader(SmallConfig())])


def test_the_manifest_gives_back_the_exact_bytes(packed: tuple[Folder, list[ViewInfo]]) -> None:
    dataset, _ = packed
    view = View.open(dataset, "small")
    keys = view.manifest.column("key").to_pylist()
    for n in range(24, 42):
        row = keys.index(sample_key(f"u://{n}"))
        facts = view.facts(row)
        assert facts["caption"] == f"Größe {n}" and facts["url"] == f"u://{n}" and facts["text"] == f"text of u://{n}"
        assert view.read(row, "json") == json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()
        tokens = view.tokens(row, "t5")
        assert tokens.dtype == np.int32 and tokens.tolist() == list(range(n))
        assert view.manifest.column("tokens_t5_length")[row].as_py() == n
    first = keys.index(sample_key("u://24"))
    assert view.read(first, "image") == jpeg(24)  # as small as the view: the bytes stay


def test_a_view_elsewhere_gives_the_same_bytes(tmp_path: Path, packed: tuple[Folder, list[ViewInfo]]) -> None:
    dataset = Folder(url=f"memory://{tmp_path.name}")
    pack_views(tmp_path, 22, dataset)
    here, there = View.open(packed[0], "small"), View.open(dataset, "small")
    assert there.info == here.info and there.manifest.equals(here.manifest)
    members = ("image", "json", "tokens_t5")
    assert all(here.read(r, m) == there.read(r, m) for r in range(len(here)) for m in members)


def test_a_view_of_another_format_is_made_again(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "dataset"))
    info = pack_views(tmp_path, 6, dataset)[1][0]
    dataset.write("views/small.json", json.dumps({**asdict(info), "format": 0}).encode())
    with pytest.raises(ValueError, match="this version reads 1: build it again"):
        View.open(dataset, "small")
    pack_views(tmp_path, 6, dataset)
    assert View.open(dataset, "small").info == info


def test_webdataset_streams_the_shards(packed: tuple[Folder, list[ViewInfo]]) -> None:
    import webdataset

    dataset, infos = packed
    for info in infos:
        view = View.open(dataset, info.view)
        folder = Path(dataset.path(info.manifest)).parent
        shards = sorted(str(p) for p in folder.glob("*.tar"))
        assert len(shards) == 5  # one a partition, also where nothing was chosen
        stream = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
        streamed = {sample["__key__"]: sample for sample in stream}
        keys = view.manifest.column("key").to_pylist()
        assert sorted(streamed) == sorted(keys)
        for row, key in enumerate(keys):
            assert {n: d for n, d in streamed[key].items() if not n.startswith("__")} == {
                "jpg": view.read(row, "image"), "json": view.read(row, "json"), "t5.npy": view.read(row, "tokens_t5")
            }  # fmt: skip
        decoded = next(iter(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8")))
        assert decoded["jpg"].dtype == np.uint8 and decoded["json"]["url"].startswith("u://")


def test_publishing_again_changes_nothing_and_growth_makes_a_version(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "dataset"))
    before = pack_views(tmp_path, 7, dataset)[1]
    files = {p: p.stat().st_mtime_ns for p in Path(dataset.url).rglob("*.[pt]a*")}
    assert pack_views(tmp_path, 7, dataset)[1] == before
    assert {p: p.stat().st_mtime_ns for p in Path(dataset.url).rglob("*.[pt]a*")} == files
    after = pack_views(tmp_path, 12, dataset)[1]
    assert after[0].version != before[0].version and after[0].samples == 8
    assert dataset.exists(before[0].manifest) and View.open(dataset, "small").info == after[0]


def test_a_damaged_manifest_says_so(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "dataset"))
    info = pack_views(tmp_path, 6, dataset)[1][0]
    Path(dataset.path(info.manifest)).write_bytes(b"other")
    with pytest.raises(ValueError, match="is damaged"):
        _ = View.open(dataset, "small").manifest
    dataset.remove(info.manifest)  # what the message says to do
    pack_views(tmp_path, 6, dataset)
    assert View.open(dataset, "small").manifest.num_rows == info.samples
    with pytest.raises(FileNotFoundError, match=r"has no view 'none': run `densebridge build`"):
        View.open(dataset, "none")
