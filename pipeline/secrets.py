"""Secrets of a job: a file of NAME=VALUE lines that lies on every machine, so that only its path is ever told around.

DENSEBRIDGE_SECRETS names it: a Kubernetes secret's mount, say. A job's process and each worker of its stages read it first.
"""

from __future__ import annotations

import os
import re
import stat

VARIABLE = "DENSEBRIDGE_SECRETS"
"""The environment variable that names the file."""
_LINE = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.+)")


def read_secrets() -> None:
    """Puts the file's values into this process's environment; does nothing where no file is named.

    Lines are NAME=VALUE, empty, or a comment after #; a value is taken as it stands. Raises FileNotFoundError,
    PermissionError or ValueError in one line that shows no value.
    """
    path = os.environ.get(VARIABLE)
    if not path:
        return
    try:
        with open(path, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(f"secrets {path} may be written by others than its owner: chmod go-w it")
            lines = file.read().splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"no secrets at {path}: {VARIABLE} names a file that every node must have") from None
    except UnicodeDecodeError:  # its text would show a byte
        raise ValueError(f"secrets {path} are no UTF-8 text: write NAME=VALUE lines") from None
    os.environ.update(_parse(path, lines))


def _parse(path: str, lines: list[str]) -> dict[str, str]:
    found = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        parts = _LINE.fullmatch(line)
        if not parts or "\0" in line:
            raise ValueError(f"secrets {path}, line {number}: this is not NAME=VALUE")
        name, value = parts.groups()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            raise ValueError(
                f"secrets {path}, line {number}: {name} is in quotes, which would be part of it: drop them"
            )
        found[name] = value
    return found
