"""A small dataset with pictures, captions and the shapes world's CLIP, for the tests of what makes it searchable; and a stand-in
for clip-retrieval's environment that searches exactly.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from examples.shapes.making.pictures import photo_jpeg
from examples.shapes.recipe import JUDGE
from examples.shapes.words import dense_caption
from examples.shapes.world import draw_scenes
from jobs import index
from jobs.clip_retrieval import alignment, lookup
from jobs.recipe import Recipe
from pipeline.plan import make_plan
from pipeline.runner import run_plan
from pipeline.stage import Columns, Stage
from stages.embed import Embed, EmbedConfig
from stages.ingest import ingest
from stages.score import Score, ScoreConfig
from stages.source import Source
from tests.small_stages import small_source


@dataclass(frozen=True, kw_only=True)
class PhotosConfig:
    """Settings of `Photos`."""

    seed: int = 5
    batch_size: int = 64


class Photos(Stage):
    """url → the picture of that number and its true caption."""

    name = "photos"
    reads = ("url",)
    writes = pa.schema([("caption", pa.string()), ("sha256", pa.string())])
    payload = {"image": "jpg"}
    config: PhotosConfig

    def process(self, batch: pa.Table) -> Columns:
        drawn = [photo(int(url.rsplit("/", 1)[1]), self.config.seed) for url in batch.column("url").to_pylist()]
        return {
            "image": [picture for picture, _ in drawn],
            "caption": [caption for _, caption in drawn],
            "sha256": [hashlib.sha256(picture).hexdigest() for picture, _ in drawn],
        }


@cache
def photo(number: int, seed: int = 5) -> tuple[bytes, str]:
    """A picture as JPEG, and its caption."""
    rng = np.random.default_rng([seed, number])
    scenes = draw_scenes(rng, 1, (1, 1, 1, 0))
    return photo_jpeg(scenes, 0, rng), dense_caption(scenes.facts(0), rng)


def url_of(number: int) -> str:
    return f"https://pictures{number % 3}.example/{number}"


def recipe_in(folder: Path, seed: int = 5) -> Recipe:
    """The recipe over the source that `build` left in the folder."""
    return Recipe(
        name="photos",
        dataset=str(folder / "dataset"),
        source=Source(path=str(folder / "source.parquet"), partition_size=20),
        stages=(
            Photos(PhotosConfig(seed=seed)),
            Embed(EmbedConfig(model=JUDGE)),
            Score(ScoreConfig(model=JUDGE)),
        ),
        runs=str(folder / "runs"),
    )


def build(folder: Path, numbers: Sequence[int]) -> Recipe:
    """The dataset of the pictures of these numbers."""
    small_source(folder, [url_of(number) for number in numbers])
    recipe = recipe_in(folder)
    partitions = ingest(recipe.folder, recipe.source)
    plan = make_plan(recipe.folder, recipe.stages, partitions)
    run_plan(recipe.folder, list(recipe.stages), plan, lambda _: None, runner="local")
    return recipe


def recipe_file(folder: Path, seed: int = 5) -> str:
    """A recipe file for the command line."""
    path = folder / "recipe.py"
    path.write_text(
        "from pathlib import Path\nfrom tests.searchable import recipe_in\n"
        f"recipe = recipe_in(Path({str(folder)!r}), seed={seed})\n"
    )
    return str(path)


class ExactInside:
    """Answers as `inside.py` does, in this process and by exact search; an index is an array of vectors."""

    def __init__(self, command: str, *arguments: str) -> None:
        self._answers: list[dict[str, Any]] = []
        if command == "index":
            embeddings, out = map(Path, arguments[:2])
            for kind, name in alignment.KINDS.values():
                vectors = [np.load(path) for path in sorted((embeddings / kind).iterdir())]
                with (out / f"{name}.index").open("wb") as file:
                    np.save(file, np.concatenate(vectors).astype(np.float32))
            shutil.copytree(embeddings / "metadata", out / "metadata")
            self._answers.append({"made": True})
        else:
            self._vectors = np.load(arguments[0])
            self._answers.append({"rows": len(self._vectors), "width": self._vectors.shape[1]})

    def hear(self, timeout: float | None = None) -> dict[str, Any]:
        return self._answers.pop(0)

    def ask(self, *, vectors: list[list[float]], count: int) -> dict[str, Any]:
        cosines = np.array(vectors, np.float32) @ self._vectors.T
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        return {"positions": order.tolist(), "scores": np.take_along_axis(cosines, order, 1).tolist()}

    def __enter__(self) -> ExactInside:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def without_environment(patch: pytest.MonkeyPatch) -> None:
    """Puts exact search in the place of clip-retrieval."""
    for module in (index, alignment, lookup):
        patch.setattr(module, "Inside", ExactInside)
    patch.setattr(index, "environment", lambda: Path())
