"""SIGKILL at any moment, two builders at once, a full disk: what is there is whole, and the next build ends the same.

`benchmarks/crash.py` does the first hundreds of times, with the real stages and on Ray.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobs.build import BuildOptions, build
from jobs.recipe import Recipe
from pipeline.partitions import list_partitions
from pipeline.plan import make_plan
from pipeline.runner import StageError
from pipeline.stage import Stage
from pipeline.storage import Folder
from pipeline.tables import read_parquet, read_table
from stages.ingest import Source, ingest
from tests.small_stages import Describe, SmallConfig, small_source, small_stages, urls
from tests.test_engine import digests

fork = multiprocessing.get_context("fork")


def recipe(folder: Path, source: Source, stages: Sequence[Stage] | None = None) -> Recipe:
    made = stages or small_stages(SmallConfig())
    return Recipe(name="small", dataset=str(folder), source=source, stages=tuple(made))


def start(given: Recipe) -> Any:
    process = fork.Process(target=build, args=(given, BuildOptions(runner="local")))
    process.start()
    return process


def bytes_of(folder: Path) -> dict[str, str]:
    return {name: d for name, d in digests(folder).items() if not name.startswith(("runs/", "sources/"))}


def dying(given: Recipe, at: int) -> Any:
    """A build that kills itself when it has published so many files, just before or after the next."""

    def run() -> None:
        publish, count = Folder._publish, iter(range(10_000))

        def counted(folder: Folder, path: Path, name: str) -> None:
            here = next(count)
            if here == at and at % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            publish(folder, path, name)
            if here == at:
                os.kill(os.getpid(), signal.SIGKILL)

        Folder._publish = counted  # type: ignore[method-assign] - in a process of its own
        build(given, BuildOptions(runner="local"))

    process = fork.Process(target=run)
    process.start()
    return process


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_it_ends_the_same(tmp_path: Path, seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    dice, source = random.Random(seed), small_source(tmp_path, urls(60))
    start(recipe(tmp_path / "whole", source)).join()
    whole = bytes_of(tmp_path / "whole")
    for _ in range(5):
        process = dying(recipe(tmp_path / "killed", source), dice.randrange(20))
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert bytes_of(tmp_path / "killed").items() <= whole.items()  # nothing half done, nothing else
    last = start(recipe(tmp_path / "killed", source))
    last.join()
    assert last.exitcode == 0 and bytes_of(tmp_path / "killed") == whole


class Moody(Describe):
    """Another caption each time, as a model on a GPU may write."""

    def process(self, batch):
        found = super().process(batch)
        return {"caption": [f"{c} {os.urandom(4).hex()}" for c in found["caption"]]}


def test_two_builders_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both end well, with the same bytes as one would have made."""
    source = small_source(tmp_path, urls(60))
    pair = [start(recipe(tmp_path / "both", source)) for _ in range(2)]
    for process in pair:
        process.join()
    start(recipe(tmp_path / "one", source)).join()
    assert [p.exitcode for p in pair] == [0, 0]
    assert bytes_of(tmp_path / "both") == bytes_of(tmp_path / "one")


def test_two_builders_whose_captions_differ_agree_in_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each may publish its own table of the same input. All readers pick one of them, and later tables follow that one."""
    source, config = small_source(tmp_path, urls(60)), SmallConfig()
    given = recipe(tmp_path / "both", source, [*small_stages(config)[:2], Moody(config), small_stages(config)[3]])
    pair = [start(given) for _ in range(2)]
    for process in pair:
        process.join()
    assert [p.exitcode for p in pair] == [0, 0]
    assert make_plan(given.folder, given.stages, ingest(given.folder, source)).is_empty


def test_builders_of_other_lists_part_what_both_hold(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    lists = [small_source(tmp_path / "a", urls(40)), small_source(tmp_path / "b", list(reversed(urls(60)[20:])))]
    pair = [start(recipe(tmp_path / "data", source)) for source in lists]
    for process in pair:
        process.join()
    for source in lists:  # a second time: each now knows of the other
        start(recipe(tmp_path / "data", source)).join()
    dataset = Folder(url=str(tmp_path / "data"))
    for source, count in zip(lists, (40, 40)):
        given = recipe(tmp_path / "data", source)
        plan = make_plan(dataset, given.stages, ingest(dataset, source))
        assert plan.is_empty and sum(t.partition.rows for t in plan.tickets) >= count
    keys = [k for p in list_partitions(dataset) for k in read_parquet(dataset, p.parquet, ["key"])["key"].to_pylist()]
    assert len(keys) == len(set(keys)) == 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


class Large(Describe):
    """Writes more than the small disk holds."""

    def process(self, batch):
        return {"caption": [os.urandom(60_000).hex() for _ in range(batch.num_rows)]}


def test_a_full_disk_is_said_and_leaves_nothing_half_done(small_disk: Path, tmp_path: Path) -> None:
    config = SmallConfig()
    source = small_source(tmp_path, urls(60))
    stages = [*small_stages(config)[:2], Large(config)]
    with pytest.raises((OSError, StageError), match="No space left on device"):
        build(recipe(small_disk / "data", source, stages), BuildOptions(runner="local"))
    assert not list((small_disk / "data").rglob(".aside-*"))
    dataset = Folder(url=str(small_disk / "data"))
    plan = make_plan(dataset, stages, ingest(dataset, source))
    assert 0 < plan.stages[2].up_to_date < 12  # what was published is whole
    for ticket in plan.tickets:
        for table in ticket.tables.values():
            assert read_table(dataset, table).num_rows == table.rows


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """As root may write anywhere, a folder below a file stands for it; and one that the system guards."""
    (tmp_path / "file").write_text("")
    for place, said in ((tmp_path / "file" / "data", errno.ENOTDIR), (Path("/proc/densebridge"), errno.ENOENT)):
        with pytest.raises(OSError) as raised:
            build(recipe(place, small_source(tmp_path, urls(5))), BuildOptions(runner="local"))
        assert raised.value.errno == said


def test_the_command_says_it_in_one_line(small_disk: Path, tmp_path: Path) -> None:
    """And with an exit code that is not 0."""
    small_source(tmp_path, urls(60))
    (small_disk / "ballast").write_bytes(b"x" * (900 << 10))
    file = tmp_path / "recipe.py"
    file.write_text(
        "from dataclasses import replace\n"
        "from tests.small_recipe import recipe as small\n"
        f"recipe = replace(small, dataset={str(small_disk / 'data')!r},"
        f" source=replace(small.source, path={str(tmp_path / 'source.parquet')!r}))\n"
    )
    command = [sys.executable, "-m", "jobs.cli", "build", str(file), "--runner", "local"]
    environment = {**os.environ, "SMALL_FOLDER": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1
    assert "the disk is full" in ended.stderr and "the same command goes on from there" in ended.stderr
