"""Draws with random weights in PyTorch and in sdjax, each in its own process: time, memory, and how far both are apart.

    python tests/benchmarks/drawing.py KIND --folder FOLDER --rounds 2

few_steps: a latent consistency model of SD1.5's size, one picture of 512 x 512 in 4 steps (diffusers' pipeline).
refiner: a base and a refiner of SDXL's structure at half its widths, 512 x 512 in 10 steps, the last two by the
    refiner, guidance 5 (diffusers' two pipelines).
upscale: an RRDBNet of 64 features and 23 blocks (ESRGAN), 128 x 128 to 512 x 512 (the network as its paper defines it).

The models are written to FOLDER once. Then PyTorch and sdjax take turns: each loads, draws once (sdjax compiles), and
draws --runs times. A JSON line for each process has the seconds until it has loaded, of the first picture and the
median of the others, and the peak of its memory in GB. apart: how far our picture is from theirs, of 255, with the same
first noise and float32 throughout. Use an otherwise idle machine.
"""

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import micro
import upscalers

SIDE = 512
PROMPT = "a red heart"
RRDB = {"features": 64, "growth": 32, "blocks": 23, "doublings": 2, "unshuffle": 1}
STEPS, REFINED, SWITCH, GUIDANCE = 4, 10, 0.8, 5.0

XL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 128, "use_linear_projection": True,
    "sample_size": 64,
}  # fmt: skip


# ----------------------------------------------------------------------------------------- the models


def write(kind: str, folder: Path) -> None:
    """Writes the models of a kind, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "upscale":
        if not (folder / "rrdb.safetensors").exists():
            from sdjax.formats.safetensors_file import save_safetensors

            save_safetensors(folder / "rrdb.safetensors", upscalers.random_rrdb(**RRDB))
        return
    if (folder / kind / "model_index.json").exists():
        return
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(micro.TOKENIZER, model_max_length=16)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=SIDE,
    )  # fmt: skip

    def text(width: int, layers: int, cls: Any = CLIPTextModel) -> Any:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        more = {"num_attention_heads": width // 64, "max_position_embeddings": 16, "projection_dim": width}
        return cls(CLIPTextConfig(**sizes, **more, **micro.IDS))

    if kind == "few_steps":
        diffusers.LatentConsistencyModelPipeline(
            unet=diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, time_cond_proj_dim=256),
            vae=vae, text_encoder=text(768, 12), tokenizer=tokenizer, scheduler=_lcm(diffusers),
            safety_checker=None, feature_extractor=None, image_encoder=None, requires_safety_checker=False,
        ).save_pretrained(folder / kind)  # fmt: skip
        np.save(folder / "noise.npy", step_noise())
        return
    euler = diffusers.EulerDiscreteScheduler(**_SCHEDULE, timestep_spacing="leading", steps_offset=1)
    shared: dict[str, Any] = {"vae": vae, "scheduler": euler, "add_watermarker": False}
    shared |= {"text_encoder_2": text(640, 32, CLIPTextModelWithProjection), "tokenizer_2": tokenizer}
    refiner = diffusers.UNet2DConditionModel(
        **XL, block_out_channels=(192, 384, 768, 768), attention_head_dim=(3, 6, 12, 12), cross_attention_dim=640,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=4, projection_class_embeddings_input_dim=5 * 128 + 640,
    )  # fmt: skip
    diffusers.StableDiffusionXLImg2ImgPipeline(
        **shared, unet=refiner, text_encoder=None, tokenizer=None, requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
    ).save_pretrained(folder / f"{kind}-second")  # fmt: skip
    base = diffusers.UNet2DConditionModel(
        **XL, block_out_channels=(160, 320, 640), attention_head_dim=(2, 5, 10), cross_attention_dim=384 + 640,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), projection_class_embeddings_input_dim=6 * 128 + 640,
    )  # fmt: skip
    diffusers.StableDiffusionXLPipeline(
        **shared, unet=base, text_encoder=text(384, 12), tokenizer=tokenizer, force_zeros_for_empty_prompt=False
    ).save_pretrained(folder / kind)


_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _lcm(diffusers: Any) -> Any:
    return diffusers.LCMScheduler(**_SCHEDULE, clip_sample=False, set_alpha_to_one=True)


# ----------------------------------------------------------------------------------------- the two sides

Draw = Callable[[], np.ndarray]
"""Draws the picture, `[H, W, 3]` of 8 bits."""


def noise() -> np.ndarray:
    """The first latents [1, h, w, 4] of both sides."""
    return np.random.default_rng(1).standard_normal((1, SIDE // 8, SIDE // 8, 4)).astype(np.float32)


def step_noise() -> np.ndarray:
    """The noise that sdjax adds after the steps of a picture with seed 0, [STEPS - 1, 1, 4, h, w]."""
    import jax

    keys = [jax.random.fold_in(jax.random.key(0), step) for step in range(STEPS - 1)]
    return np.stack([np.asarray(jax.random.normal(key, noise().shape[1:])).transpose(2, 0, 1)[None] for key in keys])


def small_picture() -> np.ndarray:
    """What is enlarged, [1, 128, 128, 3] in [0, 1]; each value is one of 8 bits."""
    random = np.random.default_rng(2).integers(0, 256, (1, SIDE // 4, SIDE // 4, 3))
    return random.astype(np.float32) / 255


def load_peer(kind: str, folder: Path) -> Draw:
    import torch

    if kind == "upscale":
        from safetensors.numpy import load_file

        tensors = load_file(folder / "rrdb.safetensors")
        return lambda: _eight_bits(upscalers.in_torch(tensors, small_picture())[0])
    import diffusers

    latents = torch.from_numpy(noise().transpose(0, 3, 1, 2).copy())
    load = lambda cls, name: cls.from_pretrained(folder / name)
    how: dict[str, Any] = {"output_type": "np"}
    if kind == "few_steps":
        pipeline = load(diffusers.LatentConsistencyModelPipeline, kind)
        pipeline.set_progress_bar_config(disable=True)
        ours = torch.from_numpy(np.load(folder / "noise.npy"))
        step = itertools.count()
        sys.modules[diffusers.LCMScheduler.__module__].randn_tensor = lambda *_, **__: ours[next(step) % (STEPS - 1)]
        how |= {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "height": SIDE, "width": SIDE}
        return lambda: _eight_bits(pipeline(PROMPT, latents=latents.clone(), **how).images[0])
    base = load(diffusers.StableDiffusionXLPipeline, kind)
    second = load(diffusers.StableDiffusionXLImg2ImgPipeline, f"{kind}-second")
    for each in (base, second):
        each.set_progress_bar_config(disable=True)
    how |= {"num_inference_steps": REFINED, "guidance_scale": GUIDANCE}

    def draw() -> np.ndarray:
        begun = base(
            PROMPT, latents=latents.clone(), height=SIDE, width=SIDE, denoising_end=SWITCH,
            **(how | {"output_type": "latent"}),
        ).images  # fmt: skip
        return _eight_bits(second(PROMPT, image=begun, denoising_start=SWITCH, **how).images[0])

    return draw


def load_ours(kind: str, folder: Path) -> Draw:
    import sdjax

    if kind == "upscale":
        image = Image.fromarray(_eight_bits(small_picture()[0]))
        return lambda: np.asarray(sdjax.upscale(image, folder / "rrdb.safetensors"))
    how: dict[str, Any] = {"latents": noise(), "height": SIDE, "width": SIDE, "guidance": GUIDANCE, "progress": False}
    sd = sdjax.load(folder / kind)
    if kind == "few_steps":
        return lambda: np.asarray(sd.text2image(PROMPT, steps=STEPS, sampler="lcm", **how)[0])
    sd = sd.with_refiner(folder / f"{kind}-second", SWITCH)
    return lambda: np.asarray(sd.text2image(PROMPT, steps=REFINED, sampler="euler", **how)[0])


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    return np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def measure(kind: str, folder: Path, side: str, runs: int) -> dict[str, Any]:
    """Draws in this process. Leaves the picture in the folder."""
    start = time.perf_counter()
    draw = (load_peer if side == "torch" else load_ours)(kind, folder)
    loaded = time.perf_counter()
    picture = draw()
    first = time.perf_counter()
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        draw()
        times.append(time.perf_counter() - began)
    np.save(folder / f"{kind}-{side}.npy", picture)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    figures = {
        "load_s": loaded - start,
        "first_s": first - loaded,
        "median_s": float(np.median(times)),
        "peak_gb": peak,
    }
    return {"kind": kind, "side": side} | {name: round(value, 2) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["few_steps", "refiner", "upscale"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--side", choices=["torch", "sdjax"], help="draw with one of them, in this process")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.kind, args.folder, args.side, args.runs)), flush=True)
        return
    write(args.kind, args.folder)
    for _ in range(args.rounds):
        for side in ("torch", "sdjax"):
            subprocess.run([sys.executable, *sys.argv, f"--side={side}"], check=True)
    theirs, ours = (np.load(args.folder / f"{args.kind}-{side}.npy").astype(int) for side in ("torch", "sdjax"))
    print(json.dumps({"kind": args.kind, "apart": {"most": int(np.abs(ours - theirs).max())}}))


if __name__ == "__main__":
    main()
