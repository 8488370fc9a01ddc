"""A view's condition over all the columns → WebDataset shards at its resolution, and the manifest the trainer reads."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.captions import TokenizerConfig, tokenizer_facts, tokenizer_id
from pipeline.fingerprint import digest_of
from pipeline.plan import Ticket
from pipeline.sample import LISTED
from pipeline.shards import FORMAT, VIEWS, ViewInfo, pack_tokens, publish_version
from pipeline.stage import Columns, Needs, Stage
from pipeline.storage import Folder
from pipeline.tables import COMMON, TableName, parquet_bytes, read_table, schema_of

from .pictures import shrinker

_FACTS = ("url", "text", "caption", "clip_score", "alt_score", "alt_supported")


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """One view."""

    view: str
    """Its name, under which training asks for it. Letters, digits and dashes."""
    resolution: int
    """Shorter side of the packed pictures in pixels; pictures are scaled down to it, never up."""
    tokenizers: tuple[TokenizerConfig, ...]
    """The tokenizers whose ids go into the shards."""
    where: str = "true"
    """An SQL condition (duckdb) over width, height, caption, text, url, clip_score, alt_score and alt_supported."""
    quality: int = 95
    """JPEG quality of pictures that were scaled."""
    batch_size: int = 256
    """Samples packed at a time."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=1.0, actors=(1, 8)))
    """What an actor takes."""

    def __post_init__(self) -> None:
        if not self.view.replace("-", "").isalnum():
            raise ValueError(f"a view's name must be letters, digits and dashes, got {self.view!r}")
        if self.resolution < 1:
            raise ValueError(f"view {self.view}: resolution must be at least 1 pixel, got {self.resolution}")


class Pack(Stage):
    """Reads everything; writes a shard a partition. Have one such stage for each view."""

    version = 2
    config: PackConfig
    drops = False  # another view is packed from the same samples, not from what this one left over

    def __init__(self, config: PackConfig) -> None:
        super().__init__(config)
        self.name = f"pack_{config.view}"
        columns = [f"tokens_{t.name}" for t in config.tokenizers]
        self.reads = ("image", "width", "height", LISTED, *_FACTS, *columns)
        sizes = [("packed_width", pa.int32()), ("packed_height", pa.int32())]
        self.writes = pa.schema([*sizes, *((f"{c}_length", pa.int32()) for c in columns)])
        # Not "image": the next view would then be packed from this one's small pictures.
        tokens = {f"packed_tokens_{t.name}": f"{t.name}.npy" for t in config.tokenizers}
        self.payload = {f"packed_image_{config.view}": "jpg", "packed_json": "json", **tokens}

    @property
    def folder(self) -> str:
        """`views/<view>-<config id>`: a folder of plain WebDataset tars."""
        return f"{VIEWS}/{self.config.view}-{self.config_id}"

    @property
    def spaces(self) -> dict[str, str]:
        """Whose ids are read: the view tells their tokenizer, which must be the one that made them."""
        return {column: t.space for t in self.config.tokenizers for column in t.columns}

    def identity(self) -> Any:
        """The settings, with the tokenizers' files in place of their names."""
        ids = [(t.name, tokenizer_id(t.model, t.revision), t.max_length) for t in self.config.tokenizers]
        return {**super().identity(), "tokenizers": [list(i) for i in ids]}

    def load(self) -> None:
        """Makes img2dataset's Resizer: short side to the resolution, ratio kept, never up."""
        self._resize = shrinker(self.config.resolution, self.config.quality)

    def process(self, batch: pa.Table) -> Columns:
        """Chooses, scales and packs the batch's samples."""
        chosen = select_rows(batch, self.config.where, self.config.view)
        rows = [self._row(row, row["key"] in chosen) for row in batch.to_pylist()]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _row(self, row: dict[str, Any], chosen: bool) -> dict[str, Any]:
        blank = dict.fromkeys((*self.writes.names, *self.payload))
        if not row[LISTED]:
            return blank | {"status": "dropped", "reason": "not_in_source"}
        if not chosen:
            return blank | {"status": "dropped", "reason": "not_in_view"}
        if min(row["width"], row["height"]) < self.config.resolution:
            return blank | {"status": "dropped", "reason": "smaller_than_view"}
        image, width, height, _, _, error = self._resize(io.BytesIO(row["image"]))
        if error:
            return blank | {"status": "failed", "reason": "not_an_image"}
        facts = {name: row[name] for name in (*_FACTS, "width", "height")}
        tokens = {f"tokens_{t.name}": np.asarray(row[f"tokens_{t.name}"], t.id_type) for t in self.config.tokenizers}
        packed = {f"packed_image_{self.config.view}": image}
        packed["packed_json"] = json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()
        packed |= {f"packed_{name}": pack_tokens(ids) for name, ids in tokens.items()}
        lengths = {f"{name}_length": len(ids) for name, ids in tokens.items()}
        return {**packed, **lengths, "packed_width": width, "packed_height": height, "status": "kept", "reason": None}


def check_condition(where: str, view: str) -> None:
    """Refuses a condition that is more than one, or whose answer depends on other rows or on the moment. Raises ValueError."""
    import duckdb

    found = duckdb.execute("SELECT json_serialize_sql(?)", [f"SELECT (\n{where}\n) FROM samples"]).fetchone()
    told: dict[str, Any] = json.loads(found[0]) if found else {"error": True}
    if told["error"] or len(told["statements"]) != 1:
        raise ValueError(
            f"view {view!r}: its condition {where!r} is not valid: {told.get('error_message', 'no condition')}"
        )
    text = json.dumps(told)
    if '"SUBQUERY"' in text:
        raise ValueError(f"view {view!r}: its condition {where!r} asks other rows: it must be told from one row alone")
    names = set(re.findall(r'"function_name": "(\w+)"', text))
    query = "SELECT function_name FROM duckdb_functions() WHERE stability <> 'CONSISTENT' AND function_name IN ?"
    unsteady = duckdb.execute(query, [sorted(names)]).fetchall() if names else []
    if unsteady:
        raise ValueError(f"view {view!r}: {unsteady[0][0]}() says another thing each time: a condition must not use it")


def select_rows(batch: pa.Table, where: str, view: str) -> set[str]:
    """Keys of the rows for which the condition holds. Raises ValueError where it is not a condition over the columns."""
    import duckdb

    rows = batch.drop_columns([c for c in batch.column_names if c == "image" or c.startswith("tokens_")])
    with duckdb.connect(config={"enable_external_access": "false", "threads": "1"}) as connection:
        connection.register("samples", rows)
        try:
            found = connection.execute(f"SELECT key FROM samples WHERE (\n{where}\n)").fetchall()
        except duckdb.Error as error:
            told = " ".join(
                str(error).partition("LINE 1:")[0].split()
            )  # what is wrong and what was near; not the query
            raise ValueError(f"view {view!r}: its condition {where!r} is not valid: {told}") from None
    return {key for (key,) in found}


def _manifest_rows(dataset: Folder, stage: Pack, table: TableName) -> pa.Table:
    """What the trainer has to know of one shard's samples."""
    columns = [c for c in schema_of(stage).names if c not in COMMON.names and not c.endswith("_sha256")]
    rows = read_table(dataset, table, ["key", "status", *columns])
    rows = rows.filter(pc.equal(rows.column("status"), "kept")).drop_columns(["status"])
    image = f"packed_image_{stage.config.view}"
    rows = rows.rename_columns([c.replace(image, "image").removeprefix("packed_") for c in rows.column_names])
    return rows.append_column("shard", pa.array([table.tar] * rows.num_rows, pa.string()))


def publish_view(dataset: Folder, stage: Pack, tickets: Sequence[Ticket]) -> ViewInfo:
    """Writes the manifest of the tickets' shards and names it as the view's present version; does nothing if it is."""
    tables = [t.tables[stage.name] for t in tickets]
    tokenizers = {t.name: tokenizer_facts(t) for t in stage.config.tokenizers}
    version = digest_of(stage.config_id, json.dumps(tokenizers), *(t.content_id for t in tables))
    pointer = f"{VIEWS}/{stage.config.view}.json"
    if dataset.exists(pointer):
        present = json.loads(dataset.read(pointer))
        same = (present.get("format"), present.get("version")) == (FORMAT, version)
        if same and dataset.exists(present["manifest"]):
            return ViewInfo(**present)
    with ThreadPoolExecutor(8) as readers:  # elsewhere each table is a wait
        manifest = pa.concat_tables(readers.map(partial(_manifest_rows, dataset, stage), tables))
    info = ViewInfo(
        view=stage.config.view,
        version=version,
        resolution=stage.config.resolution,
        samples=manifest.num_rows,
        manifest=f"{stage.folder}/manifest-{version}.parquet",
        tokenizers=tokenizers,
    )
    return publish_version(dataset, info, parquet_bytes(manifest))
