"""Trains on a Ray cluster: `training.loop.train` in the workers of Ray Train's TorchTrainer, each with a GPU or a core.

Ray starts the workers and sees them die. How many there are is decided here: Ray's own elasticity takes any number between
two, ours must divide every global batch, and it starts a user's mistake again as it does a lost worker. What was trained is
in the run folder's checkpoints alone, so that folder lies where all nodes see it, and any launcher goes on from there.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.ray_cluster import GROWTH, join_cluster, may_grow
from pipeline.ray_head import HeadWatch, at_end, follow
from pipeline.storage import Folder
from training.configuration import TrainingConfig
from training.loop import TrainingResult
from training.processes import stop_signals
from training.views import check_batches, check_before
from training.whole_files import locked

from .training_worker import WorkerTask, is_of_machines, work

if TYPE_CHECKING:
    from .train import TrainOptions

_LOSSES = 3
"""So often in a row the workers may be lost without a new checkpoint: then it is not the machines."""
_SETTLES = 5.0  # seconds until what a former job or a lost worker held is seen to be free
_SAYS = 60.0  # seconds between two lines about what is waited for
_LEASE = 120.0  # seconds for which a network's disk may keep the lock of a machine that is gone
_UNITS = {"GPU": "GPUs", "CPU": "CPU cores"}


class WorkerLostError(RuntimeError):
    """The workers ended by no fault of the training: a machine, a process or their connection was lost."""


class _Board:
    """An actor beside the driver: the first worker's lines on their way to it, and its wish to stop on the way to all."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._asked = False

    def say(self, lines: list[str]) -> None:
        self._lines += lines

    def drain(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines

    def ask(self) -> None:
        self._asked = True

    def is_asked(self) -> bool:
        return self._asked


class _BoardLink:
    """The board as a worker has it."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def say(self, lines: list[str]) -> None:
        self._board.say.remote(lines)

    def is_asked(self) -> bool:
        return ray.get(self._board.is_asked.remote())


def worker_counts(config: TrainingConfig, most: int, fewest: int) -> list[int]:
    """The numbers of workers that every phase's global batch can be shared by, the largest first. Raises ValueError where
    there is none.
    """
    fitting, problem = [], None
    for count in range(most, fewest - 1, -1):
        try:
            check_batches(config, count)
            fitting.append(count)
        except ValueError as error:
            problem = problem or error
    if problem and not fitting:
        raise problem
    return fitting


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What all sittings of a run on the cluster share."""

    task: WorkerTask
    counts: Sequence[int]
    """Of workers that may be taken, the largest first."""
    resource: str
    """What a worker takes one of: GPU or CPU."""
    patience: float
    """Seconds for which a growing cluster is waited for."""
    board: Any
    """Handle of the `_Board`."""
    asked: threading.Event
    """Set where the driver is asked to stop."""
    head: HeadWatch
    """Asked while workers are waited for or at work."""


def train_on_ray(config: TrainingConfig, *, dataset: Folder, run: Path, options: TrainOptions) -> TrainingResult | None:
    """Trains on the cluster at `options.address` to the end, over lost workers; None where it was asked to stop and has saved.

    Raises ValueError in one line for what cannot work, StageError where the cluster cannot be joined, HeadLost or ConnectionError
    where it is lost, and ChildProcessError where workers are lost again and again.
    """
    if not run.is_absolute():
        raise ValueError(
            f"runs {str(run.parent)!r} is relative: give an absolute path that all nodes of the cluster share"
        )
    counts = worker_counts(config, options.processes, options.least_processes or options.processes)
    check_before(config, dataset, counts[0])
    if dataset.is_local:  # workers may have another working folder
        dataset = Folder(url=dataset.path(""))
    run.mkdir(parents=True, exist_ok=True)
    token = run / f".shared.{uuid.uuid4().hex}"
    with _joined(str(options.address)), stop_signals() as asked:
        resource = _resource(options.on)
        token.touch()
        try:
            return _sittings(
                _Run(
                    task=WorkerTask(config=config, dataset=dataset, run=run, token=token, on_cpu=resource == "CPU"),
                    counts=counts,
                    resource=resource,
                    patience=_patience(options.wait_minutes),
                    board=_board(),
                    asked=asked,
                    head=HeadWatch("the run goes on from its last checkpoint; start the head and train again"),
                )
            )
        finally:
            token.unlink(missing_ok=True)


@contextmanager
def _joined(address: str) -> Iterator[None]:
    """A connection to the cluster. Raises StageError or, where it is lost, ConnectionError, in one line."""
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # a recipe's relative paths are meant from where the job runs
    join_cluster(address)
    with at_end(ray.shutdown):
        try:
            yield
        except RayError as error:
            raise ConnectionError(f"the Ray cluster at {address} was lost: {_first_line(error)}") from error


def _resource(on: str) -> str:
    """What a worker takes one of. Where no GPU is to be seen and a cluster may still grow, its GPUs are waited for."""
    if on == "auto":
        return "GPU" if ray.cluster_resources().get("GPU") or may_grow() else "CPU"
    return on.upper()


def _patience(minutes: float | None) -> float:
    """Seconds to wait for nodes: as long as a build does where nothing is said."""
    if minutes is None:
        return GROWTH if may_grow() else 0.0
    return 60 * minutes


def _board() -> Any:
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(_Board).remote()


def _sittings(run: _Run) -> TrainingResult | None:
    """One set of workers after the other, until the run is done or asked to stop."""
    folder, losses, wait_for_lock = run.task.run, 0, 0.0
    while True:
        _wait_for_lock(folder, wait_for_lock)
        count = _room(run, lost=wait_for_lock > 0)
        if count is None:
            print(f"asked to stop: {_saved(folder) or 'nothing'} is saved", flush=True)
            return None
        print(f"{count} workers on the cluster, with one of its {_UNITS[run.resource]} each", flush=True)
        saved = _saved(folder)
        try:
            return _sitting(run, count)
        except WorkerLostError as loss:
            losses = 1 if _saved(folder) > saved else losses + 1
            if losses == _LOSSES:
                raise ChildProcessError(
                    f"workers were lost {_LOSSES} times in a row without a new checkpoint, at last: {loss}; Ray's logs of "
                    "these workers may tell more"
                ) from loss
            run.head.wait(ray.nodes)  # or it was the head, with all that ran there
            print(f"a worker was lost ({loss}): going on from the last checkpoint", flush=True)
        wait_for_lock = _LEASE


def _wait_for_lock(run: Path, seconds: float) -> None:
    """Until no other training has the run folder: that of lost workers may take some time to go. Raises ValueError."""
    end = time.monotonic() + seconds
    while True:
        try:
            with locked(run):
                return
        except ValueError:
            if time.monotonic() > end:
                raise
        time.sleep(1)


def _saved(run: Path) -> str:
    """The newest checkpoint's name, which orders as their samples do."""
    return max((path.name for path in run.glob("checkpoint-*")), default="")


def _room(run: _Run, *, lost: bool) -> int | None:
    """The first of the counts that the cluster can place. At the start the largest is waited for; after a loss the run has
    begun and goes on with what there is, so that only the smallest is. None where it is asked to stop. Raises ValueError in
    one line where there is room for none.
    """
    waited = run.counts[-1 if lost else 0]
    for count in run.counts:
        if _finds_place(run, count, run.patience if count == waited else 0.0):
            return count
        if run.asked.is_set():
            return None
    raise ValueError(
        f"the training asks for {_shortage(run, run.counts[-1])}: lower --processes or --least-processes, or give it time to "
        "grow with --wait-minutes"
    )


def _finds_place(run: _Run, count: int, patience: float) -> bool:
    """Whether the cluster can place so many workers within this time, told of as it passes. It is asked for them all the
    while, so that an autoscaler sees the wish.
    """
    group = placement_group([{run.resource: 1}] * count)
    says = begun = time.monotonic()
    with at_end(lambda: remove_placement_group(group)):  # the trainer makes its own
        while (now := time.monotonic()) < begun + _SETTLES + patience and not run.asked.is_set():
            if group.wait(1):
                return True
            if patience and now >= says:
                says = now + _SAYS
                print(f"waiting up to {patience / 60:g} min for {_shortage(run, count)}", flush=True)
            run.head.ask(ray.nodes)
        return False


def _shortage(run: _Run, count: int) -> str:
    there, free = (int(have.get(run.resource, 0)) for have in (ray.cluster_resources(), ray.available_resources()))
    return f"{count} {_UNITS[run.resource]} and the cluster has {there}, {free} of them free"


def _sitting(run: _Run, count: int) -> TrainingResult | None:
    """Trains with so many workers, and meanwhile shows what the first of them says and passes the wish to stop on."""
    fit: Future[TrainingResult | None] = Future()
    over = threading.Event()

    def fitting() -> None:
        try:
            fit.set_result(_fit(run, count))
        except BaseException as error:  # raised where the result is asked for
            fit.set_exception(error)
        over.set()

    def look() -> None:
        if run.asked.is_set():
            run.board.ask.remote()
        run.head.ask(ray.nodes)

    # Not in the main thread, where Ray would take SIGINT over and other signals would wait.
    threading.Thread(target=fitting, daemon=True).start()
    follow(run.board, over, lambda line: print(line, flush=True), look)
    return fit.result()


def _fit(run: _Run, count: int) -> TrainingResult | None:
    """Raises WorkerLostError, or what a worker raised."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    task, link = run.task, _BoardLink(run.board)
    # Ray wants a place for checkpoints that workers hand to it. They hand none: those of the run folder are the truth, for
    # other launchers too, and a second record could contradict them.
    with tempfile.TemporaryDirectory(prefix="densebridge-ray-", ignore_cleanup_errors=True) as unused:
        trainer = TorchTrainer(
            lambda: work(task, link),
            scaling_config=ScalingConfig(
                num_workers=count, use_gpu=run.resource == "GPU", resources_per_worker={run.resource: 1}
            ),
            run_config=RunConfig(
                name=task.token.name.lstrip("."),
                storage_path=unused,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
            ),
        )
        try:
            return trainer.fit().return_value
        except TrainingFailedError as error:
            raise _cause(error) from error


def _cause(error: Exception) -> Exception:
    """What a failed training comes down to: a user's mistake, a fault in the code with its traceback, or a loss."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        if isinstance(failure, ValueError):  # `work` makes one of all that a user can do something about
            return failure
    for failure in failures.values():
        if not (type(failure).__module__.startswith("ray.") or is_of_machines(failure)):
            return error
    first = next(iter(failures.values()), getattr(error, "controller_failure", error))
    return WorkerLostError(_first_line(getattr(first, "health_check_failure", first)))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
