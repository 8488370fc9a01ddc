"""Takedown: samples leave the dataset folder, whatever recipe or setting once put them there, and stay out.

It works on files, not on a recipe's stages, because folders of old settings hold bytes too. Tombstones come first, and all
that any tombstone names is purged each time: an interrupted takedown is simply run again, and ends as if it had not been.
Then the partitions, so that no build brings a row back; then tables, tars and records; then the views' manifests; and last
it is read again what could hold any of it. Nobody should build meanwhile.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field

from .partitions import PARTITIONS, Partition, list_partitions
from .records import record_name
from .shards import VIEWS, View
from .storage import ASIDE, Folder
from .tables import TableName, read_parquet, read_table, stage_folders, tar_partition
from .takedown_check import Check, check_gone
from .takedown_tables import Removed, Rewritten, rewrite_partition, rewrite_table
from .takedown_views import present_views, rewrite_views
from .tombstones import TOMBSTONES, Tombstones, read_tombstones, write_tombstones

READERS = 8  # files at a time: on an object store each waits for an answer


@dataclass(frozen=True, kw_only=True)
class Found:
    """The samples that tombstones name and that are there."""

    by_key: frozenset[str] = frozenset()
    by_domain: frozenset[str] = frozenset()
    by_sha256: dict[str, str] = field(default_factory=dict)
    """Key of the sample → the digest."""
    partitions: frozenset[str] = frozenset()
    """Names of the partitions that hold any."""


@dataclass(frozen=True, kw_only=True)
class Takedown:
    """What a takedown did; in a dry run, what it would do."""

    forgotten: frozenset[str]
    """The keys of all samples that are to be nowhere."""
    found: Found
    removed: dict[str, Removed]
    """By folder, where anything was."""
    same_bytes: dict[str, str]
    """Key → digest of the samples that stay though they have the bytes of one that goes."""
    check: Check | None
    """None in a dry run."""


def take_down(dataset: Folder, asked: Tombstones, *, dry_run: bool = False) -> Takedown:
    """Writes tombstones for what is asked and removes what they and all earlier ones name."""
    known = read_tombstones(dataset)
    new = Tombstones(
        keys=asked.keys - known.keys, domains=asked.domains - known.domains, sha256=asked.sha256 - known.sha256
    )
    tombstones = Tombstones(
        keys=known.keys | new.keys, domains=known.domains | new.domains, sha256=known.sha256 | new.sha256
    )
    if not dry_run:
        write_tombstones(dataset, keys=new.keys, domains=new.domains, sha256=new.sha256)
    with ThreadPoolExecutor(READERS) as pool:
        found = find_samples(dataset, tombstones, pool)
        forgotten = tombstones.keys | found.by_domain | found.by_sha256.keys()
        if not dry_run:
            # Once their URLs and digests are gone, nothing else leads to what an interruption has left of them.
            causes = dict.fromkeys(found.by_sha256, "sha256") | dict.fromkeys(found.by_domain, "domain")
            write_tombstones(dataset, keys=forgotten - tombstones.keys, causes=causes)
        clean = frozenset(
            p.name for p in list_partitions(dataset) if p.name not in found.partitions and not p.has_shrunk
        )
        same_bytes = _same_bytes(dataset, forgotten, clean, pool)
        removed, tars = _purge(dataset, forgotten, found.partitions, clean, pool, dry_run=dry_run)
        check = None
        if not dry_run:
            check = check_gone(dataset, stage_folders(dataset), tombstones, forgotten, clean, tars, pool)
    return Takedown(
        forgotten=forgotten,
        found=found,
        removed={f: r for f, r in removed.items() if r.files},
        same_bytes=same_bytes,
        check=check,
    )


def find_samples(dataset: Folder, tombstones: Tombstones, pool: Executor) -> Found:
    """Looks for the tombstones' samples: digests in every table that has a column `sha256`, keys and URLs' domains in every
    partition's file. In memory are as many files as there are readers.
    """
    by_sha256: dict[str, str] = {}
    for tables in _tables_with_digests(dataset) if tombstones.sha256 else ():
        for pairs in pool.map(lambda table: _with_digests(dataset, table, tombstones.sha256), tables):
            by_sha256 |= pairs
    wanted = tombstones.keys | by_sha256.keys()
    partitions = list_partitions(dataset)
    looked = list(pool.map(lambda partition: _named_in(dataset, partition, wanted, tombstones), partitions))
    return Found(
        by_key=tombstones.keys.intersection(key for keys, _ in looked for key in keys),
        by_domain=frozenset(key for _, keys in looked for key in keys),
        by_sha256=by_sha256,
        partitions=frozenset(p.name for p, keys in zip(partitions, looked, strict=True) if any(keys)),
    )


def _same_bytes(dataset: Folder, forgotten: frozenset[str], clean: frozenset[str], pool: Executor) -> dict[str, str]:
    """Samples that stay though a forgotten one has their bytes, with the digest; to be asked before anything is purged.
    Forgotten samples are in no table of a `clean` partition.
    """
    folders = list(_tables_with_digests(dataset))
    tables = [table for tables in folders for table in tables]
    digests: set[str] = set()
    for found in pool.map(
        lambda t: _digests_of(dataset, t, forgotten), (t for t in tables if t.partition not in clean)
    ):
        digests |= found
    same: dict[str, str] = {}
    if digests:
        for pairs in pool.map(lambda table: _with_digests(dataset, table, digests), tables):
            same |= {key: digest for key, digest in pairs.items() if key not in forgotten}
    return same


def _tables_with_digests(dataset: Folder) -> Iterator[list[TableName]]:
    """By stage folder, the tables that say which bytes their samples have."""
    for folder in stage_folders(dataset):
        tables = _tables_in(dataset, folder)
        if tables and read_table(dataset, tables[0], ["sha256"]).num_columns:
            yield tables


def _tables_in(dataset: Folder, folder: str) -> list[TableName]:
    found = (TableName.parse(folder, name) for name in dataset.list(folder))
    return [table for table in found if table]


def _digests_of(dataset: Folder, table: TableName, keys: frozenset[str]) -> set[str]:
    """The digests of these samples' bytes, as far as the table has them."""
    rows = read_table(dataset, table, ["key", "sha256"])
    pairs = zip(rows.column("key").to_pylist(), rows.column("sha256").to_pylist(), strict=True)
    return {digest for key, digest in pairs if digest and key in keys}


def _with_digests(dataset: Folder, table: TableName, sha256: Collection[str]) -> dict[str, str]:
    """Keys of the table's rows whose bytes have one of these digests."""
    rows = read_table(dataset, table, ["key", "sha256"])
    pairs = zip(rows.column("key").to_pylist(), rows.column("sha256").to_pylist(), strict=True)
    return {key: digest for key, digest in pairs if digest in sha256}


def _named_in(
    dataset: Folder, partition: Partition, wanted: frozenset[str], tombstones: Tombstones
) -> tuple[list[str], list[str]]:
    """Keys of the partition's rows that are wanted themselves, and of those whose URL lies in a domain."""
    rows = read_parquet(dataset, partition.parquet, ["key", "url"] if tombstones.domains else ["key"])
    keys = rows.column("key").to_pylist()
    urls = rows.column("url").to_pylist() if tombstones.domains else []
    in_domain = [key for key, url in zip(keys, urls) if tombstones.refuses_url(url)]
    return [key for key in keys if key in wanted], in_domain


def _purge(
    dataset: Folder,
    forgotten: frozenset[str],
    holding: frozenset[str],
    clean: frozenset[str],
    pool: Executor,
    *,
    dry_run: bool,
) -> tuple[dict[str, Removed], list[str]]:
    """Removes the samples everywhere; returns by folder what went, and the tars that were written anew. `holding` names the
    partitions that hold any, `clean` those whose tables neither do nor ever did.
    """
    removed = {PARTITIONS: _purge_partitions(dataset, forgotten, holding, pool, dry_run=dry_run)}
    tars: list[str] = []
    late: list[str] = []  # what views point to goes when they point to it no more
    pointed = {
        shard.rsplit("/", 1)[0] for info in present_views(dataset) for shard in View(dataset, info).manifest.shards
    }
    for folder in stage_folders(dataset):
        named = folder in pointed or folder.startswith(f"{VIEWS}/")
        rewritten = _purge_folder(dataset, folder, forgotten, clean, pool, named=named, dry_run=dry_run)
        removed[folder] = sum((r.removed for r in rewritten), Removed())
        tars += [r.tar for r in rewritten if r.tar]
        late += [name for r in rewritten for name in r.stale]
    views = rewrite_views(dataset, forgotten, frozenset(late), pool, dry_run=dry_run)
    removed[f"{VIEWS} (manifests)"] = views.removed
    if not dry_run:
        own = [name for folder in (TOMBSTONES, VIEWS) for name in _unpublished(dataset, folder)]
        _remove(dataset, [*views.stale, *late, *own])
    return removed, tars


def _purge_partitions(
    dataset: Folder, forgotten: frozenset[str], holding: frozenset[str], pool: Executor, *, dry_run: bool
) -> Removed:
    there = [p for p in list_partitions(dataset) if p.name in holding]
    rewritten = pool.map(lambda p: rewrite_partition(dataset, p, forgotten, dry_run=dry_run), there)
    removed = sum((r.removed for r in rewritten), Removed())
    if not dry_run:
        # Also those that an interruption has left beside their successors.
        present = {p.parquet for p in list_partitions(dataset)}
        files = [f"{PARTITIONS}/{name}" for name in dataset.list(PARTITIONS) if name.endswith(".parquet")]
        _remove(dataset, [*(name for name in files if name not in present), *_unpublished(dataset, PARTITIONS)])
    return removed


def _purge_folder(
    dataset: Folder,
    folder: str,
    forgotten: frozenset[str],
    clean: frozenset[str],
    pool: Executor,
    *,
    named: bool,
    dry_run: bool,
) -> list[Rewritten]:
    """Writes a stage's tables anew. What they replace is removed at once, for it is gigabytes; but it stays and is told as
    stale where views name the folder's tars (`named`), and where another table has the same tar.
    """
    names = frozenset(dataset.list(folder))
    tables = [table for table in _tables_in(dataset, folder) if table.partition not in clean]
    sharing = Counter(table.tar for table in tables if table.tar_id)

    def rewrite(table: TableName) -> Rewritten:
        has_tar = table.tar.rsplit("/", 1)[1] in names
        done = rewrite_table(dataset, table, forgotten, has_tar=has_tar, dry_run=dry_run)
        return done if dry_run or named or sharing[table.tar] > 1 else _removed_now(dataset, done)

    rewritten = list(pool.map(rewrite, tables))
    leftovers = tuple(_leftovers(dataset, folder, clean))
    return [*rewritten, Rewritten(removed=Removed(files=len(leftovers)), stale=leftovers)]


def _removed_now(dataset: Folder, done: Rewritten) -> Rewritten:
    _remove(dataset, done.stale)
    return Rewritten(removed=done.removed, tar=done.tar)


def _leftovers(dataset: Folder, folder: str, clean: frozenset[str]) -> list[str]:
    """What processes that died have left of partitions that are not clean: tars and records without their table, and files
    that were never published, of which nobody can tell whose rows they hold.
    """
    there = _tables_in(dataset, folder)
    named = {table.tar for table in there} | {record_name(table) for table in there}
    tars = [(f"{folder}/{name}", tar_partition(name)) for name in dataset.list(folder)]
    recorded = [TableName.parse(folder, name) for name in dataset.list(f"{folder}/records")]
    records = [(record_name(table), table.partition) for table in recorded if table]
    lone = [name for name, partition in (*tars, *records) if partition and partition not in clean and name not in named]
    return [*lone, *_unpublished(dataset, folder), *_unpublished(dataset, f"{folder}/records")]


def _unpublished(dataset: Folder, folder: str) -> list[str]:
    """Files that were being written when their process died. Only a local disk has such."""
    entries = dataset.entries(folder) if dataset.is_local else ()
    return [f"{folder}/{entry.name}" for entry in entries if entry.name.startswith(ASIDE)]


def _remove(dataset: Folder, names: Iterable[str]) -> None:
    for name in names:
        dataset.remove(name)
