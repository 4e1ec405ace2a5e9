"""Compares the autoencoder in tiles with the whole: the difference of their pictures, memory and time; JSON lines.

    python tests/benchmarks/tiled_vae.py --pictures noto64

pictures: a folder of square pictures. A mosaic of them is encoded with the VAE of the embedded model, and decoded in
both ways.
Lines `apart` give differences of the two pictures in steps of 0..255: `mean`, `p99`, `max`, `seam` (the mean where
tiles overlap) and `elsewhere`. `excess`: the most by which the mean step from a row or column to the next is larger
than in the whole picture. `encoded`: mean difference of the latents, in deviations.
Lines `cost`, each from a separate process: `seconds` of a decoding without compilation, `cpu_s` of all processors with
compilation, `compile_s`, `peak_gb` and, before the decoding, `loaded_gb`. The VAE of SD1.5 has random weights.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from unet_step import random_params

import sdjax
from sdjax.data.images import on_white
from sdjax.draw import grids
from sdjax.model import Model
from sdjax.models import vae
from sdjax.models.tiling import Tiling, tiles
from sdjax.runtime import host_memory

WHOLE = {"tiny": 704, "sd15": 1024}  # the largest sizes that are decoded whole; much larger ones need too much memory
COMPILING = "/jax/core/compile/backend_compile_duration"


def mosaic(folder, size):
    files = sorted(folder.glob("*.png"))
    side = Image.open(files[0]).width
    picked = [files[i % len(files)] for i in np.random.default_rng(0).permutation((size // side) ** 2)]
    return grids.sheet([on_white(Image.open(file)) for file in picked])


def apart(args):
    """Prints the difference between the tiled and the whole picture."""
    sd = sdjax.load("tiny")
    in_tiles = sd.with_tiled_vae(args.tile, args.overlap)
    pixels = np.asarray(mosaic(args.pictures, args.size), np.float32)[None] / 255
    latents = sd.encode_image(pixels)
    encoded = np.abs(np.asarray(in_tiles.encode_image(pixels)) - np.asarray(latents))
    whole, tiled = (255 * np.asarray(each.decode_latents(latents)[0]) for each in (sd, in_tiles))
    difference = np.abs(whole - tiled).mean(axis=-1)
    factor = sd.model.outline.vae.config.factor
    places = tiles(args.size // factor, Tiling(args.tile, args.overlap), factor)
    covered = np.zeros(args.size, int)
    for start, length in places:
        covered[factor * start : factor * (start + length)] += 1
    seam = (covered[:, None] > 1) | (covered > 1)
    steps = lambda picture: [np.abs(np.diff(picture, axis=axis)).mean(axis=(1 - axis, 2)) for axis in (0, 1)]
    excess = np.subtract(steps(tiled), steps(whole))
    print(json.dumps({
        "what": "apart", "size": args.size, "tile": args.tile, "overlap": args.overlap, "tiles": len(places) ** 2,
        "mean": difference.mean(), "p99": np.quantile(difference, 0.99), "max": difference.max(),
        "seam": difference[seam].mean(), "elsewhere": difference[~seam].mean(), "excess": excess.max(),
        "encoded": encoded.mean() / np.asarray(latents).std(),
    }, default=float))  # fmt: skip


def cost(args):
    """Prints the time and memory of a decoding."""
    spent = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, duration, **_: spent.append(duration) if event == COMPILING else None
    )
    host_memory.keep()  # as the commands do
    sd = sdjax.load("tiny")
    if args.model == "sd15":
        config = vae.VAEConfig()
        params = {"vae": random_params(vae.abstract_params(config), jax.random.key(0))}
        outline = dataclasses.replace(sd.model.outline, vae=vae.AutoencoderKL(config))
        sd = sdjax.StableDiffusion(Model(outline, params))
    if args.tile:
        sd = sd.with_tiled_vae(args.tile, args.overlap)
    side = args.size // sd.model.outline.vae.config.factor
    latents = sd.model.outline.vae.config.scaling_factor * jax.random.normal(
        jax.random.key(1), (1, side, side, 4), jnp.float32
    )
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    loaded = peak()
    spent.clear()
    start, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(sd.decode_latents(latents))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    line = {"what": "cost", "model": args.model, "size": args.size, "tile": args.tile, "overlap": args.overlap}
    line |= {"seconds": seconds - sum(spent), "cpu_s": cpu, "compile_s": sum(spent)}
    line |= {"peak_gb": peak(), "loaded_gb": loaded}
    print(json.dumps(line))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="for lines `apart`")
    parser.add_argument("--tile", type=int, default=Tiling().tile)
    parser.add_argument("--overlap", type=int, default=Tiling().overlap)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--model", choices=["tiny", "sd15"], default="tiny")
    parser.add_argument("--what", choices=["apart", "cost"], help="print one line, in this process; --tile 0: no tiles")
    args = parser.parse_args()
    if args.what:
        {"apart": apart, "cost": cost}[args.what](args)
        return

    def child(**options):
        flags = [f"--{name}={value}" for name, value in options.items() if value is not None]
        subprocess.run([sys.executable, __file__, *flags], check=True)

    for tile, overlap in ((256, 0), (256, 32), (256, 64), (256, 128), (64, 16)):
        child(what="apart", pictures=args.pictures, size=512, tile=tile, overlap=overlap)
    for model, largest in WHOLE.items():
        for size in (512, 2048):
            child(what="cost", model=model, size=min(size, largest), tile=0)
            child(what="cost", model=model, size=size, tile=args.tile, overlap=args.overlap)


if __name__ == "__main__":
    main()
