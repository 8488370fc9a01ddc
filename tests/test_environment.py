"""clip-retrieval's environment: made once, by one of several, anew where it is half made; and lines of JSON there and back.

No package is installed here: the list is empty, and a small program stands in for the one that runs inside.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jobs.clip_retrieval import environment as module
from jobs.clip_retrieval.environment import LOCK, Inside, environment

PROGRAM = """
import json, sys
command, *arguments = sys.argv[1:]
print("a library talks", file=sys.stderr)
if command == "dies":
    raise RuntimeError("no such index")
print(json.dumps({"arguments": arguments, "path": sys.flags.isolated}), flush=True)
for line in sys.stdin:
    print(json.dumps({"heard": json.loads(line)}), flush=True)
"""


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of environments, and a list of nothing to install."""
    (tmp_path / "requirements.txt").write_text("")
    monkeypatch.setattr(module, "LOCK", tmp_path / "requirements.txt")
    monkeypatch.setenv("DENSEBRIDGE_ENVIRONMENTS", str(tmp_path / "environments"))
    return tmp_path / "environments"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(module, "PROGRAM", tmp_path / "program.py")
    monkeypatch.setattr(module, "environment", lambda: Path(sys.executable))


def test_two_at_once_make_one_and_half_of_one_is_made_again(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(environment())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    python = found[0]
    assert found == [python, python] and capsys.readouterr().err.count("making clip-retrieval's environment") == 1
    assert subprocess.run(
        [python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True
    ).stdout.strip() == str(python.parent.parent)
    (python.parent.parent / "made").unlink()  # as a process leaves it that died before the end
    (python.parent.parent / "left").touch()
    assert (
        environment() == python and "making" in capsys.readouterr().err and not (python.parent.parent / "left").exists()
    )
    assert environment() == python and capsys.readouterr().err == ""


def test_another_list_is_another_environment(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(module, "_make", lambda folder, python: made.append(folder))
    environment()
    module.LOCK.write_text("# another\n")
    environment()
    assert len(set(made)) == 2 and all(folder.parent == empty for folder in made)


def test_without_a_package_index_it_is_said_in_one_line(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module.LOCK.write_text(f"tqdm==4.70.1 --hash=sha256:{'0' * 64}\n")
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OSError, match=r"cannot be made in .*: ERROR: .*tqdm.*: it takes a package index once") as told:
        environment()
    assert "\n" not in str(told.value) and [path for path in empty.iterdir() if path.is_dir()] == []


def test_the_list_has_wheels_by_digest_alone() -> None:
    lines = [line.strip() for line in LOCK.read_text().splitlines() if line.strip() and not line.startswith("#")]
    names = [line for line in lines if not line.startswith("--hash=sha256:")]
    assert all("==" in name and name.endswith("\\") for name in names)
    assert "clip-retrieval==2.45.0 \\" in names and not any(name.startswith("torch==") for name in names)


def test_lines_there_and_back(program: None) -> None:
    with Inside("echo", "a", "b c") as inside:
        assert inside.hear() == {"arguments": ["a", "b c"], "path": 1}  # nothing of our own paths is there
        assert inside.ask(text="ü\n") == {"heard": {"text": "ü\n"}}
        assert inside.hear(timeout=0.01) is None


def test_one_that_ends_tells_its_last_words(program: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DENSEBRIDGE_TRACE", raising=False)
    with (
        Inside("dies") as inside,
        pytest.raises(OSError, match=r"clip-retrieval's dies ended: RuntimeError: no such index"),
    ):
        inside.say(text="nobody hears this")
        inside.hear()


def test_it_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Killed, so that nothing of its own can end what it started."""
    script = (
        "import sys, os, pathlib\nfrom jobs.clip_retrieval import environment as m\n"
        "m.environment = lambda: pathlib.Path(sys.executable)\n"
        "inside = m.Inside('back', 'no', 'index', '0')\n"
        "print(inside._process.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    # inside.py itself: it waits for no library before it listens for the end of its caller
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=LOCK.parents[2])
    process, deadline = int(done.stdout), time.monotonic() + 60
    while Path(f"/proc/{process}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{process}").exists()
