"""Folders that img2dataset itself wrote become download tables, and a build asks only for what was not in them."""

from __future__ import annotations

import importlib
import io
import json
import os
import shutil
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.adopt import AdoptOptions, adopt
from jobs.build import BuildOptions, build
from jobs.recipe import Recipe
from pipeline.partitions import list_partitions
from pipeline.records import read_record
from pipeline.sample import sample_key
from pipeline.storage import Folder
from pipeline.tables import TableName, list_tables, read_parquet, read_payloads, read_table
from pipeline.tombstones import write_tombstones
from stages.adopt import ADOPTED, Adopter
from stages.download import Download, DownloadConfig
from stages.fetch import FetchConfig
from stages.img2dataset_folder import find_pictures
from stages.source import Source

FETCH = FetchConfig(allow_private_hosts=True, retries=0, site_files=())
STAGE = Download(DownloadConfig(fetch=FETCH, min_edge=32, max_edge=96, batch_size=4))
SIZES = {  # of the pictures by name; what is not here is answered by 404
    "small.jpg": (64, 48),
    "square.jpg": (90, 90),
    "large.jpg": (260, 200),
    "drawn.png": (70, 60),
    "tiny.jpg": (20, 24),
    "wide.jpg": (300, 40),
    "broken.jpg": (80, 60),
    "shy.jpg": (80, 64),
    "late.jpg": (66, 66),
}
LISTED = (
    "small.jpg",
    "gone.jpg",
    "square.jpg",
    "tiny.jpg",
    "small.jpg",
    "broken.jpg",
    "large.jpg",
    "drawn.png",
    "shy.jpg",
)
ALSO = "wide.jpg"  # in the folder, and not in the recipe's source
RUNS: dict[str, dict[str, Any]] = {  # img2dataset's own settings
    "tars": {"resize_mode": "no", "skip_reencode": True},
    "files": {"resize_mode": "no", "skip_reencode": True, "output_format": "files"},
    "raw": {"disable_all_reencoding": True},
    "shrunk": {"resize_mode": "keep_ratio", "image_size": 40, "compute_hash": None},
    "cropped": {"resize_mode": "center_crop", "image_size": 48},
}


def picture(name: str) -> bytes:
    width, height = SIZES[name]
    pixels = np.random.default_rng(width * height).integers(0, 255, (height // 4 + 1, width // 4 + 1, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(out, "PNG" if name.endswith("png") else "JPEG", quality=90)
    data = out.getvalue()
    return data[: len(data) // 2] if name == "broken.jpg" else data


class Handler(BaseHTTPRequestHandler):
    asked: Counter[str] = Counter()

    def do_GET(self) -> None:
        name = self.path.strip("/")
        Handler.asked[name] += 1
        self.send_response(200 if name in SIZES else 404)
        if name == "shy.jpg":
            self.send_header("X-Robots-Tag", "noai")
        body = picture(name) if name in SIZES else b""
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture(scope="module")
def made(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What img2dataset makes of the listed URLs under each of its settings. Its worker processes are threads here, for
    each would load its libraries anew; its logger only prints.
    """
    STAGE.load()  # with the settings that keep its import off the network
    # By name: the package has a function `main` in the module's place.
    main, distributor = (importlib.import_module(f"img2dataset.{name}") for name in ("main", "distributor"))
    folder = tmp_path_factory.mktemp("img2dataset")
    names = [*LISTED, ALSO]
    pq.write_table(pa.table({"url": [url + n for n in names], "caption": names}), folder / "list.parquet")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patched:
        threads = SimpleNamespace(Pool=lambda count, maxtasksperchild: ThreadPool(count))
        patched.setattr(distributor, "get_context", lambda _: threads)
        patched.setattr(main, "LoggerProcess", Mock())
        for name, settings in RUNS.items():
            settings = {"compute_hash": "sha256", "output_format": "webdataset", **settings}
            main.download(
                url_list=str(folder / "list.parquet"),
                input_format="parquet",
                caption_col="caption",
                output_folder=str(folder / name),
                thread_count=2,
                number_sample_per_shard=6,
                timeout=5,
                **settings,
            )
    signal.signal(signal.SIGINT, handler)  # it has taken it
    return folder


@pytest.fixture
def recipe(url: str, tmp_path: Path) -> Recipe:
    """Asks for the listed URLs and one more, four in a partition."""
    names = [*dict.fromkeys(LISTED), "late.jpg"]
    pq.write_table(
        pa.table({"url": [url + n for n in names], "text": ["our own words"] * len(names)}), tmp_path / "l.parquet"
    )
    source = Source(path=str(tmp_path / "l.parquet"), partition_size=4)
    return Recipe(name="adopting", dataset=str(tmp_path / "dataset"), source=source, stages=(STAGE,))


def tables(dataset: Folder) -> list[TableName]:
    return [t for ts in list_tables(dataset, STAGE.folder, with_tar=True).values() for t in ts]


def rows_of(dataset: Folder, input_id: str | None = None) -> dict[str, dict[str, Any]]:
    """The rows of all tables by key, with their pictures."""
    found = {}
    for name in tables(dataset):
        if input_id is None or name.input_id == input_id:
            table = read_table(dataset, name)
            there = table.filter(table.column("image_offset").is_valid())
            images = dict(zip(there.column("key").to_pylist(), read_payloads(dataset, name, there, "image")))
            found |= {row["key"]: {**row, "image": images.get(row["key"])} for row in table.to_pylist()}
    return found


def fetched(url: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """What the download stage itself writes for these pictures, by key."""
    STAGE.load()
    columns = STAGE.process(pa.table({"url": [url + n for n in names]}))
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    return {sample_key(url + n): row for n, row in zip(names, rows)}


def everything(dataset: Folder) -> dict[str, bytes]:
    root = Path(dataset.url)
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", ["tars", "files", "raw"])
def test_adopted_rows_are_what_download_writes(kind: str, url: str, made: Path, recipe: Recipe, capsys: Any) -> None:
    adopt(recipe, AdoptOptions(folder=str(made / kind)))
    told = capsys.readouterr().out
    ends = {"small.jpg": None, "square.jpg": None, "tiny.jpg": "too_small", "large.jpg": None, "drawn.png": None}
    ends |= {ALSO: "bad_aspect_ratio"}
    ends |= {"broken.jpg": "truncated"} if kind == "raw" else {}  # which the others could not resize
    rows, expected = rows_of(recipe.folder), fetched(url, list(ends))
    assert rows.keys() == expected.keys() and [r["reason"] for r in expected.values()] == list(ends.values())
    for key, row in expected.items():
        if rows[key]["pdq"]:  # of a drawing that img2dataset made a JPEG of it may differ in a few of 256 bits
            assert (int.from_bytes(rows[key]["pdq"]) ^ int.from_bytes(row["pdq"])).bit_count() <= 10
        row |= {"http_status": None, "directives": None, "pdq": rows[key]["pdq"]}
        assert {c: rows[key][c] for c in row} == row
    refused = 3 if kind == "raw" else 2
    assert f"{len(ends)} rows adopted into 3 partitions, {refused} of them refused" in told
    failed = "" if kind == "raw" else ", failed_to_resize 1"
    assert f"{10 - len(ends)} not adopted: duplicate_url 1, failed_to_download 2{failed}\n" in told
    assert "warning" not in told and "the next `densebridge build` fetches the rest" in told


def test_both_formats_give_the_same_bytes(made: Path, recipe: Recipe, tmp_path: Path) -> None:
    other = replace(recipe, dataset=str(tmp_path / "other"))
    adopt(recipe, AdoptOptions(folder=str(made / "tars")))
    adopt(other, AdoptOptions(folder=str(made / "files")))
    assert tables(recipe.folder) == tables(other.folder)
    for name in tables(recipe.folder):
        assert recipe.folder.read(name.tar) == other.folder.read(name.tar)


def test_a_build_fetches_only_the_rest(url: str, made: Path, recipe: Recipe) -> None:
    adopt(recipe, AdoptOptions(folder=str(made / "tars")))
    adopted = rows_of(recipe.folder)
    Handler.asked.clear()
    build(recipe, BuildOptions(runner="local"))
    assert set(Handler.asked) == {"gone.jpg", "shy.jpg", "late.jpg", "broken.jpg"}
    built = {}
    for table in tables(recipe.folder):
        if table.input_id != ADOPTED:
            built |= {row["key"]: row for row in read_table(recipe.folder, table).to_pylist()}
    ours = {key for key in adopted if key != sample_key(url + ALSO)}
    assert built.keys() == ours | {sample_key(url + n) for n in Handler.asked}
    assert all(built[key]["image_sha256"] == adopted[key]["image_sha256"] for key in ours)
    # Adopting again, now that all is there, changes nothing; nor does another build.
    before = everything(recipe.folder)
    adopt(recipe, AdoptOptions(folder=str(made / "tars")))
    build(recipe, BuildOptions(runner="local"))
    assert everything(recipe.folder) == before and sum(Handler.asked.values()) == 4


def test_what_a_build_fetched_is_not_adopted(made: Path, recipe: Recipe, capsys: Any) -> None:
    build(recipe, BuildOptions(runner="local"))
    before = rows_of(recipe.folder)
    adopt(recipe, AdoptOptions(folder=str(made / "files")))
    assert "1 rows adopted into 1 partitions" in (told := capsys.readouterr().out) and "already_there 5" in told
    assert before.items() <= rows_of(recipe.folder).items()


def test_partitions_keep_the_recipes_words_and_the_folders_own(url: str, made: Path, recipe: Recipe) -> None:
    adopt(recipe, AdoptOptions(folder=str(made / "tars")))
    rows = [row for p in list_partitions(recipe.folder) for row in read_parquet(recipe.folder, p.parquet).to_pylist()]
    texts = {row["url"].removeprefix(url): row["text"] for row in rows}
    assert texts == {**dict.fromkeys((*LISTED, "late.jpg"), "our own words"), ALSO: ALSO}


def test_pictures_are_recorded_as_tried_once_when_they_were_written(made: Path, recipe: Recipe, tmp_path: Path) -> None:
    shutil.copytree(made / "tars", tmp_path / "old")
    for tar in (tmp_path / "old").glob("*.tar"):
        os.utime(tar, (1_600_000_000, 1_600_000_000))
    adopt(recipe, AdoptOptions(folder=str(tmp_path / "old")))
    for table in tables(recipe.folder):
        record = read_record(recipe.folder, table)
        assert record.column("key").to_pylist() == read_table(recipe.folder, table).column("key").to_pylist()
        assert set(record.column("attempts").to_pylist()) == {1}
        assert {t.timestamp() for t in record.column("tried_at").to_pylist()} == {1_600_000_000.0}


def test_shrunk_pictures_are_counted_and_the_originals_size_decides(
    url: str, made: Path, recipe: Recipe, capsys: Any
) -> None:
    adopt(recipe, AdoptOptions(folder=str(made / "shrunk")))
    rows, told = rows_of(recipe.folder), capsys.readouterr().out
    ends = {name: rows[sample_key(url + name)]["reason"] for name in SIZES if sample_key(url + name) in rows}
    whole = dict.fromkeys(("small.jpg", "square.jpg", "large.jpg", "drawn.png"))
    assert ends == {**whole, "tiny.jpg": "too_small", "wide.jpg": "bad_aspect_ratio"}  # the tiny one was made larger
    large = rows[sample_key(url + "large.jpg")]
    assert (large["width"], large["height"], large["sha256"]) == (52, 40, large["image_sha256"])  # no digest was kept
    assert "warning: 4 pictures were shrunk below 96 px" in told and "cropped" not in told


def test_what_is_too_small_only_as_stored_is_left_to_the_build(made: Path, recipe: Recipe, capsys: Any) -> None:
    strict = replace(recipe, stages=(Download(replace(STAGE.config, min_edge=56)),))
    adopt(strict, AdoptOptions(folder=str(made / "cropped")))
    told = capsys.readouterr().out
    # 48 pixels stored: of those whose original is large enough nothing can be said; the others are refused as they were.
    assert "3 rows adopted" in told and "3 of them refused" in told and "too_small_as_stored 3" in told
    adopt(replace(recipe, dataset=recipe.dataset + "2"), AdoptOptions(folder=str(made / "cropped")))
    assert "warning: 3 pictures were cropped or padded" in capsys.readouterr().out


def test_a_cut_tar_costs_only_its_own_rows(url: str, made: Path, recipe: Recipe, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(made / "tars", folder)
    with tarfile.open(folder / "00000.tar") as tar:
        second = [m for m in tar if m.name.endswith(".jpg")][1]
    os.truncate(folder / "00000.tar", second.offset_data + second.size - 1)
    (folder / "00001.tar").unlink()
    adopt(recipe, AdoptOptions(folder=str(folder)))
    told = capsys.readouterr().out
    assert "00000.parquet: 00000.tar is cut: 3 rows have no picture" in told
    assert "00001.parquet: there is neither 00001.tar nor a folder 00001: 3 rows have no picture" in told
    assert "1 rows adopted" in told and "no_picture 6" in told
    Handler.asked.clear()
    build(recipe, BuildOptions(runner="local"))
    assert sum(Handler.asked.values()) == 8  # nine listed and one adopted


def test_an_interrupted_adoption_goes_on(made: Path, recipe: Recipe, tmp_path: Path, monkeypatch: Any) -> None:
    whole = replace(recipe, dataset=str(tmp_path / "whole"))
    adopt(whole, AdoptOptions(folder=str(made / "tars")))
    work, done = Adopter._adopt, []

    def dies(self: Adopter, *arguments: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(work(self, *arguments))

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Adopter, "_adopt", dies)
        adopt(recipe, AdoptOptions(folder=str(made / "tars")))
    assert len(tables(recipe.folder)) == 1
    adopt(recipe, AdoptOptions(folder=str(made / "tars")))
    assert tables(recipe.folder) == tables(whole.folder)


def test_what_was_taken_down_stays_out(url: str, made: Path, recipe: Recipe) -> None:
    keys = {name: sample_key(url + name) for name in SIZES}
    digest = fetched(url, ["small.jpg"])[keys["small.jpg"]]["sha256"]
    write_tombstones(recipe.folder, keys=[keys["square.jpg"]], sha256=[digest])
    adopt(recipe, AdoptOptions(folder=str(made / "tars")))
    rows = rows_of(recipe.folder)
    assert keys["square.jpg"] not in rows
    small = rows[keys["small.jpg"]]
    assert (small["status"], small["reason"], small["image"], small["sha256"]) == ("dropped", "taken_down", None, None)


def member(name: str, data: bytes, size: int | None = None, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar's member as its bytes; `size` is what its header claims."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(data), kind
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    if size is not None:
        header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(-len(data) % 512)


def hostile(folder: Path, tar: bytes, keys: list[str]) -> Path:
    columns = {"url": [f"u://{k}" for k in keys], "key": keys, "status": ["success"] * len(keys)}
    columns |= {
        "original_width": [-1] * len(keys),
        "original_height": [9] * len(keys),
        "sha256": ["no digest"] * len(keys),
    }
    pq.write_table(pa.table(columns), folder / "00000.parquet")
    (folder / "00000.tar").write_bytes(tar)
    return folder


@pytest.mark.parametrize(
    ("bad", "trouble"),
    [
        (member("2.jpg", b"x", size=-512), "cut"),
        (member("2.jpg", b"x", size=1 << 62), "cut"),
        (member("2.jpg", b"x" * 600)[:-600], "cut"),
        (b"\xff" * 512, "damaged"),
        (b"", "cut"),
    ],
    ids=["negative size", "giant size", "cut member", "noise", "no end mark"],
)
def test_a_hostile_tar_gives_what_came_before(tmp_path: Path, bad: bytes, trouble: str) -> None:
    found = find_pictures(hostile(tmp_path, member("1.jpg", b"good") + bad, ["1", "2"]), 100)
    assert found.troubles == [f"00000.parquet: 00000.tar is {trouble}: 1 rows have no picture"]
    place = found.among([sample_key("u://2"), sample_key("u://1")])[sample_key("u://1")]
    assert found.read(place) == b"good" and found.left == {"no_picture": 1}
    assert (place["width"], place["height"], place["sha256"]) == (0, 9, b"")


def test_links_headers_and_large_members_are_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "outside.jpg").write_bytes(b"secret")
    tar = member("x.jpg", b"", kind=tarfile.SYMTYPE) + member("p.jpg", b"27 path=a.jpg\n", kind=tarfile.XHDTYPE)
    tar += member("big.jpg", b"b" * 101) + member("../../a.jpg", b"a") + bytes(1024)
    found = find_pictures(hostile(tmp_path, tar, ["x", "p", "big", "../outside", "../../a"]), 100)
    assert found.left == {"no_picture": 3, "too_large": 1}
    assert len(found.places) == 1  # looked up by the very name that its own table says, and read from within the tar
    shutil.rmtree(tmp_path / "00000", ignore_errors=True)
    (tmp_path / "00000.tar").unlink()
    (tmp_path / "00000").mkdir()
    (tmp_path / "00000" / "x.jpg").symlink_to(tmp_path / "outside.jpg")
    assert not len(find_pictures(tmp_path, 100).places)  # neither the link nor `00000/../outside.jpg`


def test_mistakes_are_told_in_one_line(tmp_path: Path, recipe: Recipe) -> None:
    pq.write_table(pa.table({"url": ["u://1"]}), tmp_path / "plain.parquet")
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, told in (
        ("", "say it with --folder"),
        (str(tmp_path / "nowhere"), "there is no folder"),
        (str(empty), "holds no .parquet file"),
        (str(tmp_path), "no table that img2dataset wrote"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            adopt(recipe, AdoptOptions(folder=folder))
    (empty / "00000.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"00000\.parquet cannot be read .*: let img2dataset finish it"):
        adopt(recipe, AdoptOptions(folder=str(empty)))
    with pytest.raises(ValueError, match="no download stage"):
        adopt(replace(recipe, stages=()), AdoptOptions(folder=str(tmp_path)))
    assert not Path(recipe.dataset).exists()


def test_a_dry_run_writes_nothing(made: Path, recipe: Recipe, capsys: Any) -> None:
    adopt(recipe, AdoptOptions(folder=str(made / "tars"), dry_run=True))
    assert "6 pictures to adopt, 0 of samples that the dataset knows already" in capsys.readouterr().out
    assert not Path(recipe.dataset).exists()


def test_pictures_that_the_source_does_not_list_are_told(url: str, made: Path, recipe: Recipe, capsys: Any) -> None:
    told = f"pictures are not in source {recipe.source.path}: they are in no view, and gc may delete them"
    folder = str(made / "tars")
    for dry_run in (True, False, True):
        adopt(recipe, AdoptOptions(folder=folder, dry_run=dry_run))
        assert f"\n1 {told}; add the folder to the source\n" in capsys.readouterr().out
    pq.write_table(pa.table({"url": [f" {url}{name}" for name in (*LISTED, ALSO)]}), tmp := recipe.source.path)
    adopt(replace(recipe, source=replace(recipe.source, path=tmp, text_column=None)), AdoptOptions(folder=folder))
    assert told not in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        {"original_width": [3_000_000_000]},
        {"original_height": [float("nan")]},
        {"original_width": ["wide"]},
        {"sha256": [b"\xff"]},
        {"url": [b"u://\xff"]},
        {"url": [["u://1"]]},
    ],
    ids=str,
)
def test_columns_of_a_wrong_type_are_told_in_one_line(tmp_path: Path, wrong: dict[str, Any]) -> None:
    table = pq.read_table(hostile(tmp_path, member("1.jpg", b"good"), ["1"]) / "00000.parquet")
    for name, values in wrong.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    pq.write_table(table, tmp_path / "00000.parquet")
    with pytest.raises(ValueError, match=r"00000\.parquet cannot be read \([^\n]+\): let img2dataset finish it"):
        find_pictures(tmp_path, 100)


def test_columns_that_can_be_cast_are(tmp_path: Path) -> None:
    table = pq.read_table(hostile(tmp_path, member("1.jpg", b"good") + bytes(1024), ["1"]) / "00000.parquet")
    for name, value in {"url": b"u://1", "original_width": 640.0, "original_height": "480", "sha256": 7}.items():
        table = table.set_column(table.column_names.index(name), name, pa.array([value]))
    pq.write_table(table, tmp_path / "00000.parquet")
    (place,) = find_pictures(tmp_path, 100).places
    assert (place["width"], place["height"], place["sha256"]) == (640, 480, b"")


def test_a_folder_named_as_a_table_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").mkdir()
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read"):
        find_pictures(tmp_path, 100)


def test_a_folder_without_captions_has_no_texts(made: Path, recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "silent"
    shutil.copytree(made / "tars", folder)
    for table in folder.glob("*.parquet"):
        pq.write_table(pq.read_table(table).drop_columns(["caption"]), table)
    adopt(recipe, AdoptOptions(folder=str(folder)))
    last = list_partitions(recipe.folder)[-1]
    assert read_parquet(recipe.folder, last.parquet).column("text").to_pylist() == [""]
    with pytest.raises(ValueError, match="has no column 'words'"):
        adopt(replace(recipe, dataset=recipe.dataset + "2"), AdoptOptions(folder=str(folder), text_column="words"))


def test_the_stage_folder_is_described(made: Path, recipe: Recipe) -> None:
    adopt(recipe, AdoptOptions(folder=str(made / "tars")))
    assert json.loads(recipe.folder.read(f"{STAGE.folder}/settings.json"))["stage"] == "download"
