"""The tab that trains: pictures and captions, what to teach, and the runs."""

import functools
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import quote

import gradio as gr

from sdjax.app import lessons, training
from sdjax.app.draw_tab import check_prompt, follow, model_field, pictures_field, preview_field, weights_of
from sdjax.app.drawing import Order
from sdjax.app.fields import Read, checks, names_field
from sdjax.app.folders import chosen, new_folder
from sdjax.app.queue import Task
from sdjax.app.shared import Shared, bar, problem
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
_QUIET: Any = {"show_progress": "hidden", "concurrency_limit": None}
"""How every button works: without a veil over its fields, for any number of people."""
_PLANNING = threading.Lock()
"""Held while a plan is made, which takes memory and all processors."""
_PRIVATE: Any = {**_QUIET, "api_visibility": "private"}


def train_tab(shared: Shared) -> None:
    """Builds the tab."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            data = _data_part(shared)
            fields, plan, start, says = _lesson_part(shared, data)
        with gr.Column(scale=6, min_width=320):
            run = _runs_part(shared)
    values = list(fields.values())
    lesson = functools.partial(_lesson, shared, list(fields))

    def on_start(*given: Any) -> Iterator[Any]:
        try:
            name, what = lesson(given)
            output = new_folder(shared.folders.runs, name, "name")
            config = training.lesson_config(what, shared.dtype, output)
            task = shared.queue.put(lambda task: _start(shared, task, training.write(config), resume=False))
        except SdjaxError as error:
            yield problem(str(error)), gr.skip()
            return
        for state in shared.follow(task):
            yield state, gr.skip()
        listed = list(shared.folders.runs_by_name())
        if name in listed and not task.error:
            yield bar(f"{name} has started", 1), gr.update(choices=listed, value=name)

    def on_plan(*given: Any) -> Iterator[str]:
        yield bar("compiling the programs of the run, which takes a minute or two", 0.3)
        try:
            yield _planned(training.lesson_config(lesson(given)[1], shared.dtype, Path("run")))
        except SdjaxError as error:
            yield problem(str(error))

    start.click(on_start, values, [says, run], validator=_check(shared, list(fields)), api_name="start", **_QUIET)
    nameless = _check(shared, list(fields), but="name")
    plan.click(on_plan, values, says, validator=nameless, api_name="plan", **_QUIET)


# ------------------------------------------------------------------------------------------------ pictures


def _data_part(shared: Shared) -> tuple[Any, Any]:
    """Builds the fields of training pictures. Returns those that choose the pictures of the style and of the thing."""
    folders = shared.folders
    with gr.Accordion("Pictures and captions", open=True):
        name = gr.Textbox(label="Name of the set", placeholder="my-style", elem_id="set-name")
        files = gr.File(label="Pictures", file_count="multiple", file_types=["image"], height=180, elem_id="set-files")
        add = gr.Button("Add these pictures", elem_id="set-add")
        edited = names_field(folders.data_by_name(), "Captions of", elem_id="set-edited")
        table = gr.Dataframe(
            headers=["file", "caption"], column_widths=["45%", "55%"], type="array", interactive=True, wrap=True,
            static_columns=[0], row_count=1, column_count=2, max_height=260, visible=False, elem_id="captions",
        )  # fmt: skip
        save = gr.Button("Save captions", size="sm", visible=False, elem_id="set-save")
        says = gr.HTML(elem_id="set-says")
    below: Any = {"render": False}  # they are shown below what to teach
    style = names_field(folders.data_by_name(), "Pictures of the style", elem_id="style-data", **below)
    thing = names_field(folders.data_by_name(), "Pictures of the thing", visible=False, **below)

    def on_add(name: str, files: list[str] | None) -> list[Any]:
        try:
            folder = lessons.add_pictures(folders.data, name or "", files or [])
        except SdjaxError as error:
            return [problem(str(error)), *[gr.skip()] * 3]
        names = list(folders.data_by_name())
        chosen_now = [gr.update(choices=names, value=folder.name) for _ in range(3)]
        return [bar(_counted(folder), 1), *chosen_now]

    def on_edit(name: str | None) -> list[Any]:
        if not name:
            return [gr.update(visible=False)] * 2
        try:
            rows = lessons.captions(chosen(folders.data_by_name(), name, "a set"))
            return [gr.update(value=rows, visible=True), gr.update(visible=True)]
        except SdjaxError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def on_save(name: str | None, rows: list[list[Any]]) -> str:
        try:
            folder = chosen(folders.data_by_name(), name, "a set")
            lessons.write_captions(folder, rows)
        except SdjaxError as error:
            return problem(str(error))
        return bar(f"Saved. {_counted(folder)}", 1)

    new = checks([lambda name: new_folder(folders.data, name or "", "name")])
    for field in (edited, style, thing):
        field.focus(lambda: gr.update(choices=list(folders.data_by_name())), None, field, **_PRIVATE)
    add.click(on_add, [name, files], [says, edited, style, thing], validator=new, api_name="add_pictures", **_QUIET)
    edited.change(on_edit, edited, [table, save], api_name="captions", **_QUIET)
    save.click(on_save, [edited, table], says, api_name="save_captions", **_QUIET)
    return style, thing


def _counted(folder: Path) -> str:
    """How many pictures a set has, and how many of them wait for a caption."""
    captions = [caption for _, caption in lessons.captions(folder)]
    says, bare = f"{len(captions)} pictures in {folder.name}.", captions.count("")
    if bare:
        which = "None of them has a caption" if bare == len(captions) else f"{bare} of them have no caption"
        says += f" {which}: write what they show in the table, then save. Without, prompts steer the result less."
    return says


# ------------------------------------------------------------------------------------------------ what to teach


def _lesson_part(shared: Shared, data: tuple[Any, Any]) -> tuple[dict[str, Any], Any, Any, Any]:
    """Builds the fields of what to teach. Returns these by name, the two buttons, and the place for messages."""
    style, thing = data
    fields: dict[str, Any] = {"way": gr.Radio(list(training.WAYS), value=next(iter(training.WAYS)), label="Teach")}
    style.render()
    thing.render()
    fields |= {"style_data": style, "thing_data": thing}
    with gr.Row(visible=False) as of_word:
        fields["word"] = gr.Textbox("<thing>", label="The new word", min_width=150)
        fields["begins_as"] = gr.Textbox(label="It begins as", placeholder="crescent moon", min_width=150)
    fields["model"] = model_field(shared)
    fields["name"] = gr.Textbox(label="Name of the run", placeholder="my-run", elem_id="run-name")
    fields["prompts"] = gr.Textbox(label="Prompts for samples, one a line", lines=2, elem_id="run-prompts")
    with gr.Accordion("Numbers", open=False, elem_id="numbers"):
        for name, (label, _) in _NUMBERS.items():
            fields[name] = gr.Textbox(label=label, placeholder="usual for the model", elem_id=f"run-{name}")
    with gr.Row():
        start = gr.Button("Train", variant="primary", elem_id="train")
        plan = gr.Button("What will it take?", elem_id="plan")
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


def _word(text: str) -> None:
    if (text or "").split() != [text]:
        raise ConfigError(f"word = {text!r}: expected one word without spaces")


def _lesson_reads(shared: Shared) -> dict[str, Read | None]:
    """Field of a lesson -> the function that reads it and raises ConfigError."""
    reads: dict[str, Any] = {name: _number(hint, name) for name, (_, hint) in _NUMBERS.items()}
    reads["name"] = lambda name: new_folder(shared.folders.runs, name or "", "name")
    reads["word"] = _word
    return reads


def _check(shared: Shared, names: list[str], but: str = "") -> Callable[..., list[Any]]:
    """The validator of a lesson: a message beside each wrong field. but: a field that may be wrong."""
    reads = _lesson_reads(shared)
    each = checks([reads.get(name) if name != but else None for name in names])

    def check(*values: Any) -> list[Any]:
        problems = each(*values)
        given = dict(zip(names, values, strict=True))
        stages = training.WAYS[given["way"]]
        if "thing" not in stages:
            problems[names.index("word")] = None  # the field is hidden
        for kind in stages:
            if not given[f"{kind}_data"]:
                place = names.index(f"{kind}_data")
                problems[place] = gr.validate(False, f"choose the pictures of the {kind}")
        return problems

    return check


def _lesson(shared: Shared, names: list[str], given: Any) -> tuple[str, training.Lesson]:
    """The name of a run and its lesson, from the values of the fields. Raises ConfigError."""
    values = dict(zip(names, given, strict=True))
    sets, reads = shared.folders.data_by_name(), _lesson_reads(shared)
    stages = training.WAYS[values["way"]]
    numbers = {name: reads[name](values[name]) for name in _NUMBERS}  # type: ignore[misc]
    lesson = training.Lesson(
        way=values["way"],
        model=values["model"],
        style_data=chosen(sets, values["style_data"], "the pictures of the style") if "style" in stages else None,
        thing_data=chosen(sets, values["thing_data"], "the pictures of the thing") if "thing" in stages else None,
        word=values["word"],
        begins_as=values["begins_as"] or "",
        prompts=tuple(line.strip() for line in (values["prompts"] or "").split("\n") if line.strip()),
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
    """What `sdjax plan` says of a run, as HTML. Raises DataError for its errors, and while another is made."""
    if not _PLANNING.acquire(blocking=False):
        raise DataError("another plan is being made: ask again when it is done")
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.toml"
            path.write_text(to_toml(config), encoding="utf-8")
            command = [sys.executable, "-m", "sdjax", "plan", str(path), "--json"]
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    finally:
        _PLANNING.release()
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
    says = gr.HTML(elem_id="run-says")
    _try_part(shared, run)
    _push_part(shared, run)
    timer = gr.Timer(_REFRESH)

    def refresh(name: str | None) -> list[Any]:
        listed = folders.runs_by_name()
        if name not in listed and listed:
            newest = next(iter(listed))
            return [gr.update(choices=list(listed), value=newest), _shown(shared, newest)]
        return [gr.update(choices=list(listed)), _shown(shared, name) if name in listed else "<p>No run yet.</p>"]

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
            if found.parent != folders.runs:
                raise DataError(f"{name} is one of several copies: resume them together, with sdjax train --resume")
            task = shared.queue.put(lambda task: _start(shared, task, found, resume=True))
        except SdjaxError as error:
            yield problem(str(error))
            return
        yield from shared.follow(task)
        if training.state(found).process is not None:
            yield bar(f"{name} has started", 1)

    timer.tick(refresh, run, [run, state], api_name="run_state", **_QUIET)
    run.change(lambda name: refresh(name)[1], run, state, **_PRIVATE)
    stop.click(on_stop, run, says, api_name="stop_run", **_QUIET)
    resume.click(on_resume, run, says, api_name="resume_run", **_QUIET)
    return run


def _try_part(shared: Shared, run: Any) -> None:
    """Builds the part that draws with the result of a run."""
    with gr.Accordion("Try the result at several weights", open=False, elem_id="try"):
        prompt = gr.Textbox(label="Prompt", elem_id="try-prompt")
        weights = gr.Textbox("0, 0.5, 1", label="Weights of the LoRA", elem_id="try-weights")
        go = gr.Button("Draw at these weights", elem_id="try-draw")
        task, tried, preview = gr.State(), gr.HTML(elem_id="try-says"), preview_field()
        gallery = pictures_field("With the LoRA at each weight", columns=3, height=300, elem_id="tried")

    def on_try(name: str | None, prompt: str, weights: str) -> Iterator[Any]:
        try:
            running = shared.put(_tries(shared, name, prompt, weights))
        except SdjaxError as error:
            yield None, problem(str(error)), gr.skip(), gr.skip()
            return
        yield from follow(shared, running)

    validator = checks([None, check_prompt, weights_of])
    outputs = [task, tried, preview, gallery]
    go.click(on_try, [run, prompt, weights], outputs, validator=validator, api_name="try_run", **_QUIET)


def _push_part(shared: Shared, run: Any) -> None:
    """Builds the part that uploads the result of a run."""
    with gr.Accordion("Push to the Hugging Face hub", open=False, elem_id="push"):
        gr.Markdown("The hub account is that of this machine: log in there with `hf auth login`.")
        repository = gr.Textbox(label="Repository", placeholder="owner/name", elem_id="push-repository")
        licence = gr.Textbox(
            label="Licence", placeholder="openrail++", info="Of the files, as far as that of the base model allows"
        )
        private = gr.Checkbox(False, label="Private")
        go, says = gr.Button("Push", elem_id="push-go"), gr.HTML(elem_id="push-says")

    def on_push(name: str | None, repository: str, licence: str, private: bool) -> Iterator[str]:
        from sdjax.train.sharing import push_run

        yield bar("uploading", 0.5)
        try:
            found = chosen(shared.folders.runs_by_name(), name, "a run")
            address = push_run(found, (repository or "").strip(), (licence or "").strip(), private=bool(private))
        except SdjaxError as error:
            yield problem(str(error).replace(f"{shared.folders.runs}/", ""))
            return
        link = f'<a href="{escape(address)}" target="_blank" rel="noopener">{escape(address)}</a>'
        yield f'<p class="state">Uploaded to {link}</p>'

    go.click(on_push, [run, repository, licence, private], says, api_name="push_run", **_QUIET)


def _tries(shared: Shared, name: str | None, prompt: str, weights: str) -> Order:
    """An order that draws a prompt with the last LoRA of a run at several weights, and with its words."""
    check_prompt(prompt)
    config = training.state(chosen(shared.folders.runs_by_name(), name, "a run")).config
    listed = shared.folders.loras_by_name()
    loras = [key for stage in config.stages if (key := f"runs/{name}/{stage.name}") in listed]
    words = [path for key, path in shared.folders.words_by_name().items() if key.rpartition("/")[0] == f"runs/{name}"]
    if not loras and not words:
        raise DataError(f"{name} has no result yet")
    tries = tuple(shared.lora_texts([(loras[-1], weight)]) for weight in weights_of(weights)) if loras else ((),)
    return Order(config.model, {"prompt": prompt}, 1, tuple(words), tries=tries)


def _shown(shared: Shared, name: str) -> str:
    """Where a run stands, with its results, its curves and its newest samples, as HTML."""
    run = shared.folders.runs_by_name()[name]
    try:
        state = training.state(run)
    except SdjaxError as error:
        return problem(str(error))
    parts = [bar(f"{state.says}, step {state.done} of {state.total}", state.done / state.total)]
    links = [f'<a href="report?run={quote(name, safe="")}" target="_blank" rel="noopener">Report of this run</a>']
    for file in shared.folders.results_by_name():
        if file.rpartition("/")[0] == f"runs/{name}":
            what = escape(file.rpartition("/")[2])
            links.append(f'<a href="result?name={quote(file, safe="")}" download>Download {what}</a>')
    parts.append(f'<p class="state links">{"".join(links)}</p><style>{CURVES}</style>')
    lines = read_metrics(run / "metrics.jsonl")
    for stage in reversed(state.config.stages):
        if curves := stage_curves(lines, stage.name):
            keys = "".join(f'<li class="{CLASSES[curve.name]}">{escape(curve.name)}</li>' for curve in curves)
            parts.append(f'<h3>{escape(stage.name)}</h3><ul class="legend">{keys}</ul>{svg(stage.name, curves)}')
        parts += list(sheets(run, stage.name, most=2))
    if state.process is None and not state.done:
        parts.append(f"<pre>{escape(training.last_words(run))}</pre>")
    return "".join(parts)
