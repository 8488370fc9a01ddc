"""Train a connector on the dataset's views. Goes on from the last good checkpoint by itself."""

from __future__ import annotations

import logging
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .recipe import parse, quiet_libraries

if TYPE_CHECKING:
    from training.loop import TrainingResult

# SIGUSR1 is for the workers too, and what they save when they are asked to stop may take long to write.
_TORCHRUN = (
    "--standalone",
    "--signals_to_handle",
    "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
    "--shutdown_timeout",
    "600",
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Options of `densebridge train`."""

    training: str | None = None
    """Which of the recipe's trainings; None is the first."""
    processes: int = 1
    """Processes on this machine, or on the cluster. On several machines without one use `accelerate launch -m jobs.train`."""
    address: str | None = None
    """Address of a running Ray cluster to train on: `auto` on one of its nodes. None trains on this machine."""
    least_processes: int | None = None
    """On a cluster that cannot give all, at the start or after a loss: train with as few as these. None takes no fewer."""
    on: Literal["auto", "gpu", "cpu"] = "auto"
    """On a cluster: what each process takes one of. auto: a CPU core where there is no GPU and an autoscaler can add none."""
    wait_minutes: float | None = None
    """On a cluster: minutes to wait until all processes find their place; None: 20 where an autoscaler may add nodes, else 0."""

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"processes must be at least 1, got {self.processes}")
        if self.least_processes is not None and not 1 <= self.least_processes <= self.processes:
            raise ValueError(
                f"least_processes is {self.least_processes}: it must be from 1 to processes ({self.processes})"
            )
        if self.wait_minutes is not None and self.wait_minutes < 0:
            raise ValueError(f"wait_minutes cannot be negative, got {self.wait_minutes:g}")
        if not self.address and (self.least_processes, self.on, self.wait_minutes) != (None, "auto", None):
            raise ValueError(
                "least_processes, on and wait_minutes are of a cluster: give its --address, or leave them out"
            )


def launch(argv: list[str], processes: int) -> int:
    """Runs this job again by torchrun, in so many processes. Not `accelerate launch --cpu`: that starts only one.

    When one of them ends, torchrun ends the others. Raises ChildProcessError in one line where a signal ended the first, and
    ValueError where there are GPUs, but not one for each.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from training.processes import INTERRUPTED

    # The workers say what is wrong; torchrun would say it once more, at length.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif processes > (count := torch.cuda.device_count()):
        raise ValueError(
            f"--processes {processes}, and each takes a GPU of its own, but {count} are to be seen: give {count}"
        )
    try:
        run(parse_args([*_TORCHRUN, "--nproc_per_node", str(processes), "-m", "jobs.train", *argv]))
    except SignalException as asked:  # it went on to the workers, and they have saved
        return INTERRUPTED if asked.sigval in (signal.SIGTERM, signal.SIGUSR1) else 128 + asked.sigval
    except ChildFailedError as failed:
        codes = {failure.exitcode for failure in failed.failures.values()}
        rank, first = failed.get_first_failure()
        if first.exitcode < 0:
            raise ChildProcessError(
                f"process {rank} was ended by {signal.Signals(-first.exitcode).name} (SIGKILL comes where memory runs out, "
                "too): the others were stopped; the same command goes on from the last checkpoint"
            ) from None
        return INTERRUPTED if codes == {INTERRUPTED} else 1
    return 0


def main(argv: list[str]) -> int:
    """Command line."""
    quiet_libraries()
    recipe, options = parse(argv, "train", TrainOptions, __doc__ or "", sets="trainings")
    name, config = recipe.training(options.training)
    if options.address:
        from training.processes import INTERRUPTED

        from .train_on_ray import train_on_ray

        done = train_on_ray(config, dataset=recipe.folder, run=recipe.run_folder(name), options=options)
        if done is None:
            return INTERRUPTED
        _tell(name, done)
        return 0
    if options.processes > 1 and "LOCAL_RANK" not in os.environ:
        from training.views import check_before

        check_before(config, recipe.folder, options.processes)  # here, so that it is said once and not by each
        return launch(argv, options.processes)
    from training.loop import train

    try:
        result = train(config, dataset=recipe.folder, run=recipe.run_folder(name))
    except RuntimeError as error:
        if "gloo/transport" not in str(error):
            raise
        raise ConnectionError("another process of this training has ended, so this one ends as well") from error
    if os.environ.get("RANK", "0") == "0":
        _tell(name, result)
    return 0


def _tell(name: str, result: TrainingResult) -> None:
    print(f"{name}: {result.samples} samples in {result.steps} steps, released in {result.release}")


if __name__ == "__main__":
    from .cli import run

    run("train", sys.argv[1:])
