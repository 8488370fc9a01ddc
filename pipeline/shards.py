"""The shards of a view: WebDataset tars with fixed order and zeroed times, and a manifest of where every byte lies.

A sample has the members `<key>.jpg`, `<key>.json` (url, text, caption and what else is known) and `<key>.<tokenizer>.npy`
for each tokenizer: token ids (uint16, or int32 for large vocabularies), not padded. Any WebDataset reader can stream the
tars. The trainer instead reads at random through the manifest, one row a sample: key, shard (its path in the dataset
folder), width, height, and for each member `<member>_offset` and `<member>_size` in bytes (`image`, `json`,
`tokens_<tokenizer>`), `tokens_<tokenizer>_length` in tokens. `views/<view>.json` names the present version of a view.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .storage import Folder

FORMAT = 1
VIEWS = "views"


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
    """Per tokenizer what `captions.tokenizer_facts` tells: `id`, `max_length`, template and kinds of captions."""
    companions: dict[str, Any] = field(default_factory=dict)
    """What later stages added to the samples: `latents` tells which VAE made them, and how."""
    format: int = FORMAT


def publish_version(dataset: Folder, info: ViewInfo, manifest: bytes) -> ViewInfo:
    """Publishes the manifest's file and names it as the view's present version; the digest in `info` is filled in."""
    info = replace(info, manifest_sha256=hashlib.sha256(manifest).hexdigest())
    dataset.write(info.manifest, manifest)
    dataset.write(f"{VIEWS}/{info.view}.json", json.dumps(asdict(info), indent=1, sort_keys=True).encode())
    return info


class ShardWriter:
    """Writes one tar through webdataset: the same members give the same bytes."""

    def __init__(self, path: Path | str) -> None:
        import webdataset as wds

        self._path = path
        self._stream = open(path, "wb")  # noqa: SIM115 - closed in close()
        self._tar = wds.TarWriter(self._stream, encoder=False, mtime=0, user="root", group="root")

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


def pack_tokens(ids: np.ndarray) -> bytes:
    """Token ids (length,) as the bytes of an npy file, little-endian in their own type (uint16 or int32)."""
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
        found = json.loads(dataset.read(name))
        if found.get("format") != FORMAT:
            raise ValueError(f"{name} has format {found.get('format')}, this version reads {FORMAT}: build it again")
        return cls(dataset, ViewInfo(**found))

    @cached_property
    def manifest(self) -> pa.Table:
        """One row a sample, in the order of the shards. Raises ValueError if it is not the file that the view names."""
        data = self.dataset.read(self.info.manifest)
        if hashlib.sha256(data).hexdigest() != self.info.manifest_sha256:
            raise ValueError(
                f"{self.info.manifest} is damaged (its digest is not the view's): delete it, and the next build makes it again"
            )
        return pq.read_table(pa.BufferReader(data))

    def __len__(self) -> int:
        return self.info.samples

    def place(self, row: int, member: str) -> tuple[str, int, int] | None:
        """Where a member of the sample in manifest row `row` lies: shard, offset, size. None if the sample has none such."""
        own = f"{member}_shard"  # a companion's bytes lie in a tar of their own
        shard = own if own in self.manifest.column_names else "shard"
        names = (shard, f"{member}_offset", f"{member}_size")
        shard, offset, size = (self.manifest.column(name)[row].as_py() for name in names)
        return None if offset is None else (shard, offset, size)

    def read(self, row: int, member: str) -> bytes:
        """The bytes of a member (`image`, `json`, `tokens_<tokenizer>`, `latents`) of the sample in manifest row `row`. Raises
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
        """Token ids: uint16 or int32 (length,)."""
        return np.load(io.BytesIO(self.read(row, f"tokens_{tokenizer}")), allow_pickle=False)

    def facts(self, row: int) -> dict[str, Any]:
        """What the json member says."""
        return json.loads(self.read(row, "json"))
