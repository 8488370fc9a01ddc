"""Builds and trains every model of the shapes world: `python -m examples.shapes.make_models [--out FOLDER] [PART ...]`.

Fixed seeds, one thread a part, an hour or two of one core in all; parts that depend on nothing can run side by side.
The order is that of PARTS. The weights in `examples/shapes/weights` were made by this command; their card is README.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .making.base import assemble_base, make_base
from .making.captioner import make_captioner
from .making.clip import make_clip
from .making.language_model import make_language_model
from .making.measure import measure_base, measure_captioner, measure_clip, measure_language_model, measure_vae
from .making.vae import make_vae

PARTS = ("clip", "language_model", "captioner", "vae", "base", "assemble", "measure")
WEIGHTS = Path(__file__).parent / "weights"


def make(part: str, out: Path, scratch: Path) -> None:
    """Makes one part; `scratch` holds what does not ship (the base's parts before they are put together)."""
    match part:
        case "clip":
            make_clip(out / "clip")
        case "language_model":
            make_language_model(out / "language_model")
        case "captioner":
            make_captioner(out / "captioner", out / "clip")
        case "vae":
            make_vae(scratch / "vae")
        case "base":
            make_base(scratch / "base", out / "clip")
        case "assemble":
            assemble_base(out / "base", scratch / "base", scratch / "vae")
        case "measure":
            (out / "measured.json").write_text(json.dumps(measure(out), indent=1) + "\n")


def measure(out: Path) -> dict[str, object]:
    """What the weights can do, on held-out data."""
    return {
        "captioner": measure_captioner(out / "captioner"),
        "clip": measure_clip(out / "clip"),
        "language_model": measure_language_model(out / "language_model"),
        "vae": measure_vae(out / "base"),
        "base_16": measure_base(out / "base", 16),
        "base_24": measure_base(out / "base", 24),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the weights")
    parser.add_argument("--scratch", type=Path, default=Path("build/making"), help="folder for what does not ship")
    given = parser.parse_args()
    unknown = [p for p in given.parts if p not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}: choose of {', '.join(PARTS)}")
    import torch

    torch.set_num_threads(1)
    for part in PARTS:
        if part in given.parts:
            make(part, given.out, given.scratch)


if __name__ == "__main__":
    main()
