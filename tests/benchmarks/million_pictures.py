"""Measures what a data set of a million pictures costs before the first step: time, memory, and again on resume.

    python tests/benchmarks/million_pictures.py make tar /tmp/million --count 1000000
    python tests/benchmarks/million_pictures.py plan /tmp/million
    python tests/benchmarks/million_pictures.py plan /tmp/million        # as a resumed run would

`make` writes pictures of 16x16 pixels: a few thousand different ones again and again, each with a caption of its own,
in tars or parquet files of 10,000, or as files in one folder. `plan` does what a run does, through the same functions:
it lists the pictures, assigns them to shapes, holds out 100, counts the windows of captions with the tokenizer of the
embedded model, makes the fingerprint, caches latents and captions, and gathers batches of 64. What it does not run is
the VAE and the text model: latents are the means of the colours, and the embedding of a caption is its number of
characters. Each part is printed with its time, the time of the processor in it, and the memory of the process after it.
"""

import argparse
import io
import json
import logging
import tarfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SHARD = 10_000


def resident(key: str) -> float:
    """Returns a line of /proc/self/status in MB. RssAnon: without pages of files, which the system can take back."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return float(line.split()[1]) / 1024


def pictures(count: int = 4000) -> list[bytes]:
    """Returns encoded pictures of two shapes."""
    random = np.random.default_rng(0)
    encoded = []
    for number in range(count):
        pixels = random.integers(0, 256, (16, 16 if number % 3 else 12, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=60)
        encoded.append(file.getvalue())
    return encoded


def caption(number: int) -> str:
    return f"picture number {number}, a red heart on a green field beside a house under a cloudy evening sky"


def make(kind: str, folder: Path, count: int) -> None:
    """Writes the pictures."""
    encoded = pictures()
    folder.mkdir(parents=True)
    for start in range(0, count, SHARD):
        numbers = range(start, min(start + SHARD, count))
        name = f"{start // SHARD:05}"
        if kind == "tar":
            with tarfile.open(folder / f"{name}.tar", "w") as tar:
                for number in numbers:
                    for suffix, content in (("jpg", encoded[number % len(encoded)]), ("txt", caption(number).encode())):
                        member = tarfile.TarInfo(f"{number:08}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        elif kind == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            images = [{"bytes": encoded[number % len(encoded)], "path": None} for number in numbers]
            table = pa.table({"image": images, "text": [caption(number) for number in numbers]})
            pq.write_table(table, folder / f"{name}.parquet", row_group_size=1000)
        else:
            (folder / name).mkdir()
            for number in numbers:
                (folder / name / f"{number:08}.jpg").write_bytes(encoded[number % len(encoded)])
                (folder / name / f"{number:08}.txt").write_text(caption(number))


class Report:
    """Prints each part with its time and memory."""

    def __init__(self) -> None:
        self.last = time.perf_counter(), time.process_time()

    def __call__(self, part: str) -> None:
        now = time.perf_counter(), time.process_time()
        wall, cpu = (after - before for after, before in zip(now, self.last, strict=True))
        print(f"{part:40} {wall:8.2f} s, {cpu:8.2f} s of the processor, {resident('RssAnon'):6.0f} MB", flush=True)
        self.last = time.perf_counter(), time.process_time()


def encode_images(images: np.ndarray) -> np.ndarray:
    blocks = images.reshape(len(images), images.shape[1] // 4, 4, images.shape[2] // 4, 4, 3)
    return np.repeat(blocks.astype(np.float32).mean((2, 4))[..., :1], 8, axis=-1)


def encode_texts(captions: list[str]) -> dict[str, np.ndarray]:
    return {"context": np.array([[len(text)] * 8 for text in captions], np.float32)}


def plan(folder: Path, cache_folder: Path, model: str, encode: int) -> None:
    """Does what a run does before its first step, and some batches. encode: how many pictures have latents."""
    from sdjax.data import buckets, cache, records
    from sdjax.data.dataset import Dataset, join, make_batch
    from sdjax.data.order import Order, choose
    from sdjax.outline import Outline
    from sdjax.train import checks
    from sdjax.train.stage_images import Images

    report = Report()
    outline = Outline.load(model, "float32")
    report("program and model's outline")
    everything = records.scan(folder, keep=cache_folder)
    report(f"list {len(everything)} pictures")
    training, held_out = records.split(everything, count=100)
    report("hold out 100")
    digests = records.fingerprint(training)
    report(f"fingerprint, {len(json.dumps(digests)) / 1e3:.1f} kB in a checkpoint")
    assigned = buckets.assign(training, buckets.sizes(16, step=4, max_aspect=2))
    report(f"{len(assigned)} shapes")
    order = Order(tuple(map(records.repeats_of, assigned.values())), 64, 0)
    choose(order, 0)
    report("order of the first batch of 64")
    for number in range(1, 101):
        choose(order, number)
    report("order of 100 batches")
    choose(order, 1_000_000)
    report("order of batch 1,000,000")
    chunks = checks.count_chunks(Images(training, held_out, [], {}), "", outline, "stages.0")
    report(f"captions of at most {chunks} windows")
    parts = {size: members[: encode * len(members) // len(training)] for size, members in assigned.items()}
    found = [
        cache.cache_images(members, cache.Views(size), encode_images, folder=cache_folder, model="none")
        for size, members in parts.items()
    ]
    report(f"latents of {sum(len(images.records) for images in found)} pictures")
    shown = (text for texts in records.captions_of(training) for text in texts)
    texts = cache.cache_texts(shown, encode_texts, folder=cache_folder, model="none")
    report(f"{len(texts.rows)} captions")
    dataset = Dataset(tuple(join(images, texts) for images in found), texts.arrays, texts.rows[""])
    del texts
    report("rows of the captions")
    order = Order(dataset.repeats, 64, 0)
    make_batch(dataset, order, 0)
    report("first batch of 64")
    for number in range(1, 101):
        make_batch(dataset, order, number)
    report("100 batches of 64")
    print(f"total {time.process_time():.1f} s of the processor, peak {resident('VmHWM'):.0f} MB with pages of files")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["make", "plan"])
    parser.add_argument("arguments", nargs="+", help="make: tar, parquet or folder, and the place; plan: the place")
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--encode", type=int, default=1_000_000, help="plan: number of pictures that get latents")
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    if args.action == "make":
        make(args.arguments[0], Path(args.arguments[1]), args.count)
    else:
        place = Path(args.arguments[0])
        plan(place, args.cache or place.with_name(place.name + "-cache"), "tiny", args.encode)
