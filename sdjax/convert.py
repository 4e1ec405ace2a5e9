"""Files of one form to another: `python -m sdjax.convert SRC DST --to FORMAT`.

A leaf: nothing imports it. JAX is imported only once the command line has been found good.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from sdjax.errors import ConfigError, DataError
from sdjax.runtime import command
from sdjax.settings import Dtype, LoraTargets

_EPILOG = """forms:
  diffusers    a model folder                               from a folder, a single file or a hub id
  single_file  a model as .safetensors, as A1111 keeps it   from the same; with --for-inpainting a standard model gets
                                                            a U-Net that sees the mask, to be trained for inpainting
  kohya        a LoRA for A1111, ComfyUI and diffusers      from a LoRA (--model says of what), or with --base from a
  peft         a LoRA for diffusers and PEFT                tuned model: the best LoRA of --rank for the difference
  embedding    new words, a file each                       from an embedding, or a LoRA file with words bundled in it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code, see `command.run`."""
    return command.run(_run, argv)


def _run(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    for path in FORMS[args.to](args):
        print(path)


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
    add(
        "--dtype", metavar="TYPE", help=f"of the weights written: {', '.join(get_args(Dtype))} (a model's own; float32)"
    )
    add("--model", metavar="SRC", help="kohya, peft: the model a LoRA was made for")
    add("--base", metavar="SRC", help="kohya, peft: the model that SRC was tuned from")
    add("--rank", type=int, metavar="R", help="with --base: of the LoRA (16)")
    add("--targets", metavar="SET", help=f"with --base: {', '.join(get_args(LoraTargets))} (attention)")
    add("--token", metavar="WORD", help="embedding: another name for the word, where SRC holds one")
    add("--tokenizer", metavar="DIR", help="folder of the tokenizer, for models of a single file (the hub's)")
    add("--prediction-type", metavar="NAME", default="", help="epsilon or v_prediction, where the model's own is wrong")
    add("--for-inpainting", action="store_true", help="diffusers, single_file: of a standard model, to be trained")
    add("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _check(args: argparse.Namespace) -> None:
    """What can be told wrong without reading anything. Raises ConfigError."""
    if args.to not in FORMS:
        raise ConfigError(f"--to {args.to}: choices are {', '.join(FORMS)}")
    if args.dtype is not None and args.dtype not in get_args(Dtype):
        raise ConfigError(f"--dtype {args.dtype}: choices are {', '.join(get_args(Dtype))}")
    if args.targets is not None and args.targets not in get_args(LoraTargets):
        raise ConfigError(f"--targets {args.targets}: choices are {', '.join(get_args(LoraTargets))}")
    if args.rank is not None and args.rank < 1:
        raise ConfigError(f"--rank {args.rank}: must be 1 or more")
    belongs = {
        "--model": ("kohya", "peft"),
        "--base": ("kohya", "peft"),
        "--rank": ("kohya", "peft"),
        "--targets": ("kohya", "peft"),
        "--token": ("embedding",),
        "--tokenizer": ("diffusers", "single_file", "kohya", "peft"),
        "--prediction-type": ("diffusers", "single_file"),
        "--for-inpainting": ("diffusers", "single_file"),
    }
    for flag, forms in belongs.items():
        if vars(args)[flag[2:].replace("-", "_")] and args.to not in forms:
            raise ConfigError(f"{flag} has no meaning for --to {args.to}, only for {', '.join(forms)}")
    if args.to in ("kohya", "peft"):
        if bool(args.model) == bool(args.base):
            choice = "--model (what SRC, a LoRA, was made for) or --base (what SRC, a model, was tuned from)"
            raise ConfigError(f"--to {args.to} needs either {choice}")
        if args.model and (args.rank or args.targets):
            raise ConfigError("--rank and --targets go with --base: a LoRA keeps its own")
    files = {"single_file", "kohya", "peft"}
    if args.to in files and args.dst.suffix.lower() != ".safetensors":
        raise ConfigError(f"{args.dst}: --to {args.to} writes a file whose name ends in .safetensors")
    if args.to == "diffusers" and args.dst.suffix.lower() in (".safetensors", ".ckpt"):
        raise ConfigError(f"{args.dst}: --to diffusers writes a folder; for a file choose --to single_file")


def _model(args: argparse.Namespace) -> list[Path]:
    from sdjax.loading import outline, with_weights

    tokenizer = args.tokenizer if Path(args.src).is_file() else None
    source = outline(args.src, tokenizer=tokenizer, prediction_type=args.prediction_type)
    if args.for_inpainting and source.is_inpainting:
        raise ConfigError(f"--for-inpainting: {args.src} is made for inpainting already")
    stored = str(next(iter(source.folder.tensors("unet").values())).dtype)
    dtype = args.dtype or (stored if stored in get_args(Dtype) else "float32")
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    model = with_weights(source, dtype=dtype)
    if args.for_inpainting:
        model = model.for_inpainting()
    model.save(args.dst, dtype=dtype)
    return [args.dst]


def _lora(args: argparse.Namespace) -> list[Path]:
    import jax.numpy as jnp

    from sdjax import lora, trees
    from sdjax.formats.lora_file import load_lora, save_lora
    from sdjax.loading import load_weights, outline

    source = lambda name: outline(name, tokenizer=args.tokenizer if Path(name).is_file() else None)
    base = source(args.base or args.model)
    if args.base:
        tuned, adapters = source(args.src), {}
        for part in base.shapes.keys() - {"vae"}:
            one, two = load_weights(tuned, part), load_weights(base, part)
            if _shapes(one) != _shapes(two):
                raise DataError(
                    f"{args.src} and {args.base} are models of different kinds: their {part}s differ in shape"
                )
            own = lora.extract(one, two, rank=args.rank or 16, which=args.targets or "attention")
            if any(jnp.any(layer["up"] != 0) for _, layer in trees.layers(own, "up")):
                adapters[part] = own
        if not adapters:
            raise DataError(f"{args.src} and {args.base} are the same in all layers a LoRA would adapt")
    else:
        adapters = load_lora(args.src, base.shapes)
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    save_lora(args.dst, adapters, base.shapes, style=args.to, dtype=jnp.dtype(args.dtype or "float32"))
    return [args.dst]


def _shapes(params) -> dict:
    from sdjax.trees import leaves

    return {path: leaf.shape for path, leaf in leaves(params)}


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
            raise ConfigError(f"{args.src} holds the words {', '.join(words)}: give a folder to write them to")
        paths = [args.dst]
    else:
        paths = [args.dst / file_name(word) for word in words]
    if len(set(paths)) != len(paths):
        raise ConfigError(f"{args.src}: the words {', '.join(words)} would share a file name: use --token one by one")
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
