"""Which text path, at equal samples, over seeds: `python -m benchmarks.connectors --seeds 0 1 2` after `make demo`.

Trains every arm of ELLA's and LaVi-Bridge's tables, as far as the shapes world has it, once a seed on the demo's dataset
(the same samples, noise and timesteps for all arms of a seed), draws the judge's prompts and scores them. The world's TSC
has three blocks where ELLA's has six, and so has the resampler that it is held against. Two arms at a time, four to five
minutes each on a core, LaVi's about ten; an arm that is done is not trained again. Prints a table (mean over prompts and
seeds, corrected for chance), what each step of ELLA's ablation gains, and, last, one line of JSON, which `--out` keeps.
Intervals are over prompts; seeds scatter by more, so give several.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from examples.shapes.recipe import CLIP_MODEL, MLP, T5_MODEL, TSC, recipe, training
from jobs.cli import one_line
from jobs.evaluate import gains, summarise
from jobs.recipe import quiet_libraries
from training.configuration import LoRAConfig
from training.connectors import LaViConfig, QueriesConfig

from .arms import Arms, by_seed, pooled, print_arms, run_arms

T5_LORA = LoRAConfig(targets=(r".*SelfAttention\.[qkvo]",), rank=8, alpha=8, rate_scale=0.05)
UNET_LORA = LoRAConfig(
    targets=(
        r".*resnets\.\d+\.(conv1|conv2|conv_shortcut|time_emb_proj)",
        r".*attn[12]\.(to_q|to_k|to_v|to_out\.0)",
        r".*ff\.net\.0\.proj",
    ),
    rank=8,
    alpha=8,
)
LAVI = training(LaViConfig(in_width=128, width=128, use_mask="mask"), replace(T5_MODEL, lora=T5_LORA))

ARMS: Arms = {
    "base": None,
    "clip_mlp": recipe.trainings["clip_mlp"],
    "mlp": training(MLP, T5_MODEL),
    "resampler_1": training(replace(TSC, timestep="off", blocks=1), T5_MODEL),
    "resampler_3": training(replace(TSC, timestep="off"), T5_MODEL),
    "tsc_adaln_zero": training(replace(TSC, timestep="adaln_zero"), T5_MODEL),
    "tsc": training(TSC, T5_MODEL),
    "tsc_beside_clip": replace(training(TSC, T5_MODEL), beside=CLIP_MODEL),
    "queries": training(QueriesConfig(in_width=128, width=128, queries=24, blocks=3, heads=4), T5_MODEL),
    "lavi": replace(LAVI, denoiser=replace(LAVI.denoiser, lora=UNET_LORA)),
}
GAINS = {
    "mlp_over_base": ("mlp", "base"),
    "mlp_over_clip_mlp": ("mlp", "clip_mlp"),
    "resampler_1_over_mlp": ("resampler_1", "mlp"),
    "blocks: resampler_3_over_resampler_1": ("resampler_3", "resampler_1"),
    "timestep with gates: tsc_adaln_zero_over_resampler_3": ("tsc_adaln_zero", "resampler_3"),
    "timestep: tsc_over_resampler_3": ("tsc", "resampler_3"),
    "no gates: tsc_over_tsc_adaln_zero": ("tsc", "tsc_adaln_zero"),
    "tsc_over_base": ("tsc", "base"),
    "clip beside: tsc_beside_clip_over_tsc": ("tsc_beside_clip", "tsc"),
    "queries_over_tsc": ("queries", "tsc"),
    "lavi_over_tsc": ("lavi", "tsc"),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which arms")
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time")
    parser.add_argument("--folder", type=Path, default=Path("build/connectors"), help="for the runs")
    parser.add_argument("--out", type=Path, help="file for the line of JSON")
    given = parser.parse_args()
    quiet_libraries()
    try:
        seeds = run_arms({arm: ARMS[arm] for arm in given.arms}, given.seeds, given.folder, given.jobs)
    except (ValueError, OSError) as error:
        raise SystemExit(f"connectors: {one_line(error)}") from None
    both = pooled(seeds)
    table = summarise(both)
    gain = gains(both, {name: pair for name, pair in GAINS.items() if set(pair) <= set(both)})
    print_arms(table)
    for name, measures in gain.items():
        full = measures["full"]
        print(f"{name}: full {full['mean']:+.3f} [{full['interval'][0]:+.3f}, {full['interval'][1]:+.3f}]")
    line = json.dumps({"seeds": given.seeds, "by_seed": by_seed(seeds), "oracle": table, "gain": gain})
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
