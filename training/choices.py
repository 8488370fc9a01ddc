"""Settings that are one of a few words: their annotation lists them, and nothing else does."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(config: Any, where: str) -> None:
    """Raises ValueError for a field of a dataclass that holds none of what its `Literal` annotation lists; `where` stands before
    the field's name.
    """
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal and getattr(config, name) not in get_args(kind):
            raise ValueError(f"{where}{name} is {getattr(config, name)!r}: choose one of {', '.join(get_args(kind))}")
