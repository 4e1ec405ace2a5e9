"""Draws what the page asks for, with the functions of `sdjax generate`, and keeps the model for the next request."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sdjax.app.folders import Folders
from sdjax.app.queue import Task
from sdjax.app.training import running
from sdjax.draw import grids, numbered
from sdjax.draw.adapters import mention, merged, read_lora, tagged
from sdjax.formats.png_parameters import save_png

_BETWEEN_PREVIEWS = 0.4  # seconds


@dataclasses.dataclass(frozen=True)
class Order:
    """What to draw. loras: texts FILE:WEIGHT for every picture; each of `tries` is a set of them to compare."""

    model: str
    settings: dict[str, Any]
    count: int = 1
    words: tuple[Path, ...] = ()
    axes: tuple[grids.Axis, ...] = ()
    tries: tuple[tuple[str, ...], ...] = ()


class Painter:
    """Draws orders. It holds one model, and the same with the LoRAs of the last order."""

    def __init__(self, folders: Folders, dtype: str, batch_size: int) -> None:
        self._folders, self._dtype, self._batch_size = folders, dtype, batch_size
        self._kept: dict[str, tuple[Any, Any]] = {}
        """Kind -> (what it was made of, value): "model", "adapted", "preview"."""

    def forget(self) -> None:
        """Frees the memory of the device."""
        self._kept.clear()

    def work(self, order: Order) -> Callable[[Task], None]:
        """Returns the work of an order, for the queue."""
        return functools.partial(self._draw, order)

    def _draw(self, order: Order, task: Task) -> None:
        from sdjax.draw import jobs
        from sdjax.formats.lora_file import load_lora

        self._wait_for_training(task)
        wanted = jobs.varied(jobs.of_prompts(order.settings, [order.settings["prompt"]], order.count), order.axes)
        if order.tries:
            wanted = [job.replace(lora=loras) for job in wanted for loras in order.tries]
        jobs.check_alone(wanted)
        folder = self._folders.loras
        named = {name.rpartition("/")[2]: path for name, path in self._folders.loras_by_name().items()}
        given = [tuple(map(read_lora, job.settings["lora"])) for job in wanted]
        loras = [
            (*own, *(tagged(tag, folder, named) for tag in job.words[1]))
            for own, job in zip(given, wanted, strict=True)
        ]
        bare = [job.replace(prompt=job.words[0]) for job in wanted]
        task.says = f"loading {order.model}"
        model = self._model(order, bare)
        trees = {path: load_lora(path, model.outline.shapes) for path in {lora.path for each in loras for lora in each}}
        pictures: dict[int, Any] = {}  # kept for a grid only

        def adapted(chosen: Any, last: bool) -> Any:
            return self._keep("adapted", (order.model, order.words, chosen), lambda: merged(model, chosen, trees))

        def watch() -> Callable[[int, int, Any], None]:
            watching = self._watch(task, model, (order.model,), len(task.files), len(wanted))
            task.says = f"compiling, or drawing picture {len(task.files) + 1} of {len(wanted)}"
            return watching

        advice = "try a smaller picture, or start the page with --dtype bfloat16"
        with numbered.claimed(self._folders.pictures, len(wanted)) as number:
            for i, picture in jobs.draw_by_loras(bare, loras, self._batch_size, adapted, watch, advice=advice):
                mention(picture, bare[i].settings["prompt"], wanted[i].settings["prompt"], given[i])
                name = numbered.safe_name(bare[i].settings["prompt"])
                path = self._folders.pictures / f"{number + i:05d}-{wanted[i].settings['seed']}-{name}.png"
                save_png(picture, path)
                if order.axes:
                    pictures[i] = picture
                task.files.append(path)
        if order.axes:
            for i, (_, sheet) in enumerate(grids.sheets([pictures[i] for i in sorted(pictures)], order.axes, 1)):
                path = self._folders.pictures / f"grid-of-{number:05d}-{i}.png"
                save_png(sheet, path)
                task.files.insert(i, path)

    def _wait_for_training(self, task: Task) -> None:
        """Waits until no run of the folder trains: the device has no memory for both."""
        while names := running(self._folders):
            self.forget()
            task.says = f"waiting until the training of {', '.join(names)} ends, or is stopped"
            task.wait(1)

    def _model(self, order: Order, wanted: Sequence[Any]) -> Any:
        """The model with the words of an order, after a check that it can draw the jobs."""
        from sdjax.draw import jobs
        from sdjax.model import Model
        from sdjax.outline import Outline

        if self._kept.get("model", (None,))[0] != (order.model, self._dtype):
            self.forget()
        load = lambda: Model.of(Outline.load(order.model, self._dtype))
        model = self._keep("model", (order.model, self._dtype), load)
        words = [model.outline.load_words(path) for path in order.words]
        model = functools.reduce(Model.with_embedding, words, model)
        jobs.check(model.outline, wanted)
        return model

    def _watch(self, task: Task, model: Any, key: Any, done: int, count: int) -> Callable[[int, int, Any], None]:
        from sdjax.app.preview import Preview

        shown: float | None = None  # a picture that is drawn at once, or while its programs compile, has no preview

        def watch(step: int, steps: int, latents: Any) -> None:
            nonlocal shown
            task.check()
            task.share = (done + step / steps) / count
            task.says = f"picture {done + 1} of {count}, step {step} of {steps}"
            now = time.monotonic()
            shown = now if shown is None else shown
            if now - shown > _BETWEEN_PREVIEWS:
                preview = self._keep("preview", key, lambda: Preview(model))
                task.preview, shown = preview(latents), time.monotonic()

        return watch

    def _keep(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """What was made of this key the last time, or made now. The former is freed first."""
        if self._kept.get(kind, (None,))[0] != key:
            self._kept.pop(kind, None)
            self._kept[kind] = key, make()
        return self._kept[kind][1]
