"""What a stage may ask of the nodes that it runs on, and that asking for something else rebuilds nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import pytest

from jobs.recipe import load_recipe, read_flags
from pipeline.stage import Needs
from tests.small_stages import SmallConfig, small_stages


def test_resources_and_labels_are_pairs() -> None:
    needs = Needs(resources=("captioner=1", "disk=0.5"), labels=("ray.io/accelerator-type=in(A100, H100)", "zone=!a"))
    assert needs.custom == {"captioner": 1.0, "disk": 0.5}
    assert needs.selector == {"ray.io/accelerator-type": "in(A100, H100)", "zone": "!a"}
    assert not Needs().custom and not Needs().selector


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"resources": ("captioner",)}, "resources takes pairs such as captioner=1"),
        ({"resources": ("a=1", "a=2")}, "each name once"),
        ({"resources": ("a=0",)}, "resources takes name=amount of what is no CPU, GPU or memory, got a=0"),
        ({"resources": ("a=nan",)}, "got a=nan"),
        ({"resources": ("GPU=1",)}, "got GPU=1"),
        ({"labels": ("zone",)}, "labels takes pairs such as ray.io/accelerator-type=A100"),
        ({"labels": ("zone=in()",)}, r"value being a, !a, in\(a,b\) or !in\(a,b\), got zone=in\(\)"),
        ({"gpus": 1.5}, "gpus must be a fraction of one or a whole number, got 1.5"),
        ({"actors": (3, 2)}, "1 <= fewest <= most"),
        ({"memory_gb": -1.0}, "cannot be negative"),
        ({"deadline": 0.0}, "deadline must be more than 0"),
    ],
)
def test_needs_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Needs(**wrong)


def test_the_labels_that_are_taken_are_those_that_ray_takes() -> None:
    from ray._private.label_utils import validate_label_selector

    for value in ("a", "!a", "in(a)", "!in(a, b)", "A-1.x_2"):
        assert validate_label_selector(Needs(labels=(f"zone={value}",)).selector) is None
    for value in ("-a", "in(a", "in(a,)", "!!a", "a b", "not(a)"):
        assert validate_label_selector({"zone": value})
        with pytest.raises(ValueError, match="labels takes"):
            Needs(labels=(f"zone={value}",))


def test_the_command_line_sets_them() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        needs: Needs = field(default_factory=Needs)

    flags = [
        "--needs.resources",
        "captioner=1",
        "disk=2",
        "--needs.labels",
        "market-type=!spot",
        "--needs.gpus",
        "0.25",
    ]
    found = read_flags(Settings, flags, "densebridge build recipe.py", "").needs
    assert found == Needs(gpus=0.25, resources=("captioner=1", "disk=2"), labels=("market-type=!spot",))


def test_an_ordered_stage_has_one_actor() -> None:
    stages = small_stages(replace(SmallConfig(), needs=Needs(actors=(2, 5))))
    assert [stage.pool for stage in stages] == [(2, 5), (1, 1), (2, 5), (2, 5)]


def test_other_needs_rebuild_nothing() -> None:
    """Of every stage of a published recipe."""
    other = Needs(cpus=7, gpus=2, memory_gb=3, resources=("captioner=1",), labels=("zone=a",), actors=(2, 9))
    changed = 0
    for stage in load_recipe("ella_sd15").stages:
        if any(f.name == "needs" for f in fields(stage.config)):
            assert type(stage)(replace(stage.config, needs=other)).folder == stage.folder, stage.name
            changed += 1
    assert changed >= 6
