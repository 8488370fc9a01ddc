"""A model card, in the format of the Hugging Face hub, of what a run has recorded; what it has not is left out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.shards import VIEWS, ViewInfo, read_info
from pipeline.storage import Folder

from .recipe import Recipe
from .report import read_scores

if TYPE_CHECKING:
    from training.configuration import TrainingConfig

CARD = """---
{front}
---

# {title}

A {connector} connector, through which {language_model} drives {denoiser}: {parameters}, trained on {samples:,} samples.
Made with densebridge, recipe `{recipe}`, training `{training}`.

{sections}"""


def model_card(recipe: Recipe, training: str, release: Path, to: str) -> str:
    """The card's text. The same records give the same text."""
    from training.releases import read_release

    _, config = recipe.training(training)
    facts = read_release(release)
    views = _views(recipe.folder, facts["phases"])
    sections = {
        "Use": _use(config, to),
        "Models": _models(facts),
        "Data": _data(recipe, views),
        "Training": _training(facts, release.parent / "log.jsonl"),
        "Scores": _scores(recipe),
    }
    return CARD.format(
        front=_front(config, to),
        title=f"{recipe.name}: {training}",
        connector=config.connector.kind,
        language_model=_name(config.language_model.model),
        denoiser=_name(config.denoiser.model),
        parameters=_trained(release, facts),
        samples=facts["samples"],
        recipe=recipe.name,
        training=training,
        sections="\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items() if text) + "\n",
    )


def _name(model: str) -> str:
    """As on the hub; of a folder the last part, for the rest is of one machine alone."""
    from training.lora_files import is_on_hub

    return model if is_on_hub(model) else Path(model).name


def _front(config: TrainingConfig, to: str) -> str:
    from huggingface_hub import ModelCardData

    from training.lora_files import is_on_hub

    on_hub = [name for name in (config.denoiser.model, config.language_model.model) if is_on_hub(name)]
    card = ModelCardData(
        base_model=on_hub or None,
        base_model_relation="adapter" if on_hub else None,
        library_name="diffusers" if to == "diffusers" else None,
        pipeline_tag="text-to-image",
        tags=["densebridge", config.connector.kind, *(["ella"] if to == "ella" else [])],
    )
    return card.to_yaml()


def _trained(release: Path, facts: Mapping[str, Any]) -> str:
    """What was trained, counted from the files' headers."""
    from safetensors import safe_open

    counts = {}
    for name in sorted(name for name in facts["files"] if not name.startswith("ema.")):
        with safe_open(release / name, framework="numpy") as tensors:
            shapes = [tensors.get_slice(key).get_shape() for key in tensors.keys()]  # noqa: SIM118
        counts[name.removesuffix(".safetensors").replace("_", " ")] = sum(_product(shape) for shape in shapes)
    each = f" ({', '.join(f'{part} {count:,}' for part, count in counts.items())})" if len(counts) > 1 else ""
    return f"{sum(counts.values()):,} parameters{each}"


def _product(shape: Sequence[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _use(config: TrainingConfig, to: str) -> str:
    if to == "diffusers":
        return (
            "With densebridge installed, FOLDER being this one:\n\n```python\n"
            "from diffusers import DiffusionPipeline\n\n"
            'pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=f"{FOLDER}/pipeline.py", '
            "trust_remote_code=True)\n"
            'pipeline("a dense prompt", num_inference_steps=50).images[0].save("picture.png")\n```' + _apart(config)
        )
    from training.ella import arguments, file_name

    name = file_name(config.connector, config.language_model)
    given = ", ".join(f"{key}={value}" for key, value in arguments(config.connector).items())
    built = f"`ELLA({given})`" if given else "`ELLA()`"
    pads = (
        "It was trained without sight of pads: give it prompts of flexible length."
        if getattr(config.connector, "use_mask", "all") == "mask"
        else f"It was trained on prompts padded to {config.language_model.max_length} tokens."
    )
    return f"`{name}` holds the weights of {built} in ELLA's code, in float16. {pads}"


def _apart(config: TrainingConfig) -> str:
    """Where each LoRA lies by itself, and how it is loaded."""
    from training.denoisers.files import network_facts
    from training.lora_files import diffusers_loads, language_model_class

    places = []
    if config.denoiser.lora and diffusers_loads(network_facts(config.denoiser)["_class_name"]):
        places.append("`pytorch_lora_weights.safetensors` (the denoiser's, for `load_lora_weights` of diffusers)")
    elif config.denoiser.lora:
        call = 'PeftModel.from_pretrained(pipeline.transformer, f"{FOLDER}/denoiser_lora")'
        places.append(f"`denoiser_lora/` (the denoiser's, for peft: `{call}` puts it into the base's transformer)")
    if config.language_model.lora:
        kind = language_model_class(config.language_model)
        call = 'PeftModel.from_pretrained(model, f"{FOLDER}/language_model_lora")'
        places.append(f"`language_model_lora/` (the language model's, for peft: `{call}` with `model` a `{kind}`)")
    return f"\n\nThe LoRA also lie by themselves: {' and '.join(places)}." if places else ""


def _models(facts: Mapping[str, Any]) -> str:
    rows = []
    for name in ("language_model", "beside", "denoiser", "connector"):
        told = facts[name]
        if told is not None:
            names = {key: value for key, value in told.items() if value is not None and value != ""}
            rows += [(name.replace("_", " "), key.replace("_", " "), _told(value)) for key, value in names.items()]
    return _table(("", "setting", "value"), rows)


def _views(dataset: Folder, phases: Sequence[Mapping[str, Any]]) -> list[ViewInfo]:
    """The phases' views, those that are still as they were."""
    trained = {name: told["manifest_sha256"] for phase in phases for name, told in phase["views"].items()}
    names = [f"{VIEWS}/{view}.json" for view in trained]
    found = (read_info(dataset, name) for name in names if dataset.exists(name))
    return [info for info in found if info is not None and info.manifest_sha256 == trained[info.view]]


def _data(recipe: Recipe, views: Sequence[ViewInfo]) -> str:
    if not views:
        return ""
    made_by = {name: told for info in views for name, told in info.made_by.items()}
    source = Path(recipe.source.path).name
    parts = [f"Pictures and texts of `{source}`.", *_captions(made_by), *_thresholds(made_by)]
    rows = []
    for info in views:
        told = info.made_by.get(f"pack_{info.view}", {}).get("settings", {})
        tokens = ", ".join(f"{name} {facts['max_length']}" for name, facts in info.tokenizers.items())
        rows.append((info.view, f"{info.samples:,}", f"{info.resolution} px", tokens, f"`{told.get('where', 'true')}`"))
    parts.append(_table(("view", "samples", "resolution", "tokens", "condition"), rows))
    funnel = _funnel(recipe, made_by)
    if funnel:
        parts.append("What became of the rows in the last build that had something to do:")
        parts.append(_table(("stage", "in", "kept", "dropped", "failed"), funnel))
    return "\n\n".join(parts)


def _captions(made_by: Mapping[str, Any]) -> Iterable[str]:
    for told in made_by.values():
        engine, prompts = told["settings"].get("engine"), told["settings"].get("prompts")
        if isinstance(engine, dict) and prompts:
            asked = "\n".join(f"> {line}" for prompt in prompts for line in str(prompt.get("text")).splitlines())
            yield f"Captions by {_captioner(str(engine.get('model')), engine.get('revision'))}, which was asked:\n\n{asked}"


def _captioner(model: str, revision: str | None) -> str:
    """A folder has no revision."""
    name = _name(model)
    return f"{name}@{revision or 'main'}" if name == model else name


def _thresholds(made_by: Mapping[str, Any]) -> Iterable[str]:
    asked = {name: value for name, value in made_by.get("clip_filter", {}).get("settings", {}).items() if value}
    if asked:
        yield "CLIP filter: " + ", ".join(f"{name} {_told(value)}" for name, value in asked.items()) + "."


def _funnel(recipe: Recipe, stages: Iterable[str]) -> list[tuple[str, ...]]:
    """A row for each stage, of the latest build of this recipe that finished."""
    dataset = recipe.folder
    for run in sorted(dataset.folders("runs"), reverse=True):
        try:
            found = json.loads(dataset.read(f"runs/{run}/run.json"))
            told = {name: found["stages"][name] for name in stages if "in" in found["stages"].get(name, {})}
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # another job's, or damaged: it only informs
            continue
        if found.get("job") == "build" and found.get("recipe") == recipe.name and told:
            return [
                (name, f"{row['in']:,}", f"{row['kept']:,}", _ends(row["dropped"]), _ends(row["failed"]))
                for name, row in told.items()
            ]
    return []


def _ends(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())


def _training(facts: Mapping[str, Any], log: Path) -> str:
    settings = facts["training"]
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    rows = []
    for number, phase in enumerate(facts["phases"]):
        losses = [line["loss"] for line in lines if line["phase"] == number and line["loss"] is not None]
        loss = f"{losses[0]:.4f} → {losses[-1]:.4f}" if losses else ""
        views = " + ".join(_share(name, told["weight"], len(phase["views"])) for name, told in phase["views"].items())
        size = (views, f"{phase['resolution']} px", f"{phase['samples']:,}", f"{phase['batch']:,}")
        rows.append((*size, f"{phase['rate']:g} {phase['schedule']}", loss))
    samples = ("caption_drop", "crop", "flip")
    names = ("weight_decay", "betas", "clip", *samples, "weighting", "ema_decay", "precision", "seed")
    asked = {name: settings[name] for name in names}
    if settings["weighting"] == "min_snr":
        asked["gamma"] = settings["gamma"]
    told = ", ".join(f"{name.replace('_', ' ')} {_told(value)}" for name, value in asked.items() if value is not None)
    timesteps = f"timesteps {settings['timesteps']['kind'].replace('_', ' ')}"
    if (times := settings["timesteps_per_encoding"]) > 1:
        timesteps += f", {times} for each encoding of a sample"
    head = ("view", "resolution", "samples", "batch", "rate", "loss, first and last logged")
    best = facts.get("validation")
    chosen = (
        f" The weights are those of the best {best['metric'].replace('_', ' ')}: {best[best['metric']]:.4f}."
        if best
        else ""
    )
    return f"{_table(head, rows)}\n\nAdamW; {told}; {timesteps}.{chosen}"


def _share(view: str, weight: float, views: int) -> str:
    """A phase's view, with its weight where there are several."""
    return view if views == 1 else f"{weight:g} {view}"


def _scores(recipe: Recipe) -> str:
    found = read_scores(Path(recipe.runs) / "evaluation")
    if found is None:
        return ""
    rows = []
    for arm, row in found.table.items():
        cells = (row.get(measure) for measure in found.measures)
        told = (f"{c['corrected']:.3f} [{c['interval'][0]:.3f}, {c['interval'][1]:.3f}]" if c else "" for c in cells)
        rows.append((arm, str(row["n"]), *told))
    table = _table(("arm", "prompts", *found.measures), rows)
    return f"Held-out prompts, corrected for chance, with 95 % intervals over prompts:\n\n{table}"


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
