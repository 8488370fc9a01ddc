"""What a stage folder was made with: `<folder>/settings.json`. A plan tells from it which setting changed, from what to what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from .fingerprint import plain
from .stage import Stage
from .storage import Folder

SETTINGS = "settings.json"
_KEYS = {"stage", "version", "identity", "configuration", "reads", "writes"}


def write_settings(dataset: Folder, stages: Sequence[Stage]) -> None:
    """Publishes the settings of each stage whose folder has none."""
    for stage in stages:
        name = f"{stage.folder}/{SETTINGS}"
        if not dataset.exists(name):
            dataset.write(name, json.dumps(describe(stage), indent=1, sort_keys=True).encode())


def describe(stage: Stage) -> dict[str, Any]:
    """A stage's settings as JSON values: what its output depends on (`identity`) and the configuration as it was written."""
    return {
        "stage": stage.name,
        "version": stage.version,
        "identity": stage.identity(),
        "configuration": plain(stage.config),
        "reads": list(stage.reads),
        "writes": [*stage.writes.names, *stage.payload],
    }


def read_settings(dataset: Folder, folder: str) -> dict[str, Any] | None:
    """The settings of a stage folder; None where nobody wrote them, or what lies there is none: they only inform."""
    try:
        found = json.loads(dataset.read(f"{folder}/{SETTINGS}"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) and set(found) >= _KEYS else None


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between two settings, each as `setting from → to`, with a model's name where there is one."""
    found = []
    if old["version"] != new["version"]:
        found.append(f"version {old['version']} → {new['version']}")
    before, after = dict(flat(old["identity"])), dict(flat(new["identity"]))
    names_before, names_after = dict(flat(old["configuration"])), dict(flat(new["configuration"]))
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key):
            named = names_before.get(key) != names_after.get(key)
            values = (names_before, names_after) if named else (before, after)
            was, now = (_shown(v[key]) if key in v else "nothing" for v in values)
            found.append(f"{key} {was} → {now}")
    for key in ("reads", "writes"):
        if old[key] != new[key]:
            found.append(f"{key} {', '.join(old[key])} → {', '.join(new[key])}")
    return found


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings with dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(v, (dict, list, str)) for v in value):
        for spot, inner in enumerate(value):
            yield from flat(inner, f"{name}.{spot}")
    else:
        yield name or "identity", value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:40]}…{text[-19:]}"
