"""Train a connector on the dataset's views. Goes on from the last good checkpoint by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

from .recipe import parse, quiet_libraries

INTERRUPTED = 75  # what `training.loop` exits with once it was asked to stop and has saved: queue it again


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `densebridge train`."""

    training: str | None = None
    """Which of the recipe's trainings; None is the first."""
    processes: int = 1
    """Processes on this machine. On more than one machine use `accelerate launch -m jobs.train`."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")


def launch(argv: list[str], processes: int) -> int:
    """Runs this job again under torchrun, in so many processes. Not `accelerate launch --cpu`: that starts only one."""
    import torch

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = dict(os.environ) | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})
    with subprocess.Popen([*command, "-m", "jobs.train", *argv], env=environment) as workers:
        asked = False

        def pass_on(number: int, _: object) -> None:
            nonlocal asked
            asked = True
            workers.send_signal(number)

        signal.signal(signal.SIGTERM, pass_on)
        code = workers.wait()
    return INTERRUPTED if asked and code else code  # torchrun itself ends with 1, though its workers saved


def main(argv: list[str]) -> int:
    """Command line."""
    quiet_libraries()
    recipe, options = parse(argv, "train", TrainOptions, __doc__ or "", sets="trainings")
    name, config = recipe.training(options.training)
    if options.processes > 1 and "LOCAL_RANK" not in os.environ:
        return launch(argv, options.processes)
    from training.loop import train

    result = train(config, dataset=recipe.folder, run=recipe.run_folder(name))
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: {result.samples} samples in {result.steps} steps, released in {result.release}")
    return 0


if __name__ == "__main__":
    from .cli import run

    run("train", sys.argv[1:])
