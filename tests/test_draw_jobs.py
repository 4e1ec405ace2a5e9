"""Jobs: lines of settings, batches of equal settings, and errors that name the line."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from sdjax.draw import jobs
from sdjax.draw.jobs import Job
from sdjax.draw.settings import Subject, complete_job, declarations
from sdjax.errors import ConfigError, DataError, SdjaxError, TrainingStopped
from sdjax.text.syntax import LoraTag


def job(**settings):
    return Job(complete_job(settings))


def read(*lines, **base):
    return jobs.read_jobs(lines, base, "jobs.jsonl")


@pytest.fixture
def files(tmp_path):
    """Name -> file of an image or a mask."""
    found = {}
    for name, colour in (("IN", "white"), ("BLACK", "black")):
        found[name] = str(tmp_path / f"{name}.png")
        Image.new("RGB", (64, 64), colour).save(found[name])
    return found


def test_batches_are_of_one_size_and_filled_up():
    def found(letters, most):
        drawn = jobs.batches([job(prompt=letter) for letter in letters], most)
        return [(places, "".join(job.settings["prompt"] for job in batch)) for places, batch in drawn]

    assert found("abcde", 4) == [([0, 1, 2], "abc"), ([3, 4], "dee")]
    assert found("abc", 4) == [([0, 1, 2], "abc")]
    assert found("ab", 1) == [([0], "a"), ([1], "b")]


def test_a_batch_holds_jobs_that_differ_in_prompts_and_seeds_alone():
    other = {"prompt": "b", "negative_prompt": "c", "seed": 5, "variation_seed": 6}
    assert other.keys() == Subject.__annotations__.keys()
    mixed = [job(prompt="a"), job(prompt="a", steps=3), job(**other), job(prompt="b", steps=3), job(lora=("x",))]
    assert [places for places, _ in jobs.batches(mixed, 8)] == [[0, 2], [1, 3], [4]]
    assert jobs.grouped("abca") == {"a": [0, 3], "b": [1], "c": [2]}


def test_jobs_with_the_same_loras_are_drawn_together(monkeypatch):
    """Each model is made once, watched batches come one by one, and pictures know their jobs."""
    told = []

    def adapted(loras, last):
        told.append((loras, last))
        return f"model with {loras}"

    def draw(model, batch, watch):
        told.append(watch)
        return [f"{job.settings['prompt']} by the {model}" for job in batch]

    monkeypatch.setattr(jobs, "draw", draw)
    wanted = [job(prompt=letter) for letter in "abcde"]
    watch = iter(range(10)).__next__
    pictures = list(jobs.draw_by_loras(wanted, ["x", "y", "x", "y", "x"], 2, adapted, watch, advice="less"))
    assert pictures == [(i, f"{'abcde'[i]} by the model with {'xyxyx'[i]}") for i in (0, 2, 4, 1, 3)]
    assert told == [("x", False), 0, 1, ("y", True), 2]

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(jobs, "draw", fail)
    with pytest.raises(TrainingStopped, match="out of memory: less"):
        next(jobs.draw_by_loras(wanted, ["x"] * 5, 2, adapted, advice="less"))


def test_a_line_takes_the_place_of_the_settings_of_the_flags():
    first, second = read('{"prompt": "a", "steps": 5}', "", '{"prompt": "b", "seed": null}', steps=3, seed=7)
    assert (first.settings["prompt"], first.settings["steps"], first.settings["seed"]) == ("a", 5, 7)
    assert (second.settings["prompt"], second.settings["steps"], second.settings["seed"]) == ("b", 3, 7)
    assert (first.origin, second.origin) == ("jobs.jsonl, line 1", "jobs.jsonl, line 3")
    for name, (_, declared) in declarations().items():
        assert name in ("prompt", "steps", "seed") or second.settings[name] == declared.default
    with pytest.raises(DataError, match=r"^jobs\.jsonl: holds no job$"):
        read("", "  ")


@pytest.mark.parametrize(
    ("line", "code", "expected"),
    [
        ("{", 3, "not JSON"),
        ('["a"]', 3, "give a table with a prompt"),
        ({"prompt": None}, 3, "give a table with a prompt"),
        ("[" * 100_000, 3, "not JSON: nested too deeply"),
        ('{"prompt": "a", "seed": ' + "1" * 5000 + "}", 3, "not JSON: a number has too many digits"),
        ('{"prompt": "half \\ud83d"}', 3, "not JSON: holds half of a character"),
        ({"prompt": "[a:" * 2000}, 2, "nested more than 100 deep"),
        ({"prompt": "(a:" + "9" * 400 + ")"}, 2, "in a prompt is too large"),
        ({"prompt": "<lora:x:nan>"}, 2, "the weights of a LoRA must be numbers"),
        ({"width": 99999999999999999992}, 2, "width = 99999999999999999992: expected at least 8 and at most 16384"),
        ({"image": "IN", "outpaint": [0, 0, 10**12, 0]}, 2, "outpaint makes a picture of 1000000000064x64 pixels"),
        ({"image": "a\0b"}, 3, "embedded null byte"),
        ({"stepz": 1}, 2, "unknown key stepz: did you mean steps?"),
        ({"steps": 2.5}, 2, "steps = 2.5: expected a whole number"),
        ({"karras": 1}, 2, "karras = 1: expected true or false"),
        ({"outpaint": [1, 2, 3], "image": "IN"}, 2, "outpaint = [1, 2, 3]: expected a list of 4"),
        ({"steps": 0}, 2, "steps = 0: expected at least 1 and at most 1000"),
        ({"seed": -1}, 2, "seed = -1: expected at least 0 and at most 4294967295"),
        ({"guidance": float("nan")}, 2, "guidance = nan: expected a number"),
        ({"width": 60}, 2, "width = 60: expected at least 8 and at most 16384, a multiple of 8"),
        ({"sampler": "magic"}, 2, "sampler = 'magic': expected one of ddim"),
        ({"sampler": "ddim", "karras": True}, 2, "sampler 'ddim' has no spacing 'karras'"),
        ({"clip_skip": 9}, 2, "clip_skip = 9: must lie in 1 (last layer)"),
        ({"prompt_syntax": "comfy"}, 2, "prompt_syntax = 'comfy': expected one of a1111, plain"),
        ({"hires_scale": 0.5}, 2, "hires_scale = 0.5: expected at least 1 and at most 8"),
        ({"hires_scale": 2, "hires_steps": 1}, 2, "strength 0.5 of 1 steps leaves none to run"),
        ({"hires_scale": 2, "image": "IN"}, 2, "--hires-scale cannot be used with an --image"),
        ({"prompt": "<lora:mine:x>"}, 2, "the weights of a LoRA must be numbers"),
        ({"strength": 0.5}, 2, "--strength needs an --image to redraw"),
        ({"outpaint": [8, 0, 0, 0]}, 2, "--mask and --outpaint need an --image"),
        ({"image": "none.png"}, 3, "--image none.png: no such file"),
        ({"image": "IN", "mask": "BLACK"}, 2, "the mask is black all over"),
        ({"image": "IN", "mask": "IN", "mask_blur": -1}, 2, "mask_blur = -1: expected at least 0 and at most 1024"),
    ],
)
def test_errors_begin_with_the_line(files, outline, line, code, expected):
    if isinstance(line, dict):
        line = json.dumps({"prompt": "a"} | {key: files.get(str(value), value) for key, value in line.items()})
    with pytest.raises(SdjaxError) as raised:
        wanted = read('{"prompt": "a", "steps": 3}', "", line)
        jobs.check_alone(wanted)
        jobs.check(outline, wanted)
    assert len(str(raised.value)) < 500
    assert raised.value.exit_code == code
    assert str(raised.value).startswith("jobs.jsonl, line 3: ") and expected in str(raised.value)


def test_errors_of_the_flags_name_no_line(outline):
    with pytest.raises(ConfigError, match=r"^sampler 'ddim' has no spacing 'karras'"):
        jobs.check(outline, [job(prompt="a"), job(prompt="b", sampler="ddim", karras=True)])


def test_the_strength_depends_on_the_mask():
    assert job().strength == 1.0
    assert job(image="x").strength == 0.75
    assert job(image="x", mask="y").strength == job(image="x", outpaint=[8, 0, 0, 0]).strength == 1.0
    assert job(image="x", mask="y", strength=0.3).strength == job(image="x", strength=0.3).strength == 0.3


def test_loras_are_taken_out_of_a_prompt_unless_its_syntax_is_plain():
    assert job(prompt="a <lora:x:0.5>cat").words == ("a cat", [LoraTag("x", 0.5, 0.5)])
    assert job(prompt="a <lora:x:0.5>cat", prompt_syntax="plain").words == ("a <lora:x:0.5>cat", [])


def test_a_job_is_replaced_with_checked_settings():
    first = Job(complete_job({"prompt": "a", "steps": 5}), "jobs.jsonl, line 1")
    assert first.replace(steps=6) == Job(complete_job({"prompt": "a", "steps": 6}), "jobs.jsonl, line 1")
    with pytest.raises(ConfigError, match="steps = 0"):
        first.replace(steps=0)


def test_images_are_turned_upright_and_read_again_when_they_change(tmp_path):
    path = tmp_path / "in.png"
    image = Image.new("RGB", (16, 8), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(path, exif=exif)
    assert jobs.read_image(str(path), "--image").size == (8, 16)
    Image.new("RGB", (24, 8), "blue").save(path)
    os.utime(path, ns=(1, 1))
    assert jobs.read_image(str(path), "--image").size == (24, 8)
    path.write_text("not an image")
    with pytest.raises(DataError, match=r"^--mask .*in\.png: cannot be read as an image"):
        jobs.read_image(str(path), "--mask")


def test_inputs_are_the_image_and_its_mask(files):
    image, mask = jobs.inputs(job(image=files["IN"]))
    assert image.size == (64, 64) and mask is None
    assert jobs.inputs(job(image=files["IN"], mask="alpha"))[1] is None
    assert np.asarray(jobs.inputs(job(image=files["IN"], mask=files["BLACK"]))[1]).max() == 0
    wider, mask = jobs.inputs(job(image=files["IN"], mask=files["BLACK"], outpaint=[8, 0, 0, 16]))
    assert wider.size == mask.size == (72, 80)
    assert np.asarray(mask)[:64, 8:].max() == 0 and np.asarray(mask)[:, :8].min() == np.asarray(mask)[64:].min() == 255
