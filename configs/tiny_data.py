"""The command that makes what the embedded model is trained from: pictures with captions, and the first weights.

    python configs/tiny_sets.py npm runs/tiny/sets        (its own text says how to get the sets)
    python configs/tiny_data.py data runs/tiny/data --sets runs/tiny/sets
    python -m sdjax.train configs/tiny_vae.toml
    git archive 8ff9a1a sdjax/tiny | tar -x -C runs/tiny        (the model before)
    python configs/tiny_data.py model runs/tiny/start --captions runs/tiny/data/pictures/metadata.jsonl \\
      --before runs/tiny/sdjax/tiny --vae runs/tiny/vae/export/vae/model
    python -m sdjax.train configs/tiny_model.toml

The commands of this file always write the same files.

`sdjax/tiny/subjects.tsv` lists the subjects: code points of an emoji, its name, other names. The names are CLDR's short
names (Unicode License v3) where these say what the picture shows, and our own elsewhere. Chosen are emoji that show one
thing: hearts, shapes, faces, animals, plants, food, vehicles, weather, sport, clothes, buildings, instruments, tools.
Left out are flags of countries, keycaps, letters, clock faces, arrows, signs, and hands and people in many variants. Of
emoji that look alike at 64 pixels one or two are chosen.

A subject is drawn in the style of each set that has it, in many framings and colours, and in scenes with others, see
configs/tiny_scenes.py. Captions name the style, as in "red heart, noto", or leave it open: "red heart". So the model
learns what a style is, and what belongs to the subject.

The U-Net and the text model begin as those of the model before, which knew the same subjects in one style and one
framing. The autoencoder began as that model's too, so its latents mean nearly the same. From random weights, a U-Net of
twice the size had not learnt after 1300 steps what this one knows after 300.

Sizes: weights in float16 and the tokenizer must stay below 24 MB. On two CPU cores the largest maps take most of the
time of a step, so the VAE has few channels there and most of its parameters at 16 x 16. The U-Net has most of its
parameters at 8 x 8, and all attention. Latents of 16 x 16 x 4 are needed for a PSNR of 30 dB. A VAE of factor 8 would
halve the work of the U-Net, but faces would be lost.

Schedule: Stable Diffusion's, with v-prediction. The time steps are spaced "trailing", so drawing starts at the step
where training ended. A zero terminal SNR would fit even better, but it excludes samplers that start at a finite sigma.
"""

import hashlib
import itertools
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiny_scenes as scenes
from PIL import Image

import sdjax
from sdjax.errors import DataError
from sdjax.runtime import command

WITHHELD = ("green circle", "purple circle", "yellow square", "orange square", "brown heart")
"""Names that training never sees, although it sees both words of each. They test whether colour and shape combine."""
TAUGHT = ("twemoji", "openmoji")
"""Sets that the model never sees: what it is taught in examples and measures."""
HELD_OUT = 0.05
"""Share of the emoji that the VAE never sees."""
CAPTIONS = 4
"""Captions of each subject. Every subject has the same number, so all are shown equally often."""
COUNTS = {"whole": 12_000, "one": 20_000, "recoloured": 5_000, "two": 10_000, "worn": 5_000}
"""Pictures of each kind."""
FIRST = 12_000
"""Pictures of the kind `whole` that training begins with."""
NAMED = 0.65
"""Share of the captions that name the style."""
WINDOW = 24
"""Positions of the text model, in tokens."""
LONGEST = 14
"""Most words of a caption."""
MERGES = 2400
"""Merges of the tokenizer."""


class Subject(NamedTuple):
    """An emoji with its names. code: its code points without fe0f, as in `1f3c3-200d-2640`."""

    code: str
    name: str
    others: tuple[str, ...]


def subjects() -> tuple[Subject, ...]:
    """The subjects in subjects.tsv, which has the order of Unicode. The subjects of WITHHELD are among them."""
    lines = (Path(sdjax.__file__).parent / "tiny" / "subjects.tsv").read_text("utf-8").splitlines()[1:]
    rows = (line.split("\t") for line in lines)
    return tuple(
        Subject(code.replace("-fe0f", ""), name, tuple(others.split("; ")) if others else ())
        for code, name, others in rows
    )


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


class Picture(NamedTuple):
    """A picture with its file's name and the other fields of its line in metadata.jsonl."""

    file: str
    image: Image.Image
    fields: dict[str, str]


def read_sets(folder: str | Path, *, taught: bool = False) -> dict[str, dict[str, Path]]:
    """Word of a set -> code -> its picture, of the sets that the model may see, or of those that it is taught."""
    found = {
        path.name: {file.stem: file for file in sorted(path.glob("*.png"))}
        for path in sorted(Path(folder).glob("*/"))
        if (path.name in TAUGHT) == taught
    }
    if not found or not all(found.values()):
        raise DataError(f"{folder}: no folders of pictures; `python configs/tiny_sets.py` draws them")
    return found


def write_data(
    folder: str | Path, sets: str | Path, counts: dict[str, int] = COUNTS, first: int = FIRST, seed: int = 0
) -> dict[str, int]:
    """Writes data sets below `folder`. Returns the number of pictures in each.

    Each is a folder of PNGs of 64 x 64 on white, with a metadata.jsonl. held_out: a share HELD_OUT of the emoji of all
    sets. vae: the other emoji, half of them framed anew. first and pictures: what text model and U-Net are trained on.
    In the first of them every emoji is whole and in the middle, and its style is named, so that words are learnt before
    places.

    The others are for the measures. true and taught: all subjects as each set draws them, with `name` and `set`.
    samples: of each set in TAUGHT, the emoji of the sample pictures. characters: six pictures of each character to
    teach it from, and poses: six others of each.
    """
    found, taught = read_sets(sets), read_sets(sets, taught=True)
    chosen = subjects()
    for subject in chosen:
        if not any(subject.code in pictures for pictures in found.values()):
            raise DataError(f"{sets}: has no picture of {subject.name}; expected those of configs/tiny_sets.py")
    random = np.random.default_rng(seed)
    test = held_out({code for pictures in found.values() for code in pictures})
    files = [(word, code, path) for word, pictures in found.items() for code, path in pictures.items()]

    def lone(word: str, code: str, path: Path, *, anew: bool) -> Picture:
        emoji = _read(path)
        image = scenes.framed(emoji, random, mirror=True) if anew else scenes.plain(emoji)
        return Picture(f"{word}/{code}.png", image, {"text": "emoji"})

    writers: dict[str, Iterable[Picture]] = {
        "held_out": (lone(*file, anew=False) for file in files if file[1] in test),
        "vae": (lone(*file, anew=random.random() < 0.5) for file in files if file[1] not in test),
        "true": _as_drawn(found, chosen),
        "taught": _as_drawn(taught, chosen),
    }
    sampled = {path.stem for path in (Path(sdjax.__file__).parent / "tiny/samples").glob("*.png")}
    for word, pictures in taught.items():
        writers[f"samples/{word}"] = _as_drawn({word: pictures}, [s for s in chosen if s.code in sampled])
    emoji = {s.name: _read(found["noto"][s.code]) for s in chosen}
    for name, poses in characters(emoji, random).items():
        writers[f"characters/{name}"], writers[f"poses/{name}"] = poses[:6], poses[6:]
    painter = Painter(found, chosen, random)
    writers["first"], writers["pictures"] = painter.pictures({"whole": first}, named=1.0), painter.pictures(counts)
    return {name: _write(Path(folder) / name, pictures) for name, pictures in writers.items()}


def _as_drawn(sets: dict[str, dict[str, Path]], chosen: Sequence[Subject]) -> Iterable[Picture]:
    for word, pictures in sets.items():
        for s in chosen:
            if s.code in pictures:
                fields = {"text": s.name, "name": s.name, "set": word}
                yield Picture(f"{word}/{s.code}.png", scenes.plain(_read(pictures[s.code])), fields)


def characters(emoji: dict[str, Image.Image], random: np.random.Generator) -> dict[str, list[Picture]]:
    """Name, as in `blue-cat-face-top-hat`, -> twelve poses of each made-up character. emoji: name -> RGBA."""
    poses = {}
    for colour, head, worn in scenes.CHARACTERS:
        coloured, level = scenes.recoloured(emoji[head], colour), scenes.eyes(head)
        image = scenes.wearing(coloured, emoji[worn], kind=worn, level=level or 0.0)
        name = "-".join((colour, head, worn)).replace(" ", "-")
        pictures = (scenes.framed(image, random, mirror=True) for _ in range(12))
        poses[name] = [Picture(f"{i}.png", picture, {"text": "", "name": name}) for i, picture in enumerate(pictures)]
    return poses


Paint = Callable[[str, str], tuple[Image.Image, str] | None]
"""Makes a picture and its caption from a set and a name, or nothing if the emoji cannot be painted so."""


class Painter:
    """Makes pictures with captions from the subjects of all sets."""

    def __init__(
        self, sets: dict[str, dict[str, Path]], chosen: Sequence[Subject], random: np.random.Generator
    ) -> None:
        self._random = random
        self._emoji = {
            word: {s.name: scenes.trimmed(_read(pictures[s.code])) for s in chosen if s.code in pictures}
            for word, pictures in sets.items()
        }
        """Set -> name -> the emoji."""
        self._subjects = {s.name: s for s in chosen if s.name not in WITHHELD}
        self._all = [
            (word, name)
            for word, emoji in self._emoji.items()
            for name in emoji
            if name in self._subjects and (word != "glyph" or not _has_colour(name))  # glyphs are black and white
        ]

    def pictures(self, counts: dict[str, int], named: float = NAMED) -> Iterable[Picture]:
        """Yields so many pictures of each kind. Those of one emoji show all of them equally often.

        named: share of the captions that name the style.
        """
        kinds: dict[str, Paint] = {
            "whole": self._whole,
            "one": self._one,
            "recoloured": self._recoloured,
            "two": self._two,
            "worn": self._worn,
        }
        for kind, count in counts.items():
            for i, (word, image, text) in enumerate(itertools.islice(self._painted(kinds[kind], named), count)):
                yield Picture(f"{kind}/{i}.png", image, {"text": text, "set": word})

    def _painted(self, paint: Paint, named: float) -> Iterable[tuple[str, Image.Image, str]]:
        """Yields set, picture and caption, without end. Each turn shows every emoji that can be painted so once."""
        while True:
            for i in self._random.permutation(len(self._all)):
                word, name = self._all[i]
                painted = paint(word, name)
                if painted is None:
                    continue
                image, text = painted
                text = f"{text}, {word}" if self._random.random() < named else text
                if len(text.split()) <= LONGEST:
                    yield word, image, text

    def _whole(self, word: str, name: str) -> tuple[Image.Image, str]:
        colour = self._colour()
        if self._random.random() < 0.2 and not _has_colour(name) and not scenes.is_withheld(colour, name):
            return scenes.whole(scenes.recoloured(self._emoji[word][name], colour)), f"{colour} {name}"
        return scenes.whole(self._emoji[word][name]), str(self._random.choice(captions(self._subjects[name])))

    def _one(self, word: str, name: str) -> tuple[Image.Image, str]:
        emoji = self._emoji[word][name]
        text = self._random.choice(captions(self._subjects[name]))
        return scenes.framed(emoji, self._random, mirror=scenes.is_mirrored(name)), str(text)

    def _recoloured(self, word: str, name: str) -> tuple[Image.Image, str] | None:
        colour = self._colour()
        if _has_colour(name) or scenes.is_withheld(colour, name):
            return None
        emoji = scenes.recoloured(self._emoji[word][name], colour)
        return scenes.framed(emoji, self._random, mirror=scenes.is_mirrored(name)), f"{colour} {name}"

    def _two(self, word: str, name: str) -> tuple[Image.Image, str] | None:
        company = str(self._random.choice([n for w, n in self._all if w == word]))
        if scenes.is_withheld(None, name, company):
            return None
        (first, one), (second, other) = self._part(word, name), self._part(word, company)
        place = str(self._random.choice(list(scenes.PLACES)))
        return scenes.PLACES[place](first, second, self._random), f"{one} {place} {other}"

    def _worn(self, word: str, name: str) -> tuple[Image.Image, str] | None:
        level = scenes.eyes(name)
        kind = str(self._random.choice((*scenes.HATS, *scenes.GLASSES)))
        if level is None or kind not in self._emoji[word]:
            return None
        colour = self._colour() if self._random.random() < 0.4 else None
        if scenes.is_withheld(colour, name, kind):
            return None
        head = self._emoji[word][name]
        head = scenes.recoloured(head, colour) if colour else head
        image = scenes.wearing(head, self._emoji[word][kind], kind=kind, level=level)
        text = f"{name} {self._random.choice(('wearing', 'with'))} {kind}"
        return scenes.framed(image, self._random, mirror=True), f"{colour} {text}" if colour else text

    def _part(self, word: str, name: str) -> tuple[Image.Image, str]:
        """An emoji for a scene, one in five of them recoloured, with its name."""
        emoji = scenes.varied(self._emoji[word][name], self._random, mirror=scenes.is_mirrored(name), most=8)
        colour = self._colour()
        if self._random.random() < 0.2 and not _has_colour(name) and not scenes.is_withheld(colour, name):
            return scenes.recoloured(emoji, colour), f"{colour} {name}"
        return emoji, name

    def _colour(self) -> str:
        return str(self._random.choice(list(scenes.COLOURS)))


def _has_colour(name: str) -> bool:
    return not scenes.COLOUR_WORDS.isdisjoint(name.split())


def _read(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGBA")
    except OSError as error:
        raise DataError(f"{path}: not a picture: {error}") from error


def _write(folder: Path, pictures: Iterable[Picture]) -> int:
    """Writes pictures and metadata.jsonl to the folder. Returns how many."""
    lines = []
    for picture in pictures:
        path = folder / picture.file
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.image.save(path)
        lines.append(json.dumps({"file_name": picture.file, **picture.fields}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")
    return len(lines)


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


# ------------------------------------------------------------------------------------------------ the first weights


def write_model(folder: str | Path, texts: Sequence[str], before: str, vae: str, seed: int = 0) -> dict[str, int]:
    """Writes the model that training begins with, in float32. Returns the number of parameters of each part.

    texts: those that its tokenizer is made for. before: the model whose U-Net, text model and schedule are taken. The
    tokens that it knows keep their vectors; those of other tokens are normal with standard deviation 0.02. Positions
    past its window begin as the last one. vae: the model whose autoencoder is taken.
    """
    import jax
    import numpy as np

    from sdjax.formats.diffusers_folder import save_folder
    from sdjax.outline import Outline

    earlier, other = Outline.load(before), Outline.load(vae)
    params = {part: earlier.load_weights(part) for part in ("unet", "text_encoder")} | {
        "vae": other.load_weights("vae")
    }
    params = jax.tree.map(np.asarray, params)
    configs = {**earlier.folder.configs, "vae": other.folder.configs["vae"]}
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer = Path(temporary) / "tokenizer"
        size = write_tokenizer(tokenizer, texts)
        known = _vocabulary(earlier.folder.tokenizers["tokenizer"])
        embeddings = params["text_encoder"]["embeddings"]
        table = embeddings["token_embedding"]["embedding"]
        rows = 0.02 * np.random.default_rng(seed).standard_normal((size, table.shape[1]), np.float32)
        for token, place in _vocabulary(tokenizer).items():
            if token in known:
                rows[place] = table[known[token]]
        positions = embeddings["position_embedding"]["embedding"]
        longer = np.pad(positions, ((0, WINDOW - len(positions)), (0, 0)), "edge")
        embeddings["token_embedding"]["embedding"], embeddings["position_embedding"]["embedding"] = rows, longer
        ids = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1, "vocab_size": size}
        configs["text_encoder"] = {**configs["text_encoder"], **ids, "max_position_embeddings": WINDOW}
        scheduler = earlier.folder.scheduler
        save_folder(folder, configs=configs, params=params, tokenizers={"tokenizer": tokenizer}, scheduler=scheduler)
    return {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in params.items()}


def _vocabulary(tokenizer: Path) -> dict[str, int]:
    return json.loads((tokenizer / "vocab.json").read_text("utf-8"))


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
    data = commands.add_parser("data", help="write pictures with captions, from several sets of emoji")
    data.add_argument("folder")
    data.add_argument("--sets", required=True, help="folder that configs/tiny_sets.py wrote")
    data.add_argument("--seed", type=int, default=0, help="seed of the framings, colours and scenes")
    model = commands.add_parser("model", help="write the model that training begins with")
    model.add_argument("folder")
    model.add_argument("--captions", required=True, help="metadata.jsonl with the texts that the tokenizer is made for")
    model.add_argument("--before", required=True, help="model whose U-Net and text model are taken")
    model.add_argument("--vae", required=True, help="model whose autoencoder is taken")
    model.add_argument("--seed", type=int, default=0, help="seed of the vectors of new tokens")
    args = parser.parse_args(argv)
    if args.command == "data":
        counts = write_data(args.folder, args.sets, seed=args.seed)
    else:
        counts = write_model(args.folder, read_captions(args.captions), args.before, args.vae, args.seed)
    print(", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
