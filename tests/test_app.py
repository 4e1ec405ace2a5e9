"""`sdjax app`: who may come in, what cannot be reached, what its fields refuse, its queue, its runs."""

import asyncio
import contextlib
import fcntl
import gc
import json
import os
import threading

import gradio
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from sdjax.app import fields, folders, lessons, queue, training
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
    lesson = training.Lesson(way, made, made, "<cat>", "red", steps=7, prompts=("a <cat>",))
    config = training.lesson_config(lesson, str(micro_models()), "float32", shared.folders.runs / "one")
    assert tuple(stage.name for stage in config.stages) == training.WAYS[way]
    assert {stage.steps for stage in config.stages} == {7} and config.data.resolution == 16
    assert training.write(config).name == "one" and "one" in shared.folders.runs_by_name()
    with pytest.raises(ConfigError, match="choose the pictures"):
        training.lesson_config(training.Lesson(way), str(micro_models()), "float32", shared.folders.runs / "two")


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


# ------------------------------------------------------------------------------------------------ the command


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


def run_folder(shared, model):
    lesson = training.Lesson("A style, as a LoRA", shared.folders.data, steps=9, resolution=16)
    return training.write(training.lesson_config(lesson, str(model), "float32", shared.folders.runs / "one"))


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
