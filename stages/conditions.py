"""A view's condition: SQL over one sample's columns. Which columns it asks for, whether it may stand, whom it chooses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_MOVING = frozenset(
    {"age", "current_date", "current_time", "current_timestamp", "localtime", "localtimestamp", "version"}
)
"""What depends on the day or the library, though duckdb calls it consistent, or takes it for a column while it parses."""


@lru_cache(maxsize=256)
def columns_of(where: str, view: str) -> tuple[str, ...]:
    """The columns that the condition asks for, sorted. Refuses one that is more than a condition, or whose answer depends on
    other rows or on the moment. Raises ValueError.
    """
    import duckdb

    with duckdb.connect() as connection:
        asked = f"SELECT (\n{where}\n) FROM samples"
        found = connection.execute("SELECT json_serialize_sql(?)", [asked]).fetchone()
        told: dict[str, Any] = json.loads(found[0]) if found else {"error": True}
        if told["error"] or len(told["statements"]) != 1:
            why = told.get("error_message", "no condition")
            raise ValueError(f"view {view!r}: its condition {where!r} is not valid: {why}")
        parsed = list(_nodes(told))
        kinds = {node.get("class") for node in parsed}
        if "SUBQUERY" in kinds:
            raise ValueError(
                f"view {view!r}: its condition {where!r} asks other rows: it must be told from one row alone"
            )
        if "STAR" in kinds:
            raise ValueError(f"view {view!r}: its condition {where!r} asks all columns: name those that it means")
        columns = set(_columns(told, frozenset()))
        names = {str(node["function_name"]) for node in parsed if "function_name" in node}
        query = "SELECT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT' AND function_name IN ?"
        unsteady = connection.execute(query, [sorted(names)]).fetchall() if names else []
    moving = sorted({name for (name,) in unsteady} | (names & _MOVING) | (columns & _MOVING))
    if moving:
        raise ValueError(f"view {view!r}: {moving[0]} says another thing each time: a condition must not use it")
    return tuple(sorted(columns))


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    """All objects within a parsed expression."""
    if isinstance(node, dict):
        yield node
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _nodes(inner)


def _columns(node: Any, own: frozenset[str]) -> Iterator[str]:
    """The columns that a parsed expression refers to; `own` are the names that lambdas around it have given."""
    if isinstance(node, list):
        for inner in node:
            yield from _columns(inner, own)
    elif isinstance(node, dict) and node.get("class") == "COLUMN_REF":
        names = node["column_names"]
        name = names[1] if len(names) > 1 and names[0] == "samples" else names[0]  # further ones are fields of a struct
        if name not in own:
            yield name
    elif isinstance(node, dict) and node.get("class") == "LAMBDA":
        yield from _columns(node["expr"], own | set(_columns(node["lhs"], frozenset())))
    elif isinstance(node, dict):
        for inner in node.values():
            yield from _columns(inner, own)


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))


def select_rows(batch: pa.Table, where: str, view: str) -> set[str]:
    """Keys of the rows for which the condition holds. Raises ValueError where it is not a condition over the columns."""
    import duckdb

    asked = {"key", *columns_of(where, view)}
    # What is no number is no score: duckdb has NaN above them all, and it would pass any threshold.
    rows = pa.table({name: _numbers(batch.column(name)) for name in batch.column_names if name in asked})
    with duckdb.connect(config={"enable_external_access": "false", "threads": "1"}) as connection:
        connection.register("samples", rows)
        try:
            found = connection.execute(f"SELECT key FROM samples WHERE (\n{where}\n)").fetchall()
        except duckdb.Error as error:
            # What is wrong and what was near; not the query.
            told = " ".join(str(error).partition("LINE 1:")[0].split())
            raise ValueError(f"view {view!r}: its condition {where!r} is not valid: {told}") from None
    return {key for (key,) in found}
