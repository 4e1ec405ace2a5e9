"""The command that makes what the embedded model is trained from: pictures with captions, and an untrained model.

    npm pack emoji-datasource-google@16.0.0
    python configs/tiny_data.py data runs/tiny/data --noto emoji-datasource-google-16.0.0.tgz
    python configs/tiny_data.py model runs/tiny/start --captions runs/tiny/data/pictures/metadata.jsonl

The training then runs with configs/tiny_vae.toml and configs/tiny_model.toml. Each command always writes the same
files.

`sdjax/tiny/subjects.tsv` lists the subjects: code points of an emoji, its name, other names. The names are CLDR's short
names (Unicode License v3) where these say what the picture shows, and our own elsewhere. Chosen are emoji that show one
thing: hearts, shapes, faces, animals, plants, food, vehicles, weather, sport, clothes, buildings, instruments, tools.
Left out are flags of countries, keycaps, letters, clock faces, arrows, signs, and hands and people in many variants. Of
emoji that look alike at 64 pixels one or two are chosen. The pictures are Google's Noto emoji (Apache License 2.0).

Sizes: weights in float16 and the tokenizer must stay below 12 MB. On two CPU cores the largest maps take most of the
time of a step, so the VAE has few channels there and most of its parameters at 16 x 16. The U-Net has most of its
parameters, and all attention, at 8 x 8. Latents of 16 x 16 x 4 are needed for a PSNR of 30 dB. A VAE of factor 8 would
halve the work of the U-Net, but faces would be lost.

Schedule: Stable Diffusion's, with v-prediction. The time steps are spaced "trailing", so drawing starts at the step
where training ended. A zero terminal SNR would fit even better, but it excludes samplers that start at a finite sigma.
"""

import hashlib
import io
import itertools
import json
import re
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import sdjax
from sdjax.errors import DataError
from sdjax.runtime import command

WITHHELD = ("green circle", "purple circle", "yellow square", "orange square", "brown heart")
"""Names that training never sees, although it sees both words of each. They test whether colour and shape combine."""
HELD_OUT = 0.05
"""Share of the emoji that the VAE never sees."""
CAPTIONS = 4
"""Captions of each subject. Every subject has the same number, so all are shown equally often."""
WINDOW = 16
"""Positions of the text model, in tokens."""
MERGES = 1800
"""Merges of the tokenizer."""


class Subject(NamedTuple):
    """An emoji with its names. code: its code points, as in `1f3c3-200d-2640`."""

    code: str
    name: str
    others: tuple[str, ...]


def subjects() -> tuple[Subject, ...]:
    """The subjects in subjects.tsv, which has the order of Unicode. The subjects of WITHHELD are among them."""
    lines = (Path(sdjax.__file__).parent / "tiny" / "subjects.tsv").read_text("utf-8").splitlines()[1:]
    rows = (line.split("\t") for line in lines)
    return tuple(Subject(code, name, tuple(others.split("; ")) if others else ()) for code, name, others in rows)


def captions(subject: Subject) -> tuple[str, ...]:
    """The captions of a subject. Half are its name, the others other names, "a NAME" and "NAME emoji"."""
    article = "an" if re.match("[aeio]|um|up|hour", subject.name) else "a"
    thing = re.split(" of | with | and ", subject.name)[0]
    plural = " and " in subject.name or re.search("(?<![suo])s$", thing)
    templates = (f"{'the' if plural else article} {subject.name}", f"{subject.name} emoji")
    # If only one template has room beside the other names, a hash of the name decides which.
    templates = templates[:: 1 if _hash(subject.name)[0] % 2 else -1]
    return (subject.name, subject.name, *(*subject.others, *templates)[: CAPTIONS - 2])


# ------------------------------------------------------------------------------------------------ the pictures


def read_package(path: str | Path) -> dict[str, bytes]:
    """Code -> PNG of every emoji in the npm package. path: the package's archive or folder."""
    path = Path(path)
    if path.is_dir():
        pictures = {file.stem: file.read_bytes() for file in path.glob("**/img/google/64/*.png")}
    elif path.is_file():
        with tarfile.open(path) as archive:
            members = [m for m in archive if "/img/google/64/" in m.name and m.name.endswith(".png")]
            pictures = {Path(m.name).stem: archive.extractfile(m).read() for m in members}  # pyright: ignore
    else:
        raise DataError(f"{path}: no such file or folder; `npm pack emoji-datasource-google` makes the archive")
    if not pictures:
        raise DataError(f"{path}: no pictures below img/google/64; expected npm's emoji-datasource-google")
    return dict(sorted(pictures.items()))


def family(code: str) -> str:
    """The code without skin tone, gender, hair and direction. Emoji of one family look alike."""
    person = {"1f468": "person", "1f469": "person", "1f9d1": "person"}
    parts = [person.get(part, part) for part in code.split("-")]
    looks = r"1f3f[b-f]|2640|2642|27a1|fe0f|200d|1f9b[0-3]"
    return "-".join(part for part in parts if not re.fullmatch(looks, part))


def held_out(codes: Iterable[str]) -> frozenset[str]:
    """The emoji that the VAE is tested on: all members of the families with the smallest hashes."""
    codes = list(codes)
    families = sorted({family(code) for code in codes}, key=_hash)
    chosen = set(families[: max(1, round(HELD_OUT * len(families)))])
    return frozenset(code for code in codes if family(code) in chosen)


def write_data(folder: str | Path, package: str | Path) -> dict[str, int]:
    """Writes four data sets below `folder`. Returns the number of pictures in each.

    Each is a folder of PNGs of 64 x 64 on white, with a metadata.jsonl of `file_name`, `text` and, in the last two,
    `name`. held_out: a share HELD_OUT of all emoji. vae: the other emoji, with all skin tones. pictures: the subjects
    except those of WITHHELD, each with CAPTIONS files of one caption each. withheld: the subjects of WITHHELD.
    """
    images = {code: _on_white(data) for code, data in read_package(package).items()}
    chosen = subjects()
    if missing := [subject.name for subject in chosen if subject.code not in images]:
        raise DataError(f"{package}: has no picture of {', '.join(missing[:3])}; expected version 16 or later")
    test = held_out(images)
    pictures, withheld = [], []
    for subject in chosen:
        stem = re.sub("[^a-z0-9]+", "-", subject.name).strip("-")
        if subject.name in WITHHELD:
            withheld.append((f"{stem}.png", subject.name, subject))
            continue
        pictures += [
            (f"{stem}{f'.{i}' if i > 1 else ''}.png", caption, subject)
            for i, caption in enumerate(captions(subject), 1)
        ]
    lines = {
        "vae": [({"file_name": f"{code}.png", "text": "emoji"}, code) for code in images if code not in test],
        "held_out": [({"file_name": f"{code}.png", "text": "emoji"}, code) for code in images if code in test],
    }
    for name, group in (("pictures", pictures), ("withheld", withheld)):
        lines[name] = [({"file_name": file, "text": text, "name": s.name}, s.code) for file, text, s in group]
    for name, group in lines.items():
        out = Path(folder) / name
        out.mkdir(parents=True, exist_ok=True)
        for entry, code in group:
            (out / entry["file_name"]).write_bytes(images[code])
        text = "".join(json.dumps(entry) + "\n" for entry, _ in group)
        (out / "metadata.jsonl").write_text(text, "utf-8")
    return {name: len(group) for name, group in lines.items()}


def _on_white(data: bytes) -> bytes:
    """The PNG on a white background."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# ------------------------------------------------------------------------------------------------ the tokenizer


def train_tokenizer(texts: Sequence[str], merges: int = MERGES) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of a byte-pair encoding of these texts, made for CLIP's tokenizer.

    Each merge joins the most frequent pair (Sennrich et al. 2016), the first in alphabetical order among equals. There
    are fewer than `merges` if all words are whole before. The ids are in CLIP's order: 256 bytes, 256 bytes at the end
    of a word, the merges, the begin and the end of a text.
    """
    alphabet = _byte_letters()
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for word in re.findall(r"'s|[a-z]+|[0-9]|[^\sa-z0-9]+", text.lower()):
            letters = [alphabet[byte] for byte in word.encode()]
            words[*letters[:-1], letters[-1] + "</w>"] += 1
    chosen: list[tuple[str, str]] = []
    for _ in range(merges):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        chosen.append(best)
        words = Counter({_merge(word, best): count for word, count in words.items()})
    letters = alphabet.values()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in chosen)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}, chosen


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            out.append("".join(pair))
            i += 2
        else:
            out.append(word[i])
            i += 1
    return tuple(out)


def _byte_letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in GPT-2 and CLIP: its own if it is printable, or one beyond code 255."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def write_tokenizer(folder: str | Path, texts: Sequence[str], merges: int = MERGES) -> int:
    """Writes a folder that CLIPTokenizer reads. Returns the size of the vocabulary."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, pairs = train_tokenizer(texts, merges)
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "do_lower_case": True,
        "model_max_length": WINDOW,
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    return len(vocabulary)


# ------------------------------------------------------------------------------------------------ the untrained model

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,  # the number of heads, in spite of the field's name
    "block_out_channels": [64, 128],
    "cross_attention_dim": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 16,
    "out_channels": 4,
    "sample_size": 16,
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
VAE: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [32, 64, 72],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 1.0,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
TEXT: dict[str, Any] = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "dtype": "float32",
    "hidden_act": "quick_gelu",
    "hidden_size": 128,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": WINDOW,
    "model_type": "clip_text_model",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "projection_dim": 128,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}
_BRANCH_ENDS = r"conv2|proj_out|out_proj|fc2"
"""Names of the last layer of a residual branch. The layer starts at zero, so each block starts as the identity."""


def write_model(folder: str | Path, texts: Sequence[str], seed: int = 0) -> dict[str, int]:
    """Writes an untrained model folder in float32. Returns the number of parameters of each part.

    Kernels are normal with standard deviation 1 / sqrt(inputs), embeddings with 0.02. The last layer of each residual
    branch and the last layer of the U-Net are zero.
    """
    import jax
    import numpy as np

    from sdjax.formats.diffusers_folder import save_folder
    from sdjax.models import clip, unet, vae

    random = np.random.default_rng(seed)

    def fill(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        names = [part.key for part in path]
        if names[-1] == "scale":
            return np.ones(leaf.shape, np.float32)
        ends = re.fullmatch(_BRANCH_ENDS, names[-2]) or names[-3:] == ["attentions_0", "to_out_0", "kernel"]
        if names[-1] == "bias" or ends or names[:-1] == ["unet", "conv_out"]:
            return np.zeros(leaf.shape, np.float32)
        inputs = leaf.size // leaf.shape[-1]
        deviation = 0.02 if names[-1] == "embedding" else inputs**-0.5
        return (deviation * random.standard_normal(leaf.shape)).astype(np.float32)

    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / "tokenizer"
        size = write_tokenizer(tokenizer, texts)
        ids = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1, "vocab_size": size}
        configs = {"unet": UNET, "vae": VAE, "text_encoder": {**TEXT, **ids}}
        abstract = {
            "unet": unet.abstract_params(unet.UNetConfig.from_dict(configs["unet"])),
            "vae": vae.abstract_params(vae.VAEConfig.from_dict(configs["vae"])),
            "text_encoder": clip.abstract_params(clip.TextConfig.from_dict(configs["text_encoder"])),
        }
        params = jax.tree_util.tree_map_with_path(fill, abstract)
        save_folder(folder, configs=configs, params=params, tokenizers={"tokenizer": tokenizer}, scheduler=SCHEDULER)
    return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}


def read_captions(path: str | Path) -> list[str]:
    """The captions in a metadata.jsonl."""
    try:
        return [json.loads(line)["text"] for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: not a metadata.jsonl of captions: {error}") from error


# ------------------------------------------------------------------------------------------------ the command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    parser = command.Parser(
        prog="python configs/tiny_data.py", description="Make what the embedded model is trained from."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write pictures with captions, from Noto emoji")
    data.add_argument("folder")
    data.add_argument("--noto", required=True, help="the npm package emoji-datasource-google: its .tgz or its folder")
    model = commands.add_parser("model", help="write an untrained model folder")
    model.add_argument("folder")
    model.add_argument("--captions", required=True, help="metadata.jsonl with the texts that the tokenizer is made for")
    model.add_argument("--seed", type=int, default=0, help="seed of the weights")
    args = parser.parse_args(argv)
    if args.command == "data":
        counts = write_data(args.folder, args.noto)
    else:
        counts = write_model(args.folder, read_captions(args.captions), args.seed)
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
