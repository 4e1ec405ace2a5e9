"""The tab that redraws a picture, or paints a part of it anew."""

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from sdjax.app import fields
from sdjax.app.draw_tab import (
    follow,
    lora_checks,
    loras_table,
    model_field,
    pictures_field,
    preview_field,
    with_weights,
)
from sdjax.app.drawing import Order
from sdjax.app.shared import Shared, bar, problem
from sdjax.errors import ConfigError, DataError

_OWN = ("prompt", "negative_prompt", "strength", "steps", "guidance", "sampler", "seed", "width", "height", "outpaint")


def painted(editor: dict[str, Any] | None) -> tuple[Image.Image, Image.Image | None]:
    """Returns the picture in the editor and the mask that was painted over it, or None. Raises ConfigError without."""
    if not editor or editor.get("background") is None:
        raise ConfigError("drop a picture first")
    picture = editor["background"].convert("RGBA")
    mask = np.zeros((picture.height, picture.width), np.uint8)
    for layer in editor.get("layers") or ():
        alpha = layer.convert("RGBA").getchannel("A").resize(picture.size)
        mask = np.maximum(mask, np.where(np.asarray(alpha) > 0, 255, 0).astype(np.uint8))
    if np.asarray(picture.getchannel("A")).min() == 255:
        picture = picture.convert("RGB")
    return picture, Image.fromarray(mask) if mask.any() else None


def redraw_tab(shared: Shared, drawn: Any) -> Any:
    """Builds the tab. drawn: the gallery of the Draw tab. Returns the editor."""
    task, chosen = gr.State(), gr.State()
    parts: dict[str, Any] = {}
    with gr.Row(equal_height=False, elem_id="redraw-parts"):
        with gr.Column(min_width=280, elem_classes="given"):
            gr.Markdown("Drop a picture and paint over what is to be drawn anew. Unpainted, all of it is redrawn.")
            editor = gr.ImageEditor(
                label="Picture",
                type="pil",
                height=520,
                sources=("upload", "clipboard"),
                brush=gr.Brush(default_size="auto", colors=["#ff3b30"], default_color="#ff3b30", color_mode="fixed"),
                transforms=("crop",),
                layers=False,
                elem_id="editor",
            )
        with gr.Column(min_width=280, elem_classes="asked"):
            parts["prompt"] = gr.Textbox(label="Prompt", lines=2, elem_id="redraw-prompt")
            parts["negative_prompt"] = fields.component("negative_prompt", lines=1, info=None)
            with gr.Row():
                go = gr.Button("Redraw", variant="primary", scale=3, min_width=120, elem_id="redraw")
                stop = gr.Button("Stop", variant="stop", scale=1, min_width=80)
        with gr.Column(min_width=280, elem_classes="made"):
            says = gr.HTML(bar("ready", 0), elem_id="redraw-says")
            preview = preview_field()
            with gr.Row(equal_height=False):
                result = pictures_field("Result", columns=1, height=340, min_width=240, elem_id="redrawn")
                both = gr.ImageSlider(
                    **{"label": "Before and after", "interactive": False, "visible": False},
                    **{"height": 340, "min_width": 240, "elem_id": "both"},
                )
            again = gr.Button("Go on from the result", size="sm")
        with gr.Column(min_width=280, elem_classes="settings"):
            model = model_field(shared)
            parts["strength"] = fields.component("strength")
            with gr.Row():
                for name in ("steps", "guidance", "sampler", "seed", "width", "height"):
                    parts[name] = fields.component(name, min_width=140, info=None)
            names, weights, words = loras_table(shared)
            with gr.Accordion("Mask and outpainting", open=False):
                for name in ("outpaint", *fields.GROUPS["Mask"]):
                    parts[name] = fields.component(name)

    read = {name: fields.reader(name) for name in parts}
    inputs = [editor, *parts.values(), model, names, weights, words]

    def order(image: Any, values: tuple[Any, ...]) -> Order:
        picture, mask = painted(image)
        settings = {name: read[name](value) for name, value in zip(parts, values, strict=False)}
        model, names, weights, words = values[len(parts) :]
        settings["lora"] = shared.lora_texts(with_weights(names, weights))
        settings["image"] = shared.saved(picture)
        settings["mask"] = None if mask is None else shared.saved(mask)
        return Order(model, settings, words=shared.word_files(words))

    def on_go(image: Any, *values: Any) -> Iterator[Any]:
        try:
            running = shared.put(order(image, values))
        except (ConfigError, DataError) as error:
            yield None, problem(str(error)), gr.skip(), gr.skip(), gr.skip()
            return
        before = _on_white(painted(image)[0])
        for state in follow(shared, running):
            ended = running.done.is_set() and running.files
            pair = _both(shared, before, shared.served(running.files[0])) if ended else None
            yield *state, gr.update(value=pair, visible=True) if pair else gr.skip()

    go.click(
        on_go,
        inputs,
        [task, says, preview, result, both],
        validator=fields.checks([_check_picture, *read.values(), None, *lora_checks(shared)]),
        show_progress="hidden",
        concurrency_limit=None,
        api_name="redraw",
    )
    stop.click(lambda running: running and running.stop(), task, None, show_progress="hidden", api_visibility="private")
    again.click(lambda shown: _first(shown), result, editor, show_progress="hidden")
    drawn.select(_selected, [drawn], chosen, show_progress="hidden", api_visibility="private")
    return editor, chosen


def _both(shared: Shared, before: Image.Image, after: str) -> tuple[str, str]:
    """The files of the picture before, as large as the one after, and of the one after."""
    with Image.open(after) as image:
        return shared.saved(before.resize(image.size)), after


def _on_white(image: Image.Image) -> Image.Image:
    """The picture as the model sees it: transparent parts are white."""
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")


def _check_picture(image: Any) -> None:
    painted(image)


def _first(shown: Any) -> Any:
    return shown[0][0] if shown else gr.skip()


def _selected(shown: Any, event: gr.SelectData) -> Any:
    return shown[event.index][0] if shown else None
