"""Weights of 8 or 4 bits (bitsandbytes), where a large model is to fit on a small GPU."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

Bits = Literal["none", "8bit", "4bit"]


def quantization_of(bits: Bits, dtype: str, setting: str) -> Any:
    """What `from_pretrained` is told: LLM.int8 (Dettmers et al. 2022) or NF4 (Dettmers et al. 2023), computing in `dtype`; None
    for "none". Raises ValueError naming `setting` where the library or a GPU is missing.
    """
    if bits == "none":
        return None
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{setting}={bits!r} needs bitsandbytes: pip install 'densebridge[quantization]'")
    if not torch.cuda.is_available():
        raise ValueError(f"{setting}={bits!r} needs a GPU: set it to 'none' on this machine")
    return BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
