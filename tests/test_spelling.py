"""What is told of a name that is none."""

from __future__ import annotations

import pytest

from pipeline.spelling import nearest


@pytest.mark.parametrize(
    ("wrong", "known", "told"),
    [
        ("promt", ["model", "prompts", "dtype"], "perhaps you meant prompts"),
        ("gpu", ["cpus", "gpus"], "perhaps you meant gpus"),
        ("zzz", ["build", "plan"], "there are: build, plan"),  # in the order given
        ("zzz", iter(["plan", "build"]), "there are: plan, build"),
        ("zzz", [], "there are: none"),
    ],
)
def test_the_nearest_name_or_all(wrong: str, known: list[str], told: str) -> None:
    assert nearest(wrong, known) == told
