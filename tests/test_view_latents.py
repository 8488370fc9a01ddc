"""From pictures to a published view with latents and kinds of captions, and what training is given of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipeline.shards import View
from pipeline.storage import Folder
from pipeline.vaes import encode_pixels, load_vae
from stages.encode_latents import EncodeLatents, EncodeLatentsConfig
from stages.pack import Pack, PackConfig
from tests.packing import Facts, pack_urls, tokenizer
from tests.small_stages import SmallConfig
from tests.training_fixtures import make_denoiser
from training.batches import BatchConfig, Batches

CONFIG = BatchConfig(
    seed=1, phase=0, resolution=24, batch=8, micro_batch=8, latent_shape=(4, 12, 12), steps=1000, tokenizer="t5",
    empty_ids=(1,), caption_drop=0.0, drawn_latents=True,
)  # fmt: skip


def test_training_is_given_the_latents_of_its_pictures(tmp_path: Path) -> None:
    base = str(make_denoiser(tmp_path / "base", drawn=True))
    t5 = tokenizer(tmp_path, "long", "short")
    latents = EncodeLatentsConfig(view="keep", vae=base, device="cpu")
    stages = [
        Facts(SmallConfig()),
        Pack(PackConfig(view="keep", resolution=24, tokenizers=(t5,))),
        Pack(PackConfig(view="square", resolution=24, shape="square", tokenizers=(t5,))),
        Pack(PackConfig(view="buckets", resolution=64, shape="buckets", tokenizers=(t5,))),
        EncodeLatents(latents),
        EncodeLatents(replace(latents, view="square")),
        EncodeLatents(replace(latents, view="buckets", crop="none")),
    ]
    dataset = Folder(url=str(tmp_path / "data"))
    urls = [f"u://{60 + n % 5}x{64 + 3 * n}" for n in range(16)]
    infos = pack_urls(tmp_path, dataset, stages, urls)
    vae = load_vae(base, None, "vae", "float32")
    for info in infos[:2]:
        view = View.open(dataset, info.view)
        assert view.info.companions["latents"]["statistics"] == ["mean", "std"] and len(view) == 16
        assert view.info.tokenizers["t5"]["captions"] == [["long", 1.0], ["short", 1.0]]
        with Batches([view], CONFIG) as pixels, Batches([view], replace(CONFIG, latents="view")) as stored:
            lengths = set()
            for _ in range(4):
                one, other = next(pixels), next(stored)
                assert one.keys == other.keys and not one.bad and not other.bad
                expected = torch.cat(encode_pixels(vae, one.pixels), dim=1)
                assert torch.allclose(other.latents, expected, rtol=2e-3, atol=2e-3)
                assert [ids.tolist() for ids in one.ids] == [ids.tolist() for ids in other.ids]
                lengths |= {len(ids) for ids in one.ids}
        assert 2 in lengths and len(lengths) > 1 and one.ids[0].dtype == np.uint16
    bucketed = View.open(dataset, "buckets")
    of_buckets = replace(
        CONFIG, resolution=64, latent_shape=(4, 32, 32), batch=4, micro_batch=4, window=1, latents="view"
    )
    with Batches([bucketed], of_buckets) as batches:
        found = [next(batches) for _ in range(8)]
        files = batches.order.shards_ahead(0)
    assert not any(batch.bad for batch in found) and len({batch.latents.shape for batch in found}) > 1
    assert {name.split("-")[0] for name in files} == {"encode_latents_buckets", "views/buckets"}
    assert all(dataset.exists(name) for name in files)
