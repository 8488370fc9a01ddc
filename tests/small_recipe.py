"""A recipe of the small stages, for the tests of jobs. SMALL_FOLDER: where everything lies; SMALL_BREAK breaks it;
SMALL_DATASET: where else the dataset lies; SMALL_SECONDS: what each row takes at each stage; SMALL_ACTORS: how many a stage
has; SMALL_GPUS: what of a GPU each that describes takes; who knows SMALL_SECRET leaves its digest there.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from jobs.recipe import Recipe
from pipeline.stage import Columns, Needs
from stages.source import Source
from tests.small_stages import Choose, Describe, Fetch, First, SmallConfig

FOLDER = Path(os.environ.get("SMALL_FOLDER", "build/small"))


def tell(who: str) -> None:
    """Leaves the secret's digest, where there is one."""
    if secret := os.environ.get("SMALL_SECRET"):
        (FOLDER / f"saw-{who}").write_text(hashlib.sha256(secret.encode()).hexdigest())


class Telling(Describe):
    """Tells whether its worker knows the secret."""

    def load(self) -> None:
        tell("worker")
        super().load()


class Broken(Describe):
    """Fails as a stage does whose model cannot be loaded."""

    def process(self, batch: pa.Table) -> Columns:
        raise RuntimeError("no model here")


describe = Broken if os.environ.get("SMALL_BREAK") else Telling
tell("job")
actors = int(os.environ.get("SMALL_ACTORS", "1"))
config = SmallConfig(
    calls=str(FOLDER / "calls"),
    seconds=float(os.environ.get("SMALL_SECONDS", "0")),
    needs=Needs(cpus=0.25, actors=(actors, actors)),
)

gpus = float(os.environ.get("SMALL_GPUS", "0"))
seen = replace(config, needs=replace(config.needs, gpus=gpus))

recipe = Recipe(
    name="small",
    dataset=os.environ.get("SMALL_DATASET", str(FOLDER / "dataset")),
    source=Source(path=str(FOLDER / "source.parquet"), partition_size=5),
    stages=(Fetch(config), First(config), describe(seen), Choose(replace(config, least=11))),
    runs=str(FOLDER / "runs"),
)
