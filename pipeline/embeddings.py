"""Embeddings in clip-retrieval's own layout, for the tools that index or cluster such folders.

`img_emb/img_emb_07.npy` and `text_emb/text_emb_07.npy` are float16 (rows, width), `metadata/metadata_07.parquet` has the
same rows in the same order. Nothing but the position joins them, over all files sorted by name; so each partition's are
made of one table. There is no image_path: clip-retrieval's server reads and hands out the local file that it names. Where a
stage tells the sha256 of what came, it stands there too, because samples are taken down by it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .fingerprint import digest_of
from .plan import Ticket, depends_on, input_id
from .rows import gather
from .sample import LISTED
from .stage import Stage, check_stages
from .storage import Folder
from .tables import parquet_bytes

METADATA = ("key", "url", "caption")
IMAGES, TEXTS = "image_embedding", "caption_embedding"


@dataclass(frozen=True, kw_only=True)
class _NoSettings:
    """Of a stage that only reads."""


class _Reader(Stage):
    """Stands behind all the stages, so that `gather` finds what came through them."""

    name = "embeddings"
    writes = pa.schema([])


def _reader(stages: Sequence[Stage], images: str, texts: str) -> _Reader:
    """Raises ValueError where no stage writes what it reads."""
    reader = _Reader(_NoSettings())
    digests = [name for name in ("sha256",) if any(name in stage.writes.names for stage in stages)]
    reader.reads = (*METADATA, *digests, images, texts, LISTED)
    check_stages([*stages, reader])
    return reader


def embeddings_id(
    stages: Sequence[Stage], tickets: Sequence[Ticket], *, images: str = IMAGES, texts: str = TEXTS
) -> str | None:
    """Digest of all that `write_embeddings` would write, told by the tables' names alone; None where one is not built."""
    reader = _reader(stages, images, texts)
    needed = depends_on([*stages, reader], len(stages))
    ids = [input_id(reader, needed, ticket, "") for ticket in tickets]
    known = [own for own in ids if own]
    return digest_of(*known) if len(known) == len(ids) else None


def write_embeddings(
    dataset: Folder,
    stages: Sequence[Stage],
    tickets: Sequence[Ticket],
    folder: Folder,
    *,
    images: str = IMAGES,
    texts: str = TEXTS,
) -> int:
    """Writes the embeddings of what the stages kept and the source still lists into `folder`, which must be empty; one
    partition at a time. Returns how many there are. `images` and `texts` name the columns. Raises ValueError where the
    folder is not empty, no stage writes a column, a table is not built, or a width differs between partitions.
    """
    if any(folder.list(name) for name in ("img_emb", "text_emb", "metadata")):
        raise ValueError(
            f"{folder.url} holds embeddings already: rows are told by position, so write into an empty folder"
        )
    reader = _reader(stages, images, texts)
    needed = depends_on([*stages, reader], len(stages))
    for stage in needed:
        unbuilt = sum(stage.name not in ticket.tables for ticket in tickets)
        if unbuilt:
            raise ValueError(
                f"stage {stage.name!r} is not built for {unbuilt} of {len(tickets)} partitions: run `densebridge build` first"
            )
    widths: dict[str, int] = {}
    rows, digits = 0, len(str(len(tickets)))
    told = [name for name in reader.reads if name not in (images, texts, LISTED)]
    for place, ticket in enumerate(tickets):
        table = gather(dataset, [*stages, reader], len(stages), ticket).rows
        table = table.filter(table.column(LISTED))
        if not table.num_rows:
            continue
        for kind, column in (("img_emb", images), ("text_emb", texts)):
            found = pc.unique(pc.list_value_length(table.column(column))).to_pylist()
            width = widths.setdefault(kind, found[0])
            if found != [width]:
                name = ticket.partition.name
                raise ValueError(
                    f"{column} in partition {name} is {min(found)} to {max(found)} wide, elsewhere {width}"
                )
            values = table.column(column).combine_chunks().flatten().to_numpy(zero_copy_only=False)
            vectors = values.astype(np.float16).reshape(-1, width)
            folder.write(f"{kind}/{kind}_{place:0{digits}}.npy", npy_bytes(vectors))
        folder.write(f"metadata/metadata_{place:0{digits}}.parquet", parquet_bytes(table.select(told)))
        rows += table.num_rows
    return rows


def npy_bytes(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()
