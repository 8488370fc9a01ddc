"""The samples of a phase, in an order that is a pure function of (seed, manifest, position).

Which sample stands at a position says `order.py`. Global batch t is the positions [tB, (t + 1)B), of which rank r of W takes a
contiguous slice in micro-batches. So the state of the data is one integer, batches straddle epochs, and nothing is padded,
repeated or lost whatever the number of processes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from pipeline.shards import View

from .bad_samples import BadSample
from .configuration import TimestepConfig
from .objective import timesteps_at
from .samples import Sample, SampleReader
from .shard_cache import open_shards
from .view_order import BUCKETS, order_of, shapes_of


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Everything that decides what the sample at a position looks like, and how positions are dealt out."""

    seed: int
    """Of the run."""
    phase: int
    """Number of the phase in the run, from 0."""
    resolution: int
    """Side of the square images, pixels; of buckets, the square root of about their area."""
    batch: int
    """Global batch, samples."""
    micro_batch: int
    """Samples in one forward pass of one process."""
    latent_shape: tuple[int, int, int]
    """(channels, height, width) of the noise of a square image."""
    steps: int
    """T, the noise levels of the denoiser."""
    tokenizer: str
    """The view's name of the tokens."""
    empty_ids: tuple[int, ...]
    """Token ids of the empty prompt, which a dropped caption becomes."""
    beside: str | None = None
    """The view's name of the tokens of a second text encoder, of the same captions; None where there is none."""
    beside_empty_ids: tuple[int, ...] = ()
    """Token ids of the empty prompt for it."""
    caption_drop: float = 0.1
    """Share of the captions that is dropped, for classifier-free guidance."""
    crop: Literal["center", "random"] = "center"
    """Which square of an image that is not square."""
    drawn_latents: bool = False
    """Whether the VAE needs noise for its posterior."""
    latents: Literal["off", "view"] = "off"
    """Whether samples are pixels, or the latents that the view holds of them."""
    flip: bool = False
    """Whether half of the pictures are mirrored."""
    timesteps: TimestepConfig = field(default_factory=TimestepConfig)
    """How timesteps are drawn."""
    view_weights: tuple[float, ...] = (1.0,)
    """Of the views that are mixed, one each."""
    window: int = 0
    """Shards that are shuffled at a time; 0: all."""
    cache: str | None = None
    """Folder for copies of shards that lie elsewhere; None copies none."""
    cache_gib: float = 64
    """Most of them, GiB."""
    timesteps_per_encoding: int = 1
    """K, how many timesteps, and noises, each sample is seen at."""
    rank: int = 0
    """This process."""
    world: int = 1
    """All processes."""
    threads: int = 2
    """Threads that read and decode."""
    ahead: int = 3
    """Micro-batches that are read ahead."""

    def __post_init__(self) -> None:
        if self.batch % (self.world * self.micro_batch):
            raise ValueError(batch_problem(self.batch, self.world, self.micro_batch))

    def latent_shape_of(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, height, width) of the noise of a picture of so many pixels."""
        channels, side, _ = self.latent_shape
        return channels, height * side // self.resolution, width * side // self.resolution


def batch_problem(batch: int, world: int, micro_batch: int) -> str:
    """What to say of a global batch that the processes cannot share."""
    found = f"a global batch of {batch} does not divide into {world} processes x micro-batches of {micro_batch}"
    if batch % world:
        return f"{found}: choose a number of processes that divides {batch}"
    return f"{found}: choose a micro_batch that divides {batch // world}"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch of B samples on the CPU."""

    positions: list[int]
    keys: list[str]
    pixels: torch.Tensor | None
    """float32 (B, 3, H, W) in [-1, 1], squares of the resolution or pictures of one bucket; None where there are latents."""
    latents: torch.Tensor | None
    """float32 (B, 2C, h, w): mean and deviation as the view holds them, unscaled; (B, C, h, w) of a VAE without posterior."""
    ids: list[np.ndarray]
    """Token ids (length,) each, uint16 or int32."""
    beside_ids: list[np.ndarray]
    """The same captions' token ids for the second text encoder; empty where there is none."""
    sizes: torch.Tensor
    """float32 (B, 6): height and width of the picture as it came, top and left of the crop, height and width wanted, pixels
    (Podell et al. 2023, arXiv 2307.01952, section 2.2)."""
    timesteps: torch.Tensor
    """int64 (B x K,), a sample's next to each other."""
    noise: torch.Tensor
    """float32 (B x K, C, h, w)"""
    posterior_noise: torch.Tensor | None
    """float32 (B, C, h, w) for a VAE with a posterior."""
    weights: torch.Tensor
    """float32 (B,): 1, or 0 for a bad sample."""
    bad: list[BadSample]


def check_images(view: View, resolution: int) -> None:
    """Raises ValueError when a view has no samples, smaller images than `resolution`, buckets of another one, or a manifest that
    is damaged or tells no sizes.
    """
    if view.info.resolution < resolution:
        raise ValueError(
            f"view {view.info.view!r} holds images of {view.info.resolution} px, the phase wants {resolution}: "
            "choose a view packed at that resolution"
        )
    if view.info.shape == BUCKETS and view.info.resolution != resolution:
        raise ValueError(
            f"view {view.info.view!r} holds buckets of {view.info.resolution} px, the phase wants {resolution}, and they are "
            "taken as they are: make them equal"
        )
    if not len(view):
        raise ValueError(f"view {view.info.view!r} holds no samples: build it first, or loosen its condition")
    if len(view.manifest) != len(view):
        raise ValueError(
            f"view {view.info.view!r} tells of {len(view)} samples, its manifest of {len(view.manifest)}: pack again"
        )
    if not {"width", "height"} <= set(view.manifest.column_names):
        raise ValueError(f"view {view.info.view!r} does not tell how large its pictures are: pack again")
    if view.info.shape == BUCKETS:
        shapes_of(view)


class Batches:
    """Iterates over the micro-batches of this rank from a position on, without end; close it, or use `with`."""

    def __init__(self, views: Sequence[View], config: BatchConfig, position: int = 0) -> None:
        """`views`: one, or several that are mixed by `config.view_weights`."""
        if position % config.batch:
            raise ValueError(f"position {position} is not at the edge of a global batch of {config.batch}")
        for view in views:
            check_images(view, config.resolution)
        self.config = config
        self.order = order_of(views, config)
        upcoming = self.order.shards_ahead if config.window else None
        self._shards = open_shards(views, config.cache, config.cache_gib, upcoming)
        self._readers = [SampleReader(view, config, self._shards) for view in views]
        self._firsts = np.cumsum([0, *map(len, views)]).tolist()
        self._slices = _slices(config, position)
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="samples")
        self._waiting: deque[tuple[range, np.ndarray, list[Future[Sample]]]] = deque()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops reading ahead and waits for the threads."""
        self._waiting.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._shards.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._waiting) <= self.config.ahead:
            self._read_ahead()
        positions, timesteps, futures = self._waiting.popleft()
        samples = [future.result() for future in futures]
        posterior = [s.posterior_noise for s in samples if s.posterior_noise is not None]
        pictures = torch.from_numpy(np.stack([s.picture for s in samples]))
        bad = [
            BadSample(position=p, key=s.key, shard=s.shard, reason=s.reason)
            for p, s in zip(positions, samples, strict=True)
            if s.reason is not None
        ]
        return Batch(
            positions=list(positions),
            keys=[s.key for s in samples],
            pixels=pictures if self.config.latents == "off" else None,
            latents=pictures if self.config.latents == "view" else None,
            ids=[s.ids for s in samples],
            beside_ids=[s.beside_ids for s in samples] if self.config.beside else [],
            sizes=torch.tensor([s.sizes for s in samples], dtype=torch.float32),
            timesteps=torch.from_numpy(timesteps),
            noise=torch.from_numpy(np.concatenate([s.noise for s in samples])),
            posterior_noise=torch.from_numpy(np.stack(posterior)) if posterior else None,
            weights=torch.tensor([float(s.reason is None) for s in samples]),
            bad=bad,
        )

    def _read_ahead(self) -> None:
        config = self.config
        positions = next(self._slices)
        self._shards.advance(positions.start)
        start = positions.start - positions.start % config.batch
        seed, phase, times = config.seed, config.phase, config.timesteps_per_encoding
        timesteps = timesteps_at(config.timesteps, seed, phase, start, config.batch, config.steps, times)
        rows = self.order.rows(np.asarray(positions)).tolist()
        futures = [self._pool.submit(self._read, position, row) for position, row in zip(positions, rows, strict=True)]
        self._waiting.append((positions, timesteps[positions.start - start : positions.stop - start].ravel(), futures))

    def _read(self, position: int, row: int) -> Sample:
        """The sample at a row of all views, which are numbered through."""
        number = bisect_right(self._firsts, row) - 1
        return self._readers[number].read(position, row - self._firsts[number])


def _slices(config: BatchConfig, position: int) -> Iterator[range]:
    """The positions of this rank's micro-batches."""
    share = config.batch // config.world
    while True:
        start = position + config.rank * share
        for first in range(start, start + share, config.micro_batch):
            yield range(first, first + config.micro_batch)
        position += config.batch
