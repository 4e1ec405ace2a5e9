"""Time and memory of `sdjax convert` on models of full size with random weights in float16.

    python tests/benchmarks/convert_full_size.py [sd15 | sdxl ...] [--folder DIR]

For each kind: folder to single file, back to a folder, to bfloat16, a LoRA merged, and the LoRA extracted again. Prints
the seconds of the whole command, its peak memory (resident set) and that by the size of the weights written or read.
Needs three times the weights on the disk, 21 GB for sdxl.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from recipe_cost import skeleton

from sdjax import lora
from sdjax.formats.deferred import Deferred
from sdjax.formats.diffusers_folder import save_folder
from sdjax.formats.lora_file import save_lora
from sdjax.outline import Outline
from sdjax.trees import leaves, nest


def random_model(kind: str, folder: Path) -> Path:
    """Writes a model folder of this kind with random weights."""
    outline = Outline.load(skeleton(kind, folder.with_name(f"{kind}-configs")), weights=False)

    def fill(shape: tuple[int, ...], seed: int) -> np.ndarray:
        numbers = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return (0.02 * numbers).astype(np.float16)

    parts = {
        part: nest(
            {
                path: Deferred(leaf.shape, np.dtype(np.float16), partial(fill, leaf.shape, i))
                for i, (path, leaf) in enumerate(leaves(tree))
            }
        )
        for part, tree in outline.shapes.items()
    }
    source = outline.folder
    save_folder(
        folder,
        configs=source.configs,
        params=parts,
        tokenizers=source.tokenizers,
        scheduler=source.scheduler,
        model_index=source.model_index,
    )
    return folder


def random_lora(model: Path, path: Path) -> Path:
    """Writes a LoRA of rank 16 on the attention of the U-Net."""
    shapes = Outline.load(model, weights=False).shapes
    draw = lambda size: np.random.default_rng(size).standard_normal(size).astype(np.float32)
    tree = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes["unet"], rank=16))
    filled = {
        p: np.float32(1) if leaf.ndim == 0 else 0.02 * draw(leaf.size).reshape(leaf.shape) for p, leaf in leaves(tree)
    }
    save_lora(path, {"unet": nest(filled)}, shapes, style="kohya")
    return path


def size(path: Path) -> int:
    """Returns the bytes of the weight files of a model."""
    files = [path] if path.is_file() else path.rglob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def measure(name: str, source: Path, target: Path, *flags: str) -> None:
    """Runs one conversion and prints its figures."""
    command = [sys.executable, "-m", "sdjax.convert", str(source), str(target), *flags]
    begun = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    seconds, peak = time.monotonic() - begun, usage.ru_maxrss * 1024
    whole = max(size(source), size(target))
    print(f"| {name} | {whole / 1e9:.2f} | {seconds:.0f} | {peak / 1e9:.2f} | {peak / whole:.2f} |", flush=True)


def main() -> None:
    """Measures each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=["sd15", "sdxl"])
    parser.add_argument("--folder", type=Path, help="where the models are written and removed again")
    args = parser.parse_args()
    print("| conversion | weights, GB | seconds | peak, GB | peak / weights |\n|---|---|---|---|---|")
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            folder = Path(temporary)
            model = random_model(kind, folder / kind)
            adapter, single, other = (
                random_lora(model, folder / "lora.safetensors"),
                folder / "one.safetensors",
                folder / "b",
            )
            measure(f"{kind}: folder to single file", model, single, "--to", "single_file")
            tokenizer = ("--tokenizer", str(model / "tokenizer"))
            measure(f"{kind}: single file to folder", single, other, "--to", "diffusers", *tokenizer)
            shutil.rmtree(other)
            measure(f"{kind}: to bfloat16", model, other, "--to", "diffusers", "--dtype", "bfloat16")
            shutil.rmtree(other)
            single.unlink()
            measure(f"{kind}: a LoRA merged", model, single, "--to", "single_file", "--lora", f"{adapter}:0.8")
            out = folder / "extracted.safetensors"
            measure(
                f"{kind}: the LoRA extracted",
                single,
                out,
                "--to",
                "kohya",
                "--base",
                str(model),
                "--rank",
                "16",
                *tokenizer,
            )


if __name__ == "__main__":
    main()
