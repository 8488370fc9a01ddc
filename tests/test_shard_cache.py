"""Shards elsewhere: copied once for all processes, within bounds, tried again; against a server that speaks S3."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scale import s3_server
from pipeline.shards import View
from pipeline.storage import Folder
from tests.test_batches import facts, take
from tests.test_samples import CONFIG
from tests.told_views import make_told_view
from training.batches import Batches
from training.shard_cache import ATTEMPTS, Descriptor, OpenShards, ShardCache, open_shards, shard_sizes

SHARDS = 6
LENGTH = 1000
NAMES = [f"views/told/1/{number}.tar" for number in range(SHARDS)]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple]:
    """A bucket, the requests it was asked, and the failures it is to give: (write, asked, failing)."""
    asked, failing = Counter(), Counter()
    with s3_server(asked, failing) as (address, write), pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("AWS_ENDPOINT_URL", address),
            ("AWS_ACCESS_KEY_ID", "a"),
            ("AWS_SECRET_ACCESS_KEY", "b"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            patch.setenv(name, value)
        yield write, asked, failing


@pytest.fixture(scope="module")
def views(server: tuple, tmp_path_factory: pytest.TempPathFactory) -> tuple[View, View]:
    """The same view, here and on the server."""
    root = tmp_path_factory.mktemp("view")
    here = make_told_view(root, [f"picture {n}" for n in range(36)], shards=SHARDS)
    for path in root.rglob("*"):
        if path.is_file():
            server[0](f"told/{path.relative_to(root)}", path.read_bytes())
    return here, View.open(Folder(url="s3://data/told"), "told")


def test_the_same_samples_come_from_here_from_requests_and_from_copies(
    views: tuple[View, View], server: tuple, tmp_path: Path
) -> None:
    here, there = views
    config, (_, asked, _) = replace(CONFIG, drawn_latents=True), server
    expected = facts(take(here, config, 6))
    assert facts(take(there, config, 1)).items() <= expected.items()
    asked.clear()
    for _ in range(2):  # the second reads what the first left
        assert facts(take(there, replace(config, cache=str(tmp_path)), 6)) == expected
    assert asked["GET"] == SHARDS  # each once; the manifest is open already
    assert len(list(tmp_path.glob("*.tar"))) == SHARDS and not list(tmp_path.glob("*.aside"))


def test_a_cache_too_small_for_the_whole_view_is_refused(views: tuple[View, View], tmp_path: Path) -> None:
    here, there = views
    sizes = shard_sizes(there)
    assert sorted(sizes) == NAMES
    for name, size in sizes.items():
        whole = Path(here.dataset.path(name)).stat().st_size
        assert whole - 10240 - 512 <= size < whole  # but for the padding
    with pytest.raises(
        ValueError, match=r"GiB of shards and training.cache_gib is 1e-05: give the phase a window, set cache"
    ):
        open_shards([there], str(tmp_path), 1e-5)
    open_shards([there], str(tmp_path), 1e-5, lambda position: NAMES[:1]).close()


def test_what_is_wanted_next_is_fetched_before_it_is_read(
    views: tuple[View, View], server: tuple, tmp_path: Path
) -> None:
    _, there = views
    asked = server[1]
    windows = {0: NAMES[:2], 1: NAMES[1:4]}
    cache = ShardCache(there.dataset, tmp_path, 1 << 30, windows.__getitem__)
    asked.clear()
    for position in (0, 0, 1):
        cache.advance(position)
    cache._pool.shutdown(wait=True)
    assert asked["GET"] == 4
    cache.read(NAMES[3], 0, 512)
    assert asked["GET"] == 4


def test_copies_used_longest_ago_go_first_and_wanted_ones_last(
    views: tuple[View, View], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, there = views
    make_room = ShardCache._make_room

    def alone(cache: ShardCache, size: int) -> None:
        with pytest.raises(BlockingIOError), cache._holding("room", wait=False):
            pass
        make_room(cache, size)

    monkeypatch.setattr(ShardCache, "_make_room", alone)
    size = there.dataset.fetch(NAMES[0], tmp_path / "one")
    cache = ShardCache(there.dataset, tmp_path / "cache", 3 * size + size // 2, lambda position: NAMES[:1])
    cache.advance(0)
    cache._pool.shutdown(wait=True)
    for number, name in enumerate(NAMES[1:], 1):
        assert cache.read(name, 0, 512) == there.dataset.read_range(name, 0, 512)
        os.utime(cache._copy(name), (number, number))
        held = [other for other in NAMES if cache._copy(other).exists()]
        assert held == [NAMES[0], *NAMES[max(1, number - 1) : number + 1]]
    assert cache.read(NAMES[1], 512, 512) == there.dataset.read_range(NAMES[1], 512, 512)  # dropped, and still open


def test_what_fails_twice_is_tried_again_and_what_fails_on_is_a_bad_sample(
    views: tuple[View, View], server: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = views
    failing, pauses = server[2], []
    monkeypatch.setattr("training.shard_cache.time.sleep", pauses.append)
    for cache in (None, str(tmp_path)):
        config = replace(CONFIG, batch=36, micro_batch=36, cache=cache, threads=1, drawn_latents=True)
        failing[f"GET /data/told/{NAMES[0]}"] = ATTEMPTS - 1
        assert facts(take(there, config, 1)) == facts(take(here, config, 1))
        assert pauses == [1.0, 2.0]
        pauses.clear()
        for copy in tmp_path.glob("*.tar"):
            copy.unlink()
    failing[f"GET /data/told/{NAMES[0]}"] = 10**6
    with Batches([there], config) as batches:
        batch = next(batches)
    failing.clear()
    assert {one.key for one in batch.bad} == {f"{n:04d}" for n in range(6)} and batch.weights.sum() == 30
    assert {one.shard for one in batch.bad} == {NAMES[0]} and all(
        one.reason.startswith("PermissionError") for one in batch.bad
    )


def test_a_copy_that_went_bad_is_fetched_anew_and_a_bad_original_once(
    views: tuple[View, View], server: tuple, tmp_path: Path
) -> None:
    _, there = views
    write, asked, _ = server
    config = replace(CONFIG, batch=36, micro_batch=36, cache=str(tmp_path))
    with Batches([there], config) as batches:
        assert not next(batches).bad
    for copy in tmp_path.glob("*.tar"):
        copy.write_bytes(b"\1" * copy.stat().st_size)
    asked.clear()
    with Batches([there], config) as batches:
        assert not next(batches).bad
    assert asked["GET"] == SHARDS
    whole = there.dataset.read(NAMES[2])
    write(f"told/{NAMES[2]}", b"\1" * len(whole))
    for copy in tmp_path.glob("*.tar"):
        copy.unlink()
    asked.clear()
    with Batches([there], config) as batches:
        assert len(next(batches).bad) == 6
    write(f"told/{NAMES[2]}", whole)
    assert asked["GET"] == SHARDS + 1


def test_whoever_read_a_bad_copy_may_read_again(views: tuple[View, View], tmp_path: Path) -> None:
    """Two threads read it before one of them has it dropped; a third opens it while that happens."""
    _, there = views
    good = there.dataset.read_range(NAMES[0], 0, 512)
    ShardCache(there.dataset, tmp_path, 1 << 30).read(NAMES[0], 0, 512)
    (copy,) = tmp_path.glob("*.tar")
    copy.write_bytes(b"\1" * copy.stat().st_size)
    cache = ShardCache(there.dataset, tmp_path, 1 << 30)
    assert cache.read(NAMES[0], 0, 512) == b"\1" * 512
    assert cache.forget(NAMES[0]) and cache.forget(NAMES[0]) and cache.read(NAMES[0], 0, 512) == good

    files = {"shard": b"bad"}

    def opening(shard: str) -> Descriptor:
        path = tmp_path / files[shard].decode()
        path.write_bytes(files[shard])
        opened = Descriptor(path)
        if files[shard] == b"bad":
            files[shard] = b"good"
            shards.forget(shard)  # by another thread, at this moment
        return opened

    shards = OpenShards(opening)
    assert shards.read("shard", 0, 4) == b"good"


def test_processes_share_the_copies_and_what_a_dead_one_left_goes(
    views: tuple[View, View], server: tuple, tmp_path: Path
) -> None:
    _, there = views
    asked = server[1]
    cache = ShardCache(there.dataset, tmp_path, 1 << 30)
    left = [cache._copy(name).with_suffix(".aside") for name in NAMES[:2]]
    for path in left:
        path.write_bytes(b"half")
    with cache._locked(left[1]):  # somebody is at it
        ShardCache(there.dataset, tmp_path, 1 << 30).close()
    assert [path.exists() for path in left] == [False, True]
    script = (
        "import sys; from pathlib import Path\n"
        "from pipeline.storage import Folder; from training.shard_cache import ShardCache\n"
        "cache = ShardCache(Folder(url='s3://data/told'), Path(sys.argv[1]), 1 << 30)\n"
        "print([len(cache.read(name, 0, 512)) for name in sys.argv[2:]])\n"
    )
    asked.clear()
    command = [sys.executable, "-c", script, str(tmp_path), *NAMES]
    here = str(Path(__file__).parents[1])
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=here) for _ in range(2)]
    assert [process.communicate(timeout=60)[0].strip() for process in both] == [str([512] * SHARDS)] * 2
    assert asked["GET"] == SHARDS and not list(tmp_path.glob("*.aside"))


def test_few_shards_are_open_and_none_is_closed_under_a_reader(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / str(number)).write_bytes(bytes([number]) * LENGTH)
    opened: Counter[str] = Counter()

    def opening(shard: str) -> Descriptor:
        opened[shard] += 1
        return Descriptor(tmp_path / shard)

    shards = OpenShards(opening, limit=2)
    held = shards._descriptor("0")
    for name in "0123404":
        assert shards.read(name, 10, 5) == bytes([int(name)]) * 5
    assert opened == {"0": 2, "1": 1, "2": 1, "3": 1, "4": 1}
    assert os.pread(held.number, 3, 0) == b"\0\0\0"
    number = held.number
    del held
    shards.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    assert shards.read("1", LENGTH - 3, 10) == b"\1\1\1"
