"""Packing: what a view takes, how its pictures are cut, what its shards say of each sample, who can read them."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.sample import sample_key
from pipeline.shards import View, ViewInfo
from pipeline.stage import check_stages
from pipeline.storage import Folder
from stages.pack import Pack, PackConfig
from tests.packing import Facts, jpeg, pack_urls, pack_views, tokenizer
from tests.small_stages import Small, SmallConfig


def test_views_are_checked() -> None:
    for wrong, message in (({"view": "a/b"}, "letters, digits and dashes"), ({"resolution": 0}, "at least 1 pixel")):
        with pytest.raises(ValueError, match=message):
            PackConfig(**{"view": "v", "resolution": 8, "tokenizers": (), **wrong})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, list[ViewInfo]]:
    root = tmp_path_factory.mktemp("packed")
    dataset = Folder(url=str(root / "dataset"))
    return dataset, pack_views(root, 22, dataset)


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

    for column, near in (
        ("captoin", "perhaps you meant caption"),
        ("zzz", "there are: aesthetic_score, .*, key, .*, width"),
    ):
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
        assert tokens.dtype == np.uint16 and tokens.tolist() == list(range(n))
        assert view.manifest.column("tokens_t5_length")[row].as_py() == n
    first = keys.index(sample_key("u://24"))
    assert view.read(first, "image") == jpeg(24, 26)  # as small as the view: the bytes stay


def test_a_view_elsewhere_gives_the_same_bytes(tmp_path: Path, packed: tuple[Folder, list[ViewInfo]]) -> None:
    dataset = Folder(url=f"memory://{tmp_path.name}")
    pack_views(tmp_path, 22, dataset)
    here, there = View.open(packed[0], "small"), View.open(dataset, "small")
    assert replace(there.info, made_by={}) == replace(here.info, made_by={})  # which name the tokenizer's folder
    assert list(there.manifest.batches()) == list(here.manifest.batches())
    members = ("image", "json", "tokens_t5")
    assert all(here.read(r, m) == there.read(r, m) for r in range(len(here)) for m in members)


def test_a_view_of_another_format_is_made_again(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "dataset"))
    info = pack_views(tmp_path, 6, dataset)[0]
    dataset.write("views/small.json", json.dumps({**asdict(info), "format": 0}).encode())
    with pytest.raises(ValueError, match=r"is of another format than this version.s, 2: build it again"):
        View.open(dataset, "small")
    pack_views(tmp_path, 6, dataset)
    assert View.open(dataset, "small").info == info


def test_publishing_again_changes_nothing_and_growth_makes_a_version(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "dataset"))
    before = pack_views(tmp_path, 7, dataset)
    files = {p: p.stat().st_mtime_ns for p in Path(dataset.url).rglob("*.[pt]a*")}
    assert pack_views(tmp_path, 7, dataset) == before
    assert {p: p.stat().st_mtime_ns for p in Path(dataset.url).rglob("*.[pt]a*")} == files
    after = pack_views(tmp_path, 12, dataset)
    assert after[0].version != before[0].version and after[0].samples == 8
    assert dataset.exists(before[0].manifest) and View.open(dataset, "small").info == after[0]


def test_a_damaged_manifest_says_so(tmp_path: Path) -> None:
    dataset = Folder(url=str(tmp_path / "dataset"))
    info = pack_views(tmp_path, 6, dataset)[0]
    Path(dataset.path(info.manifest)).write_bytes(b"other")
    with pytest.raises(ValueError, match="is damaged"):
        len(View.open(dataset, "small").manifest)
    dataset.remove(info.manifest)  # what the message says to do
    pack_views(tmp_path, 6, dataset)
    assert View.open(dataset, "small").manifest.num_rows == info.samples
    with pytest.raises(FileNotFoundError, match=r"has no view 'none': run `densebridge build`"):
        View.open(dataset, "none")


# -- shapes ------------------------------------------------------------------------------------------------------------


def pack_one(tmp_path: Path, urls: list[str], **changes: Any) -> View:
    """A view of these pictures at 32 pixels."""
    dataset = Folder(url=str(tmp_path / "dataset"))
    config = PackConfig(**{"view": "v", "resolution": 32, "tokenizers": (tokenizer(tmp_path),), **changes})
    pack_urls(tmp_path, dataset, [Facts(SmallConfig()), Pack(config)], urls)
    return View.open(dataset, "v")


def rows_of(view: View) -> dict[str, dict[str, Any]]:
    """The manifest's rows by the URL's last part."""
    rows = pa.concat_tables(view.manifest.batches()).to_pylist()
    return {view.facts(spot)["url"].rsplit("/", 1)[1]: row | {"row": spot} for spot, row in enumerate(rows)}


SIZES = ["u://32x32", "u://31x90", "u://90x31", "u://200x50", "u://64x40", "u://40x64", "u://33x40", "u://48x32"]


def test_squares(tmp_path: Path) -> None:
    rows = rows_of(pack_one(tmp_path, SIZES, shape="square"))
    assert set(rows) == {"32x32", "200x50", "64x40", "40x64", "33x40", "48x32"}  # the others would have to grow
    assert {(row["width"], row["height"], row["bucket"]) for row in rows.values()} == {(32, 32, None)}
    assert (rows["64x40"]["crop_left"], rows["64x40"]["crop_top"]) == (9, 0)  # scaled to 51 x 32
    assert (rows["40x64"]["crop_left"], rows["40x64"]["crop_top"]) == (0, 9)
    assert (rows["64x40"]["original_width"], rows["64x40"]["original_height"]) == (128, 80)


def test_buckets(tmp_path: Path) -> None:
    """At 32 pixels there are 16x64, 24x40, 32x32, 40x24 and 64x16."""
    view = pack_one(tmp_path, SIZES, shape="buckets")
    rows = rows_of(view)
    assert {url: row["bucket"] for url, row in rows.items()} == {
        "32x32": "32x32", "31x90": "16x64", "90x31": "64x16", "200x50": "64x16", "64x40": "40x24", "40x64": "24x40",
        "33x40": "32x32", "48x32": "40x24",
    }  # fmt: skip
    for url, row in rows.items():
        image = Image.open(io.BytesIO(view.read(row["row"], "image")))
        assert f"{image.width}x{image.height}" == row["bucket"] == f"{row['width']}x{row['height']}"
        facts = view.facts(row["row"])
        assert [facts[n] for n in ("scaled_width", "scaled_height", "crop_left", "crop_top", "bucket")] == {
            "32x32": [32, 32, 0, 0, "32x32"], "31x90": [22, 64, 3, 0, "16x64"], "90x31": [64, 22, 0, 3, "64x16"],
            "200x50": [64, 16, 0, 0, "64x16"], "64x40": [40, 25, 0, 0, "40x24"], "40x64": [25, 40, 0, 0, "24x40"],
            "33x40": [32, 39, 0, 3, "32x32"], "48x32": [40, 27, 0, 1, "40x24"],
        }[url]  # fmt: skip
    assert view.read(rows["32x32"]["row"], "image") == jpeg(32, 32)  # what fits keeps its bytes
    assert pack_one(tmp_path / "again", SIZES, shape="buckets").info.manifest_sha256 == view.info.manifest_sha256


def test_a_picture_that_is_too_small_for_its_bucket_is_dropped(tmp_path: Path) -> None:
    assert set(rows_of(pack_one(tmp_path, ["u://32x32", "u://31x31", "u://63x16", "u://24x40"], shape="buckets"))) == {
        "32x32", "24x40"
    }  # fmt: skip


def test_a_picture_that_cannot_be_read_is_a_row(tmp_path: Path) -> None:
    for shape in ("keep", "square", "buckets"):
        pack = Pack(PackConfig(view="v", resolution=8, shape=shape, tokenizers=()))
        pack.load()
        row = {"key": "a", "image": b"none", "width": 9, "height": 8, "listed": True}
        found = pack.process(pa.Table.from_pylist([row]))
        assert (found["status"], found["reason"]) == (["failed"], ["not_an_image"])


# -- what is said of a sample ------------------------------------------------------------------------------------------


def test_a_sample_says_where_it_comes_from(tmp_path: Path) -> None:
    where = "aesthetic_score > 6 AND least(original_width, original_height) >= 100"
    view = pack_one(tmp_path, ["u://48", "u://49", "u://50"], where=where, facts=("tokens_t5_short",), shape="square")
    assert len(view) == 1
    assert view.facts(0) == {
        "key": sample_key("u://50"), "url": "u://50", "text": "text of u://50", "caption": "Größe 50",
        "short_caption": "groß", "prompt": "plain", "sha256": hashlib.sha256(jpeg(50, 52)).hexdigest(),
        "clip_score": 0.5, "alt_score": None, "alt_supported": False, "sentence_scores": [0.5, 0.5],
        "aesthetic_score": 6.25, "tokens_t5_short": [7, 1], "width": 32, "height": 32, "original_width": 100,
        "original_height": 104, "scaled_width": 32, "scaled_height": 33, "crop_left": 0, "crop_top": 0, "bucket": None,
    }  # fmt: skip


def test_the_view_says_which_stages_made_it(packed: tuple[Folder, list[ViewInfo]]) -> None:
    small, large = packed[1]
    assert list(small.made_by) == ["facts", "pack_small"] and list(large.made_by) == ["facts", "pack_large"]
    assert large.made_by["pack_large"]["settings"]["where"] == "width >= 36"
    assert "batch_size" not in large.made_by["pack_large"]["settings"]
    assert small.members == {"image": "jpg", "json": "json", "tokens_t5": "t5.npy"}


def test_what_is_no_number_in_json_is_null() -> None:
    pack = Pack(PackConfig(view="v", resolution=8, tokenizers=(), facts=("embedding", "seen")))
    pack.load()
    row = {"key": "a", "image": jpeg(8, 8), "width": 8, "height": 8, "listed": True}
    row |= {"clip_score": float("nan"), "embedding": b"\xff\0", "seen": datetime(2024, 5, 6)}
    (data,) = pack.process(pa.Table.from_pylist([row]))["packed_json"]
    facts = json.loads(data, parse_constant=pytest.fail)
    assert (facts["clip_score"], facts["embedding"], facts["seen"]) == (None, "ff00", "2024-05-06 00:00:00")


def test_a_column_that_no_stage_writes_is_refused_only_where_it_is_asked_for() -> None:
    facts = Facts(SmallConfig())
    check_stages([facts, Pack(PackConfig(view="v", resolution=8, tokenizers=()))])  # "directives", of Pack's own wish
    for asked in ({"where": "watermark < 0.5"}, {"facts": ("watermark",)}, {"where": "directives IS NULL"}):
        with pytest.raises(
            ValueError, match=r"stage 'pack_v' reads '(watermark|directives)', which no stage before it"
        ):
            check_stages([facts, Pack(PackConfig(**{"view": "v", "resolution": 8, "tokenizers": (), **asked}))])


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_captions_of_several_kinds(tmp_path: Path) -> None:
    """Odd widths have no short caption; every third one's alt text is supported."""
    t5 = tokenizer(tmp_path, "long", "short", "alt")
    view = pack_one(tmp_path, [f"u://{n}" for n in range(32, 38)], tokenizers=(t5,))
    assert view.info.tokenizers["t5"]["captions"] == [["long", 1.0], ["short", 1.0], ["alt", 1.0]]
    for url, row in rows_of(view).items():
        width, spot = int(url), row["row"]
        for name, there, ids in (
            ("t5", True, list(range(width))), ("t5_short", width % 2 == 0, [7, 1]), ("t5_alt", width % 3 == 0, [9, 9, 1])
        ):  # fmt: skip
            assert row[f"tokens_{name}_length"] == (len(ids) if there else None)
            if there:
                tokens = view.tokens(spot, name)
                assert tokens.dtype == np.dtype("<u2") and tokens.tolist() == ids
            else:
                assert row[f"tokens_{name}_crc32"] is None
                with pytest.raises(LookupError, match=f"has no tokens_{name}"):
                    view.tokens(spot, name)


def test_a_sample_without_the_first_kind_of_caption_is_dropped(tmp_path: Path) -> None:
    view = pack_one(tmp_path, [f"u://{n}" for n in range(32, 38)], tokenizers=(tokenizer(tmp_path, "alt"),))
    assert set(rows_of(view)) == {"33", "36"}


# -- readers -----------------------------------------------------------------------------------------------------------


def test_tars_are_plain_sorted_and_timeless(packed: tuple[Folder, list[ViewInfo]]) -> None:
    dataset, (small, _) = packed
    view = View.open(dataset, "small")
    keys = view.manifest.column("key").to_pylist()
    found = []
    for shard in sorted(view.manifest.shards):
        with tarfile.open(dataset.path(shard)) as tar:
            found += tar.getmembers()
    assert all((m.isreg(), m.mtime, m.uid, m.gid, m.name.count("/")) == (True, 0, 0, 0, 0) for m in found)
    assert [m.name for m in found] == [f"{key}.{end}" for key in keys for end in ("jpg", "json", "t5.npy")]
    assert all(re.fullmatch("[0-9a-f]{24}", key) for key in keys)  # no dots, which would be read as an ending
    assert {m.name.split(".", 1)[1] for m in found} == set(small.members.values())


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
        assert decoded["t5.npy"].tolist() == view.tokens(keys.index(decoded["__key__"]), "t5").tolist()


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_loads_the_shards(
    packed: tuple[Folder, list[ViewInfo]], tmp_path: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    dataset, _ = packed
    view = View.open(dataset, "small")
    shards = [dataset.path(shard) for shard in sorted(view.manifest.shards)]
    loaded = datasets.load_dataset(
        "webdataset", data_files={"train": shards}, split="train", streaming=streaming, cache_dir=str(tmp_path)
    )
    rows = {row["__key__"]: row for row in loaded}
    assert list(rows) == view.manifest.column("key").to_pylist()
    for spot, row in enumerate(rows.values()):
        assert row["json"]["caption"] == view.facts(spot)["caption"]
        assert list(row["t5.npy"]) == view.tokens(spot, "t5").tolist()
        width, height = (view.manifest.column(name)[spot].as_py() for name in ("width", "height"))
        assert row["jpg"].size == (width, height)


def test_datasets_is_told_of_members_that_not_every_sample_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the first five samples for the pattern of all, unless it is told the features."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    t5 = tokenizer(tmp_path, "long", "short")
    view = pack_one(tmp_path, [f"u://{n}" for n in range(32, 38)], tokenizers=(t5,))
    text, ids = datasets.Value("string"), datasets.List(datasets.Value("uint16"))
    features = {"__key__": text, "jpg": datasets.Image(), "json": {"caption": text}, "t5.npy": ids, "t5-short.npy": ids}
    loaded = datasets.load_dataset(
        "webdataset",
        data_files={"train": [view.dataset.path(shard) for shard in sorted(view.manifest.shards)]},
        split="train",
        features=datasets.Features(features),
        streaming=True,
    )
    for spot, row in enumerate(loaded):
        assert row["json"]["caption"] == view.facts(spot)["caption"]
        there = view.place(spot, "tokens_t5_short") is not None
        assert row["t5-short.npy"] == ([7, 1] if there else None)
    assert spot == 5
