"""A view's pictures → what the VAE makes of them, so that training on that view need not run it."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.devices import device_of
from pipeline.pixels import as_array, open_picture, square
from pipeline.stage import Columns, Needs, Stage
from pipeline.vaes import encode_pixels, load_vae, vae_facts, vae_id


@dataclass(frozen=True, kw_only=True)
class EncodeLatentsConfig:
    """Which view's pictures, and which VAE: it must be the denoiser's own, or training refuses the latents."""

    view: str
    """Name of the view; its pack stage stands before this one."""
    vae: str
    """Folder or hub name of the VAE, or of a diffusers pipeline that has it in `subfolder`."""
    subfolder: str = "vae"
    """Of `vae`, where it lies; "" where `vae` is itself the VAE's folder."""
    revision: str | None = None
    """Commit of the hub repository; pin it."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the weights. A VAE that says that it overflows in float16, as SDXL's, is held in float32 instead; what
    overflows all the same fails as `latents_not_finite`."""
    stored_dtype: Literal["float16", "float32"] = "float16"
    """Number type of the latents as they are stored."""
    crop: Literal["center", "none"] = "center"
    """The square in the middle, as training crops it; "none" for a view whose pictures have their bucket's size already."""
    device: str = "auto"
    """Where the VAE runs: `auto` is cuda where there is one."""
    batch_size: int = 16
    """Pictures of one size encoded at a time."""
    threads: int = 4
    """Threads that decode pictures."""
    needs: Needs = field(default_factory=lambda: Needs(cpus=2.0, gpus=1.0, memory_gb=4))
    """What an actor takes."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("dtype", ("float32", "bfloat16", "float16")),
            ("stored_dtype", ("float16", "float32")),
            ("crop", ("center", "none")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"latents of view {self.view!r}: {name} is {getattr(self, name)!r}: choose one of {', '.join(choices)}"
                )
        if self.threads < 1:
            raise ValueError(f"latents of view {self.view!r}: threads must be at least 1, got {self.threads}")


class EncodeLatents(Stage):
    """Reads packed_image_<view>; writes latents_<view> beside the shards: an npy array (2C, h, w) of the posterior's mean and
    deviation, unscaled, or (C, h, w) for a VAE without posterior. Rows depend on the picture alone: captions may change.
    """

    not_fingerprinted = ("batch_size", "device", "needs", "threads")
    drops = False
    config: EncodeLatentsConfig

    def __init__(self, config: EncodeLatentsConfig) -> None:
        super().__init__(config)
        self.name = f"encode_latents_{config.view}"
        self.column = f"latents_{config.view}"
        self.companion_of = config.view
        self.reads = (f"packed_image_{config.view}",)
        sizes = [(f"{self.column}_width", pa.int32()), (f"{self.column}_height", pa.int32())]
        self.writes = pa.schema([*sizes, (f"{self.column}_crc32", pa.uint32())])
        self.payload = {self.column: "latents.npy"}

    def identity(self) -> Any:
        """The settings, with the VAE's weights in place of its name, and their number type as they are held."""
        config = self.config
        settings = {name: value for name, value in super().identity().items() if name not in ("subfolder", "revision")}
        return settings | {"vae": vae_id(config.vae, config.revision, config.subfolder), "dtype": self._dtype}

    @property
    def _dtype(self) -> str:
        if self.config.dtype != "float16":
            return self.config.dtype  # a plan for a hub's VAE then asks the hub nothing
        return vae_facts(self.config.vae, self.config.revision, self.config.subfolder).dtype("float16")

    @property
    def view_facts(self) -> dict[str, Any]:
        """What the view says of its latents; training compares the VAE with its own."""
        config = self.config
        facts = vae_facts(config.vae, config.revision, config.subfolder)
        return {
            "latents": {
                "vae": vae_id(config.vae, config.revision, config.subfolder),
                "weights_dtype": facts.dtype(config.dtype),
                "dtype": config.stored_dtype,
                "statistics": ["mean", "std"] if facts.is_drawn else ["mean"],
                "channels": facts.channels,
                "scaling_factor": facts.scaling_factor,
                "shift_factor": facts.shift_factor,
                "crop": config.crop,
            }
        }

    def load(self) -> None:
        """Loads the VAE."""

        config = self.config
        device = device_of(config.device)
        self._vae = load_vae(config.vae, config.revision, config.subfolder, config.dtype).to(device)
        self._factor = vae_facts(config.vae, config.revision, config.subfolder).factor
        self._decoders = ThreadPoolExecutor(config.threads, thread_name_prefix="pictures")

    def process(self, batch: pa.Table) -> Columns:
        """Encodes the batch's pictures, those of one size together."""
        rows: list[dict[str, Any]] = []
        sizes: dict[tuple[int, ...], dict[int, np.ndarray]] = {}
        for row, found in enumerate(self._decoders.map(self._decode, batch.column(self.reads[0]).to_pylist())):
            rows.append(self._ended(found) if isinstance(found, str) else {})
            if not isinstance(found, str):
                sizes.setdefault(found.shape, {})[row] = found
        for same in sizes.values():
            for row, latents in zip(same, self._encode(list(same.values())), strict=True):
                rows[row] = self._row(latents)
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _decode(self, data: bytes) -> np.ndarray | str:
        """The pixels that the VAE is given, float32 (3, height, width) in [-1, 1]; or why there are none."""
        try:
            image = open_picture(data)
        except (OSError, ValueError):
            return "not_an_image"
        if self.config.crop == "center":
            image = square(image, min(image.size))
        if any(side % self._factor for side in image.size):
            return "not_a_multiple_of_patch"
        return as_array(image)

    def _encode(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        """Pixels (3, H, W) each -> mean and deviation, one after the other: (N, 2C, h, w) in the stored type."""
        import torch

        pixels = torch.from_numpy(np.stack(pictures)).to(self._vae.device)
        statistics = [part for part in encode_pixels(self._vae, pixels) if part is not None]
        with np.errstate(over="ignore"):  # what becomes infinite is told row by row
            return torch.cat(statistics, dim=1).float().cpu().numpy().astype(self.config.stored_dtype)

    def _row(self, latents: np.ndarray) -> dict[str, Any]:
        if not np.isfinite(latents).all():
            return self._ended("latents_not_finite")
        out = io.BytesIO()
        np.save(out, latents.astype(latents.dtype.newbyteorder("<")), allow_pickle=False)
        return self._ended(None) | {
            self.column: out.getvalue(),
            f"{self.column}_crc32": zlib.crc32(out.getvalue()),
            f"{self.column}_width": latents.shape[2],
            f"{self.column}_height": latents.shape[1],
        }

    def _ended(self, reason: str | None) -> dict[str, Any]:
        blank = dict.fromkeys((self.column, *self.writes.names))
        return blank | {"status": "failed" if reason else "kept", "reason": reason}
