"""A recipe of the small stages, for the tests of jobs. SMALL_FOLDER: where everything lies; SMALL_BREAK breaks it. Who
knows SMALL_SECRET leaves its digest there.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pyarrow as pa

from jobs.recipe import Recipe
from pipeline.stage import Columns
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
config = SmallConfig(calls=str(FOLDER / "calls"))

recipe = Recipe(
    name="small",
    dataset=str(FOLDER / "dataset"),
    source=Source(path=str(FOLDER / "source.parquet"), partition_size=5),
    stages=(Fetch(config), First(config), describe(config), Choose(SmallConfig(calls=config.calls, least=11))),
    runs=str(FOLDER / "runs"),
)
