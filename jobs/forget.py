"""Take samples down: by URL, domain or digest they leave the dataset, its views and report pages, and stay out. Run it while
nothing builds; run it again if it was interrupted.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline.partitions import PARTITIONS
from pipeline.sample import KEY_LENGTH, sample_key
from pipeline.takedown import Takedown, take_down
from pipeline.tombstones import Tombstones, host_spellings

from .clip_retrieval.built import default_folder, read_built
from .display import console
from .recipe import Recipe, parse
from .report import ReportOptions, keys_shown

LINES_NAMED = 5
"""Lines that were not there which the output names."""


@dataclass(frozen=True, kw_only=True)
class ForgetOptions:
    """Options of `densebridge forget`. The files are text, one a line; blank lines and lines that begin with # do not count."""

    urls: Path | None = None
    """File of URLs, as the source has them; or of keys, as tables have them."""
    domains: Path | None = None
    """File of domains; each stands for its subdomains too."""
    sha256: Path | None = None
    """File of digests (64 hexadecimal digits) of pictures as they were downloaded."""
    report: tuple[Path, ...] = ()
    """Report pages, or their folders, that go if they show any of it; `report` where none is named."""
    dry_run: bool = False
    """Show what would be removed, and remove nothing."""
    json: bool = False
    """Print JSON instead of a table."""


def main(argv: list[str]) -> int:
    """Command line."""
    recipe, options = parse(argv, "forget", ForgetOptions, __doc__ or "")
    asked = read_asked(options)
    pages = find_pages(options.report)
    check_is_dataset(recipe)
    done = take_down(recipe.folder, asked, dry_run=options.dry_run)
    shown = [page for page in pages if shows_any(page.read_text("utf-8", "replace"), done.forgotten)]
    if not options.dry_run:
        for page in shown:
            page.unlink()
    if options.json:
        print(json.dumps(as_json(asked, done, shown)))
    else:
        print_proof(recipe, asked, done, shown)
        print_not_there(options, done)
    return 1 if done.check and done.check.left else 0


def read_asked(options: ForgetOptions) -> Tombstones:
    """What the files name. Raises ValueError or FileNotFoundError in one line: file, line, what is wrong."""
    if not (options.urls or options.domains or options.sha256):
        raise ValueError("nothing to forget is named: give --urls FILE, --domains FILE or --sha256 FILE")
    return Tombstones(
        keys=frozenset(_values("--urls", options.urls, _keys)),
        domains=frozenset(_values("--domains", options.domains, _domains)),
        sha256=frozenset(_values("--sha256", options.sha256, _digests)),
    )


def check_is_dataset(recipe: Recipe) -> None:
    """Raises FileNotFoundError where no build ever made a dataset, so that a misspelt folder is not certified as clean."""
    if not any(name.startswith("format-") for name in recipe.folder.list(PARTITIONS)):
        raise FileNotFoundError(f"{recipe.dataset} is no dataset folder: check `dataset` in the recipe")


def find_pages(given: tuple[Path, ...]) -> list[Path]:
    """The report pages to look at."""
    page = ReportOptions().out / "index.html"
    if not given:
        return [page] if page.is_file() else []
    pages = [path / "index.html" if path.is_dir() else path for path in given]
    for path in pages:
        if not path.is_file():
            raise FileNotFoundError(f"--report {path}: there is no such page")
    return pages


def shows_any(page: str, forgotten: frozenset[str]) -> bool:
    """Whether a report page shows any of these samples, or shows samples and does not say which, as it did once."""
    shown = keys_shown(page)
    return not forgotten.isdisjoint(shown) or (not shown and "<article" in page)


def _values(flag: str, path: Path | None, parse_line: Callable[[str], Iterable[str]]) -> dict[str, str]:
    """All that the lines of a file stand for, each with its line."""
    if path is None:
        return {}
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path}: there is no such file")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{flag} {path} is not UTF-8: write it as plain text, one a line") from None
    found: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            try:
                found |= dict.fromkeys(parse_line(line), line)
            except ValueError as error:
                raise ValueError(f"{flag} {path}, line {number}: {line!r} {error}") from None
    if not found:
        raise ValueError(f"{flag} {path} names nothing: write one a line")
    return found


def _keys(line: str) -> list[str]:
    if re.fullmatch(rf"[0-9a-fA-F]{{{KEY_LENGTH}}}", line):
        return [line.lower()]
    if not re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", line):
        raise ValueError("is no URL: it has no scheme, such as https: (a sample whose URL has none goes by its key)")
    return [sample_key(line)]


def _domains(line: str) -> frozenset[str]:
    spellings = host_spellings(line)
    if not any(re.fullmatch(r"[\w-]+(\.[\w-]+)+", spelling) for spelling in spellings):
        raise ValueError("is no domain: write it as example.com, without scheme, port, slash or star")
    return spellings


def _digests(line: str) -> list[str]:
    if not re.fullmatch(r"[0-9a-fA-F]{64}", line):
        raise ValueError("is no SHA-256: write 64 hexadecimal digits")
    return [line.lower()]


def as_json(asked: Tombstones, done: Takedown, pages: list[Path]) -> dict[str, Any]:
    """The proof for machines."""
    return {
        "dry_run": done.check is None,
        "found": found_counts(asked, done),
        "removed": {folder: asdict(count) for folder, count in done.removed.items()},
        "same_bytes": sorted(set(done.same_bytes.values())),
        "same_bytes_samples": len(done.same_bytes),
        "pages": [str(page) for page in pages],
        "check": asdict(done.check) if done.check else None,
    }


def found_counts(asked: Tombstones, done: Takedown) -> dict[str, int]:
    """How much of what was asked was there. Domains and digests count the samples, those of earlier requests too."""
    there = len(asked.keys & done.found.by_key)
    return {
        "urls": there,
        "urls_not_there": len(asked.keys) - there,
        "samples_by_domain": len(done.found.by_domain),
        "samples_by_sha256": len(done.found.by_sha256),
    }


def print_proof(recipe: Recipe, asked: Tombstones, done: Takedown, pages: list[Path]) -> None:
    """What was removed from where, and what the last look found."""
    found, would = found_counts(asked, done), "would be " if done.check is None else ""
    if asked.keys:
        print(f"{found['urls']} of {len(asked.keys)} URLs were in the dataset, {found['urls_not_there']} were not")
    if asked.domains:
        print(f"{found['samples_by_domain']} samples were of such domains")
    if asked.sha256:
        print(f"{found['samples_by_sha256']} samples had such digests")
    table = Table(title=f"{would}removed from {recipe.dataset}", title_justify="left")
    for name in ("folder", "files", "rows", "bytes"):
        table.add_column(name, justify="left" if name == "folder" else "right")
    for folder, count in done.removed.items():
        table.add_row(folder, f"{count.files:,}", f"{count.rows:,}", f"{count.bytes:,}")
    if done.removed:
        console.print(table)
    else:
        print(f"nothing {would or 'was '}removed from {recipe.dataset}: it holds none of it")
    for page in pages:
        print(f"{page} showed some of it and {would or 'was '}removed: make it again with `densebridge report`")
    if done.same_bytes:
        print(f"{len(done.same_bytes):,} other samples have the same bytes and stay: take them down with --sha256")
    if done.check is None:
        return
    print(f"read again: {done.check.files:,} files, {done.check.rows:,} rows and members: ", end="")
    print("nothing is left" if not done.check.left else "SOME IS LEFT; end what builds, and run this again:")
    for left in done.check.left:
        print(f"  {left}")
    print_untouched(recipe, done)


def print_untouched(recipe: Recipe, done: Takedown) -> None:
    """What lies outside of the dataset folder, and stays."""
    print(f"the source {recipe.source.path} is yours and stays as it is; what it still lists of this stays out")
    index = default_folder(recipe)
    if done.removed and read_built(index):
        print(
            f"the index in {index} is stale now: `densebridge index` takes this out; searches show none of it until then"
        )
    for run in filter(Path.is_dir, map(recipe.run_folder, recipe.trainings)):
        print(f"{run} stays as it is: it holds keys at most, but its weights may have learned from some of this")


def print_not_there(options: ForgetOptions, done: Takedown) -> None:
    """The first lines whose sample the dataset did not hold."""
    lines = _values("--urls", options.urls, _keys)
    missing = [line for key, line in lines.items() if key not in done.found.by_key]
    for line in missing[:LINES_NAMED]:
        print(f"not in the dataset: {line}")
    if len(missing) > LINES_NAMED:
        print(f"and {len(missing) - LINES_NAMED:,} more")


if __name__ == "__main__":
    from .cli import run

    run("forget", sys.argv[1:])
