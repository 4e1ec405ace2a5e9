"""The LoRAs of a picture: named by a flag, a setting or the prompt, merged into the model, named in the PNG text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sdjax.errors import ConfigError, DataError
from sdjax.runtime import command
from sdjax.settings import parse


class Lora(NamedTuple):
    """A LoRA to merge in, from `--lora FILE[:WEIGHT]`, from the line of a job or from a prompt."""

    path: Path
    unet_weight: float
    text_weight: float

    @property
    def tag(self) -> str:
        """The LoRA as A1111 writes it in a prompt."""
        return f"<lora:{self.path.stem}:{self.unet_weight:g}>"


def read_lora(text: str) -> Lora:
    """Reads FILE or FILE:WEIGHT."""
    path, rest = command.file_and_rest("--lora", text)
    weight = 1.0 if rest is None else parse(float, rest, f"the weight of --lora {path}")
    return Lora(path, weight, weight)


def found_below(folder: Path | None) -> dict[str, Path]:
    """Name -> file of the LoRAs in a folder and the folders below it."""
    files = sorted(folder.rglob("*")) if folder is not None else []
    return {path.stem: path for path in files if path.suffix in (".safetensors", ".pt", ".ckpt")}


def tagged(tag: Any, folder: Path | None, files: Mapping[str, Path]) -> Lora:
    """Finds the file of a prompt's `<lora:NAME:WEIGHT>`. tag: a `text.syntax.LoraTag`."""
    if folder is None:
        raise ConfigError(f"the prompt names the LoRA {tag.name!r}: give --lora-dir DIR, the folder it lies in")
    if tag.name not in files:
        raise DataError(f"--lora-dir {folder}: no LoRA {tag.name!r} in it; there are {', '.join(files) or 'none'}")
    return Lora(files[tag.name], tag.unet_weight, tag.text_weight)


def merged(model: Any, loras: Sequence[Lora], adapters: Mapping[Path, Mapping[str, Any]]) -> Any:
    """The model with LoRAs merged in. adapters: file -> part -> adapter tree."""
    for lora in loras:
        for part, tree in adapters[lora.path].items():
            model = model.with_lora({part: tree}, lora.unet_weight if part == "unet" else lora.text_weight)
    return model


def mention(picture: Image.Image, drawn: str, prompt: str, loras: Sequence[Lora]) -> None:
    """Writes `prompt` and the LoRAs in place of the prompt `drawn` in a picture's text, where A1111 looks for them."""
    text = picture.info["parameters"]
    picture.info["parameters"] = " ".join([prompt, *(lora.tag for lora in loras)]) + text.removeprefix(drawn)
