"""Packing: what a view takes, how its pictures are cut, what its shards say of each sample, who can read them."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.sample import sample_key
from pipeline.shards import View, ViewInfo
from pipeline.stage import check_stages
from pipeline.storage import Folder
from stages.pack import PackConfig
from tests.packing import Facts, jpeg, pack_views
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

    for column, near in (("captoin", "perhaps you meant caption"), ("zzz", "there are: aesthetic_score, .*, key, .*, width")):
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
    with pytest.raises(ValueError, match="this version reads 2: build it again"):
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
