"""Read a view again, every byte of it, and tell what is not as its manifest says: densebridge verify RECIPE [VIEW]. Without a
name all views that the recipe packs. A dataset folder (or its URL) may stand for the recipe.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.shards import VIEWS
from pipeline.storage import Folder
from pipeline.verification import Verified, verify_view
from stages.pack import Pack

from .recipe import parse, read_flags


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Options of `densebridge verify`."""

    view: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="VIEW")]] = ""
    """The view; all where none is named."""
    decode: bool = False
    """Decode every picture to its last pixel."""
    threads: int = 4
    """Shards that are read at a time."""
    json: bool = False
    """Print JSON instead of lines."""

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")


def verify(dataset: Folder, views: Sequence[str], options: VerifyOptions) -> dict[str, Verified]:
    """Reads each view and tells of it. Raises FileNotFoundError or ValueError where there is nothing to go by."""
    found = {}
    for view in views:
        found[view] = verify_view(dataset, view, decode=options.decode, threads=options.threads)
        if not options.json:
            print_verified(view, found[view])
    return found


def print_verified(view: str, found: Verified) -> None:
    """What was read in one line, and a line for each problem: what, shard, key, in words."""
    wrong = len(found.problems) + found.untold
    speed = found.bytes / 1e6 / max(found.seconds, 1e-9)
    read = f"{found.samples} samples, {found.shards} shards, {found.bytes / 1e6:.1f} MB ({speed:.0f} MB/s)"
    print(f"view {view}: {read}: {f'{wrong} problems' if wrong else 'all as its manifest says'}")
    for problem in found.problems:
        print(f"  {problem.what}  {problem.shard}  {problem.key or '-'}  {problem.told}")
    if found.untold:
        print(f"  and {found.untold} more in the same shards")


def main(argv: list[str]) -> int:
    """Command line. Exit code 1 where anything is wrong."""
    if argv and ("://" in argv[0] or Path(argv[0]).is_dir()):
        options = read_flags(VerifyOptions, argv[1:], f"densebridge verify {argv[0]}", __doc__ or "")
        dataset = Folder(url=argv[0])
        packed = [name.removesuffix(".json") for name in dataset.list(VIEWS) if name.endswith(".json")]
    else:
        recipe, options = parse(argv, "verify", VerifyOptions, __doc__ or "", words="RECIPE [VIEW]")
        dataset = recipe.folder
        packed = [stage.config.view for stage in recipe.stages if isinstance(stage, Pack)]
    if not (packed or options.view):
        raise FileNotFoundError(f"{dataset.url} has no view: run `densebridge build` with a pack stage first")
    found = verify(dataset, [options.view] if options.view else packed, options)
    if options.json:
        print(json.dumps({view: asdict(verified) for view, verified in found.items()}))
    return int(any(verified.problems for verified in found.values()))


if __name__ == "__main__":
    from .cli import run

    run("verify", sys.argv[1:])
