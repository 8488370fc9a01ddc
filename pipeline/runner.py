"""Runs a plan: every stage over every partition that needs it, in-process or as one Ray Data stream of actor pools.

What flows between Ray's operators is a partition's ticket (names), never its pixels. So later partitions download while
earlier ones are captioned, and a lost worker costs the partitions it held, which Ray runs again. The one file that
imports ray (but for `jobs/head.py`).
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .compute import Progress, Report
from .engine import StageWorker
from .partitions import Partition
from .plan import Plan, Ticket
from .quarantine import Ledger, Watch
from .secrets import read_secrets
from .stage import Stage
from .storage import Folder
from .tables import TableName

RunnerName = Literal["ray", "local"]


class StageError(RuntimeError):
    """A stage failed as a whole: its message says which stage, on which partition, and why."""


def run_plan(
    dataset: Folder,
    stages: Sequence[Stage],
    plan: Plan,
    report: Report,
    *,
    runner: RunnerName,
    address: str | None = None,
) -> None:
    """Does what the plan says is missing, up to a `whole` stage whose rows are not all there yet: the next plan goes on
    from there. Raises StageError; what was published until then stays.
    """
    working = [i for i, s in enumerate(plan.stages[: plan.until]) if s.to_compute]
    tickets = [t for t in plan.tickets if any(stages[i].name not in t.tables for i in working)]
    job = _Job(
        dataset=dataset,
        stages=tuple(stages),
        partitions=tuple(t.partition for t in plan.tickets),
        retry=plan.retry,
    )
    if runner == "local":
        workers = [job.worker(i, Ledger()) for i in working]
        for ticket in tickets:
            for worker in workers:
                ticket = _work(worker, ticket, report)
    else:
        _run_on_ray(job, working, tickets, report, address)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every worker of a build is told."""

    dataset: Folder
    stages: tuple[Stage, ...]
    partitions: tuple[Partition, ...]
    retry: frozenset[str]

    def worker(self, index: int, watch: Watch) -> StageWorker:
        return StageWorker(
            self.dataset, self.stages, index, self.partitions, retry=self.stages[index].name in self.retry, watch=watch
        )


def _work(worker: StageWorker, ticket: Ticket, report: Report) -> Ticket:
    try:
        return worker.work(ticket, report)
    except Exception as error:
        where = f"stage {worker.stage.name!r}, partition {ticket.partition.name}"
        raise StageError(f"{where}: {type(error).__name__}: {error}") from error


def _run_on_ray(job: _Job, working: list[int], tickets: list[Ticket], report: Report, address: str | None) -> None:
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        _init_ray(address, [job.stages[i] for i in working])
    try:
        board = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Board).remote()
        stream = _stream(job, working, tickets, board)
        failure: list[BaseException] = []
        consumer = threading.Thread(target=_consume, args=(stream, failure), daemon=True)
        consumer.start()
        going = True
        while going:
            consumer.join(timeout=0.5)
            going = consumer.is_alive()  # asked before the board is, so that the last drain misses nothing
            for progress in ray.get(board.drain.remote(), timeout=60):
                report(Progress(**progress))
        if failure:
            raise StageError(_reason(failure[0])) from None
    except ray.exceptions.RayError as error:
        raise StageError(f"Ray failed: {_reason(error)}") from error
    finally:
        if started_here:
            ray.shutdown()


def _init_ray(address: str | None, stages: Sequence[Stage]) -> None:
    """Connects to the cluster at `address`, or starts one on this machine that is wide enough for all stages at once.

    Ray's CPUs are slots, not cores: with fewer slots than the actors ask for, a stream would wait for ever.
    """
    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # its hints would stand between the lines of our own progress
    if address:
        try:
            ray.init(address=address, log_to_driver=False)
        except (RuntimeError, OSError) as error:  # another version of Ray or Python there, or nobody
            raise StageError(f"cannot join the Ray cluster at {address}: {error}") from error
        short = _shortage(stages, ray.cluster_resources())
        if short:  # an autoscaling cluster may grow, so this is no error
            print(f"the cluster is too small for all stages at once, and waits until it has grown: {short}")
        return
    slots = max(os.cpu_count() or 1, math.ceil(sum(s.needs.cpus * s.needs.actors[0] for s in stages)) + 1)
    ray.init(
        address="local",
        num_cpus=slots,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=256 << 20,
        _node_ip_address="127.0.0.1",
    )
    short = _shortage(stages, ray.cluster_resources())
    if short:
        raise StageError(f"this machine cannot run all stages at once: {short}; lower `needs` or use a cluster")


def _shortage(stages: Sequence[Stage], there: dict[str, float]) -> str:
    """What the smallest pools of all stages together ask for and the cluster does not have."""
    asked = {
        "CPU": sum(s.needs.cpus * s.needs.actors[0] for s in stages),
        "GPU": sum(s.needs.gpus * s.needs.actors[0] for s in stages),
        "GiB memory": sum(s.needs.memory_gb * s.needs.actors[0] for s in stages),
    }
    have = {**there, "GiB memory": there.get("memory", 0) / (1 << 30)}
    return ", ".join(f"{n:g} {k} of {have.get(k, 0):.4g}" for k, n in asked.items() if n > have.get(k, 0))


def _stream(job: _Job, working: list[int], tickets: list[Ticket], board: Any) -> Any:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = any(job.stages[i].ordered for i in working)
    if job.dataset.is_local:  # workers may have another working folder
        job = replace(job, dataset=Folder(url=job.dataset.path("")))
    rows = [{"ticket": _pack(t)} for t in tickets]
    stream = ray.data.from_items(rows, override_num_blocks=len(rows))
    for index in working:
        needs, ordered = job.stages[index].needs, job.stages[index].ordered
        fewest, most = (1, 1) if ordered else needs.actors
        stream = stream.map_batches(
            _RayStage,
            fn_constructor_args=(job, index, board),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=fewest,
                max_size=most,
                max_tasks_in_flight_per_actor=1 if ordered else 2,  # of two that wait, an actor may take either first
            ),
            num_cpus=needs.cpus,
            num_gpus=needs.gpus or None,
            memory=int(needs.memory_gb * (1 << 30)) or None,
        )
    return stream


class _RayStage:
    """A stage worker as Ray Data wants it: built once in each actor, then called with one ticket after another."""

    def __init__(self, job: _Job, index: int, board: Any) -> None:
        read_secrets()
        self._worker, self._board = job.worker(index, _BoardWatch(board)), board

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        report = lambda progress: self._board.add.remote(asdict(progress))  # noqa: E731
        return {"ticket": [_pack(_work(self._worker, _unpack(t), report)) for t in batch["ticket"]]}


class _Board(Ledger):
    """An actor that collects the workers' progress until the driver fetches it, and remembers what they began."""

    def __init__(self) -> None:
        super().__init__()
        self._items: list[dict[str, Any]] = []

    def add(self, item: dict[str, Any]) -> None:
        self._items.append(item)

    def drain(self) -> list[dict[str, Any]]:
        items, self._items = self._items, []
        return items


class _BoardWatch:
    """The board's memory, as a worker asks for it. Each call is waited for: a note that is under way dies with its worker."""

    def __init__(self, board: Any) -> None:
        import ray

        self._board, self.worker = board, str(ray.get_runtime_context().get_actor_id())

    def begin(self, place: str, keys: Sequence[str], deadline: float) -> str:
        import ray

        faulthandler.cancel_dump_traceback_later()
        how = ray.get(self._board.begin.remote(place, list(keys), deadline))
        if how == "go":  # in C and without Python's lock, so it also ends a process that hangs inside a library
            faulthandler.dump_traceback_later(deadline, exit=True, file=2)
        return how

    def end(self, place: str, keys: Sequence[str]) -> None:
        import ray

        faulthandler.cancel_dump_traceback_later()
        ray.get(self._board.end.remote(place, list(keys)))

    def forget(self, place: str) -> None:
        self._board.forget.remote(place)

    def suspects(self, place: str) -> list[list[str]]:
        import ray

        return ray.get(self._board.suspects.remote(place))


def _consume(stream: Any, failure: list[BaseException]) -> None:
    try:
        for _ in stream.iter_batches(batch_size=None):
            pass
        time.sleep(0.2)  # lets the last progress reach the board
    except BaseException as error:  # handed to the main thread, which raises it
        failure.append(error)


def _reason(error: BaseException) -> str:
    """The stage's own message out of Ray's wrapping."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, StageError):
            return str(seen)
        seen = getattr(seen, "cause", None) or seen.__cause__
    lines = [line for line in str(error).splitlines() if "StageError:" in line]
    return lines[-1].split("StageError:", 1)[1].strip() if lines else f"{type(error).__name__}: {error}"


def _pack(ticket: Ticket) -> str:
    return json.dumps(
        {"partition": asdict(ticket.partition), "tables": {k: asdict(v) for k, v in ticket.tables.items()}}
    )


def _unpack(text: str) -> Ticket:
    found = json.loads(text)
    tables = {name: TableName(**table) for name, table in found["tables"].items()}
    return Ticket(partition=Partition(**found["partition"]), tables=tables)
