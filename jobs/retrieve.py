"""Ask a running clip-retrieval server and write what it answers as a source table: densebridge retrieve pairs.parquet --text "a
red bicycle". Its columns are url, text (the index's caption), similarity and query, so a recipe takes it as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.storage import Folder
from pipeline.tables import parquet_bytes
from stages.retrieval import Query, RetrievalConfig, read_query, retrieve

from .recipe import read_flags


@dataclass(frozen=True, kw_only=True)
class RetrieveOptions:
    """Options of `densebridge retrieve`."""

    text: tuple[str, ...] = ()
    """Texts to look for."""
    image: tuple[Path, ...] = ()
    """Pictures to look for."""
    server: Annotated[RetrievalConfig, tyro.conf.arg(name="")] = field(default_factory=RetrievalConfig)
    """Which server is asked, and how."""


def main(argv: list[str]) -> int:
    """Command line."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: densebridge retrieve TABLE.parquet [OPTIONS]\n\n{__doc__}")
        print("`densebridge retrieve TABLE.parquet --help` lists the options.")
        return 0 if argv else 2
    path = Path(argv[0])
    if path.suffix != ".parquet":
        raise ValueError(f"densebridge retrieve needs the table first, a .parquet file: got {argv[0]!r}")
    options = read_flags(RetrieveOptions, argv[1:], f"densebridge retrieve {argv[0]}", __doc__ or "")
    if path.exists():
        raise ValueError(f"{path} is there already: name another, or delete it")
    found = retrieve(options.server, read_queries(options))
    if not found.table.num_rows:
        raise ValueError(f"{options.server.back} found nothing with a URL: no table is written")
    Folder(url=str(path.parent)).write(path.name, parquet_bytes(found.table))
    skipped = f"; {found.skipped:,} without a URL were left out" if found.skipped else ""
    print(f"{path}: {found.table.num_rows:,} URLs{skipped}")
    return 0


def read_queries(options: RetrieveOptions) -> Sequence[Query]:
    """What is looked for. Raises ValueError where that is nothing."""
    texts = [Query(name=text) for text in options.text if text.strip()]
    if len(texts) < len(options.text) or not (texts or options.image):
        raise ValueError('say what to look for: --text "a red bicycle" "a blue one", or --image FILE')
    return [*texts, *(read_query(path, options.server) for path in options.image)]


if __name__ == "__main__":
    from .cli import run

    run("retrieve", sys.argv[1:])
