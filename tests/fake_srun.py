"""Slurm's `srun` as far as jobs/cluster/slurm.sh goes: so many processes of a command, here; signals go on to all of them.

An option that it does not know is an error, as with the real one.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys


def main(argv: list[str]) -> int:
    """Starts the tasks and returns the highest of their exit codes."""
    parser = argparse.ArgumentParser(prog="srun", allow_abbrev=False)
    for name in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "kill-on-bad-exit", "wait"):
        parser.add_argument(f"--{name}", type=int)
    for name in ("nodelist", "exclude", "export", "gpu-bind"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    asked = parser.parse_args(argv)
    if asked.ntasks_per_node:
        assert asked.ntasks == asked.nodes * asked.ntasks_per_node
    tasks = []
    for index in range(asked.ntasks):
        told = {
            "SLURM_PROCID": index,
            "SLURM_LOCALID": index % (asked.ntasks_per_node or 1),
            "SLURM_NTASKS": asked.ntasks,
        }
        environment = os.environ | {name: str(value) for name, value in told.items()}
        tasks.append(subprocess.Popen(asked.command, env=environment, start_new_session=True))

    def forward(number: int, _: object) -> None:
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, number)  # the real one's go to all processes of a task

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, forward)
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
