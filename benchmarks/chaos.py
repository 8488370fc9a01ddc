"""Builds on a Ray cluster of two nodes to which something happens, beside one that nobody disturbs.

    python -m benchmarks.chaos [--rows 200] [--seconds 0.05] [--only node head]

What happens: `actor` a process of the stage that takes a part of a (pretended) GPU gets SIGKILL in the middle of a batch; `node`
a node is lost with all that runs on it; `head` the head is lost, the build ends in one line, and the same command goes on with a
new head; `memory` another program fills the object store and holds what it put there; `storage` 10 % of the storage's calls
fail, writes leaving halves behind, and 10 % take half a second more. Stages are the tests' small ones, each row taking
`--seconds` at each of four stages. Prints a table (seconds, rows computed twice, whether every file has the same bytes and the
funnel is the same) and, last, one line of JSON; ends with 1 where a build differs or computed more than what was in flight twice.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.small_stages import small_source, urls

from .nodes import STORE, Node

RECIPE = "tests/small_recipe.py"
PARTITION, STAGES, ACTORS = 5, 4, 2
LOST = 300.0
"""Seconds within which a build whose head is lost must end."""
HOLDER = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False)
held = [ray.put(bytes(8 << 20)) for _ in range(int(sys.argv[2]) >> 23)]
print("full", flush=True)
time.sleep(3600)
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a build."""

    scenario: str
    seconds: float
    """From the first command to the end of the last."""
    commands: int
    """Builds that it took."""
    twice: int
    """Rows that stages computed a second time; but for the ordered stage, which is shown again what came first."""
    allowed: int
    """Rows that may be: those of the partitions that were in the hands of what was killed."""
    files_differing: int
    funnel_equal: bool
    said: str = ""
    """The line with which a disturbed build ended, where it did."""

    @property
    def good(self) -> bool:
        return not self.files_differing and self.funnel_equal and self.twice <= self.allowed


class Build:
    """Builds of one source into a folder of their own, on a cluster of their own."""

    def __init__(self, folder: Path, rows: int, seconds: float, dataset: str = "") -> None:
        """`dataset`: how the build calls the folder `dataset` in `folder`."""
        folder.mkdir()
        self.folder, self.rows, self.commands = folder, rows, 0
        small_source(folder, urls(rows), partition_size=PARTITION)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SMALL_"))}
        told = {
            "SMALL_FOLDER": str(folder),
            "SMALL_SECONDS": str(seconds),
            "SMALL_ACTORS": str(ACTORS),
            "SMALL_GPUS": "0.25",
        }
        place = {"SMALL_DATASET": dataset} if dataset else {}
        ours = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        self.environment = {**kept, **ours, **told, **place}

    def start(self, address: str) -> subprocess.Popen[bytes]:
        """The command, on the cluster there."""
        self.commands += 1
        command = [sys.executable, "-m", "jobs.cli", "build", RECIPE, "--address", address]
        with (self.folder / f"log-{self.commands}").open("wb") as log:
            return subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def finish(self, process: subprocess.Popen[bytes], seconds: float = 1800.0) -> int:
        """The exit code of the command; one that does not end is killed, which counts as 124."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return 124

    def must(self, process: subprocess.Popen[bytes]) -> None:
        """Waits for the command, which must end well."""
        if code := self.finish(process):
            raise SystemExit(f"the build ended with {code}: {self.said(20)}")

    def said(self, lines: int = 1) -> str:
        """The end of what the last command said."""
        return "\n".join((self.folder / f"log-{self.commands}").read_text(errors="replace").splitlines()[-lines:])

    def calls(self) -> Counter[str]:
        """How often each stage was given each row, by whichever process."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return Counter(" ".join(line.split()[:2]) for line in lines)

    def wait_for_calls(self, share: float) -> None:
        """Until the stages were given that share of all rows that they will be given."""
        end = time.monotonic() + 900
        while self.calls().total() < share * self.rows * STAGES * 0.6:
            if time.monotonic() > end:
                raise SystemExit(f"the build does not get on: {self.said(20)}")
            time.sleep(0.05)

    def digests(self) -> dict[str, str]:
        """Of every table, partition and setting. Not of what says when something happened, nor of where this build lies."""
        root = self.folder / "dataset"
        files = [p for p in root.rglob("*") if p.is_file() and not p.name.startswith(".")]
        files = [p for p in files if p.relative_to(root).parts[0] not in ("runs", "sources")]
        files = [p for p in files if p.parent.name != "records"]
        here = str(self.folder).encode()
        return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes().replace(here, b"")).hexdigest() for p in files}

    def funnel(self) -> str:
        """What `densebridge status` tells."""
        command = [sys.executable, "-m", "jobs.cli", "status", RECIPE, "--json"]
        environment = {name: value for name, value in self.environment.items() if name != "SMALL_DATASET"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


Scenario = Callable[[Build, "Cluster"], str]


class Cluster:
    """A head and another node."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment, self._ending = environment, ExitStack()
        try:
            self.head = self.start(None)
            self.node = self.start(self.head)
        except BaseException:
            self.close()  # the head must not outlive a node that does not come up
            raise

    def start(self, head: Node | None) -> Node:
        """One more node."""
        folder = self._ending.enter_context(
            tempfile.TemporaryDirectory(prefix="chaos", dir="/tmp", ignore_cleanup_errors=True)
        )
        node = Node(Path(folder), self._environment, cpus=2, gpus=1, head=head)
        self._ending.callback(node.kill)
        return node

    def close(self) -> None:
        """Ends all nodes."""
        self._ending.close()


def undisturbed(build: Build, cluster: Cluster) -> str:
    """Nothing happens."""
    build.must(build.start(cluster.head.address))
    return ""


def actor(build: Build, cluster: Cluster) -> str:
    """The process of the GPU stage's actor gets SIGKILL."""
    process = build.start(cluster.head.address)
    build.wait_for_calls(0.4)
    found = [worker for node in (cluster.head, cluster.node) for worker in node.workers("MapBatches(describe)")]
    if not found:
        raise SystemExit("the GPU stage has no actor to kill")
    with suppress(psutil.NoSuchProcess):
        found[0].kill()
    build.must(process)
    return ""


def node(build: Build, cluster: Cluster) -> str:
    """A node is lost."""
    process = build.start(cluster.head.address)
    build.wait_for_calls(0.4)
    if not cluster.node.workers("MapBatches("):
        raise SystemExit("the node that is to be lost has nothing of the build")
    cluster.node.kill()
    build.must(process)
    return ""


def head(build: Build, cluster: Cluster) -> str:
    """The head is lost, and there is a new one."""
    process = build.start(cluster.head.address)
    build.wait_for_calls(0.4)
    cluster.head.kill()
    began = time.monotonic()
    code = build.finish(process, LOST)
    took = time.monotonic() - began
    said = build.said()
    if code != 1 or not said.startswith("densebridge: "):
        raise SystemExit(f"the head is lost and the build ends with {code} and no line that says so: {build.said(20)}")
    cluster.node.kill()
    cluster.head = cluster.start(None)
    build.must(build.start(cluster.head.address))
    return f"{code} after {took:.0f} s: {said}"


def memory(build: Build, cluster: Cluster) -> str:
    """The object store is full of another's objects."""
    command = [sys.executable, "-c", HOLDER, cluster.head.address, str(2 * STORE)]
    holder = subprocess.Popen(command, env=build.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert holder.stdout and holder.stdout.readline() == b"full\n", "nobody could fill the object store"
        build.must(build.start(cluster.head.address))
    finally:
        holder.kill()
        holder.wait()
    return ""


SCENARIOS: dict[str, tuple[Scenario, int, str]] = {
    "undisturbed": (undisturbed, 0, ""),
    "actor": (actor, PARTITION, ""),
    "node": (node, PARTITION * STAGES * ACTORS, ""),
    "head": (head, PARTITION * STAGES * ACTORS, ""),
    "memory": (memory, 0, ""),
    "storage": (undisturbed, 0, "unreliable://0.1-1-0.5"),
}
"""By name: what happens, rows that may be computed twice for it, and where the dataset lies if not on the disk."""


def play(name: str, folder: Path, rows: int, seconds: float, alone: Build | None) -> tuple[Outcome, Build]:
    """One scenario on a cluster of its own, held against the undisturbed build."""
    scenario, allowed, storage = SCENARIOS[name]
    build = Build(folder / name, rows, seconds, f"{storage}{folder / name / 'dataset'}" if storage else "")
    cluster = Cluster(build.environment)
    try:
        began = time.monotonic()
        said = scenario(build, cluster)
        took = time.monotonic() - began
    finally:
        cluster.close()
    ours, theirs = build.digests(), (alone or build).digests()
    outcome = Outcome(
        scenario=name,
        seconds=round(took, 1),
        commands=build.commands,
        twice=sum(count - 1 for call, count in build.calls().items() if not call.startswith("first ")),
        allowed=allowed,
        files_differing=sum(ours.get(file) != theirs.get(file) for file in {*ours, *theirs}),
        funnel_equal=build.funnel() == (alone or build).funnel(),
        said=said,
    )
    return outcome, build


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="of the source, in partitions of 5")
    parser.add_argument("--seconds", type=float, default=0.05, help="that a row takes at each stage")
    parser.add_argument("--only", nargs="*", choices=[*SCENARIOS][1:], default=[*SCENARIOS][1:], help="what happens")
    given = parser.parse_args()
    outcomes: list[Outcome] = []
    alone: Build | None = None
    with tempfile.TemporaryDirectory() as folder:
        for name in ("undisturbed", *given.only):
            outcome, build = play(name, Path(folder), given.rows, given.seconds, alone)
            alone = alone or build
            outcomes.append(outcome)
            same = "same bytes" if not outcome.files_differing else f"{outcome.files_differing} FILES DIFFER"
            print(
                f"{name:<12} | {outcome.seconds:>6.1f} s | {outcome.twice:>3} rows twice (at most {outcome.allowed}) | "
                f"{same} | funnel {'equal' if outcome.funnel_equal else 'DIFFERS'} | {outcome.said}",
                flush=True,
            )
    print(json.dumps({"rows": given.rows, "seconds": given.seconds, "outcomes": [asdict(o) for o in outcomes]}))
    raise SystemExit(0 if all(outcome.good for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
