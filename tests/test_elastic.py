"""Whatever processes, threads, micro-batches and kills: every step has the same samples, noise, timesteps, captions, crops."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipeline.shards import View
from pipeline.storage import Folder
from tests.told_views import make_told_view
from tests.training_fixtures import make_world, training_config
from training import loop
from training.batches import BatchConfig, Batches
from training.loop import train

WORLDS = (1, 2, 3, 4, 6, 8, 16)
STEPS = 6
CONFIG = BatchConfig(
    seed=4, phase=1, resolution=8, batch=48, micro_batch=48, latent_shape=(4, 4, 4), steps=1000, tokenizer="t5",
    empty_ids=(1,), caption_drop=0.2, crop="random", flip=True, drawn_latents=True,
)  # fmt: skip
Step = list[tuple]
"""Of one step its samples by position, each with all that is drawn and read for it."""


@dataclass(frozen=True)
class Sitting:
    """One start of a run, up to where it is killed."""

    world: int
    share: int
    """Micro-batches that a process cuts its part of a batch into, as far as they divide it."""
    threads: int
    ahead: int
    steps: int


@pytest.fixture(scope="module", params=[109, 30], ids=["more than a batch", "less than a batch"])
def view(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> View:
    """No batch divides it; some captions speak of sides, some are not told, and shards are lost, cut and spoilt."""
    captions = [["a cat", "a cat left of a dog", "", "a hen"][number % 4] for number in range(request.param)]
    root = tmp_path_factory.mktemp("view")
    view = make_told_view(root, captions, shards=8)
    lost, cut, spoilt = (root / f"views/told/1/{number}.tar" for number in (1, 3, 5))
    lost.unlink()
    data = cut.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    data = spoilt.read_bytes()
    spoilt.write_bytes(data.replace(b"\xff\xda", b"\xff\xdb", 1))  # one bit, in the first picture
    return view


def walk(view: View, sitting: Sitting, position: int) -> list[Step]:
    """The steps of one sitting from `position` on, as all its processes see them together."""
    each = CONFIG.batch // sitting.world
    micro = each // sitting.share if each % sitting.share == 0 else each
    config = replace(
        CONFIG, world=sitting.world, micro_batch=micro, threads=sitting.threads, ahead=sitting.ahead, timesteps=CONFIG.timesteps
    )  # fmt: skip
    seen: list[Step] = [[] for _ in range(sitting.steps)]
    for rank in range(sitting.world):
        with Batches([view], replace(config, rank=rank), position) as batches:
            for step in seen:
                for _ in range(each // micro):
                    step += facts_of(next(batches))
    return [sorted(step) for step in seen]


def facts_of(batch) -> Step:
    """What every sample of a micro-batch is made of."""
    reasons = {one.position: one.reason for one in batch.bad}
    return [
        (
            position,
            batch.keys[n],
            *(_digest(one[n].numpy()) for one in (batch.noise, batch.posterior_noise, batch.pixels)),
            int(batch.timesteps[n]),
            tuple(batch.ids[n].tolist()),
            tuple(batch.sizes[n].tolist()),
            float(batch.weights[n]),
            reasons.get(position, ""),
        )
        for n, position in enumerate(batch.positions)
    ]


def _digest(array) -> str:
    return hashlib.blake2b(array.tobytes(), digest_size=16).hexdigest()


@pytest.fixture(scope="module")
def straight(view: View) -> list[Step]:
    """One process with one thread, never stopped."""
    return walk(view, Sitting(1, 1, 1, 1, STEPS), 0)


sittings = st.builds(
    Sitting,
    st.sampled_from(WORLDS),
    st.sampled_from((1, 2, 3, 4)),
    st.sampled_from((1, 4)),
    st.sampled_from((1, 5)),
    st.integers(1, STEPS),
)


@settings(max_examples=12, deadline=None)
@given(plan=st.lists(sittings, min_size=1, max_size=3))
def test_any_processes_and_kills_see_the_same_steps(view: View, straight: list[Step], plan: Sequence[Sitting]) -> None:
    done: list[Step] = []
    for sitting in [*plan, Sitting(1, 1, 1, 1, STEPS)]:  # what is left after the last kill
        left = replace(sitting, steps=min(sitting.steps, STEPS - len(done)))
        done += walk(view, left, len(done) * CONFIG.batch)
    assert done == straight


@pytest.mark.parametrize("world", WORLDS)
def test_every_number_of_processes_sees_the_same_steps(view: View, straight: list[Step], world: int) -> None:
    assert walk(view, Sitting(world, 3, 2, 2, 2), 2 * CONFIG.batch) == straight[2:4]


def test_every_sample_comes_once_in_an_epoch_and_none_of_the_damaged_is_replaced(
    view: View, straight: list[Step]
) -> None:
    samples = [sample for step in straight for sample in step]
    assert [sample[0] for sample in samples] == list(range(STEPS * CONFIG.batch))
    epochs = [samples[start : start + len(view)] for start in range(0, len(samples) - len(view) + 1, len(view))]
    assert len(epochs) >= 2
    for epoch in epochs:
        assert sorted(sample[1] for sample in epoch) == [f"{n:04d}" for n in range(len(view))]
    bad = [{sample[1] for sample in epoch if not sample[-2]} for epoch in epochs]
    always = set.intersection(*bad)  # of one at a shard's cut a caption may be lost, which is at times dropped
    assert all(len(one - always) <= 1 for one in bad) and len(view) // 8 < len(always) < len(view) // 2
    assert {sample[-1].split(":")[0] for sample in samples} == {"", "FileNotFoundError", "ValueError"}
    noise = [sample[2] for sample in samples]
    assert len(set(noise)) == len(noise)  # also where a sample comes again


def test_a_manifest_that_changed_is_refused(tmp_path: Path) -> None:
    view = make_told_view(tmp_path, ["a cat"] * 12)
    path = tmp_path / view.info.manifest
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"manifest.parquet is damaged \(its digest is not the view's\)"):
        Batches([View.open(view.dataset, "told")], CONFIG)


SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from pipeline.storage import Folder
from tests.test_elastic import run_config
from training import loop

world, run, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
commit, rank = loop._commit, os.environ.get("RANK", "0")

def told(sitting, state, outcome, seconds):
    commit(sitting, state, outcome, seconds)
    with open(run / f"steps-{os.environ.get('WORLD_SIZE', '1')}-{rank}.jsonl", "a") as file:
        file.write(json.dumps([state.step, int(rank), outcome.keys]) + chr(10))
    if state.samples == last:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    loop._commit = told
    loop.train(run_config(world), dataset=Folder(url=str(world / "dataset")), run=run)
"""


def run_config(world: Path):
    """Two phases of 4 and 3 steps of 12 samples, saved every second step."""
    return training_config(world, checkpoint_every=24)


def sit(world: Path, run: Path, processes: int, last: int = -1) -> int:
    """Trains until the processes kill themselves once `last` samples are done; the exit code."""
    root = str(Path(__file__).parents[1])
    script = run / "script.py"
    script.write_text(SCRIPT)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes))
    command = [sys.executable, *(torchrun if processes > 1 else ()), str(script), str(world), str(run), str(last)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.run(command, env=environment, capture_output=True, timeout=200, check=False).returncode


def keys_by_step(run: Path) -> dict[int, list[str]]:
    """The samples of each step in order, which is the same in every sitting that took it."""
    found: dict[int, set[tuple[str, ...]]] = {}
    for world in (1, 2, 3):
        parts: dict[int, dict[int, list[str]]] = {}
        for path in run.glob(f"steps-{world}-*.jsonl"):
            for line in path.read_text().splitlines():
                step, rank, keys = json.loads(line)
                parts.setdefault(step, {})[rank] = keys
        for step, ranks in parts.items():
            if len(ranks) == world:
                found.setdefault(step, set()).add(tuple(key for rank in range(world) for key in ranks[rank]))
    assert all(len(one) == 1 for one in found.values())
    return {step: list(one.pop()) for step, one in sorted(found.items())}


def test_one_then_two_then_three_processes_end_as_one_that_was_never_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by SIGKILL between checkpoints, in either phase: what was not saved is done again."""
    world, run, straight = make_world(tmp_path / "world"), tmp_path / "run", tmp_path / "straight"
    expected, commit = {}, loop._commit

    def told(sitting, state, outcome, seconds):
        commit(sitting, state, outcome, seconds)
        expected[state.step] = outcome.keys

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_commit", told)
        result = train(run_config(world), dataset=Folder(url=str(world / "dataset")), run=straight)
    run.mkdir()
    assert sit(world, run, 1, last=36) == -signal.SIGKILL
    assert sit(world, run, 2, last=60) != 0
    assert sit(world, run, 3) == 0
    assert keys_by_step(run) == expected and len(expected) == result.steps == 7
    for name in ("connector", "ema.connector"):
        ours, theirs = (load_file(r / "release" / f"{name}.safetensors") for r in (run, straight))
        for key, one in ours.items():
            two = theirs[key]
            if key.endswith("in_proj_bias"):  # a key's bias has no gradient but rounding, which Adam makes large
                one, two = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (one, two))
            assert torch.allclose(one, two, atol=1e-4), key
