"""What happens to clusters and storages: the build ends with the bytes of an undisturbed one, or in one clear line.

`benchmarks/chaos.py` does all of it on a cluster of two nodes, `tests/test_crash.py` kills builds.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipeline.funnel import count_funnel
from pipeline.plan import make_plan
from pipeline.runner import StageError, run_plan
from pipeline.storage import Folder
from stages.ingest import ingest
from tests.small_stages import SmallConfig, small_source, small_stages, urls
from tests.test_engine import digests, run
from tests.unreliable_files import UnreliableFiles


@pytest.fixture
def config(tmp_path: Path) -> SmallConfig:
    return SmallConfig(calls=str(tmp_path / "calls"))


def calls(config: SmallConfig) -> Counter[str]:
    """How often each stage was given each row."""
    path = Path(config.calls)
    found = Counter(path.read_text().splitlines())
    path.unlink()
    return found


def test_storage_that_fails_a_tenth_of_its_calls(
    tmp_path: Path, config: SmallConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads, listings, writes that leave halves, renames that came to pass and say they did not."""
    monkeypatch.setattr("pipeline.patience.sleep", lambda _: None)
    source, stages = small_source(tmp_path, urls(120)), small_stages(config)
    whole, failing = Folder(url=str(tmp_path / "whole")), Folder(url=f"unreliable://0.1-7{tmp_path}/failing")
    plan = run(whole, stages, source)
    ours = calls(config)
    assert run(failing, stages, source) == plan and plan.is_empty
    assert digests(tmp_path / "failing") == digests(tmp_path / "whole") and calls(config) == ours
    assert count_funnel(failing, stages, plan.tickets) == count_funnel(whole, stages, plan.tickets)
    assert isinstance(failing._files, UnreliableFiles) and failing._files.failed > 50


def test_storage_that_is_gone_ends_the_build_in_one_line_and_costs_nothing_that_was_paid(
    tmp_path: Path, config: SmallConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.patience.PATIENCE", 0.0)
    source, stages = small_source(tmp_path, urls(60)), small_stages(config)
    run(Folder(url=str(tmp_path / "whole")), stages, source)
    ours = calls(config)
    there = f"{tmp_path}/failing"
    partitions = ingest(Folder(url=there), source)
    failures = 0
    for attempt in range(200):
        dataset = Folder(url=f"unreliable://0.03-{attempt}{there}")  # each attempt has other bad moments
        try:
            plan = make_plan(dataset, stages, partitions)
            run_plan(dataset, stages, plan, lambda _: None, runner="local")
            break
        except (OSError, StageError) as error:
            assert f"{dataset.url} has failed for 0 s" in str(error) and "\n" not in str(error)
            failures += 1
    assert failures > 3 and digests(tmp_path / "failing") == digests(tmp_path / "whole")
    found = calls(config)
    assert found.keys() == ours.keys()
    # But for the ordered stage, which each build shows again what came first: it pays for that with nothing but time.
    twice = Counter({call: number for call, number in (found - ours).items() if not call.startswith("first ")})
    assert 0 < twice.total() <= 5 * failures  # of the partition that was in the making
