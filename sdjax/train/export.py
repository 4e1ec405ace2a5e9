"""What a stage leaves behind for other programs: its LoRA in both namings, a model card, and a grid of pictures.

Every file is written under another name and renamed when whole, the LoRA last; nothing in them depends on the clock,
so that the same run gives the same files.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax.formats.embedding_file import file_name, save_embedding
from sdjax.formats.lora_file import save_lora
from sdjax.loading import load_weights
from sdjax.model import Model
from sdjax.runtime.whole_file import replacing
from sdjax.train.config import RunConfig
from sdjax.train.results import Results
from sdjax.train.stages import StagePlan

PEFT_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora.safetensors"


def export(folder: Path, config: RunConfig, plan: StagePlan, made: Results, grid: Path | None) -> None:
    """Write all that the stages have made, this one the last.

    `lora.safetensors` (kohya's keys) and the same in PEFT's keys; WORD.safetensors for each new word; `model/` if a
    model was trained as a whole, with the others as they were; README.md and, if there is one, the grid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outline, metadata = plan.recipe.outline, _metadata(config, plan)
    if made.adapters:
        save_lora(folder / PEFT_FILE, made.adapters, outline.shapes, style="peft")
    for word, rows in words(plan, made).items():
        save_embedding(folder / file_name(word), word, rows)
    if made.weights:
        _save_model(folder / "model", config, plan, made)
    if grid is not None:
        with replacing(folder / "samples.png") as file, grid.open("rb") as source:
            shutil.copyfileobj(source, file)
    with replacing(folder / "README.md") as file:
        file.write(_card(config, plan, made, has_grid=grid is not None).encode())
    if made.adapters:
        save_lora(folder / KOHYA_FILE, made.adapters, outline.shapes, style="kohya", metadata=metadata)


def words(plan: StagePlan, made: Results) -> dict[str, dict[str, Any]]:
    """Each new word's vectors [n, D] by text model."""
    found, first = {}, 0
    for word, count in plan.words.items():
        found[word] = {name: np.asarray(rows[first : first + count]) for name, rows in made.rows.items()}
        first += count
    return found


def _save_model(folder: Path, config: RunConfig, plan: StagePlan, made: Results) -> None:
    """The models trained as a whole with the rest of the base; adapters and new words are files of their own."""
    outline = plan.recipe.outline
    params = {
        part: made.weights[part] if part in made.weights else load_weights(outline, part, dtype=jnp.float32)
        for part in outline.shapes
    }
    scheduler = {**outline.folder.scheduler, **outline.schedule.config}
    outline = dataclasses.replace(outline, folder=dataclasses.replace(outline.folder, scheduler=scheduler))
    temporary = folder.with_name(".model-new")
    shutil.rmtree(temporary, ignore_errors=True)
    Model(outline, params).save(temporary, dtype=config.export_dtype)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def _metadata(config: RunConfig, plan: StagePlan) -> dict[str, str]:
    """What A1111 and others show of a LoRA."""
    stage = plan.stage
    return {
        "ss_output_name": stage.name,
        "ss_sd_model_name": Path(config.model).name,
        "ss_resolution": f"({plan.data.resolution}, {plan.data.resolution})",
        "ss_clip_skip": str(plan.recipe.hidden.clip_skip),
        "ss_seed": str(config.seed),
        "ss_steps": str(stage.steps),
        "ss_learning_rate": json.dumps(stage.learning_rate),
        "ss_lr_scheduler": stage.schedule,
        "ss_optimizer": stage.optimizer,
        "ss_batch_size_per_device": str(plan.data.batch_size),
        "ss_gradient_accumulation_steps": str(plan.data.accumulation),
        "ss_num_train_images": str(len(plan.records)),
        "ss_enable_bucket": str(plan.data.buckets),
        "ss_bucket_info": json.dumps({"buckets": dict(enumerate(_buckets(plan)))}),
        "ss_min_snr_gamma": str(stage.min_snr_gamma or None),
        "modelspec.title": stage.name,
    }


def _buckets(plan: StagePlan) -> list[dict[str, Any]]:
    """The training pictures by size, as kohya's scripts write it."""
    return [{"resolution": (size.width, size.height), "count": len(found)} for size, found in plan.buckets.items()]


def _card(config: RunConfig, plan: StagePlan, made: Results, *, has_grid: bool) -> str:
    stage = plan.stage
    captions = list(dict.fromkeys(caption for record in plan.records if (caption := record.caption)))
    earlier = [s.name for s in config.stages[: plan.number]]
    hub_id = not Path(config.model).exists() and "/" in config.model
    settings = {
        "base model": f"`{config.model}`",
        "trained": "; ".join(_trained(plan)),
        "on top of": ", ".join(earlier) + " (included in these files)" if earlier else "the base model",
        "images": ", ".join(f"{len(found)} at {size.width} x {size.height}" for size, found in plan.buckets.items()),
        "steps": f"{stage.steps} of {plan.examples} images",
        "learning rate": f"{json.dumps(stage.learning_rate)}, {stage.schedule}, warm-up {stage.warmup_steps}",
        "seed": str(config.seed),
        "clip skip": str(plan.recipe.hidden.clip_skip),
        "number type": config.dtype,
    }
    example = " ".join(plan.words) or next(iter(captions), "a prompt")
    prompt = next((prompt for prompt in config.validation.prompts if prompt), example)
    tags = [*(["lora"] if made.adapters else []), *(["textual_inversion"] if made.rows else []), "sdjax"]
    lines = [
        "---",
        *([f"base_model: {config.model}"] if hub_id else []),
        "library_name: diffusers",
        f"tags: [stable-diffusion, text-to-image, {', '.join(tags)}]",
        "---",
        f"# {stage.name}",
        "",
        "For Stable Diffusion, trained with sdjax.",
        "",
        *(["![before and after](samples.png)", ""] if has_grid else []),
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "",
        "## Prompts",
        "New words: " + ", ".join(f"`{word}` ({count} vectors)" for word, count in plan.words.items())
        if plan.words
        else "There is no trigger word beyond what the captions hold.",
        *(["", "Captions it was trained with, for example:", ""] if captions else []),
        *(f"- {caption}" for caption in captions[:8]),
        "",
        "## Use",
        *_use(config, plan, made, prompt),
        "",
        "## Licence",
        "These weights derive from the base model and from the training images: the licences of both apply. Name them",
        "here before you share the files.",
        "",
    ]
    return "\n".join(lines)


def _trained(plan: StagePlan) -> list[str]:
    stage, parts = plan.stage, plan.stage.parts
    adapted = [part for part, kind in parts.items() if kind == "lora"]
    whole = [part for part, kind in parts.items() if kind == "weights"]
    targets = stage.lora_targets
    listed = targets if isinstance(targets, str) else ", ".join(f"`{pattern}`" for pattern in targets)
    return [
        *([f"LoRA of {', '.join(adapted)}, rank {stage.lora_rank}, targets {listed}"] if adapted else []),
        *([f"Textual Inversion of {', '.join(stage.placeholder_tokens)}"] if stage.placeholder_tokens else []),
        *([f"all weights of {', '.join(whole)}"] if whole else []),
    ]


def _use(config: RunConfig, plan: StagePlan, made: Results, prompt: str) -> list[str]:
    """How other programs load the files."""
    name, files = plan.stage.name, {word: file_name(word) for word in plan.words}
    model = "model" if made.weights else config.model
    flags = [
        f"--model {model}",
        *([f"--lora {KOHYA_FILE}"] if made.adapters else []),
        *(f"--embedding {file}" for file in files.values()),
        f"--prompt {json.dumps(prompt)}",
    ]
    lines = [f"- sdjax: `python -m sdjax.generate {' '.join(flags)}`"]
    if made.weights:
        lines.append('- diffusers: `DiffusionPipeline.from_pretrained("model")`')
    if made.adapters:
        lines += [
            f"- diffusers: `pipeline.load_lora_weights(FOLDER, weight_name={json.dumps(PEFT_FILE)})`",
            f"- A1111: copy `{KOHYA_FILE}` to `models/Lora/{name}.safetensors`, prompt `<lora:{name}:1>`",
            f"- ComfyUI: copy `{KOHYA_FILE}` to `models/loras/`, then the node Load LoRA",
        ]
    for word, file in files.items():
        lines += [
            f"- diffusers: `pipeline.load_textual_inversion(FOLDER, weight_name={json.dumps(file)}, "
            f"token={json.dumps(word)})`",
            f"- A1111 and ComfyUI: copy `{file}` to `embeddings/`; there the word is `{Path(file).stem}`",
        ]
    return lines
