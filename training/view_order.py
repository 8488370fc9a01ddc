"""The order in which a phase goes through its views: what their manifests say of shards and buckets, and its settings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.manifest import SHARD
from pipeline.shards import View

from .order import Bucketed, Mixed, Order, Whole, Windowed, slots_of

if TYPE_CHECKING:
    from .batches import BatchConfig

BUCKET = "bucket"
LATENTS_SHARD = f"latents_{SHARD}"
BUCKETS, KEEP = "buckets", "keep"
"""Shapes of views: pictures of several sizes, which the manifest's column `bucket` says; pictures as they came, only smaller."""


def order_of(views: Sequence[View], config: BatchConfig) -> Order:
    """The order over the rows of all views, numbered through."""
    orders = [_order_of(view, config) for view in views]
    if len(orders) == 1:
        return orders[0]
    weights = dict(zip([view.info.view for view in views], config.view_weights, strict=True))
    batched = any(view.info.shape == BUCKETS for view in views)  # one global batch is of one shape
    key = f"{config.seed}/{config.phase}/{'/'.join(view.info.manifest_sha256 for view in views)}"
    return Mixed(orders, [len(view) for view in views], slots_of(weights), key, config.batch if batched else 1)


def _order_of(view: View, config: BatchConfig) -> Order:
    key = f"{config.seed}/{config.phase}/{view.info.manifest_sha256}"
    shards = _shards_of(view, config.latents == "view") if config.window else None
    if view.info.shape != BUCKETS:
        return Windowed(shards.counts(), shards.names, config.window, key) if shards else Whole(len(view), key)
    names, numbers = _codes(view, BUCKET)
    # Of 34 million rows these are 136 MB, as large as the manifest's column itself.
    rows = np.argsort(numbers.astype(np.int16), kind="stable").astype(np.uint32)
    edges = np.cumsum(np.bincount(numbers, minlength=len(names)))
    tables = np.split(rows, edges[:-1])
    orders: list[Order] = [
        Windowed(shards.counts(table), shards.names, config.window, key, name)
        if shards
        else Whole(len(table), f"{key}/{name}")
        for name, table in zip(names, tables, strict=True)
    ]
    return Bucketed(tables, orders, config.batch, key)


class _Shards(NamedTuple):
    """A view's shards, in the order of its rows."""

    names: list[tuple[str, ...]]
    """The file that its samples lie in, and the one that their latents lie in."""
    edges: np.ndarray
    """Rows before each, and in all."""

    def counts(self, rows: np.ndarray | None = None) -> np.ndarray:
        """Rows of each; of some `rows`, which rise."""
        return np.diff(self.edges if rows is None else np.searchsorted(rows, self.edges.astype(rows.dtype)))


def _shards_of(view: View, with_latents: bool) -> _Shards:
    names, numbers = _codes(view, SHARD)
    firsts = np.flatnonzero(np.diff(numbers, prepend=-1))
    files = [[names[number]] for number in numbers[firsts].tolist()]
    if with_latents and LATENTS_SHARD in view.manifest.column_names:  # in one file, but some samples may have none
        others, found = _codes(view, LATENTS_SHARD)
        for one, number in zip(files, np.maximum.reduceat(found, firsts).tolist(), strict=True):
            one += [others[number]] if number >= 0 else []
    return _Shards([tuple(one) for one in files], np.append(firsts, len(view)))


def _codes(view: View, column: str) -> tuple[list[str], np.ndarray]:
    """A column's different values, sorted, and for each row the number of its own; -1 for null."""
    found = view.manifest.column(column).unify_dictionaries()
    values = found.chunk(0).dictionary.to_pylist()
    order = np.argsort(np.asarray(values, dtype=str))
    ranks = np.append(np.argsort(order), -1).astype(np.int32)  # the last is for nulls
    indices = np.concatenate([chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False) for chunk in found.chunks])
    return [values[number] for number in order.tolist()], ranks[indices]


def shape_of(bucket: str) -> tuple[int, int]:
    """`768x512`, a width and a height as manifests have them -> (512, 768): height and width, as arrays have them."""
    width, height = bucket.split("x")
    return int(height), int(width)


def shapes_of(view: View) -> list[tuple[int, int]]:
    """(height, width) of the pictures of a bucketed view, of every bucket that has any. Raises ValueError for samples that are
    in none.
    """
    names = view.manifest.column(BUCKET).unique().to_pylist()
    if None in names:
        raise ValueError(f"view {view.info.view!r} has samples in no bucket, its manifest is damaged: pack again")
    return sorted(shape_of(name) for name in names)
