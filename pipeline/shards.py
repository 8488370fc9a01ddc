"""The shards of a view: WebDataset tars with fixed order and zeroed times, and random access to them.

A sample has the members `<key>.jpg`, `<key>.json` (where it comes from and what is known of it), and for each tokenizer
`<key>.<tokenizer>.npy`: token ids, not padded, in the smallest type that holds them; for further captions of it
`<key>.<tokenizer>-<kind>.npy`. Any WebDataset reader can stream the tars. The trainer instead reads at random through the
manifest (`manifest.py`), where the members are called `image`, `json` and `tokens_<tokenizer>` or `tokens_<tokenizer>_<kind>`.
`views/<view>.json` names the present version of a view.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .manifest import SHARD, Manifest, ManifestWriter
from .storage import Folder, read_json

FORMAT = 2
VIEWS = "views"
_MODE, _OWNER = 0o444, "root"


@dataclass(frozen=True, kw_only=True)
class ViewInfo:
    """What `views/<view>.json` says of a view's present version."""

    view: str
    version: str
    resolution: int
    samples: int
    manifest: str
    """Path of the manifest in the dataset folder."""
    manifest_sha256: str = ""
    tokenizers: dict[str, dict[str, Any]]
    """Per tokenizer: `id` (name@revision or digest of its files), `max_length` and the kinds of `captions` in the shards."""
    shape: str = "keep"
    """What its pictures look like: `keep`, `square` or `buckets` (see `stages/pack.py`)."""
    members: dict[str, str] = field(default_factory=dict)
    """Per member of the manifest the ending of its name in the tars, such as `jpg` for `image`."""
    companions: dict[str, Any] = field(default_factory=dict)
    """What later stages have to say of the members that they add, such as which VAE made the latents."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """Per stage that took part: its `version`, what its output depends on (`identity`), its `settings` as written."""
    format: int = FORMAT


def publish_version(dataset: Folder, info: ViewInfo, manifest: ManifestWriter) -> ViewInfo:
    """Publishes the closed manifest and names it as the view's present version; what follows from the file is filled in."""
    info = replace(info, samples=manifest.rows, manifest_sha256=manifest.sha256)
    manifest.publish(info.manifest)
    name_version(dataset, info)
    return info


def read_info(dataset: Folder, name: str) -> ViewInfo | None:
    """What the pointer `views/<view>.json` says; None where it has another format. Raises ValueError where it is damaged."""
    found = read_json(dataset, name, format=int)
    if found["format"] != FORMAT:
        return None
    try:
        return ViewInfo(**found)
    except TypeError as error:
        raise ValueError(
            f"{dataset.url}/{name} is damaged ({error}): delete it, and the next build makes it again"
        ) from None


def name_version(dataset: Folder, info: ViewInfo) -> None:
    """Lets `views/<view>.json` say so."""
    dataset.write(f"{VIEWS}/{info.view}.json", json.dumps(asdict(info), indent=1, sort_keys=True).encode())


class ShardWriter:
    """Writes one tar through webdataset: the same members give the same bytes."""

    def __init__(self, path: Path | str) -> None:
        import webdataset as wds

        self._path = path
        self._stream = open(path, "wb")  # noqa: SIM115 - closed in close()
        self._tar = wds.TarWriter(self._stream, encoder=False, mtime=0, mode=_MODE, user=_OWNER, group=_OWNER)

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends a sample: its members' bytes by file extension."""
        self._tar.write({"__key__": key, **members})

    def close(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Ends the tar and returns where everything lies: {key: {extension: (offset, size)}}."""
        self._tar.close()
        self._stream.close()
        places: dict[str, dict[str, tuple[int, int]]] = {}
        with tarfile.open(self._path) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                places.setdefault(key, {})[extension] = (member.offset_data, member.size)
        return places


def member_header(name: str, size: int) -> bytes:
    """The block before a member's bytes as `ShardWriter` writes it."""
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.uname, member.gname = size, _MODE, _OWNER, _OWNER
    return member.tobuf(tarfile.PAX_FORMAT)


def pack_tokens(ids: np.ndarray) -> bytes:
    """Token ids (length,) as the bytes of an npy file, little-endian, in the array's own type."""
    out = io.BytesIO()
    np.save(out, ids.astype(ids.dtype.newbyteorder("<")), allow_pickle=False)
    return out.getvalue()


class View:
    """Random access to one version of a view. Safe to share between threads and to pickle."""

    def __init__(self, dataset: Folder, info: ViewInfo) -> None:
        self.dataset, self.info = dataset, info

    @classmethod
    def open(cls, dataset: Folder, view: str) -> View:
        """The present version of a view. Raises FileNotFoundError or ValueError in one line that says what to do."""
        name = f"{VIEWS}/{view}.json"
        if not dataset.exists(name):
            raise FileNotFoundError(
                f"{dataset.url} has no view {view!r}: run `densebridge build` with a pack stage for it"
            )
        info = read_info(dataset, name)
        if info is None:
            raise ValueError(f"{name} is of another format than this version's, {FORMAT}: build it again")
        return cls(dataset, info)

    def __reduce__(self) -> tuple[type[View], tuple[Folder, ViewInfo]]:
        return View, (self.dataset, self.info)  # without the columns that were read

    @cached_property
    def manifest(self) -> Manifest:
        """One row a sample, in the order of the shards. Raises ValueError if it is not the file that the view names."""
        return Manifest(self.dataset, self.info.manifest, self.info.manifest_sha256)

    def __len__(self) -> int:
        return self.info.samples

    def place(self, row: int, member: str) -> tuple[str, int, int] | None:
        """Where a member of the sample in manifest row `row` lies: shard, offset, size. None if the sample has none such."""
        own = f"{member}_{SHARD}"
        shard = own if own in self.manifest.column_names else SHARD
        names = (shard, f"{member}_offset", f"{member}_size")
        shard, offset, size = (self.manifest.column(name)[row].as_py() for name in names)
        return None if offset is None else (shard, offset, size)

    def read(self, row: int, member: str) -> bytes:
        """The bytes of a member (`image`, `json`, `tokens_<tokenizer>`, …) of the sample in manifest row `row`. Raises
        KeyError where the view has no such member, LookupError where this sample has none.
        """
        place = self.place(row, member)
        if place is None:
            raise LookupError(f"row {row} of view {self.info.view!r} has no {member}")
        shard, offset, size = place
        data = self.dataset.read_range(shard, offset, size)
        if len(data) != size:
            raise ValueError(f"{shard} is cut: {len(data)} of {size} bytes at {offset}")
        return data

    def tokens(self, row: int, tokenizer: str) -> np.ndarray:
        """Token ids: int (length,), in the type they are stored in."""
        return np.load(io.BytesIO(self.read(row, f"tokens_{tokenizer}")), allow_pickle=False)

    def facts(self, row: int) -> dict[str, Any]:
        """What the json member says."""
        return json.loads(self.read(row, "json"))
