"""A picture's settings as text in its PNG file, in the form AUTOMATIC1111 writes and ComfyUI and others read."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

SAMPLER_NAMES = {
    "ddim": "DDIM",
    "pndm": "PLMS",
    "lms": "LMS",
    "heun": "Heun",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
}
MASKED_CONTENT = {"blurred": "fill", "noise": "latent noise", "constant": "latent nothing"}


def parameters_text(request: Mapping[str, Any], picture: int, *, model: str) -> str:
    """The settings of one picture of a request (the fields of `request.Request`)."""
    lines = [request["prompts"][picture]]
    if negative := request["negatives"][picture]:
        lines.append(f"Negative prompt: {negative}")
    fields: dict[str, Any] = {
        "Steps": request["steps"],
        "Sampler": SAMPLER_NAMES[request["sampler"]],
        "Schedule type": "Karras" if request["karras"] else "Automatic",
        "CFG scale": request["guidance"],
        "Seed": request["seeds"][picture],
        "Size": f"{request['width']}x{request['height']}",
        "Model": Path(model).stem,
    }
    if request["guidance_rescale"]:
        fields["CFG Rescale"] = request["guidance_rescale"]
    if request["strength"] != 1.0:
        fields["Denoising strength"] = request["strength"]
    if request["clip_skip"]:
        fields["Clip skip"] = request["clip_skip"]
    if request["emphasis"] == "no_norm":
        fields["Emphasis"] = "No norm"
    if request["variation_strength"]:
        fields["Variation seed"] = request["variation_seeds"][picture]
        fields["Variation seed strength"] = request["variation_strength"]
    if (hires := request["hires"]) is not None and hires.scale != 1:
        fields |= _hires_fields(vars(hires))
    if (inpainting := request["inpainting"]) is not None:
        fields |= _inpainting_fields(vars(inpainting))
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in {**fields, "Version": "sdjax"}.items()))
    return "\n".join(lines)


def _hires_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"Denoising strength": options["strength"], "Hires upscale": options["scale"]}
    if options["steps"]:
        fields["Hires steps"] = options["steps"]
    return fields | {"Hires upscaler": options["upscaler"].capitalize()}


def _inpainting_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    fields = {"Mask blur": options["mask_blur"], "Mask grow": options["mask_grow"]}
    fields = {name: value for name, value in fields.items() if value}
    if options["fill"] in MASKED_CONTENT:
        fields["Masked content"] = MASKED_CONTENT[options["fill"]]
    if options["only_masked"]:
        fields |= {"Inpaint area": "Only masked", "Masked area padding": options["padding"]}
    return fields


def _quoted(value: Any) -> str:
    text = str(value)
    return '"' + text.replace('"', "'") + '"' if any(mark in text for mark in ',:"\n') else text


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG with the picture's `parameters` text, where it has one, under a temporary name first."""
    path = Path(path)
    info = PngInfo()
    if "parameters" in image.info:
        info.add_text("parameters", image.info["parameters"])
    building = path.with_name(f".{path.name}.partial")
    image.save(building, format="PNG", pnginfo=info)
    building.replace(path)
