"""Following a job through a connection that breaks, and past a head that has forgotten it."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import SimpleNamespace
from typing import cast

import pytest

from jobs import follow as module
from jobs.follow import follow, watch
from jobs.head import Head, Job, connect
from training.processes import INTERRUPTED

pytestmark = pytest.mark.usefixtures("process_as_it_was")


class Line:
    """A line to a server that breaks once these bytes came over it, and stays dead for the next two who ring. A silent one does
    not tell those who have it that it broke.
    """

    def __init__(self, port: int, breaks: bytes, silent: bool) -> None:
        self._port, self._breaks, self._silent, self.refused = port, breaks, silent, 0
        self._dead = threading.Event()
        self._ends: list[socket.socket] = []
        self._bell = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._bell.getsockname()[1]}"
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            caller, _ = self._bell.accept()
            if self._dead.is_set() and self.refused < 2:
                self.refused += 1
                caller.close()
                continue
            called = socket.create_connection(("127.0.0.1", self._port))
            self._ends += [caller, called]
            for source, sink in ((caller, called), (called, caller)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
                if self._breaks in data and not self._dead.is_set():
                    self._dead.set()
                    if self._silent:
                        return
                    for end in self._ends:
                        with contextlib.suppress(OSError):  # it has ended already
                            end.shutdown(socket.SHUT_RDWR)
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("silent", [False, True])
def test_a_broken_connection_loses_and_doubles_nothing(
    head: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    monkeypatch.setattr(module, "CALL", 2.0)  # for which a silent stream is waited for at the end
    line = Line(int(head.rsplit(":", 1)[1]), b"word 2\n", silent)
    there = connect(line.address)
    words = "import time\nfor i in range(7): print('word', i, flush=True); time.sleep(1)"
    job = there.submit(f'python -c "{words}"', {}, cpus=0, gpus=0)
    assert follow(there, job).status == "succeeded"
    said = capsys.readouterr()
    assert [w for w in said.out.splitlines() if w.startswith("word")] == [f"word {i}" for i in range(7)]
    assert line.refused == 2


def test_a_job_that_never_ran_says_why(head: str, capsys: pytest.CaptureFixture[str]) -> None:
    there = connect(head)
    job = there.submit("true", {"working_dir": "local:///nowhere"}, cpus=0, gpus=0)
    assert watch(there, job) == 1
    assert "'/nowhere', which must already exist on every node" in capsys.readouterr().err


def test_a_training_that_saved_is_told_from_one_that_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for code, status in ((75, 75), (1, 1)):
        over = Job(id="one", command="x", status="failed", message="", started=0.0, ended=1.0, code=code)
        monkeypatch.setattr(module, "follow", lambda *_, over=over: over)
        assert watch(cast("Head", SimpleNamespace(address="http://h")), "one") == status
    assert "has saved: submit it again" in capsys.readouterr().out and module.SAVED == INTERRUPTED


def test_a_head_that_forgot_the_job_says_so(head: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As one does that was started again."""
    with pytest.raises(SystemExit) as ended:
        watch(connect(head), "raysubmit_gone")
    assert ended.value.code == 4
    assert "no longer knows raysubmit_gone: it was started again without its memory" in capsys.readouterr().err
