"""What every worker of a build is told, and one partition's ticket through one of them."""

from __future__ import annotations

from dataclasses import dataclass

from .compute import Report
from .engine import StageWorker
from .partitions import Partition
from .plan import Ticket
from .quarantine import Watch
from .stage import Stage
from .storage import Folder


class StageError(RuntimeError):
    """A stage failed as a whole: its message says which stage, on which partition, and why."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker of a build is told."""

    dataset: Folder
    stages: tuple[Stage, ...]
    partitions: tuple[Partition, ...]
    retry: frozenset[str]

    def worker(self, index: int, watch: Watch) -> StageWorker:
        """One for the stage of this index."""
        return StageWorker(
            self.dataset, self.stages, index, self.partitions, retry=self.stages[index].name in self.retry, watch=watch
        )


def work(worker: StageWorker, ticket: Ticket, report: Report) -> Ticket:
    """The ticket with the table of this worker's stage. Raises StageError."""
    try:
        return worker.work(ticket, report)
    except Exception as error:
        where = f"stage {worker.stage.name!r}, partition {ticket.partition.name}"
        raise StageError(f"{where}: {type(error).__name__}: {error}") from error
