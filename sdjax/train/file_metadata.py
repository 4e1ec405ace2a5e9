"""The metadata of exported files: what kohya's scripts, A1111 and ModelSpec record, and the files to use them with."""

import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

from sdjax.formats.families import ARCHITECTURES, CONTEXT_WIDTHS, SD2
from sdjax.formats.lora_kohya import context_width
from sdjax.outline import Outline
from sdjax.train.results import places
from sdjax.train.stages import Run, StagePlan


def own_words(run: Run, plan: StagePlan) -> dict[str, range]:
    """Returns the places of the words that the run made: all but those of [base]."""
    return {word: place for word, place in places(plan.words).items() if word not in run.beneath.words}


def lora_metadata(run: Run, plan: StagePlan, date: str, step: int | None) -> dict[str, str]:
    """Returns the metadata of a LoRA file that A1111 and other programs show."""
    config, stage, architecture = run.config, plan.stage, _architecture(plan.recipe.outline)
    return {
        "ss_output_name": stage.name,
        "ss_sd_model_name": Path(config.model).name,
        "ss_resolution": f"({plan.data.resolution}, {plan.data.resolution})",
        "ss_clip_skip": str(plan.recipe.hidden.clip_skip),
        "ss_seed": str(config.seed),
        "ss_steps": str(stage.steps if step is None else step),
        "ss_max_train_steps": str(stage.steps),
        "ss_learning_rate": json.dumps(stage.learning_rate),
        "ss_lr_scheduler": stage.schedule,
        "ss_optimizer": stage.optimizer,
        "ss_batch_size_per_device": str(plan.data.batch_size),
        "ss_gradient_accumulation_steps": str(plan.data.accumulation),
        "ss_num_train_images": str(len(plan.records)),
        "ss_enable_bucket": str(plan.data.buckets),
        "ss_bucket_info": json.dumps({"buckets": dict(enumerate(_buckets(plan)))}),
        "ss_min_snr_gamma": str(stage.min_snr_gamma or None),
        **({"modelspec.architecture": f"{architecture}/lora"} if architecture else {}),
        **_modelspec(run, plan, date, " ".join(own_words(run, plan)) or plan.data.caption),
        **_base_entry(run),
        **(
            {"sdjax_lora_init": json.dumps(_file(run, f"stages.{plan.number}.lora_init", stage.lora_init))}
            if stage.lora_init
            else {}
        ),
    }


def word_metadata(run: Run, plan: StagePlan, date: str, word: str) -> dict[str, str]:
    """Returns the metadata of the file of a word."""
    kind = {"modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "diffusers"}
    if architecture := _architecture(plan.recipe.outline):
        kind["modelspec.architecture"] = f"{architecture}/textual-inversion"
    return kind | _modelspec(run, plan, date, word) | _base_entry(run)


def _modelspec(run: Run, plan: StagePlan, date: str, trigger: str) -> dict[str, str]:
    """Returns the entries of ModelSpec (1.0.1) that depend on the run: what programs show of a file, and its defaults.

    The entries of a LoRA that depend on the file alone, such as its hash, come from `formats`.
    """
    config, size, words = run.config, plan.data.resolution, " ".join(own_words(run, plan))
    hints = [f"new words: {words}"] if words else []
    if run.beneath.loras:
        hints += ["with " + ", ".join(f"{Path(lora.path).stem} at {lora.weight:g}" for lora in config.base.loras)]
    entries = {
        "title": plan.stage.name,
        "date": date,
        "resolution": f"{size}x{size}",
        "prediction_type": "v" if _predicts_velocity(plan.recipe.outline) else "epsilon",
        "encoder_layer": str(plan.recipe.hidden.clip_skip),
        "trigger_phrase": trigger,
        "usage_hint": "; ".join(hints),
        "license": config.license,
    }
    return {f"modelspec.{name}": value for name, value in entries.items() if value}


def _predicts_velocity(outline: Outline) -> bool:
    return outline.schedule.prediction_type == "v_prediction"


def _architecture(outline: Outline) -> str:
    """Returns ModelSpec's name of the base model; empty for a model of another size."""
    family = CONTEXT_WIDTHS.get(context_width(outline.shapes) or 0)
    if family == SD2 and _predicts_velocity(outline):
        return "stable-diffusion-v2-768-v"
    return ARCHITECTURES.get(family or "", "")


def today() -> str:
    """Returns the day, in UTC; SOURCE_DATE_EPOCH (seconds since 1970) sets another, for builds that are repeated."""
    seconds = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def _base_entry(run: Run) -> dict[str, str]:
    """Returns the entry that gives for each file of [base] its name, its sha256 and the weight of a LoRA."""
    base = run.config.base
    loras = [_file(run, f"base.loras.{i}", lora.path) | {"weight": lora.weight} for i, lora in enumerate(base.loras)]
    files = [*loras, *(_file(run, f"base.embeddings.{i}", path) for i, path in enumerate(base.embeddings))]
    return {"sdjax_base": json.dumps(files)} if files else {}


def _file(run: Run, key: str, path: str) -> dict[str, Any]:
    return {"file": Path(path).name, "sha256": run.identity[f"fingerprint.files.{key}"].split()[0]}


def _buckets(plan: StagePlan) -> list[dict[str, Any]]:
    """Returns the number of training images by size, in the form that kohya's scripts write."""
    return [{"resolution": (size.width, size.height), "count": len(images)} for size, images in plan.buckets.items()]
