"""Exports the results of a stage for other programs: LoRA files, embedding files, a model, a card and pictures.

Each file is either complete or absent. The same run gives the same files: of the clock they hold only the day on which
the run began.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from sdjax import lora
from sdjax.formats.embedding_file import TEXT_MODELS, file_name, save_embedding
from sdjax.formats.lora_file import KOHYA_FILE, PEFT_FILE, is_plain, save_lora
from sdjax.model import Model
from sdjax.runtime.whole_file import replacing
from sdjax.text.encoding import TEXT_ENCODERS
from sdjax.train import snapshots
from sdjax.train.config import RunConfig
from sdjax.train.file_metadata import lora_metadata, own_words, word_metadata
from sdjax.train.results import Results
from sdjax.train.sharing import LICENCE, with_licence
from sdjax.train.stages import Run, StagePlan
from sdjax.trees import layers


def export(
    folder: Path,
    run: Run,
    plan: StagePlan,
    results: Results,
    grid: Path | None,
    *,
    date: str,
    step: int | None = None,
) -> None:
    """Writes the results of all stages up to this one. A model holds the LoRAs of [base], the other files do not.

    The files are `lora.safetensors` with kohya's keys, `pytorch_lora_weights.safetensors` with PEFT's keys unless there
    is LoHa or LoKr, WORD.safetensors for each new word, README.md, and `samples.png` if there is a `grid` to copy. If
    all weights of a part were trained, `model/` holds the whole model. README.md is written last.
    date: the day on which the run began. step: that of a snapshot, see `snapshots`. Its files have the step in their
    names; none of them has PEFT's keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outline, named = plan.recipe.outline, lambda name: name if step is None else snapshots.numbered(name, step)
    if results.adapters:
        metadata = lora_metadata(run, plan, date, step)
        save_lora(folder / named(KOHYA_FILE), results.adapters, outline.shapes, style="kohya", metadata=metadata)
        if step is None and is_plain(results.adapters):
            save_lora(folder / PEFT_FILE, results.adapters, outline.shapes, style="peft")
    for word, place in own_words(run, plan).items():
        vectors = {name: np.asarray(rows[place.start : place.stop]) for name, rows in results.rows.items()}
        save_embedding(folder / named(file_name(word)), word, vectors, metadata=word_metadata(run, plan, date, word))
    if results.weights:
        _save_model(folder / "model", run.config, plan, results)
    if grid is not None:
        with replacing(folder / named(snapshots.GRID)) as file, grid.open("rb") as source:
            shutil.copyfileobj(source, file)
    with replacing(folder / named(snapshots.CARD)) as file:
        file.write(_card(run, plan, results, step=step, has_grid=grid is not None).encode())


def _save_model(folder: Path, config: RunConfig, plan: StagePlan, results: Results) -> None:
    """Writes the model with its trained weights, but without adapters and new words, which have separate files."""
    outline = plan.recipe.outline
    params = {
        part: results.weights[part] if part in results.weights else outline.load_weights(part, dtype=jnp.float32)
        for part in outline.shapes
    }
    scheduler = {**outline.folder.scheduler, **outline.schedule.config}
    outline = dataclasses.replace(outline, folder=dataclasses.replace(outline.folder, scheduler=scheduler))
    Model(outline, params).save(folder, dtype=config.export_dtype)


def _card(run: Run, plan: StagePlan, results: Results, *, step: int | None, has_grid: bool) -> str:
    """Returns the model card, in Markdown."""
    config, stage = run.config, plan.stage
    plan = plan._replace(words={word: len(place) for word, place in own_words(run, plan).items()})
    beneath = _beneath(config, results)
    captions = list(dict.fromkeys(caption for record in plan.records[:1000] if (caption := record.caption)))
    earlier = [s.name for s in config.stages[: plan.number]]
    hub_id = not Path(config.model).exists() and "/" in config.model
    settings = {
        "base model": f"`{config.model}`",
        "trained": "; ".join(_trained(plan)),
        **({"begun from": f"`{Path(stage.lora_init).name}`"} if stage.lora_init else {}),
        "on top of": ", ".join(earlier) + " (included in these files)" if earlier else "the base model",
        **({"with": beneath} if beneath else {}),
        "images": ", ".join(f"{len(images)} at {size.width} x {size.height}" for size, images in plan.buckets.items()),
        "steps": ("" if step is None else f"{step} of ") + f"{stage.steps}, each of {plan.examples} images",
        "learning rate": f"{json.dumps(stage.learning_rate)}, {stage.schedule}, warm-up {stage.warmup_steps}",
        "seed": str(config.seed),
        "clip skip": str(plan.recipe.hidden.clip_skip),
        "number type": config.dtype,
    }
    example = " ".join(plan.words) or next(iter(captions), "a prompt")
    prompt = next((prompt for prompt in config.validation.prompts if prompt), example)
    tags = [
        *(["lora", "template:sd-lora"] if results.adapters else []),
        *(["textual_inversion"] if plan.words else []),
        "sdjax",
    ]
    lines = [
        "---",
        *([f"base_model: {config.model}"] if hub_id else []),
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        f"tags: [stable-diffusion, text-to-image, diffusers, {', '.join(tags)}]",
        *(
            [f"instance_prompt: {json.dumps(trigger)}"]
            if (trigger := " ".join(plan.words) or plan.data.caption)
            else []
        ),
        *(["widget:", f"- text: {json.dumps(prompt)}", "  output:", f"    url: {snapshots.GRID}"] if has_grid else []),
        "---",
        f"# {stage.name}",
        "",
        "For Stable Diffusion, trained with sdjax.",
        "",
        *([f"![{'before and after' if step is None else 'samples'}]({snapshots.GRID})", ""] if has_grid else []),
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "",
        "## Prompts",
        "New words: " + ", ".join(f"`{word}` ({count} vectors)" for word, count in plan.words.items())
        if plan.words
        else "There is no trigger word besides those in the captions.",
        *(["", "Captions it was trained with, for example:", ""] if captions else []),
        *(f"- {caption}" for caption in captions[:8]),
        "",
        "## Use",
        *_use(config, plan, results, prompt),
        "",
        f"{LICENCE}",
        "These weights derive from the base model and from the training images: the licences of both apply. Name them",
        "here before you share the files.",
        "",
    ]
    card = "\n".join(lines)
    return with_licence(card, config.license) if config.license else card


def _beneath(config: RunConfig, results: Results) -> str:
    """Returns what the files of [base] are to the export, in words."""
    loras = [f"`{Path(item.path).name}` at weight {item.weight:g}" for item in config.base.loras]
    words = [f"`{Path(path).name}`" for path in config.base.embeddings]
    held, apart = (loras, words) if results.weights else ([], loras + words)
    return "; ".join(
        [
            *([f"{', '.join(held)} (included in `model/`)"] if held else []),
            *([f"{', '.join(apart)} (not in these files: use them together)"] if apart else []),
        ]
    )


def _trained(plan: StagePlan) -> list[str]:
    """Returns what the stage trains, in words."""
    stage, parts = plan.stage, plan.stage.parts
    adapted = [part for part, kind in parts.items() if kind == "lora"]
    trees = [lora.join(plan.state.trainable[part], plan.frozen["scales"][part]) for part in adapted]
    adapters = [layer for tree in trees for _, layer in layers(tree, "scale")]
    kinds = ", ".join(sorted(set(map(lora.form, adapters))))
    ranks = ", ".join(map(str, sorted({rank for rank in map(lora.rank, adapters) if rank})) or ["whole matrices"])
    whole = [part for part, kind in parts.items() if kind == "weights"]
    targets = stage.lora_targets
    listed = targets if isinstance(targets, str) else ", ".join(f"`{pattern}`" for pattern in targets)
    listed = f"the {len(adapters)} layers of the file" if stage.lora_init else listed
    return [
        *([f"{kinds} of {', '.join(adapted)}, rank {ranks}, targets {listed}"] if adapted else []),
        *([f"Textual Inversion of {', '.join(stage.placeholder_tokens)}"] if stage.placeholder_tokens else []),
        *([f"all weights of {', '.join(whole)}"] if whole else []),
    ]


def _use(config: RunConfig, plan: StagePlan, results: Results, prompt: str) -> list[str]:
    """Returns how other programs load the files, as items of a list in Markdown."""
    name, files = plan.stage.name, {word: file_name(word) for word in plan.words}
    loras = [] if results.weights else config.base.loras
    model = "model" if results.weights else config.model
    flags = [
        f"--model {model}",
        *(f"--lora {Path(item.path).name}:{item.weight:g}" for item in loras),
        *([f"--lora {KOHYA_FILE}"] if results.adapters else []),
        *(f"--embedding {Path(path).name}" for path in config.base.embeddings),
        *(f"--embedding {file}" for file in files.values()),
        f"--prompt {json.dumps(prompt)}",
        *([] if (guidance := config.validation.guidance) is None else [f"--guidance {guidance:g}"]),
    ]
    merging = f"sdjax convert {config.model} {name}.safetensors --to single_file --lora {KOHYA_FILE}"
    lines = [f"- sdjax: `python -m sdjax.generate {' '.join(flags)}`"]
    if results.weights:
        lines.append('- diffusers: `DiffusionPipeline.from_pretrained("model")`')
    if plain := is_plain(results.adapters) and bool(results.adapters):
        lines += [f"- diffusers: `pipeline.load_lora_weights(FOLDER, weight_name={json.dumps(PEFT_FILE)})`"]
    if any("magnitude" in layer for _, layer in layers(results.adapters, "scale")):
        lines += [f"- A1111, ComfyUI, kohya's scripts: they read DoRA wrongly; merge it into the model: `{merging}`"]
    elif results.adapters:
        lines += [
            f"- A1111: copy `{KOHYA_FILE}` to `models/Lora/{name}.safetensors`, prompt `<lora:{name}:1>`",
            f"- ComfyUI: copy `{KOHYA_FILE}` to `models/loras/`, then the node Load LoRA",
        ]
    if results.adapters and not plain:
        lines += [f"- diffusers does not read LoHa and LoKr; merge it into the model: `{merging}`"]
    for word, file in files.items():
        lines += use_in_diffusers(word, file, tuple(results.rows))
        lines += [f"- A1111 and ComfyUI: copy `{file}` to `embeddings/`; there the word is `{Path(file).stem}`"]
    return lines


def use_in_diffusers(word: str, file: str, text_models: Sequence[str]) -> list[str]:
    """Returns how diffusers loads a word, as an item of a list in Markdown. With two text models it takes a call each.

    text_models: those that the word has vectors for.
    """
    token = json.dumps(word)
    if len(text_models) == 1:
        arguments = f"FOLDER, weight_name={json.dumps(file)}, token={token}"
        return [f"- diffusers: `pipeline.load_textual_inversion({arguments})`"]
    return [
        f"- diffusers: `words = safetensors.torch.load_file({json.dumps(file)})`, then for each text model",
        *(
            f"  `pipeline.load_textual_inversion(words[{json.dumps(key)}], token={token}, "
            f"text_encoder=pipeline.{model}, tokenizer=pipeline.{TEXT_ENCODERS[model]})`"
            for key, model in TEXT_MODELS.items()
        ),
    ]
