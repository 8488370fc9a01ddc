"""All stages over all partitions as one Ray Data stream of actor pools.

What flows between Ray's operators is a partition's ticket (names), never its pixels. So later partitions download while
earlier ones are captioned, and a lost worker costs the partitions it held, which Ray runs again.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.machinery import PathFinder
from typing import Any

from .compute import Progress, Report
from .partitions import Partition
from .plan import Ticket
from .quarantine import Ledger
from .ray_cluster import GROWTH, join_cluster, may_grow, nodes, start_cluster
from .ray_head import at_end, follow
from .ray_waiting import REPLACE, Waiting
from .room import shortage
from .secrets import read_secrets
from .stage import Stage
from .storage import Folder
from .tables import TableName
from .workers import Job, StageError, work


def run_on_ray(
    job: Job, working: list[int], tickets: list[Ticket], report: Report, address: str | None, patience: float | None
) -> None:
    """Sends the tickets through the stages of the indices `working`, on the cluster at `address` or one of its own.
    `patience`: seconds to wait for nodes that the cluster lacks, None for as long as its kind asks for. Raises StageError.
    """
    import ray

    started_here = not ray.is_initialized()
    stages = [job.stages[i] for i in working]
    executor, failure, over = None, list[BaseException](), threading.Event()

    def end() -> None:
        if executor:
            executor.shutdown(force=True)  # in a cluster that is not ours its actors would go on for nobody
            over.wait(10)  # or the consumer would ask a Ray that is gone, which ends the process before it says why
        if started_here:
            ray.shutdown()

    with at_end(end), _told():
        if started_here and address is None:
            start_cluster(stages)
        elif started_here:
            join_cluster(str(address))
        waiting = Waiting(stages, _check_room(stages, patience, alone=started_here and address is None))
        board = _start_board()
        stream = _stream(job, working, tickets, board)
        executor = stream._create_executor()  # by hand, as iter_batches tells nobody how to end what it has begun
        consumed = (stream._build_bundle_iterator(executor), failure, over)
        threading.Thread(target=_consume, args=consumed, daemon=True).start()
        follow(board, over, lambda told: report(Progress(**told)), waiting.look)
        if failure:
            raise StageError(_reason(failure[0])) from None


@contextmanager
def _told() -> Iterator[None]:
    """What Ray raises, as a StageError."""
    import ray

    try:
        yield
    except ray.exceptions.RayError as error:
        raise StageError(f"Ray failed: {_reason(error)}") from error


def _start_board() -> Any:
    """The board, on the node of this process: with any other node the build would lose what its workers told."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(**options)(_Board).remote()


def _check_room(stages: Sequence[Stage], patience: float | None, *, alone: bool) -> float:
    """Seconds to wait for nodes. `alone`: on this machine. Raises StageError where the cluster lacks some and will not grow."""
    grows = GROWTH if may_grow() else 0.0
    waits = grows if patience is None else patience
    short = shortage(stages, nodes())
    if short and alone:
        raise StageError(f"this machine cannot run all stages at once: {short}; lower `needs` or use a cluster")
    if short and not waits:
        raise StageError(f"the cluster is too small: {short}; lower `needs`, or wait for nodes with --wait-minutes")
    if short:  # the actors that the stream asks for are what an autoscaler adds nodes for
        print(f"waiting up to {waits / 60:g} min for nodes: {short}", flush=True)
    return max(waits, REPLACE) if patience is None else patience


def _stream(job: Job, working: list[int], tickets: list[Ticket], board: Any) -> Any:
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = any(job.stages[i].ordered for i in working)
    if job.dataset.is_local:  # workers may have another working folder
        job = replace(job, dataset=Folder(url=job.dataset.path("")))
    _send_whole(job.stages)
    rows = [{"ticket": _pack(t)} for t in tickets]
    stream = ray.data.from_items(rows, override_num_blocks=len(rows))
    for index in working:
        stage = job.stages[index]
        needs, (fewest, most) = stage.needs, stage.pool
        in_flight = 1 if stage.ordered else 2  # of two that wait, an actor may take either first
        stream = stream.map_batches(
            type(stage.name, (_RayStage,), {}),  # Ray shows the pool by this name
            fn_constructor_args=(job, index, board),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=fewest,
                max_size=most,
                max_tasks_in_flight_per_actor=in_flight,
            ),
            num_cpus=needs.cpus,
            num_gpus=needs.gpus or None,
            memory=int(needs.memory_gb * (1 << 30)) or None,
            resources=needs.custom or None,
            label_selector=needs.selector or None,
        )
    return stream


def _send_whole(stages: Sequence[Stage]) -> None:
    """Has the classes of a module that no worker could import, such as a recipe file, sent whole and not by name."""
    import ray

    for name in {type(part).__module__ for stage in stages for part in (stage, stage.config)}:
        if "." not in name and name in sys.modules and PathFinder.find_spec(name) is None:
            ray.cloudpickle.register_pickle_by_value(sys.modules[name])


class _RayStage:
    """A stage worker as Ray Data wants it: built once in each actor, then called with one ticket after another.

    Those of one node that load the same model share its download: huggingface_hub locks each file while it comes, and who
    waited for the lock finds it there.
    """

    def __init__(self, job: Job, index: int, board: Any) -> None:
        read_secrets()
        self._worker, self._board = job.worker(index, _BoardWatch(board)), board

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        report = lambda progress: self._board.add.remote(asdict(progress))  # noqa: E731
        return {"ticket": [_pack(work(self._worker, _unpack(t), report)) for t in batch["ticket"]]}


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


def _consume(bundles: Iterable[Any], failure: list[BaseException], over: threading.Event) -> None:
    try:
        for _ in bundles:
            pass
        time.sleep(0.2)  # lets the last progress reach the board
    except BaseException as error:  # handed to the main thread, which raises it
        failure.append(error)
    finally:
        over.set()


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
