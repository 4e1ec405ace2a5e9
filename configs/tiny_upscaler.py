"""The command that trains and measures the embedded upscaler, which makes pictures of 256 pixels from 64.

    npm pack @iconify-json/noto@1.2.9
    pip install resvg-py
    python configs/tiny_upscaler.py data runs/upscaler/data --noto iconify-json-noto-1.2.9.tgz
    python configs/tiny_upscaler.py train runs/upscaler/data runs/upscaler/model.safetensors
    python configs/tiny_upscaler.py measure runs/upscaler/data runs/upscaler/model.safetensors

The pictures are Google's Noto emoji (Apache License 2.0) as vectors, drawn at 256 x 256 pixels: one of each family of
emoji that look alike. The families that configs/tiny_data.py holds out are held out here too.

The network sees two kinds of small pictures: the large ones made smaller by several filters, and those after the
autoencoder of the embedded model, with a little noise in their latents, since it is to enlarge drawn pictures. The loss
is the mean absolute error.
"""

import functools
import json
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from tiny_data import family, held_out

import sdjax
from sdjax.data.images import on_white, picture
from sdjax.draw import grids
from sdjax.errors import DataError
from sdjax.formats.parameter_names import to_state_dict
from sdjax.formats.png_parameters import save_png
from sdjax.formats.safetensors_file import save_safetensors
from sdjax.models.layers import Compute
from sdjax.models.upscaler import CompactConfig, CompactNet
from sdjax.runtime import command

CONFIG = CompactConfig(features=32, layers=6, scale=4)
LARGE, SMALL = 256, 64
"""Sides of the pictures in pixels."""
CROP = 32
"""Side of the small crops that training sees."""
FILTERS = (Image.Resampling.BOX, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
DECAY = 0.998
"""Of the moving average of the weights, at each step."""
DECODED = 256
"""Number of training pictures that are shown after the autoencoder."""
LATENT_NOISE = 0.15
"""Largest standard deviation of the noise in latents, which have a standard deviation of 1."""


# ------------------------------------------------------------------------------------------------ the pictures


def write_data(folder: str | Path, package: str | Path) -> dict[str, int]:
    """Writes PNGs of 256 x 256 on white below train/ and held_out/. Returns how many.

    package: the archive of npm's @iconify-json/noto.
    """
    import resvg_py  # needed here alone

    try:
        with tarfile.open(package) as archive:
            read = lambda name: json.load(archive.extractfile(f"package/{name}.json"))  # pyright: ignore
            icons, names = read("icons")["icons"], read("chars")
    except (OSError, KeyError, tarfile.TarError) as error:
        raise DataError(f"{package}: not the archive of npm's @iconify-json/noto: {error}") from None
    codes = {family(code): code for code in sorted(names, reverse=True) if not code.startswith("1f1e")}  # flags
    test = held_out(codes.values())
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    for code in codes.values():
        svg = f'<svg {spaces} viewBox="0 0 128 128">{icons[names[code]]["body"]}</svg>'
        png = resvg_py.svg_to_bytes(svg_string=svg, width=LARGE, height=LARGE, background="white")
        path = Path(folder) / ("held_out" if code in test else "train") / f"{code}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(png))
    return {"train": len(codes) - len(test), "held_out": len(test)}


def read_data(folder: str | Path) -> dict[str, Image.Image]:
    """Code -> picture of the PNGs in a folder."""
    files = sorted(Path(folder).glob("*.png"))
    if not files:
        raise DataError(f"{folder}: holds no PNG; the command `data` writes them")
    return {file.stem: on_white(Image.open(file)) for file in files}


def decoded(small: Sequence[Image.Image], noise: float, seed: int = 0) -> np.ndarray:
    """The pictures [N, 64, 64, 3] in 8 bits after the embedded model's autoencoder, with noise in their latents."""
    tiny, random, out = sdjax.load("tiny"), np.random.default_rng(seed), []
    for image in small:
        latents = np.asarray(tiny.encode_image([image]))
        latents = latents + noise * random.random() * random.standard_normal(latents.shape).astype(np.float32)
        out.append(picture(np.asarray(tiny.decode_latents(latents))[0]))
    return np.stack([np.asarray(image) for image in out])


class Pairs(NamedTuple):
    """Pictures in 8 bits. large: [N, 256, 256, 3]. small: each in V versions, [V, N, 64, 64, 3]."""

    large: np.ndarray
    small: np.ndarray


def make_pairs(pictures: Sequence[Image.Image]) -> tuple[Pairs, Pairs]:
    """The pictures made smaller by each filter, and some of them by the first filter and the autoencoder."""
    stacked = lambda images: np.stack([np.asarray(image) for image in images])
    small = [[image.resize((SMALL, SMALL), how) for image in pictures] for how in FILTERS]
    some = np.random.default_rng(0).permutation(len(pictures))[:DECODED]
    coded = decoded([small[0][i] for i in some], LATENT_NOISE)
    large = stacked(pictures)
    return Pairs(large, np.stack([stacked(images) for images in small])), Pairs(large[some], coded[None])


def batches(pairs: Sequence[Pairs], size: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (small, large) crops without end, in [0, 1], mirrored, turned, with other colours, half of them inverted.

    Each of `pairs` gives as many. Half are chosen of four for the most contrast, because much of a picture is plain.
    """
    random, scale = np.random.default_rng(seed), CONFIG.scale

    def crop() -> tuple[np.ndarray, np.ndarray]:
        of = pairs[random.integers(len(pairs))]
        version, i, top, left = random.integers([*of.small.shape[:2], *[SMALL - CROP + 1] * 2])
        small = of.small[version, i, top : top + CROP, left : left + CROP]
        top, left, side = top * scale, left * scale, CROP * scale
        return small, of.large[i, top : top + side, left : left + side]

    def example(candidates: int) -> list[np.ndarray]:
        pair = max((crop() for _ in range(candidates)), key=lambda pair: pair[0].std())
        turns, mirror, inverted = random.integers([4, 2, 2])
        colours = random.permutation(3)
        changed = [np.rot90(x[:, :: -1 if mirror else 1, colours] / np.float32(255), turns) for x in pair]
        return [1 - x if inverted else x for x in changed]

    while True:
        small, large = zip(*(example(4 if n % 2 else 1) for n in range(size)), strict=True)
        yield np.stack(small), np.stack(large)


# ------------------------------------------------------------------------------------------------ training


def train(pairs: Sequence[Pairs], out: Path, *, steps: int, batch: int, seed: int) -> None:
    """Trains the network from scratch, and writes it in float16 every 250 steps and at the end.

    It starts as nearest pixels: the last layer is 0. What is written is the moving average of the weights.
    """
    network = CompactNet(CONFIG, Compute())
    params = network.init(jax.random.key(seed), jnp.zeros((1, CROP, CROP, 3)))["params"]
    last = f"body_{2 * CONFIG.layers + 2}"
    params = {**params, last: jax.tree.map(jnp.zeros_like, params[last])}
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-3, steps // 50, steps, 1e-5))
    state = params, params, optimizer.init(params)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, small: Any, large: Any) -> Any:
        params, average, moments = state
        error = lambda params: jnp.mean(jnp.abs(network.apply({"params": params}, small) - large))
        loss, gradients = jax.value_and_grad(error)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 1 - DECAY)
        return (params, average, moments), loss

    losses, began = [], time.monotonic()
    for i, (small, large) in zip(range(1, steps + 1), batches(pairs, batch, seed), strict=False):
        state, loss = step(jax.tree.map(jnp.copy, state) if i == 1 else state, small, large)
        losses.append(loss)
        if i % 250 == 0 or i == steps:
            save_safetensors(out, to_state_dict(state[1]), dtype=np.dtype(np.float16))
            seconds = time.monotonic() - began
            print(f"step {i}: loss {np.mean(losses[-250:]):.5f}, {seconds:.0f} s", flush=True)


# ------------------------------------------------------------------------------------------------ measuring


def measure(pictures: Sequence[Image.Image], model: str | Path, sheet: Path | None) -> list[dict[str, Any]]:
    """The mean PSNR in dB and SSIM (Wang et al. 2004) of enlarged pictures, by the network and by Lanczos.

    plain: the small pictures are means of 4 x 4 pixels. decoded: after the autoencoder too, without noise.
    sheet: gets a PNG of rows of four: the small picture, Lanczos, the network, the true picture.
    """
    small = [image.resize((SMALL, SMALL), Image.Resampling.BOX) for image in pictures]
    seen = {"plain": small, "decoded": [Image.fromarray(values) for values in decoded(small, 0.0)]}
    ways = {
        "lanczos": lambda image: image.resize((LARGE, LARGE), Image.Resampling.LANCZOS),
        "network": lambda image: sdjax.upscale(image, model),
    }
    results, cells = [], []
    for kind, images in seen.items():
        made = {way: [enlarge(image) for image in images] for way, enlarge in ways.items()}
        for way, enlarged in made.items():
            pairs = list(zip(pictures, enlarged, strict=True))
            scores = {score.__name__: np.mean([score(*pair) for pair in pairs]) for score in (psnr, ssim)}
            results.append({"small": kind, "by": way} | {name: round(float(x), 3) for name, x in scores.items()})
        nearest = [image.resize((LARGE, LARGE), Image.Resampling.NEAREST) for image in images]
        cells += [cell for row in zip(nearest, *made.values(), pictures, strict=True) for cell in row]
    if sheet is not None:
        save_png(grids.sheet(cells, columns=4), sheet)
    return results


def psnr(true: Image.Image, other: Image.Image) -> float:
    """The peak signal-to-noise ratio of two pictures in dB."""
    error = np.mean(np.square(np.asarray(true, np.float64) - np.asarray(other)))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def ssim(true: Image.Image, other: Image.Image) -> float:
    """The structural similarity of the brightness of two pictures, with a Gaussian window of 1.5 pixels."""
    from scipy.ndimage import gaussian_filter

    x, y = (np.asarray(image.convert("L"), np.float64) for image in (true, other))
    mean = lambda values: gaussian_filter(values, 1.5)
    of_x, of_y = mean(x), mean(y)
    covariance, variances = mean(x * y) - of_x * of_y, mean(x * x) - of_x**2 + mean(y * y) - of_y**2
    a, b = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float(np.mean((2 * of_x * of_y + a) * (2 * covariance + b) / ((of_x**2 + of_y**2 + a) * (variances + b))))


# ------------------------------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    parser = command.Parser(prog="python configs/tiny_upscaler.py", description="Train the embedded upscaler.")
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write pictures of 256 x 256 pixels")
    data.add_argument("folder")
    data.add_argument("--noto", required=True, help="the archive of npm's @iconify-json/noto")
    training = commands.add_parser("train", help="train the network and write it in float16")
    training.add_argument("folder")
    training.add_argument("out", type=Path)
    training.add_argument("--steps", type=int, default=5000)
    training.add_argument("--batch", type=int, default=4, help="crops at once")
    training.add_argument("--seed", type=int, default=0)
    measuring = commands.add_parser("measure", help="compare with Lanczos on the pictures held out")
    measuring.add_argument("folder")
    measuring.add_argument("model", help='the file of an upscaler, or "tiny"')
    measuring.add_argument("--sheet", type=Path, help="PNG to write: small, Lanczos, network, true")
    args = parser.parse_args(argv)
    if args.command == "data":
        counts = write_data(args.folder, args.noto)
        print(", ".join(f"{name} {count:,}" for name, count in counts.items()))
    elif args.command == "train":
        pairs = make_pairs([*read_data(Path(args.folder) / "train").values()])
        train(pairs, args.out, steps=args.steps, batch=args.batch, seed=args.seed)
    else:
        pictures = [*read_data(Path(args.folder) / "held_out").values()]
        for result in measure(pictures, args.model, args.sheet):
            print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
