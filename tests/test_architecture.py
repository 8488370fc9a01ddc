"""The shape of the house: file sizes, function sizes, the README's tree, nothing of one machine in the repository."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "stages", "jobs", "training", "examples", "benchmarks")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 360
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 70, f"{node.name} is too long"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or path.name == "__init__.py", "the module needs a docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} needs a docstring"


def test_readme_names_every_source_file() -> None:
    readme = (ROOT / "README.md").read_text()
    missing = [p.name for p in SOURCES if p.name != "__init__.py" and p.name not in readme]
    assert not missing


def test_readme_names_every_job() -> None:
    from jobs.cli import JOBS

    readme = (ROOT / "README.md").read_text()
    assert [job for job in JOBS if f"densebridge {job}" not in readme] == []
    assert all((ROOT / "jobs" / f"{job}.py").is_file() for job in JOBS)


def test_nothing_of_one_machine_is_committed() -> None:
    command = [
        "git",
        "-C",
        str(ROOT),
        "grep",
        "-nIE",
        r"/(home|root)/[a-z]|find-links|index-url",
        "--",
        ":!tests/test_architecture.py",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout == ""


def test_every_dependency_is_pinned() -> None:
    pinned = {re.split(r"==", line)[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if line}
    project = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[0]
    wanted = {re.split(r"[\[>=<]", name)[0].lower() for name in re.findall(r'^    "([a-z0-9-]+[^"]*)"', project, re.M)}
    assert wanted - pinned == set()


def test_help_needs_no_heavy_library() -> None:
    script = "import sys; sys.argv = ['densebridge', '--help']; import jobs.cli\ntry: jobs.cli.main()\nexcept SystemExit: pass\n"
    script += "print([m for m in ('torch', 'ray', 'transformers', 'pyarrow', 'rich') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip().endswith("[]")


def test_training_needs_neither_ray_nor_webdataset() -> None:
    script = "import sys, training.loop, training.generation, training.batches\n"
    script += "print([m for m in ('ray', 'webdataset', 'img2dataset', 'tyro') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert out.strip().endswith("[]")
