"""A stage's rows under other settings: judged anew where the stage can tell (`revise`), shown to it where it `remembers`.

So a stricter limit on pictures, or another policy on opt-outs, asks no server again for what is there; and a refresh asks
whether a picture has changed instead of fetching it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from .settings import describe, flat, read_settings
from .stage import Columns, Stage
from .storage import Folder
from .tables import TableName, list_tables, read_payloads, read_table, schema_of

UNCHANGED = "unchanged"
"""What a stage that remembers may answer for a row: its earlier one stands."""


@dataclass(frozen=True, kw_only=True)
class Sibling:
    """Another folder of the stage, whose settings differ in what is revisable alone."""

    identity: Mapping[str, Any]
    tables: Mapping[str, list[TableName]]


def sibling_folders(dataset: Folder, stage: Stage) -> list[str]:
    """The folders that the stage has under other settings."""
    root, _, folder = stage.folder.rpartition("/")
    prefix = folder.rsplit("-", 1)[0]
    there = [name for name in dataset.folders(root) if name.rsplit("-", 1)[0] == prefix and name != folder]
    return [f"{root}/{name}" if root else name for name in there]


def find_siblings(dataset: Folder, stage: Stage) -> list[Sibling]:
    """The stage's folders whose rows it can revise, the latest first: that with the highest first revisable setting."""
    if not stage.revisable:
        return []
    now, found = describe(stage), []
    for folder in sibling_folders(dataset, stage):
        then = read_settings(dataset, folder)
        if then and is_sibling(stage, then, now):
            tables = list_tables(dataset, folder, with_tar=bool(stage.payload))
            found.append(Sibling(identity=then["identity"], tables=tables))
    return sorted(found, key=lambda s: s.identity.get(stage.revisable[0], 0), reverse=True)


def is_sibling(stage: Stage, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the settings of two folders differ in what the stage can revise alone."""
    return bool(stage.revisable) and _fixed(stage, then) == _fixed(stage, now)


def _fixed(stage: Stage, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal: all but how it was written down and what the stage can revise."""
    revisable = tuple(f"{name}." for name in stage.revisable)
    told = {**settings, "configuration": None}
    told["identity"] = {k: v for k, v in flat(settings["identity"]) if not f"{k}.".startswith(revisable)}
    return told


class Earlier:
    """One partition's rows under the siblings' settings."""

    def __init__(
        self,
        dataset: Folder,
        stage: Stage,
        siblings: Sequence[Sibling],
        partition: str,
        made_from: Mapping[str, str],
    ) -> None:
        """`made_from`: by key, what the rows are made from that the stage is given now."""
        self._dataset, self._stage, self._made_from = dataset, stage, made_from
        self._tables = [(s.identity, table) for s in siblings for table in s.tables.get(partition, ())]
        self._read: dict[TableName, list[dict[str, Any]]] = {}

    def revised(self, wanted: Mapping[str, int], *, retry: bool) -> list[tuple[TableName, pa.Table]]:
        """Rows that stand or fall under the present settings too, by the table that holds their payload; each wanted row
        (named by key and made_from) at most once. In a `retry` none of those that another try may help.
        """
        found, done = [], set[str]()
        for identity, table in self._tables:
            rows = []
            for row in self._rows(table):
                name = row["key"] + row["made_from"]
                if name in wanted and name not in done and not (retry and row["transient"]):
                    judged = self._stage.revise(row, identity)
                    if judged is not None:
                        done.add(name)
                        rows.append(self._whole_row(row, judged))
            found.append((table, pa.Table.from_pylist(rows, schema=schema_of(self._stage))))
        return found

    def shown(self, batch: pa.Table) -> pa.Table:
        """The batch with the columns that the stage remembers, as `earlier_<column>`."""
        known = [self._kept.get(key, ({}, None))[0] for key in batch.column("key").to_pylist()]
        for name in self._stage.remembers:
            column = pa.array([row.get(name) for row in known], self._stage.writes.field(name).type)
            batch = batch.append_column(f"earlier_{name}", column)
        return batch

    def restored(self, keys: Sequence[str], columns: Columns) -> Columns:
        """The columns with the earlier row, payload and all, wherever the stage answered that it is unchanged."""
        spots = [i for i, status in enumerate(columns["status"]) if status == UNCHANGED and keys[i] in self._kept]
        lists = {name: list(values) for name, values in columns.items()}
        by_table: dict[TableName, list[int]] = {}
        for spot in spots:
            row, table = self._kept[keys[spot]]
            anew = {name: lists[name][spot] for name in self._stage.restates if lists[name][spot]}
            for name, values in lists.items():
                values[spot] = {**row, **anew}.get(name)
            if row["status"] == "kept":
                by_table.setdefault(table, []).append(spot)
        for table, together in by_table.items():
            rows = pa.Table.from_pylist([self._kept[keys[s]][0] for s in together], schema=schema_of(self._stage))
            for name in self._stage.payload:
                for spot, data in zip(together, read_payloads(self._dataset, table, rows, name), strict=True):
                    lists[name][spot] = data
        return lists

    def _rows(self, table: TableName) -> list[dict[str, Any]]:
        """A table's rows, read once."""
        if table not in self._read:
            self._read[table] = read_table(self._dataset, table).to_pylist()
        return self._read[table]

    @cached_property
    def _kept(self) -> dict[str, tuple[dict[str, Any], TableName]]:
        """By key the latest row that was kept, as the present settings judge it but for the first that can be revised:
        that one asks for the row to be looked at again, which is being done.
        """
        found: dict[str, tuple[dict[str, Any], TableName]] = {}
        first = self._stage.revisable[0] if self._stage.remembers else ""
        present = self._stage.identity().get(first) if first else None
        for identity, table in self._tables if self._stage.remembers else ():
            for row in self._rows(table):
                same = row["made_from"] == self._made_from.get(row["key"])
                if row["status"] == "kept" and same and row["key"] not in found:
                    judged = self._stage.revise(row, {**identity, first: present})
                    found[row["key"]] = (row if judged is None else self._whole_row(row, judged), table)
        return found

    def _whole_row(self, row: dict[str, Any], judged: Mapping[str, Any]) -> dict[str, Any]:
        whole = {**row, **judged, "key": row["key"], "made_from": row["made_from"]}
        if whole["status"] != "kept":
            whole |= {f"{n}_{part}": None for n in self._stage.payload for part in ("offset", "size", "sha256")}
        return whole
