"""Embeddings as clip-retrieval lays them out: the same rows in the same order, of what came through and is still listed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.embeddings import main
from pipeline.embeddings import write_embeddings
from pipeline.plan import Ticket, make_plan
from pipeline.runner import run_plan
from pipeline.stage import Columns, Stage
from pipeline.storage import Folder
from stages.ingest import ingest
from tests.small_stages import Small, SmallConfig, small_source


def vector(url: str, width: int = 6) -> np.ndarray:
    drawn = np.random.default_rng(list(url.encode())).normal(size=width)
    return (drawn / np.linalg.norm(drawn)).astype(np.float16)


class Embedded(Small):
    """url → both embeddings and a caption; those whose url has `gone` are dropped. `suffix` widens the last urls'."""

    name = "embedded"
    reads = ("url",)
    writes = pa.schema(
        [
            ("caption", pa.string()),
            ("image_embedding", pa.list_(pa.float16())),
            ("caption_embedding", pa.list_(pa.float16())),
        ]
    )

    def process(self, batch: pa.Table) -> Columns:
        urls = batch.column("url").to_pylist()
        gone = ["gone" in url for url in urls]
        return {
            "caption": [f"of {url}" for url in urls],
            "image_embedding": [vector(u, 7 if self.config.suffix and "9" in u else 6) for u in urls],
            "caption_embedding": [vector(f"text of {url}", 4) for url in urls],
            "status": ["dropped" if g else "kept" for g in gone],
            "reason": ["gone" if g else None for g in gone],
        }


def build(tmp_path: Path, urls: list[str], suffix: str = "") -> tuple[Folder, list[Stage], list[Ticket]]:
    dataset = Folder(url=str(tmp_path / "dataset"))
    stages: list[Stage] = [Embedded(SmallConfig(suffix=suffix))]
    partitions = ingest(dataset, small_source(tmp_path, urls))
    run_plan(dataset, stages, make_plan(dataset, stages, partitions), lambda _: None, runner="local")
    return dataset, stages, make_plan(dataset, stages, partitions).tickets


URLS = [f"u://{n}" for n in range(50)] + [f"u://gone{n}" for n in range(7)]


def test_rows_stand_where_their_metadata_says(tmp_path: Path) -> None:
    dataset, stages, _ = build(tmp_path, URLS)
    dataset, stages, tickets = build(tmp_path, URLS[3:])  # three are no longer listed
    assert len(tickets) > 2
    out = Folder(url=str(tmp_path / "out"))
    assert write_embeddings(dataset, stages, tickets, out) == 47
    names = out.list("metadata")
    assert all(
        len({len(n) for n in out.list(kind)}) == 1 for kind in ("img_emb", "text_emb", "metadata")
    )  # zero-padded
    rows = pa.concat_tables(pq.read_table(tmp_path / "out" / "metadata" / n) for n in names)
    images, texts = (
        np.concatenate([np.load(tmp_path / "out" / kind / n) for n in out.list(kind)])
        for kind in ("img_emb", "text_emb")
    )
    assert rows.column_names == ["key", "url", "caption"] and images.dtype == texts.dtype == np.float16
    assert (images.shape, texts.shape) == ((47, 6), (47, 4))
    assert sorted(rows.column("url").to_pylist()) == sorted(URLS[3:50])
    for url, caption, image, text in zip(
        rows.column("url").to_pylist(), rows.column("caption").to_pylist(), images, texts
    ):
        assert caption == f"of {url}"
        assert np.array_equal(image, vector(url)) and np.array_equal(text, vector(f"text of {url}", 4))


def test_the_same_dataset_gives_the_same_bytes_and_never_over_others(tmp_path: Path) -> None:
    dataset, stages, tickets = build(tmp_path, URLS)
    for name in ("a", "b"):
        write_embeddings(dataset, stages, tickets, Folder(url=str(tmp_path / name)))
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert files and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    with pytest.raises(ValueError, match=r"holds embeddings already: .* write into an empty folder"):
        write_embeddings(dataset, stages, tickets, Folder(url=str(tmp_path / "a")))


def test_two_widths_are_refused(tmp_path: Path) -> None:
    dataset, stages, tickets = build(tmp_path, [f"u://{'9' if n > 7 else '1'}/{'x' * n}" for n in range(30)], "wide")
    with pytest.raises(ValueError, match=r"image_embedding in partition \S+ is \d to \d wide, elsewhere \d"):
        write_embeddings(dataset, stages, tickets, Folder(url=str(tmp_path / "out")))


def recipe_file(tmp_path: Path, stages: str = "(Embedded(SmallConfig()),)") -> str:
    (tmp_path / "recipe.py").write_text(
        "from jobs.recipe import Recipe\nfrom stages.source import Source\n"
        "from tests.small_stages import Fetch, SmallConfig\nfrom tests.test_embeddings import Embedded\n"
        f"recipe = Recipe(name='e', dataset={str(tmp_path / 'dataset')!r}, stages={stages},\n"
        f"    source=Source(path={str(tmp_path / 'source.parquet')!r}, partition_size=5))\n"
    )
    return str(tmp_path / "recipe.py")


def test_the_job_writes_what_is_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, tickets = build(tmp_path, URLS)
    out = tmp_path / "out"
    assert main([recipe_file(tmp_path), "--folder", str(out)]) == 0
    assert f"{out}: embeddings of 50 samples" in capsys.readouterr().out
    assert sum(len(np.load(file)) for file in (out / "img_emb").iterdir()) == 50
    assert {p.name for p in out.iterdir()} == {"img_emb", "text_emb", "metadata"} and len(tickets) > 2


def test_what_is_not_built_is_refused_in_one_line(tmp_path: Path) -> None:
    out = ["--folder", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="holds no dataset of this source yet: run `densebridge build` first"):
        main([recipe_file(tmp_path), *out])
    build(tmp_path, URLS)
    changed = recipe_file(tmp_path, "(Embedded(SmallConfig(suffix='other')),)")
    with pytest.raises(
        ValueError, match=r"'embedded' is not built for (\d+) of \1 partitions: run `densebridge build`"
    ):
        main([changed, *out])
    with pytest.raises(ValueError, match="'embeddings' reads 'caption', which no stage before it writes"):
        main([recipe_file(tmp_path, "(Fetch(SmallConfig()),)"), *out])
    assert not (tmp_path / "out").exists()
