"""The tab that trains: pictures and captions, what to teach, and the runs."""

import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import quote

import gradio as gr

from sdjax.app import lessons, training
from sdjax.app.draw_tab import follow, pictures_field, preview_field
from sdjax.app.drawing import Order
from sdjax.app.fields import Read, checks, names_field
from sdjax.app.folders import KOHYA_FILE, chosen, new_folder, pictures_in
from sdjax.app.queue import Task
from sdjax.app.shared import Shared, bar, problem
from sdjax.data.folder import METADATA
from sdjax.errors import ConfigError, DataError, SdjaxError
from sdjax.settings import read_value
from sdjax.train.config import Data, Stage, Validation
from sdjax.train.config_file import to_toml
from sdjax.train.curves import CLASSES, read_metrics, stage_curves, svg
from sdjax.train.report import CURVES, sheets

_STAGE, _DATA, _VALIDATION = (get_type_hints(kind, include_extras=True) for kind in (Stage, Data, Validation))
_NUMBERS: dict[str, tuple[str, Any]] = {
    "steps": ("Steps of each stage", _STAGE["steps"]),
    "rank": ("Rank of the LoRA", _STAGE["lora_rank"]),
    "batch_size": ("Pictures in a step", _DATA["batch_size"]),
    "resolution": ("Resolution", _DATA["resolution"]),
    "held_out": ("Held-out pictures", _DATA["validation_count"]),
    "every": ("Steps between samples", _VALIDATION["every"]),
}
"""Field of a lesson -> its label, and the declaration of its values."""
_REFRESH = 2.0  # seconds


def train_tab(shared: Shared) -> None:
    """Builds the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            data = _data_part(shared)
            fields, plan, start, says = _lesson_part(shared, data)
        with gr.Column(scale=6, min_width=320):
            run = _runs_part(shared)
    values = list(fields.values())
    validator = checks([_lesson_reads(shared)[name] for name in fields])
    lesson = functools.partial(_lesson, shared, list(fields))

    def on_start(*given: Any) -> Iterator[Any]:
        try:
            name, what = lesson(given)
            output = new_folder(shared.folders.runs, name, "name")
            config = training.lesson_config(what, shared.models[0], shared.dtype, output)
        except SdjaxError as error:
            yield problem(str(error)), gr.skip()
            return
        task = shared.queue.put(lambda task: _start(shared, task, training.write(config), resume=False))
        for state in shared.follow(task):
            yield state, gr.skip()
        yield gr.skip(), gr.update(choices=list(shared.folders.runs_by_name()), value=None if task.error else name)

    def on_plan(*given: Any) -> Iterator[str]:
        yield bar("compiling the programs of the run, which takes a minute or two", 0.3)
        try:
            yield _planned(training.lesson_config(lesson(given)[1], shared.models[0], shared.dtype, Path("run")))
        except SdjaxError as error:
            yield problem(str(error))

    quiet: Any = {"show_progress": "hidden", "concurrency_limit": None}
    start.click(on_start, values, [says, run], validator=validator, api_name="start", **quiet)
    plan.click(on_plan, values, says, validator=validator, api_name="plan", **quiet)


# ------------------------------------------------------------------------------------------------ pictures


def _data_part(shared: Shared) -> tuple[Any, Any]:
    """Builds the fields of training pictures. Returns those that choose the pictures of the style and of the thing."""
    folders = shared.folders
    with gr.Accordion("Pictures and captions", open=True):
        with gr.Row():
            name = gr.Textbox(label="Name of the set", placeholder="my-style", elem_id="set-name", min_width=160)
            files = gr.File(
                label="Pictures", file_count="multiple", file_types=["image"], height=120, elem_id="set-files"
            )
        add = gr.Button("Add these pictures", elem_id="set-add")
        edited = names_field(folders.data_by_name(), "Captions of", elem_id="set-edited")
        table = gr.Dataframe(
            headers=["file", "caption"], type="array", interactive=True, static_columns=[0], wrap=True, max_height=260,
            row_count=1, column_count=2, elem_id="captions",
        )  # fmt: skip
        save = gr.Button("Save captions", size="sm")
        says = gr.HTML()
    style = names_field(folders.data_by_name(), "Pictures of the style", elem_id="style-data")
    thing = names_field(folders.data_by_name(), "Pictures of the thing", visible=False)

    def on_add(name: str, files: list[str] | None) -> list[Any]:
        try:
            folder = lessons.add_pictures(folders.data, name or "", files or [])
        except SdjaxError as error:
            return [problem(str(error)), *[gr.skip()] * 3]
        names = list(folders.data_by_name())
        chosen_now = [gr.update(choices=names, value=folder.name) for _ in range(3)]
        return [bar(f"{len(pictures_in(folder))} pictures in {folder.name}", 1), *chosen_now]

    def on_edit(name: str | None) -> Any:
        try:
            return lessons.captions(chosen(folders.data_by_name(), name, "a set")) if name else [["", ""]]
        except SdjaxError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def on_save(name: str | None, rows: list[list[Any]]) -> str:
        try:
            folder = chosen(folders.data_by_name(), name, "a set")
            lessons.write_captions(folder, rows)
        except SdjaxError as error:
            return problem(str(error))
        return bar(f"{METADATA} of {folder.name} is written", 1)

    quiet: Any = {"show_progress": "hidden"}
    add.click(on_add, [name, files], [says, edited, style, thing], api_name="add_pictures", **quiet)
    edited.change(on_edit, edited, table, api_name="captions", **quiet)
    save.click(on_save, [edited, table], says, api_name="save_captions", **quiet)
    return style, thing


# ------------------------------------------------------------------------------------------------ what to teach


def _lesson_part(shared: Shared, data: tuple[Any, Any]) -> tuple[dict[str, Any], Any, Any, Any]:
    """Builds the fields of what to teach. Returns these by name, the two buttons, and the place for messages."""
    style, thing = data
    fields: dict[str, Any] = {"way": gr.Radio(list(training.WAYS), value=next(iter(training.WAYS)), label="Teach")}
    fields |= {"style_data": style, "thing_data": thing}
    with gr.Row(visible=False) as of_word:
        fields["word"] = gr.Textbox("<thing>", label="The new word", min_width=150)
        fields["begins_as"] = gr.Textbox(label="It begins as", placeholder="crescent moon", min_width=150)
    fields["name"] = gr.Textbox(label="Name of the run", placeholder="my-run", elem_id="run-name")
    fields["prompts"] = gr.Textbox(label="Prompts for samples, one a line", lines=2, elem_id="run-prompts")
    with gr.Accordion("Numbers", open=False, elem_id="numbers"):
        for name, (label, _) in _NUMBERS.items():
            fields[name] = gr.Textbox(label=label, placeholder="usual for the model", elem_id=f"run-{name}")
    with gr.Row():
        start = gr.Button("Train", variant="primary", elem_id="train")
        plan = gr.Button("What will it take?")
    says = gr.HTML(elem_id="train-says")

    def on_way(way: str) -> list[Any]:
        stages = training.WAYS[way]
        style, thing = (gr.update(visible=kind in stages) for kind in ("style", "thing"))
        return [style, thing, thing]

    fields["way"].change(on_way, fields["way"], [style, thing, of_word], show_progress="hidden")
    return fields, plan, start, says


def _number(hint: Any, name: str) -> Callable[[str], int | None]:
    def read(text: str) -> int | None:
        text = (text or "").strip()
        return read_value(hint, int(text) if text.lstrip("-").isdigit() else text, name) if text else None

    return read


def _lesson_reads(shared: Shared) -> dict[str, Read | None]:
    """Field of a lesson -> the function that reads it and raises ConfigError."""
    reads: dict[str, Any] = {name: _number(hint, name) for name, (_, hint) in _NUMBERS.items()}
    reads["name"] = lambda name: new_folder(shared.folders.runs, name or "", "name")
    reads["word"] = lambda word: read_value(_STAGE["placeholder_tokens"], [word], "word")
    return {name: reads.get(name) for name in ("way", "style_data", "thing_data", "begins_as", "prompts", *reads)}


def _lesson(shared: Shared, names: list[str], given: Any) -> tuple[str, training.Lesson]:
    """The name of a run and its lesson, from the values of the fields. Raises ConfigError."""
    values = dict(zip(names, given, strict=True))
    sets, reads = shared.folders.data_by_name(), _lesson_reads(shared)
    stages = training.WAYS[values["way"]]
    numbers = {name: reads[name](values[name]) for name in _NUMBERS}  # type: ignore[misc]
    lesson = training.Lesson(
        way=values["way"],
        style_data=chosen(sets, values["style_data"], "the pictures of the style") if "style" in stages else None,
        thing_data=chosen(sets, values["thing_data"], "the pictures of the thing") if "thing" in stages else None,
        word=values["word"],
        begins_as=values["begins_as"],
        prompts=tuple(line.strip() for line in values["prompts"].split("\n") if line.strip()),
        **{**numbers, "held_out": numbers["held_out"] or 0},
    )
    return values["name"], lesson


def _start(shared: Shared, task: Task, run: Path, *, resume: bool) -> None:
    """Starts a run as soon as no other trains, and waits until it holds its folder. Its work is not waited for."""
    while names := training.running(shared.folders):
        task.says = f"waiting until the training of {', '.join(names)} ends"
        task.wait(1)
    shared.painter.forget()
    task.says = f"starting {run.name}"
    process = training.start(run, resume=resume)
    while training.state(run).process is None:
        if training.ended(process) is not None:
            raise DataError(training.last_words(run).strip().split("\n")[-1].removeprefix("error: "))
        task.wait(0.2)


def _planned(config: Any) -> str:
    """What `sdjax plan` says of a run, as HTML."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.toml"
        path.write_text(to_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "sdjax", "plan", str(path), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise DataError(done.stderr.strip().split("\n")[-1].removeprefix("error: "))
    report = json.loads(done.stdout.strip().split("\n")[-1])
    most = max(row["memory_gb"] for row in report["programs"])
    lines = [f"{'It fits' if report['fits'] else 'It does not fit'}: {most:.2f} GB on {report['device']}."]
    lines += [f"It fits with {line}." for line in report["advice"]]
    if report.get("seconds_per_step_at_least"):
        lines.append(f"A step takes {report['seconds_per_step_at_least']:g} s or more, of {report['steps']} steps.")
    return f'<div class="state">{"<br>".join(map(escape, lines))}</div>'


# ------------------------------------------------------------------------------------------------ runs


def _runs_part(shared: Shared) -> Any:
    """Builds the list of runs, and what is seen of the chosen one. Returns the list."""
    folders = shared.folders
    names = list(folders.runs_by_name())
    run = names_field(names, "Run", value=names[0] if names else None, elem_id="run")
    state = gr.HTML(elem_id="run-state")
    with gr.Row():
        stop = gr.Button("Save and stop", variant="stop", elem_id="run-stop")
        resume = gr.Button("Resume", elem_id="run-resume")
        fetch = gr.DownloadButton("Download LoRA")
    says = gr.HTML(elem_id="run-says")
    with gr.Accordion("Try the result at several weights", open=False, elem_id="try"):
        prompt = gr.Textbox(label="Prompt", elem_id="try-prompt")
        weights = gr.Textbox("0, 0.5, 1", label="Weights of the LoRA")
        go = gr.Button("Draw at these weights", elem_id="try-draw")
        task, tried, preview = gr.State(), gr.HTML(), preview_field()
        gallery = pictures_field("With the LoRA at each weight", columns=3, height=300, elem_id="tried")
    timer = gr.Timer(_REFRESH)

    def refresh(name: str | None) -> list[Any]:
        listed = folders.runs_by_name()
        if name not in listed and listed:
            newest = next(iter(listed))
            return [gr.update(choices=list(listed), value=newest), _shown(listed[newest])]
        return [gr.update(choices=list(listed)), _shown(listed[name]) if name in listed else "<p>No run yet.</p>"]

    def on_stop(name: str | None) -> str:
        try:
            training.stop(chosen(folders.runs_by_name(), name, "a run"))
        except SdjaxError as error:
            return problem(str(error))
        return bar("saving, then stopping", 0.5)

    def on_resume(name: str | None) -> Iterator[str]:
        try:
            found = chosen(folders.runs_by_name(), name, "a run")
            if training.state(found).process is not None:
                raise DataError(f"{name} is training")
        except SdjaxError as error:
            yield problem(str(error))
            return
        yield from shared.follow(shared.queue.put(lambda task: _start(shared, task, found, resume=True)))

    def on_fetch(name: str | None) -> Any:
        listed = folders.loras_by_name()
        stages = [key for key in listed if key.startswith(f"runs/{name}/")]
        if not stages:
            raise gr.Error(f"{name or 'no run'} has no {KOHYA_FILE} yet", print_exception=False)
        return shared.served(listed[stages[-1]])

    def on_try(name: str | None, prompt: str, weights: str) -> Iterator[Any]:
        try:
            found = chosen(folders.runs_by_name(), name, "a run")
            running = shared.put(_tries(shared, found, prompt, weights))
        except SdjaxError as error:
            yield None, problem(str(error)), gr.skip(), gr.skip()
            return
        yield from follow(shared, running)

    quiet: Any = {"show_progress": "hidden", "concurrency_limit": None}
    timer.tick(refresh, run, [run, state], api_name="run_state", **quiet)
    run.change(lambda name: refresh(name)[1], run, state, api_visibility="private", **quiet)
    stop.click(on_stop, run, says, api_name="stop_run", **quiet)
    resume.click(on_resume, run, says, api_name="resume_run", **quiet)
    fetch.click(on_fetch, run, fetch, api_name="download", **quiet)
    go.click(on_try, [run, prompt, weights], [task, tried, preview, gallery], api_name="try_run", **quiet)
    return run


def _tries(shared: Shared, run: Path, prompt: str, weights: str) -> Order:
    """An order that draws a prompt with the last LoRA of a run at several weights, and with its words."""
    if not (prompt or "").strip():
        raise ConfigError("write a prompt")
    config = training.state(run).config
    listed = shared.folders.loras_by_name()
    loras = [listed[key] for stage in config.stages if (key := f"runs/{run.name}/{stage.name}") in listed]
    words = [path for name, path in shared.folders.words_by_name().items() if name.startswith(f"runs/{run.name}/")]
    if not loras and not words:
        raise DataError(f"{run.name} has no result yet")
    tries = tuple(shared.lora_texts([(f"runs/{run.name}/{loras[-1].parent.name}", w)]) for w in weights.split(","))
    return Order(config.model, {"prompt": prompt}, 1, tuple(words), tries=tries if loras else ((),))


def _shown(run: Path) -> str:
    """Where a run stands, with its curves and newest samples, as HTML."""
    try:
        state = training.state(run)
    except SdjaxError as error:
        return problem(str(error))
    parts = [bar(f"{state.says}, step {state.done} of {state.total}", state.done / state.total)]
    link = f'<a href="report?run={quote(run.name)}" target="_blank" rel="noopener">Report of this run</a>'
    parts.append(f'<p class="state">{link}</p><style>{CURVES}</style>')
    lines = read_metrics(run / "metrics.jsonl")
    for stage in reversed(state.config.stages):
        if curves := stage_curves(lines, stage.name):
            keys = "".join(f'<li class="{CLASSES[curve.name]}">{escape(curve.name)}</li>' for curve in curves)
            parts.append(f'<h3>{escape(stage.name)}</h3><ul class="legend">{keys}</ul>{svg(stage.name, curves)}')
        parts += list(sheets(run, stage.name, most=2))
    if state.process is None and not state.done:
        parts.append(f"<pre>{escape(training.last_words(run))}</pre>")
    return "".join(parts)
