"""A Ray cluster of several nodes on this machine, each a family of processes that can be killed as a machine is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

ATTEMPTS = 8
STORE = 128 << 20  # bytes of each node's object store, about the least that Ray takes


def free_ports(count: int) -> list[int]:
    """Ports that nobody has, outside 10002-19999, which Ray's workers are given theirs from."""
    found: list[int] = []
    for port in range(21000 + os.getpid() * 37 % 9000, 60000):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) != 0:
                found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free port")


class Node:
    """`ray start` and all that it started. With `head` it joins that one, else it is one."""

    def __init__(self, folder: Path, environment: dict[str, str], *, cpus: float, head: Node | None = None) -> None:
        """`folder`: for Ray's files, with a short name: sockets lie there, whose path may have 107 letters."""
        self._folder, self._environment = folder, environment
        for _ in range(ATTEMPTS):  # on a busy machine Ray's raylet gives up on the processes beside it after 30 s
            port, agent = free_ports(2)
            self.address: str = head.address if head else f"127.0.0.1:{port}"
            command = [f"{Path(sys.executable).parent}/ray", "start", "--block", "--disable-usage-stats"]
            command += [f"--address={head.address}"] if head else ["--head", f"--port={port}", f"--temp-dir={folder}"]
            command += ["--include-dashboard=false"] if not head else []
            command += [f"--dashboard-agent-listen-port={agent}", f"--num-cpus={cpus:g}", "--num-gpus=0"]
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
