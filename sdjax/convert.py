"""The command that converts models, LoRAs and embeddings: `python -m sdjax.convert SRC DST --to FORM`.

It imports JAX after it has checked the flags, so mistakes are reported at once. Models are converted and merged a
tensor at a time, so memory holds little of them.
"""

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from sdjax.errors import ConfigError, DataError
from sdjax.runtime import command
from sdjax.settings import Dtype, LoraTargets, choices, parse

_EPILOG = """forms:
  diffusers    a model folder, from a folder, a single file or a hub id
  single_file  a model in one .safetensors file, with its VAE, as A1111 and ComfyUI keep models; from the same
  kohya        a LoRA for A1111, ComfyUI, kohya's scripts and diffusers, from a LoRA and its --model, or extracted
  peft         a LoRA for diffusers and PEFT, from the same; ComfyUI skips the attention layers of its U-Net
  embedding    new words, one file each, from an embedding or from a LoRA file with words

models:  --lora merges LoRAs of any kind (also LoCon, DoRA, LoHa, LoKr, GLoRA) into the model. Averages over the
         training and buffers in SRC are left out.
LoRAs:   --lora adds LoRAs to SRC. --rank, --ratio and --energy resize the result, to the LoRA of this rank that is
         nearest to it, and make a plain LoRA of any other kind; the error is printed. Words bundled in SRC stay in
         the file, or with peft become files beside DST.
extract: with --base the result is the LoRA nearest to the difference of SRC, a fine-tuned model, and the base.
"""

_MODELS, _LORAS = ("diffusers", "single_file"), ("kohya", "peft")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    for path in FORMS[args.to](args):
        print(path)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="sdjax convert",
        description="Convert, merge, resize and extract models, LoRAs and embeddings.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("src", metavar="SRC", help="file, folder or hub id")
    add("dst", metavar="DST", type=Path, help="file or folder to write")
    add("--to", required=True, metavar="FORM", help=f"one of {', '.join(FORMS)}")
    dtypes, targets = ", ".join(get_args(Dtype)), ", ".join(choices(LoraTargets))
    add("--dtype", metavar="TYPE", help=f"of the weights written: {dtypes} (a model keeps its own; others float32)")
    add(
        "--lora", metavar="FILE[:W]", action="append", default=[], help="a LoRA and its weight (1), any number of times"
    )
    add("--embedding", metavar="FILE", action="append", default=[], help="diffusers, kohya: words to put in, likewise")
    add("--model", metavar="SRC", help="kohya, peft: the model that the LoRA was made for")
    add("--base", metavar="SRC", help="kohya, peft: the model that SRC was fine-tuned from")
    add(
        "--rank",
        "--resize-rank",
        type=int,
        metavar="R",
        help="kohya, peft: the rank, or the most (with --base: 16)",
    )
    add("--ratio", type=float, metavar="X", help="kohya, peft: drop singular values below the largest / X")
    add("--energy", type=float, metavar="X", help="kohya, peft: keep this share of the squared norm of each layer")
    add("--targets", metavar="SET", help=f"with --base: the layers to adapt: {targets} (attention)")
    add("--token", metavar="WORD", help="embedding: another name for the word, if SRC holds one word")
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer, for a model in a single file (that on the hub)")
    add("--prediction-type", metavar="NAME", default="", help="epsilon or v_prediction, if the model has the wrong one")
    add("--for-inpainting", action="store_true", help="diffusers, single_file: add a mask to the input, for training")
    add("--overwrite", action="store_true", help="replace what is at DST")
    add("--debug", action="store_true", help="show the tracebacks of errors")
    return parser


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for mistakes that show before anything is read."""
    for name, allowed in (("to", FORMS), ("dtype", get_args(Dtype)), ("targets", choices(LoraTargets))):
        value = vars(args)[name]
        if value is not None and value not in allowed:
            raise ConfigError(f"--{name} {value}: choices are {', '.join(allowed)}")
    for name, least, most in (("rank", 1, math.inf), ("ratio", 1, math.inf), ("energy", 1e-6, 1)):
        value = vars(args)[name]
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            raise ConfigError(f"--{name} {value}: must be {least} or more" + (", and 1 at most" if most == 1 else ""))
    forms_of = {
        **dict.fromkeys(("--model", "--base", "--rank", "--ratio", "--energy", "--targets"), _LORAS),
        "--token": ("embedding",),
        **dict.fromkeys(("--tokenizer", "--lora"), (*_MODELS, *_LORAS)),
        "--embedding": ("diffusers", "kohya"),
        **dict.fromkeys(("--prediction-type", "--for-inpainting"), _MODELS),
    }
    for flag, forms in forms_of.items():
        if vars(args)[flag[2:].replace("-", "_")] and args.to not in forms:
            raise ConfigError(f"{flag} has no meaning for --to {args.to}, only for {', '.join(forms)}")
    if args.to in _LORAS:
        if bool(args.model) == bool(args.base):
            choice = "--model (SRC is a LoRA made for it) or --base (SRC is a model fine-tuned from it)"
            raise ConfigError(f"--to {args.to} needs either {choice}")
        if args.model and args.targets:
            raise ConfigError("--targets goes with --base: an existing LoRA keeps its layers")
        if args.base and args.lora:
            raise ConfigError("--lora goes with --model: extract first, and add LoRAs to the result")
    if args.to in ("single_file", *_LORAS) and args.dst.suffix.lower() != ".safetensors":
        raise ConfigError(f"{args.dst}: --to {args.to} writes a file whose name ends in .safetensors")
    if args.to == "diffusers" and args.dst.suffix.lower() in (".safetensors", ".ckpt"):
        raise ConfigError(f"{args.dst}: --to diffusers writes a folder; for a file choose --to single_file")


def _check_free(args: argparse.Namespace, *paths: Path) -> None:
    """Raises ConfigError for a path that holds something, which only --overwrite replaces."""
    for path in paths:
        if not args.overwrite and path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ConfigError(f"{path}: exists already; --overwrite replaces it")


# ------------------------------------------------------------------------------------------------ what is read


def _outline(source: str, args: argparse.Namespace):
    from sdjax.outline import Outline

    tokenizer = args.tokenizer if Path(source).is_file() else None
    return Outline.load(source, tokenizer=tokenizer, prediction_type=args.prediction_type)


def _weighted(flag: str, text: str) -> tuple[Path, float]:
    path, rest = command.file_and_rest(flag, text)
    return path, 1.0 if rest is None else parse(float, rest, f"the weight of {flag} {path}")


def _read_loras(outline: Any, files: Sequence[tuple[Path, float]]):
    """The LoRA files with their weights, for a model given by its outline, and the words bundled in them."""
    from sdjax.formats.lora_file import read_lora

    loras = [(read_lora(path, outline.shapes), weight) for path, weight in files]
    return loras, [path for (path, _), (file, _) in zip(files, loras, strict=True) if file.words]


def _read_words(outline: Any, files: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """The words of several files for a model. Raises ConfigError for a word that two of them have."""
    words: dict[str, dict[str, Any]] = {}
    for path in files:
        for word, rows in outline.load_words(path).items():
            if word in words:
                raise ConfigError(f"{path}: holds the word {word}, as another of the files does")
            words[word] = rows
    return words


def _word_files(words: Mapping[str, Any], folder: Path, source: Any) -> dict[str, Path]:
    """The path of each word's file in a folder."""
    from sdjax.formats.embedding_file import file_name

    paths = {word: folder / file_name(word) for word in words}
    if len(set(paths.values())) != len(paths):
        raise ConfigError(f"{source}: the words {', '.join(words)} would share a file name: use --token one by one")
    return paths


def _save_words(words: Mapping[str, Any], paths: Mapping[str, Path], args: argparse.Namespace) -> list[Path]:
    import jax.numpy as jnp

    from sdjax.formats.embedding_file import save_embedding

    for word, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_embedding(path, word, words[word], dtype=jnp.dtype(args.dtype or "float32"))
    return list(paths.values())


# ------------------------------------------------------------------------------------------------ forms


def _model(args: argparse.Namespace) -> list[Path]:
    from sdjax.formats.carried import carried
    from sdjax.formats.merging import merged
    from sdjax.model import Model

    _check_free(args, args.dst)
    source = _outline(args.src, args)
    if args.for_inpainting and source.is_inpainting:
        raise ConfigError(f"--for-inpainting: {args.src} is made for inpainting already")
    files = [_weighted("--lora", text) for text in args.lora]
    loras, with_words = _read_loras(source, files)
    words = _read_words(source, [*with_words, *args.embedding])
    beside = _word_files(words, args.dst.parent, args.src) if args.to == "single_file" else {}
    _check_free(args, *beside.values())
    stored = str(next(iter(source.folder.tensors("unet").values())).dtype)
    dtype = args.dtype or (stored if stored in get_args(Dtype) else "float32")
    params = {
        part: merged(
            source.view_weights(part), [(file.adapters[part], w) for file, w in loras if part in file.adapters]
        )
        for part in source.shapes
    }
    metadata = carried(source.folder.metadata) | _sources(args.src, files)
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    model = Model(source, params)
    if args.for_inpainting:
        model = model.for_inpainting()
    if words and not beside:
        model = model.with_embedding(words)
    model.save(args.dst, dtype=dtype, metadata=metadata)
    return [args.dst, *_save_words(words, beside, args)]


def _lora(args: argparse.Namespace) -> list[Path]:
    import jax.numpy as jnp

    from sdjax.formats.carried import carried
    from sdjax.formats.lora_file import save_lora
    from sdjax.lora.low_rank import Limit

    _check_free(args, args.dst)
    model = _outline(args.base or args.model, args)
    given = Limit(args.rank, args.ratio, args.energy)
    limit = given if given != Limit() else None
    if args.base:
        adapters, with_words, metadata = _extract(args, model, limit or Limit(rank=16)), [], {}
    else:
        files = [_weighted("SRC", args.src), *(_weighted("--lora", text) for text in args.lora)]
        loras, with_words = _read_loras(model, files)
        adapters = loras[0][0].adapters
        if limit or files != [(files[0][0], 1.0)]:
            adapters = _combined(model, [(file.adapters, weight) for file, weight in loras], limit)
        metadata = carried(loras[0][0].metadata) | _sources(files[0][0], files[1:])
    words = _read_words(model, [*with_words, *args.embedding])
    beside = _word_files(words, args.dst.parent, args.src) if args.to == "peft" else {}
    _check_free(args, *beside.values())
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    bundled = {} if beside else words
    dtype = jnp.dtype(args.dtype or "float32")
    save_lora(args.dst, adapters, model.shapes, style=args.to, embeddings=bundled, metadata=metadata, dtype=dtype)
    return [args.dst, *_save_words(words, beside, args)]


def _combined(model: Any, weighted: Sequence[tuple[Mapping[str, Any], float]], limit: Any) -> dict[str, Any]:
    from sdjax.lora import low_rank

    params = {part: model.view_weights(part) for part in {part for tree, _ in weighted for part in tree}}
    nearest = low_rank.combined(params, weighted, limit)
    if limit and nearest.lost:
        _print_error(nearest)
    return nearest.adapters


def _extract(args: argparse.Namespace, base: Any, limit: Any) -> dict[str, Any]:
    """The adapters that turn one model, given by its outline, into a tuned one, for all parts but the VAE."""
    from sdjax.lora import low_rank

    tuned = _outline(args.src, args)
    parts = [part for part in base.shapes if part != "vae"]
    if different := [part for part in parts if tuned.shapes.get(part) != base.shapes[part]]:
        fault = f"{', '.join(different)} differ in shape"
        raise DataError(f"{args.src} and {args.base} are models of different kinds: {fault}")
    after, before = ({part: model.view_weights(part) for part in parts} for model in (tuned, base))
    nearest = low_rank.extract(after, before, limit, which=args.targets or "attention")
    if not nearest.adapters:
        raise DataError(f"{args.src} and {args.base} are the same in all layers that a LoRA would adapt")
    _print_error(nearest)
    return nearest.adapters


def _print_error(nearest: Any) -> None:
    """Prints to stderr what a LoRA lacks of the change that it stands for."""
    path, share = nearest.worst
    error = f"relative error {nearest.error:.2g} of the change of all layers"
    print(f"{error}; of the worst, {'/'.join(path)}, {share:.2g}", file=sys.stderr)


def _sources(source: Any, loras: Sequence[tuple[Path, float]]) -> dict[str, str]:
    """The entry of the metadata that names what was merged, by ModelSpec; none if nothing was."""
    merged = ", ".join([Path(source).name, *(f"{path.name}:{weight:g}" for path, weight in loras)])
    return {"modelspec.merged_from": merged} if loras else {}


def _embedding(args: argparse.Namespace) -> list[Path]:
    from sdjax.formats.embedding_file import load_embedding

    words = load_embedding(args.src)
    if args.token:
        if len(words) != 1:
            raise ConfigError(f"--token {args.token} names one word; {args.src} holds {', '.join(words)}")
        words = dict(zip([args.token], words.values(), strict=True))
    if args.dst.suffix.lower() == ".safetensors":
        if len(words) != 1:
            raise ConfigError(f"{args.src} holds the words {', '.join(words)}: write them to a folder")
        paths = {word: Path(args.dst) for word in words}
    else:
        paths = _word_files(words, args.dst, args.src)
    _check_free(args, *paths.values())
    return _save_words(words, paths, args)


FORMS: dict[str, Callable[[argparse.Namespace], list[Path]]] = {
    "diffusers": _model,
    "single_file": _model,
    "kohya": _lora,
    "peft": _lora,
    "embedding": _embedding,
}


if __name__ == "__main__":
    sys.exit(main())
