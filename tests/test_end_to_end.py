"""The main job on a small scale, through the very commands: server, build, second build, new threshold, training, drawing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.shapes.server import serve
from examples.shapes.source import ShapesSource, write_source

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "examples/shapes/recipe.py"
ROWS = 80
SHORT = """
import dataclasses
from examples.shapes import recipe as shapes
def short(config):
    phases = tuple(dataclasses.replace(p, samples=32, batch=8, micro_batch=4) for p in config.phases)
    return dataclasses.replace(config, phases=phases, checkpoint_every=32, log_every=1)
recipe = dataclasses.replace(
    shapes.recipe,
    trainings={name: short(config) for name, config in shapes.recipe.trainings.items()},
    evaluation=dataclasses.replace(shapes.recipe.evaluation, judge=lambda: shapes.ShapesJudge(count=8), steps=2),
)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a source, a short recipe, and the dataset built once by the local runner."""
    folder = tmp_path_factory.mktemp("shapes")
    (folder / "short.py").write_text(SHORT)
    source = ShapesSource(count=ROWS, slow=0.0)
    with serve(source) as url:
        write_source(source, url, folder / "source.parquet")
        first = densebridge(folder, "build", RECIPE, "--runner", "local")
    assert first.returncode == 0, first.stderr
    return folder


def densebridge(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, SHAPES_BUILD=str(folder), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", COLUMNS="160")
    command = [sys.executable, "-m", "jobs.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=250, check=False)


def summarised(folder: Path) -> dict[str, Any]:
    """What the demo would write to summary.json of this folder."""
    script = (
        "import json; from examples.shapes.summary import summarise; from examples.shapes.source import ShapesSource\n"
        f"print(json.dumps(summarise(ShapesSource(count={ROWS}, slow=0.0), {{}}, 0.0)))"
    )
    environment = dict(os.environ, SHAPES_BUILD=str(folder))
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
    )
    return json.loads(out.stdout.splitlines()[-1])


def funnel(folder: Path) -> dict[str, dict]:
    return json.loads(densebridge(folder, "status", RECIPE, "--json").stdout)


def test_every_row_ends_somewhere(world: Path) -> None:
    found = funnel(world)
    assert found["download"]["in"] == ROWS
    for row in found.values():
        assert row["in"] == row["kept"] + sum(row["dropped"].values()) + sum(row["failed"].values())
    assert found["download"]["failed"].get("http_404") and found["pack_16"]["kept"] > found["pack_24"]["kept"] > 0


def test_a_second_build_does_nothing_and_says_so(world: Path) -> None:
    """The server is gone: had the build asked it for anything, rows would have failed."""
    before = {p: p.stat().st_mtime_ns for p in world.rglob("dataset/**/*") if p.is_file()}
    again = densebridge(world, "build", RECIPE)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert before == {p: p.stat().st_mtime_ns for p in world.rglob("dataset/**/*") if p.is_file()}


def test_a_new_threshold_redoes_only_the_filter_and_the_packing(world: Path) -> None:
    plan = densebridge(world, "plan", RECIPE, "--clip-filter.min-score", "0.6", "--json")
    to_do = {name for name, row in json.loads(plan.stdout).items() if row["to_compute"]}
    assert to_do == {"clip_filter", "pack_16", "pack_24"}


def test_a_new_prompt_keeps_what_is_known_of_the_picture_alone(world: Path) -> None:
    plan = densebridge(world, "plan", RECIPE, "--recaption.engine.max-new-tokens", "100", "--json")
    kept = {name for name, row in json.loads(plan.stdout).items() if not row["to_compute"]}
    assert kept == {"download", "deduplicate", "embed"}


def test_training_goes_through_both_phases_and_its_release_draws(world: Path) -> None:
    recipe = str(world / "short.py")
    for training, processes in (("tsc", "1"), ("mlp", "2"), ("clip_mlp", "1")):
        trained = densebridge(world, "train", recipe, "--training", training, "--processes", processes)
        assert trained.returncode == 0, trained.stderr
    log = [json.loads(line) for line in (world / "runs/tsc/log.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in log} == {0, 1} and log[-1]["samples"] == 64
    drawn = densebridge(
        world, "generate", recipe, "--prompt", "A red cross.", "--out", str(world / "out"), "--steps", "2"
    )
    assert drawn.returncode == 0, drawn.stderr
    assert np.asarray(Image.open(world / "out/0000.png")).shape == (24, 24, 3)
    judged = densebridge(world, "evaluate", recipe)
    assert judged.returncode == 0, judged.stderr
    found = json.loads((world / "runs/evaluation/evaluation.json").read_text())
    assert set(found["oracle"]) == {"base", "clip_mlp", "mlp", "tsc"} and set(found["gain"]["tsc_over_base"]) >= {
        "fact",
        "full",
    }
    page = densebridge(world, "report", recipe, "--out", str(world / "report"))
    assert page.returncode == 0, page.stderr
    summary = summarised(world)
    assert set(summary) == {
        *(
            "seconds",
            "peak_memory_gb",
            "funnel",
            "caption_fact_f1",
            "clip_auc",
            "mismatch_precision",
            "mismatch_recall",
        ),
        *("oracle", "gain"),
    }
    assert set(summary["oracle"]["tsc"]) == {"n", "fact", "full", "bag", "count"}
    assert set(summary["oracle"]["tsc"]["fact"]) == {"raw", "shuffled", "corrected", "interval"}
    assert set(summary["gain"]) == {"tsc_over_base", "mlp_over_base", "clip_mlp_over_base", "tsc_over_clip_mlp"}
    assert summary["caption_fact_f1"] > 0.9 and summary["clip_auc"] > 0.97
    assert "<script" not in (world / "report/index.html").read_text()
