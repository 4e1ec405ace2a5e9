"""`sdjax app`: who may come in, what cannot be reached, what its fields refuse, its queue, its runs."""

import asyncio
import contextlib
import dataclasses
import fcntl
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import gradio
import hub_server
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sdjax.app import fields, folders, lessons, queue, train_tab, training
from sdjax.app import shared as shared_module
from sdjax.app.__main__ import main
from sdjax.app.drawing import Painter
from sdjax.app.server import application
from sdjax.app.shared import Shared
from sdjax.draw.settings import declarations
from sdjax.errors import ConfigError, DataError
from sdjax.formats import lora_file

pytestmark = [
    *map(pytest.mark.filterwarnings, ("ignore::DeprecationWarning", "ignore::ResourceWarning")),  # those of Gradio
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

LOCAL = {"host": "127.0.0.1:7860"}


@pytest.fixture
def shared(tmp_path, monkeypatch):
    for name in ("out", "loras", "words", "data", "runs", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "temporary"))
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)  # Gradio would make one and never close it
    named = folders.Folders(*(tmp_path / name for name in ("out", "loras", "words", "data", "runs")))
    painter = Painter(named, "float32", 1)
    yield Shared(named, ("tiny",), "float32", queue.Queue(), painter, tmp_path / "temporary")
    asyncio.set_event_loop(None)
    loop.close()
    gc.collect()


@pytest.fixture
def client(shared):
    """Asks the page as a browser of this machine does."""
    return TestClient(application(shared, "127.0.0.1", ""), headers=LOCAL)


@pytest.fixture
def hub(monkeypatch):
    """See `hub_server.serve`."""
    yield from hub_server.serve(monkeypatch)


def picture(path, colour="red"):
    Image.new("RGB", (16, 16), colour).save(path)
    return str(path)


# ------------------------------------------------------------------------------------------------ who may come in


def test_the_page_answers_to_this_machine_only(client):
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 403  # a name that points to 127.0.0.1
    assert client.get("/", headers={**LOCAL, "origin": "http://evil.example"}).status_code == 403
    assert client.get("/", headers={**LOCAL, "origin": "http://127.0.0.1:7860"}).status_code == 200


def test_with_a_token_nothing_answers_without_it(shared):
    client = TestClient(application(shared, "0.0.0.0", "a-long-secret-token"), headers={"host": "box:7860"})
    for path in ("/", "/config", "/gradio_api/info", "/report?run=x", "/gradio_api/queue/data?session_hash=a"):
        assert client.get(path).status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    first = client.get("/?token=a-long-secret-token")
    assert first.status_code == 200 and "HttpOnly" in first.headers["set-cookie"]
    assert client.get("/config").status_code == 200  # by the cookie


def test_the_page_may_not_speak_to_other_hosts(client):
    policy = client.get("/").headers["content-security-policy"]
    assert policy.startswith("default-src 'self'") and "http" not in policy
    text = client.get("/theme.css").text + client.get("/config").text
    assert "fonts.googleapis" not in text and json.loads(client.get("/config").text)["analytics_enabled"] is False


# ------------------------------------------------------------------------------------------------ what is out of reach


def test_no_file_of_the_machine_can_be_read(client, tmp_path, shared):
    secret = tmp_path / "secret.txt"
    secret.write_text("hidden words")
    (shared.folders.pictures / "link.png").symlink_to(secret)
    inside = ["/etc/passwd", str(secret), f"{shared.folders.pictures}/link.png", "../secret.txt", "pyproject.toml"]
    inside += [f"{shared.temporary}/../secret.txt", f"{shared.temporary}/%2e%2e/secret.txt", "http://127.0.0.1:1/x"]
    for path in inside:
        got = client.get(f"/gradio_api/file={path}")
        assert got.status_code in (403, 404) and "hidden" not in got.text, path
    for path in ("proxy=http://127.0.0.1:1/x", "vibe-code/", "run-history/buckets", "runs", "dev/reload"):
        assert client.get(f"/gradio_api/{path}").status_code == 404
    assert client.get("/report?run=../../etc").status_code == 404


def test_a_path_in_place_of_an_upload_is_refused(client, tmp_path, shared):
    secret = picture(tmp_path / "secret.png")
    names = {fn["api_name"]: fn for fn in client.get("/config").json()["dependencies"]}
    index = names["reuse"]["id"]
    data = [{"path": secret, "meta": {"_type": "gradio.FileData"}}]
    body = {"data": data, "fn_index": index, "session_hash": "one", "trigger_id": None, "event_data": None}
    with TestClient(client.app, headers=LOCAL) as running:
        assert running.post("/gradio_api/queue/join", json=body).status_code == 200
        with running.stream("GET", "/gradio_api/queue/data?session_hash=one") as answer:
            text = "".join(answer.iter_text())
    assert '"success":false' in text and "not uploaded by a user" in text


def test_names_not_paths_choose_files_and_links_out_are_not_listed(shared, tmp_path):
    (tmp_path / "outside.safetensors").write_bytes(b"x")
    (shared.folders.loras / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (shared.folders.loras / "far").symlink_to(tmp_path)
    (shared.folders.loras / "mine.safetensors").write_bytes(b"x")
    assert list(shared.folders.loras_by_name()) == ["mine"]
    for name in ("link", "../outside", str(tmp_path / "outside.safetensors"), "", None):
        with pytest.raises(ConfigError):
            shared.lora_texts([(name, 1)])


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "", "..", "taken", "x" * 200])
def test_new_folders_have_plain_names(shared, name):
    (shared.folders.runs / "taken").mkdir()
    with pytest.raises(ConfigError, match="name"):
        folders.new_folder(shared.folders.runs, name, "name")


def test_the_names_of_results_are_those_that_are_written():
    assert (folders.KOHYA_FILE, folders.PEFT_FILE) == (lora_file.KOHYA_FILE, lora_file.PEFT_FILE)


# ------------------------------------------------------------------------------------------------ fields


def test_every_setting_of_drawing_has_a_field_whose_default_reads_as_its_default():
    shown = {"prompt", "negative_prompt", *fields.MAIN, *(name for group in fields.GROUPS.values() for name in group)}
    elsewhere = {"image", "mask", "lora", "outpaint", "strength"}  # fields of their own in the tabs
    assert shown | elsewhere == set(declarations())
    with gradio.Blocks():
        for name in shown | {"outpaint", "strength"}:
            value = fields.component(name).value
            assert fields.reader(name)(value) == declarations()[name][1].default, name


BAD = {
    **{"steps": 0, "guidance": "x", "width": "65", "seed": -1, "sampler": "magic", "outpaint": "1,2", "freeu": "a,b"},
    **{"upscale": "/etc/passwd", "hires_upscaler": "../x.pt", "strength": "2", "karras": "yes", "mask_blur": 1e9},
}


@pytest.mark.parametrize(("name", "value"), BAD.items())
def test_a_bad_value_gives_one_message_for_its_field(name, value):
    check = fields.checks([fields.reader("prompt"), fields.reader(name)])
    good, bad = check("a cat", value)
    assert good is None and bad["is_valid"] is False
    assert bad["message"].startswith(name) and "\n" not in bad["message"]


# ------------------------------------------------------------------------------------------------ the queue


def test_tasks_run_one_after_another_and_can_be_stopped():
    tasks, begun, go = queue.Queue(), threading.Event(), threading.Event()

    def first(task):
        begun.set()
        go.wait(10)

    def endless(task):
        while True:
            task.wait(0.01)

    def wrong(task):
        raise DataError("no such thing")

    one, two, three = tasks.put(first), tasks.put(endless), tasks.put(wrong)
    assert begun.wait(10)
    assert [tasks.ahead(task) for task in (one, two, three)] == [0, 1, 2]
    go.set()
    assert one.done.wait(10)
    two.stop()
    assert two.done.wait(10) and two.says == "stopped" and two.error == ""
    assert three.done.wait(10) and three.error == "no such thing"


def test_a_drawing_waits_while_a_run_trains(shared, micro_models):
    from sdjax.app.drawing import Order

    run = run_folder(shared, micro_models())
    order = Order(str(micro_models()), {"prompt": "a cat", "steps": 2}, count=2)
    with locked(run):
        task = shared.put(order)
        wait_for(lambda: "waiting until the training of one" in task.says)
        assert not task.files
    assert task.done.wait(120) and task.error == ""
    assert [path.name for path in task.files] == ["00000-0-a-cat.png", "00001-1-a-cat.png"]
    assert "Steps: 2" in Image.open(task.files[0]).info["parameters"]
    assert (shared.served(task.files[0]) != str(task.files[0])) and not list(shared.folders.pictures.glob(".*"))


def test_a_drawing_shows_previews_and_stops_within_a_picture(shared, micro_models, monkeypatch):
    from sdjax.app import drawing

    monkeypatch.setattr(drawing, "_BETWEEN_PREVIEWS", 0)
    task = shared.put(drawing.Order(str(micro_models()), {"prompt": "a cat", "steps": 1000}))
    wait_for(lambda: task.preview is not None or task.done.is_set())
    assert task.preview.size == (16, 16)
    task.stop()
    assert task.done.wait(60) and task.says == "stopped" and not task.files


# ------------------------------------------------------------------------------------------------ pictures and runs


def test_dropped_pictures_become_a_set_with_captions(shared, tmp_path):
    files = [picture(tmp_path / "red cat.png"), picture(tmp_path / "b.PNG", "blue")]
    made = lessons.add_pictures(shared.folders.data, "set", files)
    assert lessons.captions(made) == [["000-red-cat.png", "red cat"], ["001-b.png", "b"]]
    lessons.write_captions(made, [["000-red-cat.png", 'a "cat"\u2028'], ["001-b.png", None]])
    assert lessons.captions(made) == [["000-red-cat.png", 'a "cat"'], ["001-b.png", ""]]
    for row in (["../x.png", "a"], ["/etc/passwd", "a"], ["metadata.jsonl", "a"]):
        with pytest.raises(DataError, match="has no picture"):
            lessons.write_captions(made, [row])


@pytest.mark.parametrize(("name", "content"), [("a.png", b"no picture"), ("a.txt", b"text"), ("a.png", b"")])
def test_an_upload_that_is_no_picture_is_refused(shared, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        lessons.add_pictures(shared.folders.data, "set", [str(tmp_path / name)])
    assert not shared.folders.data_by_name()


@pytest.mark.parametrize("way", training.WAYS)
def test_lessons_become_settings(shared, tmp_path, micro_models, way):
    made = lessons.add_pictures(shared.folders.data, "set", [picture(tmp_path / "cat.png")])
    model = str(micro_models())
    lesson = training.Lesson(way, model, made, made, "<cat>", "red", steps=7, prompts=("a <cat>",))
    config = training.lesson_config(lesson, "float32", shared.folders.runs / "one")
    assert config.model == model
    assert tuple(stage.name for stage in config.stages) == training.WAYS[way]
    assert {stage.steps for stage in config.stages} == {7} and config.data.resolution == 16
    assert training.write(config).name == "one" and "one" in shared.folders.runs_by_name()
    with pytest.raises(ConfigError, match="choose the pictures"):
        training.lesson_config(training.Lesson(way, model), "float32", shared.folders.runs / "two")


def test_a_run_of_a_terminal_is_shown_with_its_process(shared, micro_models):
    run = run_folder(shared, micro_models())
    (run / "metrics.jsonl").write_text('{"stage": "style", "step": 3, "loss": 1.0}\n')
    assert training.state(run)[1:] == (3, 9, None) and training.state(run).says == "stopped"
    with pytest.raises(DataError, match="not training"):
        training.stop(run)
    with locked(run):
        assert training.state(run).process == os.getpid() and training.running(shared.folders) == ["one"]
    assert training.running(shared.folders) == []


def test_the_report_of_a_run_is_served(client, shared, micro_models):
    run_folder(shared, micro_models())
    got = client.get("/report?run=one")
    assert got.status_code == 200 and "No step has been taken yet." in got.text


def test_links_that_lead_out_of_a_run_hide_it(client, shared, micro_models, tmp_path):
    run = run_folder(shared, micro_models())
    (tmp_path / "secret.jsonl").write_text("{}")
    (run / "metrics.jsonl").symlink_to(tmp_path / "secret.jsonl")
    assert shared.folders.runs_by_name() == {} and client.get("/report?run=one").status_code == 404


def test_copies_are_shown_each(client, shared, micro_models):
    model = micro_models()
    (shared.folders.runs / "both").mkdir()
    copies = [run_folder(shared, model, f"both/{name}") for name in ("a", "b")]
    (run_folder(shared, model) / "inner").mkdir()
    shutil.copy(copies[0] / "config.toml", shared.folders.runs / "one" / "inner")  # no copy: "one" is a run itself
    assert set(shared.folders.runs_by_name()) == {"one", "both/a", "both/b"}
    assert client.get("/report", params={"run": "both/a"}).status_code == 200
    result(copies[1], "style", folders.KOHYA_FILE)
    result(copies[1], "style", "cat.safetensors")
    assert list(shared.folders.loras_by_name()) == ["runs/both/b/style"]
    assert list(shared.folders.words_by_name()) == ["runs/both/b/cat"]
    with locked(copies[1]):
        assert training.running(shared.folders) == ["both/b"]
    page = function(client, "run_state")
    assert "step 0 of 9" in page("both/b")[1] and "No run yet" not in page("gone")[1]
    (said,) = function(client, "resume_run")("both/a")
    assert "resume them together" in said


def test_results_are_downloaded_by_name(client, shared, micro_models, tmp_path):
    run = run_folder(shared, micro_models())
    result(run, "style", folders.KOHYA_FILE, b"weights")
    (shared.folders.loras / "mine.safetensors").write_bytes(b"not a result")
    got = client.get("/result", params={"name": "runs/one/style"})
    assert got.content == b"weights" and 'filename="one-style.safetensors"' in got.headers["content-disposition"]
    assert 'href="result?name=runs%2Fone%2Fstyle" download' in function(client, "run_state")("one")[1]
    for name in ("mine", "runs/one/../one/style", "runs/one/config.toml", "/etc/passwd", ""):
        assert client.get("/result", params={"name": name}).status_code == 404


# ------------------------------------------------------------------------------------------------ plan and push


def lesson_values(client, shared, **changes):
    """The values of the fields of a lesson, in the order of the page."""
    config = client.get("/config").json()
    (start,) = (each for each in config["dependencies"] if each["api_name"] == "start")
    props = {each["id"]: each["props"] for each in config["components"]}
    given = {"Pictures of the style": "set", "Name of the run": "two", "Steps of each stage": "3"} | changes
    return [given.get(props[number]["label"], props[number].get("value")) for number in start["inputs"]]


@pytest.fixture
def micro(shared, micro_models, tmp_path):
    """The page with two models, of which the second is a micro model, and a set of pictures."""
    lessons.add_pictures(shared.folders.data, "set", [picture(tmp_path / f"{name}.png") for name in ("cat", "dog")])
    shared = dataclasses.replace(shared, models=("tiny", str(micro_models())))
    return shared, TestClient(application(shared, "127.0.0.1", ""), headers=LOCAL)


def test_the_page_says_what_a_run_will_take(micro):
    shared, client = micro
    values = lesson_values(client, shared, Model=shared.models[1], **{"Name of the run": ""})
    *_, said = function(client, "plan")(*values)
    assert re.search(r"It fits: \d+\.\d\d GB on ", said), said
    assert not list(shared.folders.runs.iterdir())  # a plan makes no run
    *_, said = function(client, "plan")(*lesson_values(client, shared, **{"Pictures of the style": "gone"}))
    assert "problem" in said and "gone" in said
    with train_tab._PLANNING:
        *_, said = function(client, "plan")(*values)
    assert "another plan is being made" in said


def test_a_run_of_the_page_trains_the_chosen_model(micro):
    shared, client = micro
    values = lesson_values(client, shared, Model=shared.models[1])
    training._started.clear()
    *_, last = function(client, "start")(*values)
    assert last[1]["value"] == "two"
    assert training.state(shared.folders.runs / "two").config.model == shared.models[1]
    (process,) = training._started.values()
    assert process.wait(300) == 0 and "runs/two/style" in shared.folders.results_by_name()


def test_the_fields_of_a_lesson_have_their_messages_beside_them(micro):
    shared, client = micro
    bad = {
        **{"Pictures of the style": None, "Name of the run": "../x", "Steps of each stage": "none"},
        **{"Rank of the LoRA": "0", "Pictures in a step": "-1", "Resolution": "65", "Held-out pictures": "1.5"},
        **{"Steps between samples": "x", "The new word": "two words", "Teach": "A thing, then a style on top"},
        **{"Pictures of the thing": None},
    }
    config = client.get("/config").json()
    props = {each["id"]: each["props"] for each in config["components"]}
    (start,) = (each for each in config["dependencies"] if each["api_name"] == "start")
    labels = [props[number]["label"] for number in start["inputs"]]
    check = validator(client, "start")
    said = dict(zip(labels, check(*lesson_values(client, shared, **bad)), strict=True))
    assert {label for label, message in said.items() if message} == set(bad) - {"Teach"}
    assert all("\n" not in message["message"] for message in said.values() if message)
    assert not any(check(*lesson_values(client, shared)))
    assert not any(check(*lesson_values(client, shared, **{"The new word": ""})))  # the field is hidden


def test_a_run_is_pushed_from_the_page(hub, client, shared, finished):
    shutil.copytree(finished[0], shared.folders.runs / "done")
    push = function(client, "push_run")
    cases = [
        (("done", "me/style", "", False), "say under which licence"),
        (("done", "style", "openrail++", False), "no name of a repository: give OWNER/NAME"),
        (("done", None, "openrail++", False), "no name of a repository"),
        (("done", "no/entry", "openrail++", False), "the token may not write there"),
        (("../done", "me/style", "openrail++", False), "there is none of this name"),
        ((None, "me/style", "openrail++", False), "choose a run"),
    ]
    for given, message in cases:
        *_, said = push(*given)
        assert 'class="problem"' in said and message in said and str(shared.folders.runs) not in said, given
    *_, said = push("done", " me/style ", "openrail++", True)
    assert "/me/style</a>" in said and hub.private == {"me/style": True}
    assert {"lora.safetensors", "README.md"} <= set(hub.repositories["me/style"])


def test_a_wrong_token_of_the_hub_is_one_message(hub, client, shared, finished, monkeypatch):
    shutil.copytree(finished[0], shared.folders.runs / "done")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    *_, said = function(client, "push_run")("done", "me/style", "openrail++", False)
    assert "the token is not valid: log in with" in said and not any(hub.repositories.values())


# ------------------------------------------------------------------------------------------------ bounds


def test_old_files_for_the_browser_are_removed(shared, monkeypatch):
    monkeypatch.setattr(shared_module, "_KEPT_BYTES", 250)
    paths = []
    for age in (9000, 8000, 7000, 100, 0):  # seconds
        path = shared.temporary / str(age) / "a.png"
        path.parent.mkdir()
        path.write_bytes(bytes(100))
        os.utime(path, (time.time() - age,) * 2)
        paths.append(path)
    shared_module.tidy(shared.temporary)
    assert [path.exists() for path in paths] == [False, False, False, True, True]
    assert not paths[0].parent.exists()
    shared_module.tidy(shared.temporary)
    assert paths[3].exists()


def test_requests_beyond_a_number_are_refused(monkeypatch):
    monkeypatch.setattr(queue, "_MOST_WAITING", 2)
    tasks, go = queue.Queue(), threading.Event()
    waiting = [tasks.put(lambda task: go.wait(10)) for _ in range(2)]
    with pytest.raises(DataError, match="2 requests wait already"):
        tasks.put(lambda task: None)
    go.set()
    assert all(task.done.wait(10) for task in waiting)
    assert tasks.put(lambda task: None).done.wait(10)


def test_visitors_are_forgotten_beyond_a_number(client):
    blocks = client.app.routes[-1].app.get_blocks()
    for number in range(60):
        blocks.state_holder[f"visitor {number}"]
    assert len(blocks.state_holder.session_data) == 50


# ------------------------------------------------------------------------------------------------ the command


def test_the_page_starts_without_jax_and_without_the_stub_files_of_gradio(tmp_path):
    script = """
import sys
from pathlib import Path
from sdjax.app import gradio_import
before = list(sys.meta_path)
gradio_import.quickly()
assert sys.meta_path == before
import gradio.component_meta
assert gradio.component_meta.create_or_modify_pyi.__module__ == "sdjax.app.gradio_import"
from sdjax.app.drawing import Painter
from sdjax.app.folders import Folders
from sdjax.app.queue import Queue
from sdjax.app.server import application
from sdjax.app.shared import Shared
here = Folders(*[Path(".")] * 5)
application(Shared(here, ("tiny",), "float32", Queue(), Painter(here, "float32", 1), Path(".")), "127.0.0.1", "")
print(sorted({"jax", "flax", "optax", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_page_that_is_ended_leaves_no_temporary_files(tmp_path, ending):
    (tmp_path / "tmp").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and pass that on
from sdjax.app.__main__ import main
sys.exit(main())
"""
    command = [sys.executable, "-c", script, "--port", str(port)]
    own = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(command, cwd=tmp_path, env=own, stdout=subprocess.PIPE) as server:
        assert b"http://127.0.0.1" in server.stdout.readline()
        wait_for(lambda: answers(port))
        assert list((tmp_path / "tmp").iterdir())
        server.send_signal(ending)
        assert server.wait(60) == 128 + ending
    assert not list((tmp_path / "tmp").iterdir())


def answers(port):
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
        return answer.status == 200
    return False


def test_a_port_that_is_taken_is_one_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--port", str(taken.getsockname()[1])]) == 2
    error = capsys.readouterr().err
    assert "Address already in use" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "0"], "--port"),
        (["--dtype", "int8"], "--dtype"),
        (["--token", "short"], "--token"),
        (["--runs", "/proc/x"], "--runs /proc/x: cannot be written"),
        (["--batch-size", "0"], "--batch-size"),
    ],
)
def test_bad_flags_are_refused(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def run_folder(shared, model, name="one"):
    lesson = training.Lesson("A style, as a LoRA", str(model), shared.folders.data, steps=9, resolution=16)
    return training.write(training.lesson_config(lesson, "float32", shared.folders.runs / name))


def result(run, stage, name, content=b"x"):
    (run / "export" / stage).mkdir(parents=True, exist_ok=True)
    (run / "export" / stage / name).write_bytes(content)


def _of(client, name):
    blocks = client.app.routes[-1].app.get_blocks()
    (found,) = (each for each in blocks.fns.values() if each.api_name == name)
    return found


def function(client, name):
    """The function behind a button of the page."""
    return _of(client, name).fn


def validator(client, name):
    return _of(client, name).validator


@contextlib.contextmanager
def locked(run):
    """Holds the lock of a run as its process does."""
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def wait_for(condition, seconds=60):
    done = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        done.wait(0.02)
    raise AssertionError("it did not happen")
