"""Trains a style by LoRA and a character by Textual Inversion, in every order, and scores the results; JSON lines.

    python tests/benchmarks/orders.py --noto noto64 --twemoji twemoji64 --out runs/orders [--seed 0]

noto, twemoji: folders of the same subjects under the same file names, with metadata.jsonl. The base model ("tiny")
draws Noto. The style is Twemoji, learned from names that the base knows. The concept is the cat with nine moods
(--concept cat) or the moon with eight phases (--concept moon) in Twemoji, learned from all but two of its pictures.

    style_nearer    of pictures of names that the style did not see: share that is nearer to Twemoji than to Noto
    style_distance  their mean distance to the picture of the same name in Twemoji; noto_distance: in Noto
    concept         of pictures of the word: share whose nearest picture of all Twemoji shows the concept
    concept_5       share for which one of the five nearest does
    loss_style, loss_concept    held-out loss on pictures that no stage saw, with the same noise for every model

A distance is the root mean square of pixels in [0, 1] after averaging 2 x 2 pixels. The runs are in OUT/METHOD/, the
lines also in OUT/scores.jsonl, and pictures by every model in OUT/grid-CONCEPT-SEED.png.
"""

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "configs"))

import tiny_data

import sdjax
from sdjax import diffusion
from sdjax.data.images import Size, on_white
from sdjax.draw.grids import sheet
from sdjax.runtime import compilation_cache, host_memory
from sdjax.train import config_file
from sdjax.train.loop import train

WORD = "<thing>"
CONCEPTS = {"cat": "cat-face", "moon": "moon symbol"}  # a part of the sub-category or of the name
INIT = {"cat": "cat face", "moon": "crescent moon"}
STYLE = {
    "name": "style",
    "train": ["lora"],
    "steps": 300,
    "learning_rate": 4e-4,
    "lora_rank": 8,
    "lora_targets": "all",
    "schedule": "cosine",
    "warmup_steps": 5,
    "data": {"caption_dropout": 0.1, "batch_size": 8},
}
CONCEPT = {
    "name": "character",
    "train": ["textual_inversion"],
    "steps": 300,
    "learning_rate": 2e-2,
    "placeholder_tokens": [WORD],
    "vectors_per_token": 2,
    "template": ["{}", "a {}", "{} emoji"],
    "schedule": "cosine",
    "weight_decay": 0.0,
    "clip_ti_decay": True,
    "clip_ti_norm": 1.9,  # the norm of the words that the model knows
    "data": {"missing_caption": "empty", "batch_size": 8},
}
JOINT = {  # one stage with the steps and pictures of both; a third of the pictures show the concept
    **STYLE,
    "name": "joint",
    "train": ["lora", "textual_inversion"],
    "steps": 600,
    "learning_rate": {"unet": 4e-4, "textual_inversion": 1e-2},
    **{key: CONCEPT[key] for key in ("placeholder_tokens", "vectors_per_token", "clip_ti_decay", "clip_ti_norm")},
    "template": "caption",
    "weight_decay": 0.0,
    "lora_parts": ["unet"],
}
METHODS = {  # the name of the result of each stage -> the stages of a run
    ("LoRA", "LoRA then TI"): [STYLE, CONCEPT],
    ("TI", "TI then LoRA"): [CONCEPT, STYLE],
    ("joint",): [JOINT],
}


def folder_of(folder, source, records):
    """Makes a training folder of these pictures. Returns its path."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for record in records:
        shutil.copy(source / record["file_name"], folder)
    lines = [json.dumps({"file_name": r["file_name"], "text": r["text"]}) for r in records]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def pixels(path):
    """Returns [H, W, 3] in [0, 1], on white."""
    return np.asarray(on_white(Image.open(path)), np.float32) / 255


def coarse(images):
    """Returns the means of 2 x 2 pixels: [B, H, W, 3] -> [B, H/2 * W/2 * 3]."""
    images = np.stack(images)
    b, h, w, c = images.shape
    return images.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4)).reshape(b, -1)


def distance(a, b):
    return np.sqrt(np.mean(np.square(a - b), axis=-1))


def held_out_loss(sd, images, captions, levels=(125, 375, 625, 875)):
    """Returns the mean squared error of the U-Net, over pictures and time steps, with the same noise in each call."""
    latents = sd.encode_image([Image.fromarray(np.round(image * 255).astype(np.uint8)) for image in images])
    context, losses = sd.encode_text(captions), []
    for level in levels:
        noise = jax.random.normal(jax.random.key(level), latents.shape)
        steps = np.full(len(images), level, np.int32)
        noisy = diffusion.add_noise(sd.model.outline.schedule, latents, noise, steps)
        target = diffusion.target(sd.model.outline.schedule, latents, noise, steps)
        losses.append(float(np.mean(np.square(sd.predict(noisy, steps, context) - target))))
    return sum(losses) / len(losses)


def draw(sd, prompts, seed):
    pictures = sd.text2image(list(prompts), steps=20, guidance=3.0, seed=seed, progress=False)
    return [np.asarray(picture, np.float32) / 255 for picture in pictures]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noto", type=Path, required=True)
    parser.add_argument("--twemoji", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--concept", choices=CONCEPTS, default="cat")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    host_memory.keep()
    compilation_cache.enable()

    records = [json.loads(line) for line in (args.twemoji / "metadata.jsonl").read_text().splitlines()]
    known = {subject.name for subject in tiny_data.subjects()} - set(tiny_data.WITHHELD)
    init = INIT[args.concept]
    is_concept = [CONCEPTS[args.concept] in r["subcategory"] + r["text"] for r in records]
    things = [r for r, shows in zip(records, is_concept, strict=True) if shows]
    style = [r for r, shows in zip(records, is_concept, strict=True) if r["text"] in known and not shows]
    random.Random(args.seed).shuffle(style)
    random.Random(args.seed).shuffle(things)
    unseen, style = style[:40], style[40:]
    shown, hidden = things[:-2], things[-2:]
    named = [{**r, "text": WORD} for r in shown]
    style_folder = folder_of(args.out / "style", args.twemoji, style)
    concept_folder = folder_of(args.out / "concept", args.twemoji, shown)
    joint_folder = folder_of(args.out / "both", args.twemoji, style + named)
    repeats = {r["file_name"]: max(1, len(style) // 14) for r in named}  # a third of all examples
    places = {"style": style_folder, "character": concept_folder, "joint": joint_folder}

    twins = {kind: [pixels(folder / r["file_name"]) for r in unseen] for kind, folder in
             (("twemoji", args.twemoji), ("noto", args.noto))}  # fmt: skip
    everything = coarse([pixels(args.twemoji / r["file_name"]) for r in records])
    is_concept = np.array(is_concept)
    hidden_pixels = [pixels(args.twemoji / r["file_name"]) for r in hidden]
    base, rows = sdjax.load("tiny"), []

    def score(name, sd, word):
        drawn = draw(sd, [r["text"] for r in unseen], args.seed)
        small = coarse(drawn)
        to_twemoji, to_noto = (distance(small, coarse(twins[kind])) for kind in ("twemoji", "noto"))
        characters = draw(sd, [template.format(word) for template in CONCEPT["template"] for _ in range(8)], 100)
        near = np.argsort(distance(coarse(characters)[:, None], everything[None]), axis=1)
        line = {
            "method": name,
            "concept_name": args.concept,
            "seed": args.seed,
            "style_nearer": float(np.mean(to_twemoji < to_noto)),
            "style_distance": float(to_twemoji.mean()),
            "noto_distance": float(to_noto.mean()),
            "concept": float(np.mean(is_concept[near[:, 0]])),
            "concept_5": float(np.mean(is_concept[near[:, :5]].any(axis=1))),
            "loss_style": held_out_loss(sd, twins["twemoji"], [r["text"] for r in unseen]),
            "loss_concept": held_out_loss(sd, hidden_pixels, [word] * len(hidden)),
        }
        print(json.dumps(line), flush=True)
        with (args.out / "scores.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        rows.append([*drawn[:8], *characters[:8]])

    score("base", base, init)
    for names, stages in METHODS.items():
        output = args.out / f"{names[-1].replace(' ', '_')}-{args.concept}-{args.seed}"
        shutil.rmtree(output, ignore_errors=True)
        placed = [
            {
                **s,
                **({"init_tokens": [init]} if s is not STYLE else {}),
                "data": {**s["data"], "path": places[s["name"]]} | ({"repeats": repeats} if s is JOINT else {}),
            }
            for s in stages
        ]
        table = {
            "model": "tiny",
            "output": str(output),
            "seed": args.seed,
            "data": {"path": style_folder, "resolution": 64},
            "stages": placed,
            "checkpoint": {"every": 0},
            "parallel": {"mesh": {"data": 1}},
        }
        assert train(config_file.from_table(table)) == 0
        for name, stage in zip(names, stages, strict=True):
            sd, result = base, output / "export" / stage["name"]
            if (result / "lora.safetensors").exists():
                sd = sd.with_lora(result / "lora.safetensors")
            word = WORD if (result / "thing.safetensors").exists() else init
            if word == WORD:
                sd = sd.with_embedding(result / "thing.safetensors", token=WORD)
            score(name, sd, word)
    pictures = [Image.fromarray(np.round(image * 255).astype(np.uint8)) for row in rows for image in row]
    sheet(pictures, columns=16).resize(Size(16 * 96, len(rows) * 96), Image.Resampling.NEAREST).save(
        args.out / f"grid-{args.concept}-{args.seed}.png"
    )


if __name__ == "__main__":
    main()
