"""How the tests are dealt out to processes: a file stays together, and so do all files that start Ray clusters, which would
starve each other. Property tests draw the same examples every time.
"""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.ray_heads import head, process_as_it_was, short_folder  # noqa: F401  fixtures

settings.register_profile("same", derandomize=True)
settings.load_profile("same")

RAY = (
    "test_cli",
    "test_engine",
    "test_follow",
    "test_head",
    "test_jobs",
    "test_quarantine",
    "test_ray_cluster",
    "test_slurm",
    "test_submit",
    "test_train_on_ray",
    "test_whole",
)
LONG = (
    "test_elastic",
    "test_killed_training",
    "test_clip_retrieval",
    "test_fsdp",
    "test_demo",
    "test_end_to_end",
    "test_loop",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups for pytest-xdist, which the Makefile starts with two processes; without it they mean nothing."""
    for item in items:
        name = item.path.stem
        item.add_marker(pytest.mark.xdist_group("ray" if name in RAY else name))
    items.sort(
        key=lambda item: item.path.stem not in RAY + LONG
    )  # so that no process is left alone with them at the end
