"""Take over the pictures of a folder that img2dataset wrote: the next build fetches only what is not in it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.settings import write_settings
from stages.adopt import Adopted, Adopter, count_unlisted, held_pictures
from stages.download import Download
from stages.img2dataset_folder import Pictures, find_pictures
from stages.ingest import ingest
from stages.pack import Pack
from stages.source import Source

from .recipe import Recipe, parse, quiet_libraries


@dataclass(frozen=True, kw_only=True)
class AdoptOptions:
    """Options of `densebridge adopt`."""

    folder: str = ""
    """What img2dataset wrote, of output_format webdataset or files; a folder of this machine."""
    text_column: str = "caption"
    """The column of its tables that holds the alt text. Without a column `caption` there is none."""
    dry_run: bool = False
    """Only say what there is to adopt; write nothing, decode nothing."""


def adopt(recipe: Recipe, options: AdoptOptions) -> None:
    """Makes partitions of the folder's URLs that no partition holds yet, then download tables of its pictures."""
    dataset, stage = recipe.folder, _download_of(recipe)
    pictures = find_pictures(_folder(options.folder), stage.config.fetch.max_bytes)
    for line in pictures.troubles:
        print(line)
    if options.dry_run:
        held = sum(len(places) for _, places in held_pictures(dataset, pictures))
        print(f"{len(pictures.places)} pictures to adopt, {held} of samples that the dataset knows already")
        _print_left(pictures.left)
        _print_unlisted(recipe, pictures)
        return
    ingest(dataset, recipe.source)  # first, so that its rows keep the recipe's own texts and columns
    ingest(dataset, _source(recipe, options))
    write_settings(dataset, [stage])
    edge = _wanted_edge(recipe, stage)
    adopted = _run(Adopter(dataset, stage, pictures, wanted_edge=edge))
    _print_adopted(adopted, pictures, edge)
    _print_unlisted(recipe, pictures)
    print("the next `densebridge build` fetches the rest")


def _download_of(recipe: Recipe) -> Download:
    stage = next((s for s in recipe.stages if isinstance(s, Download)), None)
    if stage is None:
        raise ValueError(f"recipe {recipe.name!r} has no download stage, whose place adopted pictures could take")
    return stage


def _folder(name: str) -> Path:
    if not name:
        raise ValueError("which folder? say it with --folder DIR")
    if not Path(name).is_dir():
        raise FileNotFoundError(f"there is no folder {name}: give one that img2dataset wrote")
    return Path(name)


def _source(recipe: Recipe, options: AdoptOptions) -> Source:
    """The folder's tables as a source."""
    first = min(Path(options.folder).glob("[!.]*.parquet"))
    none = options.text_column == "caption" and "caption" not in pq.read_schema(first).names
    return Source(
        path=options.folder,
        url_column="url",
        text_column=None if none else options.text_column,
        empty_urls="skip",
        partition_size=recipe.source.partition_size,
    )


def _wanted_edge(recipe: Recipe, stage: Download) -> int:
    """The most pixels of a shorter side that the recipe has a use for."""
    views = [s.config.resolution for s in recipe.stages if isinstance(s, Pack)]
    return min(max(views, default=stage.config.max_edge), stage.config.max_edge)


def _run(adopter: Adopter) -> Adopted:
    """Adopts; says every ten seconds how far it is."""
    shown = time.monotonic()
    for adopted in adopter.run():
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            print(f"  {adopted.rows} rows, {adopted.partitions} partitions", flush=True)
    return adopter.adopted


def _print_adopted(adopted: Adopted, pictures: Pictures, edge: int) -> None:
    refused = f", {adopted.refused} of them refused as download would" if adopted.refused else ""
    print(f"{adopted.rows} rows adopted into {adopted.partitions} partitions{refused}")
    _print_left(pictures.left + adopted.left)
    if adopted.shrunk:
        print(
            f"warning: {adopted.shrunk} pictures were shrunk below {edge} px, the recipe's largest view: kept as they are"
        )
    if adopted.reshaped:
        print(f"warning: {adopted.reshaped} pictures were cropped or padded by img2dataset: kept as they are")


def _print_left(left: Mapping[str, int]) -> None:
    if reasons := ", ".join(f"{reason} {count}" for reason, count in sorted(left.items()) if count):
        print(f"{sum(left.values())} not adopted: {reasons}")


def _print_unlisted(recipe: Recipe, pictures: Pictures) -> None:
    if count := count_unlisted(recipe.source, pictures):
        print(
            f"{count} pictures are not in source {recipe.source.path}: they are in no view, and gc may delete them; "
            "add the folder to the source"
        )


def main(argv: list[str]) -> int:
    """Command line."""
    quiet_libraries()
    adopt(*parse(argv, "adopt", AdoptOptions, __doc__ or ""))
    return 0


if __name__ == "__main__":
    from .cli import run

    run("adopt", sys.argv[1:])
