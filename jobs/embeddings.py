"""Write the embeddings of pictures and captions as clip-retrieval lays them out, for tools that index or cluster them."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from pipeline.embeddings import write_embeddings
from pipeline.plan import make_plan
from pipeline.storage import Folder
from stages.ingest import ingested

from .recipe import parse


@dataclass(frozen=True, kw_only=True)
class EmbeddingsOptions:
    """Options of `densebridge embeddings`."""

    folder: str = "embeddings"
    """Where to write: any fsspec URL, with no embeddings in it yet."""


def main(argv: list[str]) -> int:
    """Command line."""
    recipe, options = parse(argv, "embeddings", EmbeddingsOptions, __doc__ or "")
    dataset, out = recipe.folder, Folder(url=options.folder)
    tickets = make_plan(dataset, recipe.stages, ingested(dataset, recipe.source)).tickets
    if not tickets:
        raise ValueError(f"{dataset.url} holds no dataset of this source yet: run `densebridge build` first")
    rows = write_embeddings(dataset, recipe.stages, tickets, out)
    print(f"{out.url}: embeddings of {rows:,} samples in img_emb/, text_emb/ and metadata/")
    return 0


if __name__ == "__main__":
    from .cli import run

    run("embeddings", sys.argv[1:])
