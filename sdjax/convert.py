"""The command that converts models, LoRAs and embeddings: `python -m sdjax.convert SRC DST --to FORM`.

It imports JAX after it has checked the flags, so mistakes are reported at once.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from sdjax.errors import ConfigError, DataError
from sdjax.runtime import command
from sdjax.settings import Dtype, LoraTargets, choices

_EPILOG = """forms:
  diffusers    a model folder, from a folder, a single file or a hub id
  single_file  a model in one .safetensors file, as A1111 keeps models; from the same
  kohya        a LoRA for A1111, ComfyUI and diffusers, from a LoRA and its --model, or extracted
  peft         a LoRA for diffusers and PEFT, from the same
  embedding    new words, one file each, from an embedding or from a LoRA file with words

To extract a LoRA from a fine-tuned model SRC, give --base: the result is the best LoRA of --rank for the difference.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code; see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    for path in FORMS[args.to](args):
        print(path)


def _check_free(args: argparse.Namespace, *paths: Path) -> None:
    """Raises ConfigError for a path that holds something, which only --overwrite replaces."""
    for path in paths:
        if not args.overwrite and path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ConfigError(f"{path}: exists already; --overwrite replaces it")


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="sdjax convert",
        description="Convert models, LoRAs and embeddings.",
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
    add("--model", metavar="SRC", help="kohya, peft: the model that the LoRA was made for")
    add("--base", metavar="SRC", help="kohya, peft: the model that SRC was fine-tuned from")
    add("--rank", type=int, metavar="R", help="with --base: the rank of the LoRA (16)")
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
    if args.rank is not None and args.rank < 1:
        raise ConfigError(f"--rank {args.rank}: must be 1 or more")
    models, loras = ("diffusers", "single_file"), ("kohya", "peft")
    forms_of = {
        **dict.fromkeys(("--model", "--base", "--rank", "--targets"), loras),
        "--token": ("embedding",),
        "--tokenizer": (*models, *loras),
        **dict.fromkeys(("--prediction-type", "--for-inpainting"), models),
    }
    for flag, forms in forms_of.items():
        if vars(args)[flag[2:].replace("-", "_")] and args.to not in forms:
            raise ConfigError(f"{flag} has no meaning for --to {args.to}, only for {', '.join(forms)}")
    if args.to in loras:
        if bool(args.model) == bool(args.base):
            choice = "--model (SRC is a LoRA made for it) or --base (SRC is a model fine-tuned from it)"
            raise ConfigError(f"--to {args.to} needs either {choice}")
        if args.model and (args.rank or args.targets):
            raise ConfigError("--rank and --targets go with --base: an existing LoRA keeps its rank and layers")
    if args.to in ("single_file", *loras) and args.dst.suffix.lower() != ".safetensors":
        raise ConfigError(f"{args.dst}: --to {args.to} writes a file whose name ends in .safetensors")
    if args.to == "diffusers" and args.dst.suffix.lower() in (".safetensors", ".ckpt"):
        raise ConfigError(f"{args.dst}: --to diffusers writes a folder; for a file choose --to single_file")


def _outline(source: str, args: argparse.Namespace):
    from sdjax.model import Outline

    tokenizer = args.tokenizer if Path(source).is_file() else None
    return Outline.load(source, tokenizer=tokenizer, prediction_type=args.prediction_type)


def _model(args: argparse.Namespace) -> list[Path]:
    _check_free(args, args.dst)
    source = _outline(args.src, args)
    if args.for_inpainting and source.is_inpainting:
        raise ConfigError(f"--for-inpainting: {args.src} is made for inpainting already")
    stored = str(next(iter(source.folder.tensors("unet").values())).dtype)
    dtype = args.dtype or (stored if stored in get_args(Dtype) else "float32")
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    model = source.with_weights(dtype=dtype)
    if args.for_inpainting:
        model = model.for_inpainting()
    model.save(args.dst, dtype=dtype)
    return [args.dst]


def _lora(args: argparse.Namespace) -> list[Path]:
    import jax.numpy as jnp

    from sdjax.formats.lora_file import load_lora, save_lora

    _check_free(args, args.dst)
    base = _outline(args.base or args.model, args)
    adapters = load_lora(args.src, base.shapes) if args.model else _extract(args, _outline(args.src, args), base)
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    save_lora(args.dst, adapters, base.shapes, style=args.to, dtype=jnp.dtype(args.dtype or "float32"))
    return [args.dst]


def _extract(args: argparse.Namespace, tuned, base) -> dict[str, Any]:
    """The adapters that turn one model, given by its outline, into a tuned one, for all parts but the VAE."""
    from sdjax import lora

    parts = [part for part in base.shapes if part != "vae"]
    if different := [part for part in parts if tuned.shapes.get(part) != base.shapes[part]]:
        fault = f"{', '.join(different)} differ in shape"
        raise DataError(f"{args.src} and {args.base} are models of different kinds: {fault}")
    adapters = {}
    for part in parts:
        weights = (model.load_weights(part) for model in (tuned, base))
        adapter = lora.extract(*weights, rank=args.rank or 16, which=args.targets or "attention")
        if lora.changes_anything(adapter):
            adapters[part] = adapter
    if not adapters:
        raise DataError(f"{args.src} and {args.base} are the same in all layers that a LoRA would adapt")
    return adapters


def _embedding(args: argparse.Namespace) -> list[Path]:
    import jax.numpy as jnp

    from sdjax.formats.embedding_file import file_name, load_embedding, save_embedding

    words = load_embedding(args.src)
    if args.token:
        if len(words) != 1:
            raise ConfigError(f"--token {args.token} names one word; {args.src} holds {', '.join(words)}")
        words = dict(zip([args.token], words.values(), strict=True))
    if args.dst.suffix.lower() == ".safetensors":
        if len(words) != 1:
            raise ConfigError(f"{args.src} holds the words {', '.join(words)}: write them to a folder")
        paths = [args.dst]
    else:
        paths = [args.dst / file_name(word) for word in words]
    if len(set(paths)) != len(paths):
        raise ConfigError(f"{args.src}: the words {', '.join(words)} would share a file name: use --token one by one")
    _check_free(args, *paths)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, (word, rows) in zip(paths, words.items(), strict=True):
        save_embedding(path, word, rows, dtype=jnp.dtype(args.dtype or "float32"))
    return paths


FORMS: dict[str, Callable[[argparse.Namespace], list[Path]]] = {
    "diffusers": _model,
    "single_file": _model,
    "kohya": _lora,
    "peft": _lora,
    "embedding": _embedding,
}


if __name__ == "__main__":
    sys.exit(main())
