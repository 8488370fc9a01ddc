"""Find samples: densebridge search RECIPE "a red bicycle against a brick wall", or --image FILE. The query is embedded by the
recipe's CLIP and held against the pictures or the captions of what `densebridge index` last indexed. --serve starts
clip-retrieval's server over the same index, for this machine alone.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from pipeline.tombstones import read_tombstones

from .clip_retrieval.back import serve
from .clip_retrieval.built import Built, changes, default_folder, made_of, read_built
from .clip_retrieval.lookup import Hit, look_up
from .clip_retrieval.query import QueryEncoder
from .recipe import Recipe, parse, quiet_libraries


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of `densebridge search`."""

    text: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="TEXT")]] = ""
    """What to look for."""
    image: Path | None = None
    """A picture to look for, instead of a text."""
    by: Literal["picture", "caption"] = "picture"
    """What the query is held against: the pictures' embeddings or the captions'."""
    count: int = 10
    """Samples to show."""
    folder: Path | None = None
    """Where the index lies; `index/<recipe>` beside the recipe's runs if not given."""
    serve: bool = False
    """Serve queries over HTTP on 127.0.0.1 until interrupted, instead of answering one."""
    port: int = 1234
    """The server's port; 0 takes any free one."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.port < 65536:
            raise ValueError(f"count must be at least 1 and port at most 65535, got {self.count} and {self.port}")

    def check_asked(self) -> None:
        """Raises ValueError unless just one thing is asked for: a text, a picture, or to serve."""
        if bool(self.text.strip()) + bool(self.image) + self.serve != 1:
            raise ValueError('give one of: a text to look for ("a red bicycle"), --image FILE, or --serve')


def find_index(recipe: Recipe, folder: Path) -> tuple[Built, list[str]]:
    """The index, and in words why it is stale. Raises FileNotFoundError where there is none, ValueError where it was made with
    another CLIP than the recipe's: its vectors and a query's do not compare.
    """
    built = read_built(folder)
    if built is None:
        raise FileNotFoundError(f"there is no index in {folder}: run `densebridge index` first")
    wanted = made_of(recipe, built.made_of.get("index_gb", 0.0))
    if built.made_of.get("models") != wanted["models"]:
        raise ValueError(
            f"the index in {folder} was made with another CLIP than the recipe's: run `densebridge build` and `densebridge index`"
        )
    stale = changes(built, wanted)
    if wanted["tables"] is None:
        stale = ["the dataset is not wholly built: run `densebridge build`"]
    return built, stale


def query_vector(recipe: Recipe, options: SearchOptions) -> np.ndarray:
    """What is looked for, as the recipe's CLIP sees it: float32 (width,)."""
    encoder = QueryEncoder(recipe)
    if options.image is None:
        if not encoder.read_whole(options.text):
            print("the text is longer than the recipe's CLIP reads: its beginning is looked for", file=sys.stderr)
        return encoder.text(options.text)
    if not options.image.is_file():
        raise FileNotFoundError(f"--image {options.image}: there is no such file")
    try:
        return encoder.picture(options.image.read_bytes())
    except ValueError as error:
        raise ValueError(f"--image {options.image}: {error}") from None


def print_hits(hits: list[Hit]) -> None:
    """Score, key and URL in a line, and below it the caption; the best first."""
    for hit in hits:
        print(f"{hit.score:7.4f}  {hit.key}  {hit.url}\n         {' '.join(hit.caption.split())}")
    if not hits:
        print("nothing was found")


def main(argv: list[str]) -> int:
    """Command line."""
    recipe, options = parse(argv, "search", SearchOptions, __doc__ or "", words="RECIPE [TEXT]")
    options.check_asked()
    quiet_libraries()
    folder = options.folder or default_folder(recipe)
    built, stale = find_index(recipe, folder)
    for reason in stale:
        print(f"the index in {folder} is stale ({reason}): run `densebridge index` for a new one", file=sys.stderr)
    if options.serve:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does, its server too
        with suppress(KeyboardInterrupt):
            serve(recipe, folder, built, options.port, lambda port: _print_ready(recipe, port))
        return 0
    hits = look_up(
        folder,
        built,
        query_vector(recipe, options),
        kind=options.by,
        count=options.count,
        tombstones=read_tombstones(recipe.folder),
    )
    if options.json:
        print(json.dumps({"stale": stale, "hits": [asdict(hit) for hit in hits]}))
    else:
        print_hits(hits)
    return 0


def _print_ready(recipe: Recipe, port: int) -> None:
    print(f"clip-retrieval serves index {recipe.name!r} at http://127.0.0.1:{port} until Ctrl-C", flush=True)


if __name__ == "__main__":
    from .cli import run

    run("search", sys.argv[1:])
