"""A Ray cluster of several nodes on this machine, each a family of processes that can be killed as a machine is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

ATTEMPTS = 8
STORE = 128 << 20  # bytes of each node's object store, about the least that Ray takes


_ports = iter(range(21000 + os.getpid() * 37 % 9000, 60000))


def free_ports(count: int) -> list[int]:
    """Ports that nobody has on any address, outside 10002-19999, which Ray's workers are given theirs from; each is told once,
    as who asks may take its time to listen there.
    """
    found: list[int] = []
    for port in _ports:
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free port")


PATIENT = {"RAY_raylet_start_wait_time_s": "150", "RAY_agent_register_timeout_ms": "150000"}
"""On a busy machine Ray would give up on a node, and its raylet on the processes beside it, before they are up."""


class Node:
    """`ray start` and all that it started. With `head` it joins that one, else it is one."""

    def __init__(
        self, folder: Path, environment: dict[str, str], *, cpus: float, gpus: float = 0, head: Node | None = None
    ) -> None:
        """`folder`: for Ray's files, with a short name: sockets lie there, whose path may have 107 letters. `gpus`: pretended."""
        self._folder, self._environment = folder, {**environment, **PATIENT}
        for _ in range(ATTEMPTS):  # it may be too busy even so, or another takes the port
            port, agent = free_ports(2)
            self.address: str = head.address if head else f"127.0.0.1:{port}"
            command = [f"{Path(sys.executable).parent}/ray", "start", "--block", "--disable-usage-stats"]
            command += [f"--address={head.address}"] if head else ["--head", f"--port={port}", f"--temp-dir={folder}"]
            command += ["--include-dashboard=false"] if not head else []
            command += [f"--dashboard-agent-listen-port={agent}", f"--num-cpus={cpus:g}", f"--num-gpus={gpus:g}"]
            if self._come_up([*command, f"--object-store-memory={STORE}"]):
                return
        raise RuntimeError(f"no node came up: {self._log.read_text()[-2000:]}")

    @property
    def _log(self) -> Path:
        return self._folder / "node.log"

    def _come_up(self, command: list[str]) -> bool:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log, cwd=self._folder, start_new_session=True
            )
        while self._process.poll() is None:
            if "Ray runtime started" in self._log.read_text():
                return True
            time.sleep(0.2)
        self.kill()
        return False

    def workers(self, name: str) -> list[psutil.Process]:
        """Its workers whose title has this in it."""
        found = []
        for process in self._family():
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it has just ended
                continue
        return found

    def _family(self) -> list[psutil.Process]:
        try:
            one = psutil.Process(self._process.pid)
            return [one, *one.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL to all of it, as when the power fails."""
        for process in self._family():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()
