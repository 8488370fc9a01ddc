"""Each stage's work as a script without a pipeline would do it: the library in a loop over batches that lie in memory.

No file is read or written, no row can fail, nothing is recorded. Each function loads what it needs and returns the loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.stage import Stage
from stages.captioning.prompts import choose
from stages.sentences import split_sentences

Loop = Callable[[Sequence[pa.Table]], None]


def download(stage: Stage) -> Loop:
    """aiohttp, then img2dataset's resizer."""
    import aiohttp
    from img2dataset.resizer import Resizer

    config = stage.config
    resize = Resizer(config.max_edge, "keep_ratio", True, encode_quality=config.quality, skip_reencode=True)

    async def fetch(urls: Sequence[str]) -> list[bytes]:
        async with aiohttp.ClientSession() as session:

            async def ask(url: str) -> bytes:
                async with session.get(url) as response:
                    return await response.read()

            return await asyncio.gather(*map(ask, urls))

    def loop(batches: Sequence[pa.Table]) -> None:
        for batch in batches:
            for data in asyncio.run(fetch(batch.column("url").to_pylist())):
                resize(io.BytesIO(data))
                hashlib.sha256(data).hexdigest()

    return loop


def embed(stage: Stage) -> Loop:
    """transformers' CLIP, asked for pictures."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, CLIPModel

    name = stage.config.model
    processor = AutoImageProcessor.from_pretrained(name, backend="pil")
    model = CLIPModel.from_pretrained(name, dtype=stage.config.dtype).eval()

    def loop(batches: Sequence[pa.Table]) -> None:
        for batch in batches:
            images = [Image.open(io.BytesIO(data)).convert("RGB") for data in batch.column("image").to_pylist()]
            with torch.inference_mode():
                pixels = processor(images=images, return_tensors="pt")["pixel_values"]
                model.get_image_features(pixel_values=pixels).pooler_output.numpy()

    return loop


def recaption(stage: Stage) -> Loop:
    """transformers' LLaVA, greedily, with the prompt that the stage chooses for each sample."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    config: Any = stage.config
    engine = config.engine
    processor = AutoProcessor.from_pretrained(engine.model, backend="pil")
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(engine.model, dtype=engine.dtype).eval()

    def asked(key: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": choose(config.prompts, key).text}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def loop(batches: Sequence[pa.Table]) -> None:
        pictures = [data for batch in batches for data in batch.column("image").to_pylist()]
        texts = [asked(key) for batch in batches for key in batch.column("key").to_pylist()]
        for start in range(0, len(pictures), engine.batch_size):
            window = slice(start, start + engine.batch_size)
            images = [Image.open(io.BytesIO(data)).convert("RGB") for data in pictures[window]]
            given = processor(images=images, text=texts[window], padding=True, return_tensors="pt")
            with torch.inference_mode():
                out = model.generate(**given, max_new_tokens=engine.max_new_tokens, do_sample=False)
            processor.batch_decode(out[:, given["input_ids"].shape[1] :], skip_special_tokens=True)

    return loop


def score(stage: Stage) -> Loop:
    """transformers' CLIP, asked for texts: captions, alt texts and sentences of a batch in one pass."""
    import torch
    from transformers import AutoTokenizer, CLIPModel

    tokenizer = AutoTokenizer.from_pretrained(stage.config.model)
    model = CLIPModel.from_pretrained(stage.config.model, dtype=stage.config.dtype).eval()

    def loop(batches: Sequence[pa.Table]) -> None:
        for batch in batches:
            captions, alts = batch.column("caption").to_pylist(), batch.column("text").to_pylist()
            sentences = [s for caption in captions for s in split_sentences(caption)]
            given = tokenizer([*captions, *alts, *sentences], padding=True, truncation=True, return_tensors="pt")
            with torch.inference_mode():
                model.get_text_features(**given).pooler_output.numpy()

    return loop


def pretokenize(stage: Stage) -> Loop:
    """The tokenizer."""
    from transformers import AutoTokenizer

    config: Any = stage.config
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer.model)

    def loop(batches: Sequence[pa.Table]) -> None:
        for batch in batches:
            tokenizer(batch.column("caption").to_pylist(), truncation=True, max_length=config.tokenizer.max_length)

    return loop


def pack(stage: Stage, folder: Path) -> Loop:
    """img2dataset's resizer and webdataset's writer, which does write."""
    import webdataset as wds
    from img2dataset.resizer import Resizer

    config: Any = stage.config
    resize = Resizer(config.resolution, "keep_ratio", True, encode_quality=config.quality, skip_reencode=True)
    names = [t.name for t in config.tokenizers]

    def loop(batches: Sequence[pa.Table]) -> None:
        with wds.TarWriter(str(folder / "bare.tar"), encoder=False) as tar:
            for batch in batches:
                for row in batch.to_pylist():
                    image = resize(io.BytesIO(row["image"]))[0]
                    told = json.dumps({"url": row["url"], "caption": row["caption"]}).encode()
                    ids = {f"{n}.npy": np.asarray(row[f"tokens_{n}"], np.int32).tobytes() for n in names}
                    tar.write({"__key__": row["key"], "jpg": image, "json": told, **ids})

    return loop
