"""What a stage leaves behind for other programs: its LoRA in both namings, a model card, and a grid of pictures.

Every file is written under another name and renamed when whole, the LoRA last; nothing in them depends on the clock,
so that the same run gives the same files.
"""

import json
import shutil
from pathlib import Path

from sdjax.config import RunConfig, Stage
from sdjax.formats.lora_file import save_lora
from sdjax.formats.safetensors_file import replacing
from sdjax.pipeline import StableDiffusion
from sdjax.train.stages import Adapters, StagePlan

PEFT_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "lora.safetensors"


def export(
    folder: Path, config: RunConfig, plan: StagePlan, model: StableDiffusion, adapters: Adapters, grid: Path | None
) -> None:
    """Write `lora.safetensors` (kohya's keys), the same in PEFT's keys, README.md and, if there is one, the grid."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = _metadata(config, plan)
    save_lora(folder / PEFT_FILE, adapters, model.params, style="peft")
    if grid is not None:
        with replacing(folder / "samples.png") as file, grid.open("rb") as source:
            shutil.copyfileobj(source, file)
    with replacing(folder / "README.md") as file:
        file.write(_card(config, plan, has_grid=grid is not None).encode())
    save_lora(folder / KOHYA_FILE, adapters, model.params, style="kohya", metadata=metadata)


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
        "ss_min_snr_gamma": str(stage.min_snr_gamma or None),
        "modelspec.title": stage.name,
    }


def _card(config: RunConfig, plan: StagePlan, *, has_grid: bool) -> str:
    stage, data = plan.stage, plan.data
    captions = list(dict.fromkeys(record.caption for record in plan.records if record.caption))
    earlier = [s.name for s in config.stages[: plan.number]]
    hub_id = not Path(config.model).exists() and "/" in config.model
    settings = {
        "base model": f"`{config.model}`",
        "trained": f"LoRA of {', '.join(stage.lora_parts)}, rank {stage.lora_rank}, targets {_listed(stage)}",
        "on top of": ", ".join(earlier) + " (included in these files)" if earlier else "the base model",
        "images": f"{len(plan.records)} at {data.resolution} x {data.resolution}",
        "steps": f"{stage.steps} of {plan.examples} images",
        "learning rate": f"{json.dumps(stage.learning_rate)}, {stage.schedule}, warm-up {stage.warmup_steps}",
        "seed": str(config.seed),
        "clip skip": str(plan.recipe.hidden.clip_skip),
        "number type": config.dtype,
    }
    prompt = (config.validation.prompts or tuple(captions) or ("a prompt",))[0]
    lines = [
        "---",
        *([f"base_model: {config.model}"] if hub_id else []),
        "library_name: diffusers",
        "tags: [stable-diffusion, text-to-image, lora, sdjax]",
        "---",
        f"# {stage.name}",
        "",
        "A LoRA for Stable Diffusion, trained with sdjax.",
        "",
        *(["![before and after](samples.png)", ""] if has_grid else []),
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "",
        "## Prompts",
        "There is no trigger word beyond what the captions hold. Captions it was trained with, for example:",
        "",
        *(f"- {caption}" for caption in captions[:8]),
        "",
        "## Use",
        f"- sdjax: `python -m sdjax.generate --model {config.model} --lora {KOHYA_FILE} --prompt {json.dumps(prompt)}`",
        f"- diffusers: `pipeline.load_lora_weights(FOLDER, weight_name={json.dumps(PEFT_FILE)})`",
        f"- A1111: copy `{KOHYA_FILE}` to `models/Lora/{stage.name}.safetensors`, prompt `<lora:{stage.name}:1>`",
        f"- ComfyUI: copy `{KOHYA_FILE}` to `models/loras/`, then the node Load LoRA",
        "",
        "## Licence",
        "These weights derive from the base model and from the training images: the licences of both apply. Name them",
        "here before you share the files.",
        "",
    ]
    return "\n".join(lines)


def _listed(stage: Stage) -> str:
    targets = stage.lora_targets
    return targets if isinstance(targets, str) else ", ".join(f"`{pattern}`" for pattern in targets)
