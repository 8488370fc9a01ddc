"""Pictures of a folder that img2dataset wrote → tables of the download stage, so that none of them is fetched again."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.partitions import Partition, list_partitions
from pipeline.plan import Ticket
from pipeline.records import write_first_record
from pipeline.reuse import find_reusable
from pipeline.rows import gather
from pipeline.sample import sample_key
from pipeline.storage import Folder
from pipeline.tables import TableName, list_tables, read_parquet, writing_table
from pipeline.tombstones import TAKEN_DOWN, read_tombstones

from .download import Download
from .img2dataset_folder import Pictures
from .source import Source, read_source

ADOPTED = "adopted-pictures"
"""The input id of adopted tables. No digest is spelled so: a plan never takes one for complete, and the next build takes
over its rows and fetches the others."""


@dataclass(kw_only=True)
class Adopted:
    """What became of pictures."""

    rows: int = 0
    """Rows written, dropped ones included."""
    partitions: int = 0
    """Tables written."""
    refused: int = 0
    """Of the rows, those of pictures that the stage refuses."""
    left: Counter[str] = field(default_factory=Counter)
    """Pictures for which no row was written, by reason."""
    shrunk: int = 0
    """Of the rows, pictures that img2dataset made smaller than the stage itself would, and than is wanted."""
    reshaped: int = 0
    """Of the rows, pictures that img2dataset cropped or padded."""


class Adopter:
    """Writes adopted tables, partition by partition. What an earlier table decided is left as it is, so an adoption that
    is run again writes nothing, and one that was interrupted goes on.
    """

    def __init__(self, dataset: Folder, stage: Download, pictures: Pictures, *, wanted_edge: int) -> None:
        """`wanted_edge`: pixels of the shorter side of which a smaller picture is counted as shrunk. Raises ValueError where
        the stage blurs: boxes are of pictures as they came, and these may have been cropped.
        """
        if stage.config.blur_column:
            raise ValueError(
                "download has a blur_column: pictures of img2dataset's folders cannot be blurred as they lie"
            )
        self._dataset, self._stage, self._pictures, self._wanted_edge = dataset, stage, pictures, wanted_edge
        self._taken_down = read_tombstones(dataset).sha256
        self.adopted = Adopted()

    def run(self) -> Iterator[Adopted]:
        """Works on all partitions; yields the counts so far after each that holds any picture."""
        self._stage.load()
        found = 0
        for partition, places in held_pictures(self._dataset, self._pictures):
            found += len(places)
            self._adopt(partition, places)
            yield self.adopted
        # Every URL of the folder was ingested, but for those that tombstones keep out.
        self.adopted.left[TAKEN_DOWN] += len(self._pictures.places) - found
        yield self.adopted

    @cached_property
    def _tables(self) -> dict[str, list[TableName]]:
        return list_tables(self._dataset, self._stage.folder, with_tar=True)

    def _adopt(self, partition: Partition, places: Mapping[str, np.void]) -> None:
        """Writes one table of the pictures that no earlier table speaks of for good."""
        given = gather(self._dataset, [self._stage], 0, Ticket(partition=partition))
        earlier = self._tables.get(partition.name, [])
        known = find_reusable(self._dataset, self._stage, earlier, given, earlier=None, retry=True)
        fresh = given.without(set(known.positions)).only(places)
        self.adopted.left["already_there"] += len(places) - fresh.rows.num_rows
        keys: list[str] = []
        with writing_table(self._dataset, self._stage) as writer:
            for batch in fresh.batches(self._stage.batch_size):
                rows = list(self._rows(zip(batch.table.to_pylist(), batch.made_from, strict=True), places))
                if rows:
                    writer.add({name: [row[name] for row in rows] for name in rows[0]})
                keys += [row["key"] for row in rows]
            if not keys:
                return
            table = writer.finish(partition.name, ADOPTED)
            tried_at = [self._pictures.times[places[key]["file"]] for key in keys]
            write_first_record(self._dataset, table, keys, tried_at)
            writer.publish(self._dataset)
        self.adopted.rows += table.rows
        self.adopted.refused += table.rows - table.kept
        self.adopted.partitions += 1

    def _rows(
        self, pairs: Iterable[tuple[Mapping[str, Any], str]], places: Mapping[str, np.void]
    ) -> Iterator[dict[str, Any]]:
        """The rows that can be written of these samples and what they are made from."""
        for given, made_from in pairs:
            row = self._row(places[given["key"]])
            if not isinstance(row, str) and row["sha256"] and self._stage.is_unexpected(row["sha256"], given):
                row = "digest_mismatch"
            if isinstance(row, str):
                self.adopted.left[row] += 1
            else:
                yield {"key": given["key"], "made_from": made_from, **row}

    def _row(self, place: np.void) -> dict[str, Any] | str:
        """The row that download would write, or why it can not be told from what is stored: then the build fetches it.

        img2dataset records neither the server's answer nor its opt-outs, so they are unknown.
        """
        width, height, came = int(place["width"]), int(place["height"]), place["sha256"].decode()
        blank = {**dict.fromkeys((*self._stage.writes.names, *self._stage.payload)), "transient": False}
        known = {"original_width": width, "original_height": height} if width and height else {}
        if known and (reason := self._stage.rules.refuse_size(width, height)):
            return {**blank, **known, "sha256": came or None, "status": "dropped", "reason": reason}
        data = self._pictures.read(place)
        if data is None:
            return "no_picture"
        row = {**blank, **self._stage.picture_row(data)}
        if row["status"] != "kept":
            # What is stored may be smaller, cropped or damaged; only of the bytes that came it is the verdict.
            return row if came == hashlib.sha256(data).hexdigest() else f"{row['reason']}_as_stored"
        row |= {"sha256": came or row["sha256"], **_lain_as(known, row)}
        if row["sha256"] in self._taken_down:
            return {**blank, "status": "dropped", "reason": TAKEN_DOWN}
        self._compare((row["width"], row["height"]), (width, height))
        return row

    def _compare(self, stored: tuple[int, int], original: tuple[int, int]) -> None:
        """Counts what img2dataset changed. Sides are sorted: it leaves a turned picture as it lies, we put it upright."""
        (short, long), (first_short, first_long) = sorted(stored), sorted(original)
        self.adopted.shrunk += short < min(first_short, self._wanted_edge)
        # A side that was rounded by less than a pixel changes the products by less than the other side.
        self.adopted.reshaped += first_short > 0 and abs(short * first_long - long * first_short) > first_long


def _lain_as(known: dict[str, int], row: Mapping[str, Any]) -> dict[str, int]:
    """The original's sides in the order of the upright picture's; img2dataset does not look which side is up."""
    turned = (row["width"] > row["height"]) != (known["original_width"] > known["original_height"]) if known else False
    return dict(zip(known, reversed(known.values()))) if turned else known


def held_pictures(dataset: Folder, pictures: Pictures) -> Iterator[tuple[Partition, dict[str, np.void]]]:
    """Each partition that holds any of the pictures' samples, with their places by key."""
    for partition in list_partitions(dataset):
        keys = read_parquet(dataset, partition.parquet, ["key"]).column("key").to_pylist()
        if found := pictures.among(keys):
            yield partition, found


def count_unlisted(source: Source, pictures: Pictures) -> int:
    """How many of the pictures' samples the source does not list: no view has them. Reads the source."""
    listed: set[str] = set()
    for batch in read_source(source):
        listed.update(pictures.among([sample_key(url) for url in batch.column("url").to_pylist() if url]))
    return len(pictures.places) - len(listed)
