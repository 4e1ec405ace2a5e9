"""The tab that draws pictures from a prompt."""

import math
import random
from collections.abc import Iterator
from typing import Any

import gradio as gr

from sdjax.app import fields
from sdjax.app.drawing import Order
from sdjax.app.queue import Task
from sdjax.app.shared import Shared, bar, problem
from sdjax.draw import grids
from sdjax.draw.settings import declarations
from sdjax.errors import ConfigError, DataError
from sdjax.settings import Count, parse, read_value

_MOST_PICTURES = 1000


def model_field(shared: Shared) -> Any:
    """Returns the field to choose the model, hidden if there is no choice."""
    models = list(shared.models)
    return gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1)


def preview_field(**how: Any) -> Any:
    """Returns the place of a preview, which is seen only while a picture is drawn."""
    return gr.Image(label="Preview", visible=False, interactive=False, height=240, buttons=[], **how)


def pictures_field(label: str, **how: Any) -> Any:
    """Returns a gallery that shows small pictures whole, and sends nothing to other hosts."""
    buttons: Any = ["download", "fullscreen"]
    look: Any = {"columns": 2, "fit_columns": False, "object_fit": "contain", "height": 560}
    return gr.Gallery(label=label, interactive=False, buttons=buttons, **{**look, **how})


def loras_table(shared: Shared) -> tuple[Any, Any, Any]:
    """Returns the fields to choose LoRAs, with a weight each, and words."""
    with gr.Accordion("LoRAs and words", open=False):
        names = fields.names_field(shared.folders.loras_by_name(), "LoRAs", value=[], multiselect=True)
        weights = gr.Textbox("", label="Weights", placeholder="1", info="One for each LoRA, such as 0.8, 1")
        words = fields.names_field(shared.folders.words_by_name(), "Words", value=[], multiselect=True)
    for field, listed in ((names, shared.folders.loras_by_name), (words, shared.folders.words_by_name)):
        newest = lambda listed=listed: gr.update(choices=list(listed()))
        field.focus(newest, None, field, show_progress="hidden", api_visibility="private")
    return names, weights, words


def with_weights(names: list[str] | None, weights: str) -> list[tuple[str, str]]:
    """Pairs of a LoRA and its weight. Raises ConfigError unless there is none, one, or one weight for each."""
    given = [str(weight) for weight in weights_of(weights)]
    names = names or []
    if len(given) not in (1, len(names)):
        raise ConfigError(f"{len(given)} weights for {len(names)} LoRAs: give one, or one for each")
    return list(zip(names, given * len(names) if len(given) == 1 else given, strict=True))


def weights_of(text: str) -> list[float]:
    """The weights in a field, with commas between them; an empty field is 1. Raises ConfigError."""
    return [parse(float, part.strip(), "weight") for part in text.split(",")] if text.strip() else [1.0]


def check_prompt(text: str) -> None:
    """Raises ConfigError for a prompt of nothing."""
    if not (text or "").strip():
        raise ConfigError("write a prompt: what should the picture show?")


def lora_checks(shared: Shared) -> list[fields.Read]:
    """Those of the fields of `loras_table`."""
    return [lambda names: shared.lora_texts([(name, 1) for name in names or ()]), weights_of, shared.word_files]


def _axes(*texts: str) -> tuple[grids.Axis, ...]:
    axes = tuple(grids.parse_axis(text) for text in texts if text and text.strip())
    if barred := [axis.name for axis in axes if axis.name in ("lora", *fields.FILES)]:
        raise ConfigError(f"{barred[0]} names files, which a grid of the page cannot vary")
    if len(axes) == 2 and axes[0].name == axes[1].name:
        raise ConfigError(f"both axes vary {axes[0].name}: choose another setting for one of them")
    return axes


def _count(value: Any) -> int:
    count = read_value(Count, 1 if value is None else value, "pictures")
    if count > _MOST_PICTURES:
        raise ConfigError(f"pictures = {count}: at most {_MOST_PICTURES} at once")
    return count


def draw_tab(shared: Shared) -> tuple[Any, Any]:
    """Builds the tab. Returns the gallery of what was drawn, and the button that sends a picture of it to Redraw."""
    task = gr.State()
    groups = {title: names for title, names in fields.GROUPS.items() if title != "Mask"}
    parts: dict[str, Any] = {}
    with gr.Row(equal_height=False, elem_id="draw-parts"):
        with gr.Column(min_width=280, elem_classes="asked"):
            parts["prompt"] = gr.Textbox(label="Prompt", lines=3, placeholder="red heart", elem_id="prompt")
            parts["negative_prompt"] = fields.component("negative_prompt", lines=1, info=None)
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", scale=3, min_width=120, elem_id="draw")
                stop = gr.Button("Stop", variant="stop", scale=1, min_width=80, elem_id="stop")
        with gr.Column(min_width=280, elem_classes="made"):
            says = gr.HTML(bar("ready", 0), elem_id="says")
            preview = preview_field(elem_id="preview")
            gallery = pictures_field("Pictures", elem_id="drawn")
            send = gr.Button("Redraw the chosen picture", size="sm", elem_id="send")
        with gr.Column(min_width=280, elem_classes="settings"):
            model = model_field(shared)
            with gr.Row():
                for name in fields.MAIN:
                    parts[name] = fields.component(name, min_width=140, info=None)
                count = gr.Number(1, label="Pictures", precision=0, min_width=140)
            fresh = gr.Button("Another seed", size="sm")
            names, weights, words = loras_table(shared)
            for title, group in groups.items():
                with gr.Accordion(title, open=False):
                    for name in group:
                        parts[name] = fields.component(name)
            with gr.Accordion("Grid of two settings", open=False):
                x = gr.Textbox(label="Across", placeholder="steps=10,20,30")
                y = gr.Textbox(label="Down", placeholder="guidance=1,3,7.5")
            with gr.Accordion("Use the settings of a picture", open=False):
                dropped = gr.File(label="PNG file", file_types=[".png"], type="filepath", elem_id="dropped")
                reused = gr.HTML()

    read = {name: fields.reader(name) for name in parts}
    of_loras = zip((names, weights, words), lora_checks(shared), strict=True)
    extra = {
        **{"model": (model, None), "count": (count, _count)},
        **dict(zip(("names", "weights", "words"), of_loras, strict=True)),
        **{"x": (x, _axes), "y": (y, _axes)},
    }
    inputs = [*parts.values(), *(part for part, _ in extra.values())]

    def order(values: tuple[Any, ...]) -> Order:
        own = dict(zip(parts, values, strict=False))
        more = dict(zip(extra, values[len(parts) :], strict=True))
        settings = {name: read[name](value) for name, value in own.items()}
        settings["lora"] = shared.lora_texts(with_weights(more["names"], more["weights"]))
        axes = _axes(more["x"], more["y"])
        if all(axis.name != "prompt" for axis in axes):
            check_prompt(settings["prompt"])
        count = math.prod([_count(more["count"]), *(len(axis.values) for axis in axes)])
        if count > _MOST_PICTURES:
            raise ConfigError(f"this grid has {count} pictures: at most {_MOST_PICTURES} at once")
        return Order(more["model"], settings, _count(more["count"]), shared.word_files(more["words"]), axes)

    def on_draw(*values: Any) -> Iterator[Any]:
        try:
            running = shared.put(order(values))
        except (ConfigError, DataError) as error:
            yield None, problem(str(error)), gr.skip(), gr.skip()
            return
        yield from follow(shared, running)

    def reuse(path: str | None) -> list[Any]:
        changes, message = reused_values(path, list(parts))
        return [message, *changes]

    draw.click(
        on_draw,
        inputs,
        [task, says, preview, gallery],
        validator=fields.checks([*read.values(), *(check for _, check in extra.values())]),
        show_progress="hidden",
        concurrency_limit=None,
        api_name="draw",
    )
    parts["prompt"].submit(lambda: None, js="() => { document.querySelector('#draw').click() }")
    stop.click(lambda running: running and running.stop(), task, None, show_progress="hidden", api_visibility="private")
    fresh.click(lambda: random.randrange(2**32), None, parts["seed"], show_progress="hidden")
    dropped.change(reuse, dropped, [reused, *parts.values()], show_progress="hidden", api_name="reuse")
    return gallery, send


def follow(shared: Shared, running: Task) -> Iterator[Any]:
    """Yields (task, state, preview, gallery) of a task until it is done."""
    shown = 0
    for state in shared.follow(running):
        files = list(running.files)
        gallery = [shared.served(path) for path in files] if len(files) != shown else gr.skip()
        shown = len(files)
        image = running.preview if not running.done.is_set() else None
        yield running, state, gr.update(value=image, visible=image is not None), gallery


def reused_values(path: str | None, names: list[str]) -> tuple[list[Any], str]:
    """Returns the values of fields from the text of a PNG file, and a message."""
    from sdjax.data.images import read_picture
    from sdjax.draw.reuse import settings_of

    if path is None:
        return [gr.skip()] * len(names), ""
    try:
        from PIL import Image

        read_picture(path)
        with Image.open(path) as image:
            settings, left_out = settings_of(image)
    except (DataError, OSError) as error:
        return [gr.skip()] * len(names), problem(str(error).removeprefix(f"{path}: "))
    default = {name: declared.default for name, (_, declared) in declarations().items()}
    values = [fields.value_of(name, settings.get(name, default[name])) for name in names]
    note = f" Not taken over: {', '.join(left_out)}." if left_out else ""
    return values, bar(f"The fields now have the settings of this picture.{note}", 1)
