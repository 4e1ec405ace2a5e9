"""`sdjax generate`: pictures, files, and mistakes told in one line before any weight is read."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import sdjax
from sdjax import generate, lora
from sdjax.draw import jobs, numbered
from sdjax.draw.settings import complete_job, declarations
from sdjax.formats.embedding_file import save_embedding
from sdjax.formats.lora_file import save_lora

STEPS = ("--steps", "2", "--guidance", "3")
ONE = ("--batch-size", "1")  # one compiled program for most of this file


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    # The command's own per-user cache is not the tests' to fill.
    monkeypatch.setattr("sdjax.runtime.compilation_cache.enable", lambda: None)


def run(*flags, model="tiny"):
    return generate.main(["--model", model, *map(str, flags)])


def recorded(path):
    with Image.open(path) as picture:
        return picture.info["parameters"]


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_pictures_are_those_of_the_library(tmp_path, tiny, capsys):
    prompts = ["red heart", "red heart", "pizza", "pizza"]
    flags = ("--prompt", "red heart", "--prompt", "pizza", "--num-images", 2, "--seed", 5, *ONE)
    assert run(*flags, *STEPS, "--out", tmp_path) == 0
    names = ["00000-5-red-heart.png", "00001-6-red-heart.png", "00002-7-pizza.png", "00003-8-pizza.png"]
    assert sorted(os.listdir(tmp_path)) == [*names, "grid.png"]
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in [*names, "grid.png"]]
    for i, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        expected = tiny.text2image(prompt, seed=5 + i, steps=2, guidance=3.0, progress=False)[0]
        np.testing.assert_array_equal(pixels(tmp_path / name), np.asarray(expected))
        assert recorded(tmp_path / name) == expected.info["parameters"]
    sheet = pixels(tmp_path / "grid.png")
    assert sheet.shape == (128, 128, 3)
    np.testing.assert_array_equal(sheet[64:, 64:], pixels(tmp_path / names[3]))


def test_nothing_is_overwritten_and_one_picture_makes_no_grid(tmp_path):
    for number in ("00000", "00001"):
        assert run("--prompt", "red heart", *STEPS, "--out", tmp_path) == 0
        assert (tmp_path / f"{number}-0-red-heart.png").exists()
    assert len(os.listdir(tmp_path)) == 2


def test_two_runs_in_one_folder_take_different_numbers(tmp_path):
    """The second one begins before the first has written anything."""
    with numbered.claimed(tmp_path, 3) as first, numbered.claimed(tmp_path, 2) as second:
        assert (first, second) == (0, 3)
        (tmp_path / "00004-0-x.png").touch()
    assert os.listdir(tmp_path) == ["00004-0-x.png"]
    with numbered.claimed(tmp_path, 1) as third:
        assert third == 5


def test_a_grid_is_never_replaced(tmp_path):
    flags = ("--prompt", "red heart", "--num-images", 2, *ONE, *STEPS, "--out", tmp_path)
    assert run(*flags) == 0
    first = (tmp_path / "grid.png").read_bytes()
    assert run(*flags, "--seed", 5) == 0
    assert (tmp_path / "grid.png").read_bytes() == first
    assert (tmp_path / "grid-of-00002.png").stat().st_size


def test_prompts_come_from_a_file_too(tmp_path):
    (tmp_path / "prompts.txt").write_text("﻿pizza\n\n  blue größe  \r\n", encoding="utf-8")
    flags = ("--prompt", "red heart", "--prompts-file", tmp_path / "prompts.txt", *ONE)
    assert run(*flags, *STEPS, "--out", tmp_path / "out") == 0
    names = ["00000-0-red-heart.png", "00001-1-pizza.png", "00002-2-blue-größe.png", "grid.png"]
    assert sorted(os.listdir(tmp_path / "out")) == names


def test_lora_is_merged_with_its_weight_and_recorded(tmp_path, tiny):
    adapters = {"unet": lora.init(jax.random.key(0), tiny.params["unet"], rank=2)}
    adapters["unet"] = lora.map_layers(lambda layer: layer | {"up": layer["up"] + 0.1}, adapters["unet"])
    save_lora(tmp_path / "my style.safetensors", adapters, tiny.params)
    flags = ("--lora", f"{tmp_path / 'my style.safetensors'}:0.5", "--lora", tmp_path / "my style.safetensors")
    assert run("--prompt", "red heart", *flags, *STEPS, "--out", tmp_path / "out") == 0
    (name,) = os.listdir(tmp_path / "out")
    expected = tiny.with_lora(adapters, 1.5).text2image("red heart", steps=2, guidance=3.0, progress=False)[0]
    plain = tiny.text2image("red heart", steps=2, guidance=3.0, progress=False)[0]
    drawn = pixels(tmp_path / "out" / name).astype(int)
    assert np.abs(drawn - np.asarray(expected).astype(int)).max() <= 1
    assert np.abs(drawn - np.asarray(plain).astype(int)).max() > 20
    assert recorded(tmp_path / "out" / name).startswith("red heart <lora:my style:0.5> <lora:my style:1>\nSteps: 2, ")
    axis = f"lora=none,{tmp_path / 'my style.safetensors'}:1.5"
    assert run("--prompt", "red heart", *flags, *STEPS, *ONE, "--grid-x", axis, "--out", tmp_path / "grid") == 0
    without, with_lora, _ = sorted((tmp_path / "grid").iterdir())
    for file, picture in ((without, plain), (with_lora, expected)):
        assert np.abs(pixels(file).astype(int) - np.asarray(picture).astype(int)).max() <= 1
    assert recorded(without).startswith("red heart\n")
    assert recorded(with_lora).startswith("red heart <lora:my style:1.5>\n")
    assert run("--prompt", "red heart", *flags, *STEPS, "--base-dtype", "int8", "--out", tmp_path / "int8") == 0
    (name,) = os.listdir(tmp_path / "int8")
    eight = sdjax.load("tiny", base_dtype="int8").with_lora(adapters, 1.5)
    expected = eight.text2image("red heart", steps=2, guidance=3.0, progress=False)[0]
    assert np.abs(pixels(tmp_path / "int8" / name).astype(int) - np.asarray(expected).astype(int)).max() <= 1
    assert 0.1 < np.abs(pixels(tmp_path / "int8" / name).astype(int) - drawn).mean() < 4


def test_loras_that_prompts_name_are_found_in_their_folder(tmp_path, tiny):
    """Each prompt is drawn with its own, and with its own weights of U-Net and text model."""
    parts = {part: lora.init(jax.random.key(0), tiny.params[part], rank=2) for part in ("unet", "text_encoder")}
    adapters = {
        part: lora.map_layers(lambda layer: layer | {"up": layer["up"] + 0.1}, tree) for part, tree in parts.items()
    }
    (tmp_path / "loras" / "styles").mkdir(parents=True)
    save_lora(tmp_path / "loras" / "styles" / "mine.safetensors", adapters, tiny.params)
    prompts = ["red <lora:mine:0.2:0.6>(heart)", "red (heart)", "red (heart)<lora:mine:0.5>"]
    flags = [flag for prompt in prompts for flag in ("--prompt", prompt)]
    out = tmp_path / "out"
    assert run(*flags, "--lora-dir", tmp_path / "loras", *STEPS, *ONE, "--out", out) == 0
    first = tiny.with_lora({"text_encoder": adapters["text_encoder"]}, 0.2).with_lora({"unet": adapters["unet"]}, 0.6)
    names = sorted(os.listdir(out))
    for i, (sd, prompt) in enumerate(zip([first, tiny, tiny.with_lora(adapters, 0.5)], prompts, strict=True)):
        assert names[i] == f"0000{i}-{i}-red-heart.png"
        expected = sd.text2image("red (heart)", steps=2, guidance=3.0, seed=i, progress=False)[0]
        assert np.abs(pixels(out / names[i]).astype(int) - np.asarray(expected).astype(int)).max() <= 1
        assert recorded(out / names[i]).startswith(f"{prompt}\nSteps: 2, ")


def test_an_image_is_redrawn_at_its_size_down_to_multiples_of_8(tmp_path):
    Image.new("RGBA", (67, 70), (255, 0, 0, 128)).save(tmp_path / "in.png")
    flags = ("--prompt", "red heart", "--image", tmp_path / "in.png", "--strength", 0.5, "--out", tmp_path / "out")
    assert run(*flags, *STEPS) == 0
    (name,) = os.listdir(tmp_path / "out")
    assert pixels(tmp_path / "out" / name).shape == (64, 64, 3)
    assert "Denoising strength: 0.5" in recorded(tmp_path / "out" / name)


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (["--width", "63"], 2, "--width = 63: expected at least 8 and at most 16384, a multiple of 8"),
        (["--height", "0"], 2, "--height = 0: expected at least 8 and at most 16384, a multiple of 8"),
        (["--steps", "0"], 2, "--steps = 0: expected at least 1 and at most 1000"),
        (["--steps", "many"], 2, "--steps = 'many': expected a whole number"),
        (["--guidance", "nan"], 2, "--guidance = nan: expected a number"),
        (["--guidance-rescale", "1.5"], 2, "--guidance-rescale = 1.5: expected at least 0 and at most 1"),
        (["--num-images", "0"], 2, "--num-images = 0: expected at least 1"),
        (["--seed", "-1"], 2, "--seed = -1: expected at least 0"),
        (["--clip-skip", "0"], 2, "--clip-skip = 0: expected at least 1"),
        (["--sampler", "eular"], 2, "--sampler = 'eular': expected one of ddim, ddpm, pndm"),
        (["--sampler", "ddim", "--karras"], 2, "sampler 'ddim' has no spacing 'karras'"),
        (["--sampler", "lcm", "--steps", "51"], 2, "steps 51 must be at most 50"),
        (["--clip-skip", "9"], 2, "clip_skip = 9: must lie in 1 (last layer)"),
        (["--lora", "TEXT"], 3, "text.png"),
        (["--prompt-syntax", "comfy"], 2, "--prompt-syntax = 'comfy': expected one of a1111, plain"),
        (["--emphasis", "strong"], 2, "--emphasis = 'strong': expected one of original, no_norm"),
        (["--prompt", "a <lora:mine:1>"], 2, "the prompt names the LoRA 'mine': give --lora-dir DIR"),
        (["--prompt", "<lora:mine:1>", "--lora-dir", "nowhere"], 3, "--lora-dir nowhere: no LoRA 'mine' in it"),
        (["--prompt", "<lora:mine:x>", "--lora-dir", "nowhere"], 2, "the weights of a LoRA must be numbers"),
        (["--dtype", "float64"], 2, "--dtype = 'float64': expected one of float32"),
        (["--base-dtype", "int4"], 2, "base_dtype = 'int4': expected one of"),
        (["--strength", "0.5"], 2, "--strength needs an --image to redraw"),
        (["--image", "IMAGE", "--strength", "0"], 2, "--strength = 0.0: expected above 0"),
        (["--image", "IMAGE", "--strength", "1.5"], 2, "--strength = 1.5: expected above 0"),
        (["--image", "IMAGE", "--strength", "0.01"], 2, "leaves none to run"),
        (["--image", "missing.png"], 3, "--image missing.png: no such file"),
        (["--image", "TEXT"], 3, "cannot be read as an image"),
        (["--lora", "missing.safetensors"], 3, "--lora missing.safetensors: no such file"),
        (["--lora", "missing.safetensors:0.5"], 3, "--lora missing.safetensors: no such file"),
        (["--lora", "TEXT:strong"], 2, "text.png = 'strong': expected a number"),
        (["--lora", "TEXT:inf"], 2, "text.png = inf: expected a number"),
        (["--prompts-file", "missing.txt"], 3, "--prompts-file missing.txt: No such file"),
        (["--prompts-file", "IMAGE"], 3, "not UTF-8 text"),
        (["--widht", "64"], 2, "--widht"),
        (["--width", "99999999999999999992"], 2, "--width = 99999999999999999992: expected at least 8 and at most"),
        (["--width", "9" * 5000], 2, "...: expected a whole number"),
        (["--prompt", "half \udc80"], 2, "prompt = 'half \\udc80': expected text in UTF-8"),
        (["--image", "IMAGE", "--outpaint", "0,0,0,999999999999"], 2, "outpaint makes a picture of 64x1000000000063"),
        (["--grid-x", "steps=2,3", "--grid-y", "steps=4"], 2, "--grid-x and --grid-y both vary steps"),
        (["--out", "TEXT/below"], 2, "cannot be written to"),
    ],
)
def test_bad_values_are_told_in_one_line_before_weights_load(flags, code, expected, tmp_path, capsys, no_weights):
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    (tmp_path / "text.png").write_text("not an image")
    stand_ins = {"IMAGE": str(tmp_path / "in.png"), "TEXT": str(tmp_path / "text.png")}
    for name, path in stand_ins.items():
        flags = [flag.replace(name, path) for flag in flags]
    assert run("--prompt", "red heart", "--out", tmp_path / "out", *flags) == code
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not captured.out


def test_no_prompt_is_told(tmp_path, capsys, no_weights):
    assert run("--out", tmp_path) == 2
    assert "give --prompt TEXT or --prompts-file FILE" in capsys.readouterr().err


def test_a_missing_model_is_told(tmp_path, capsys):
    assert run("--prompt", "red heart", "--out", tmp_path, model=str(tmp_path / "no" / "such" / "model")) == 3
    assert "no/such/model" in capsys.readouterr().err


def test_a_lora_that_does_not_fit_is_told(tmp_path, capsys, no_weights):
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert run("--prompt", "red heart", "--lora", tmp_path / "bad.safetensors", "--out", tmp_path) == 3
    assert "bad.safetensors: holds no tensors" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(sdjax.ConfigError):
        run("--prompt", "red heart", "--steps", "0", "--debug")


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("red heart", "red-heart"),
        ("../../etc/passwd", "etc-passwd"),
        ("a\\b:c*?<>|\"'\0\n", "a-b-c"),
        ("絵文字 🍕 größe", "絵文字-größe"),
        ("🍕", "picture"),
        ("", "picture"),
        ("x" * 5000, "x" * 80),
        ("絵" * 100, "絵" * 26),
    ],
)
def test_file_names_are_safe(prompt, name):
    assert numbered.safe_name(prompt) == name


def test_a_very_long_prompt_can_be_saved(tmp_path):
    assert run("--prompt", "größe 絵 / " * 20, *STEPS, "--out", tmp_path) == 0
    (name,) = os.listdir(tmp_path)
    assert len(name.encode()) <= 255
    assert recorded(tmp_path / name).startswith("größe 絵 / größe")


def test_the_help_lists_every_setting_once_and_related_ones_together(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    flags = re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.MULTILINE)
    assert len(set(flags)) == len(flags)
    settings = [f"--{name.replace('_', '-')}" for name in declarations()]
    assert set(settings) <= set(flags)
    assert flags[flags.index("--prompt") :][:6] == [
        "--prompt", "--prompts-file", "--num-images", "--negative-prompt", "--seed", "--variation-seed",
    ]  # fmt: skip
    groups = [[flag for flag in flags if flag.startswith(start)] for start in ("--variation", "--hires", "--grid")]
    for group in [*groups, ["--height", "--width"], ["--mask", "--outpaint", "--mask-blur", "--mask-grow"]]:
        first = flags.index(group[0])
        assert flags[first : first + len(group)] == group


def test_help_and_mistakes_do_not_wait_for_jax():
    code = """
import sys
from sdjax import generate
assert generate.main(["--model", "tiny", "--prompt", "x", "--steps", "0"]) == 2
slow = {"jax", "flax", "transformers"} & set(sys.modules)
assert not slow, slow
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_new_words_come_from_embedding_files(tmp_path, tiny):
    table = np.asarray(tiny.params["text_encoder"]["embeddings"]["token_embedding"]["embedding"])
    rows = {"text_encoder": table[np.array(tiny.model.outline.tokenizers["tokenizer"].words("red heart"))]}
    save_embedding(tmp_path / "word.safetensors", "<w>", rows)
    for flags, prompt in ((["word.safetensors"], "a <w>"), (["word.safetensors:Plana9"], "a plana9")):
        flags = [part for flag in flags for part in ("--embedding", tmp_path / flag)]
        out = tmp_path / prompt.split()[-1].strip("<>")
        assert run("--prompt", prompt, *flags, *STEPS, *ONE, "--seed", 7, "--out", out) == 0
        (file,) = out.iterdir()
        expected = tiny.text2image("a red heart", seed=7, steps=2, guidance=3.0, progress=False)[0]
        assert np.abs(pixels(file).astype(int) - np.asarray(expected)).max() <= 1
        assert recorded(file).startswith(prompt)


def test_embeddings_that_do_not_fit_are_refused_before_weights(tmp_path, no_weights, capsys):
    save_embedding(tmp_path / "wide.safetensors", "<w>", {"text_encoder": np.zeros((1, 768), np.float32)})
    save_embedding(tmp_path / "good.safetensors", "<w>", {"text_encoder": np.zeros((1, 128), np.float32)})
    good = tmp_path / "good.safetensors"
    for flags, code, fault in (
        ([tmp_path / "wide.safetensors"], 3, "made for Stable Diffusion 1"),
        ([tmp_path / "none.safetensors"], 3, "no such file"),
        ([f"{good}:heart"], 2, "'heart' is a word of the vocabulary already"),
        ([f"{good}:"], 2, "placeholder token ''"),
        ([good, good], 2, "'<w>' clashes"),
    ):
        flags = [part for flag in flags for part in ("--embedding", flag)]
        assert run("--prompt", "a", *flags, "--out", tmp_path / "out") == code
        assert fault in capsys.readouterr().err


def test_another_autoencoder_and_a_refiner(tmp_path, tiny, capsys):
    folder, drawn = Path(sdjax.__file__).parent / "tiny", []
    for out, flags in {
        "plain": (),
        "both": ("--vae", folder / "vae", "--refiner", "tiny", "--refiner-switch", "0.4"),
    }.items():
        assert run("--prompt", "pizza", *STEPS, *ONE, "--sampler", "ddim", *flags, "--out", tmp_path / out) == 0
        drawn += (tmp_path / out).iterdir()
    np.testing.assert_array_equal(pixels(drawn[0]), pixels(drawn[1]))
    with Image.open(drawn[1]) as picture:
        assert "Refiner: tiny, Refiner switch at: 0.4" in picture.info["parameters"]
    for flags, fault in [
        (("--refiner-switch", "1.5", "--refiner", "tiny"), "refiner switch = 1.5"),
        (("--refiner", tmp_path), "no model_index.json"),
        (("--vae", folder / "unet"), "is that of a UNet2DConditionModel"),
        (("--original-size", "64,64"), "original_size is a condition of SDXL, which tiny does not take"),
        (("--original-size", "64"), "--original-size = "),
    ]:
        assert run("--prompt", "a", *flags, "--out", tmp_path / "x") in (2, 3)
        assert fault in capsys.readouterr().err


def test_a_model_of_a_single_file(tmp_path, tiny, capsys):
    folder = Path(sdjax.__file__).parent / "tiny"
    model = str(tmp_path / "model.safetensors")
    tiny.save(model)
    for flags, fault in (((), "give its folder"), (("--prediction-type", "v"), "choices are epsilon")):
        assert run("--prompt", "a", *flags, "--out", tmp_path / "x", model=model) in (2, 3)
        assert fault in capsys.readouterr().err
    assert run("--prompt", "pizza", *STEPS, *ONE, "--tokenizer", folder, "--out", tmp_path / "out", model=model) == 0
    (file,) = (tmp_path / "out").iterdir()
    expected = tiny.text2image("pizza", seed=0, steps=2, guidance=3.0, progress=False)[0]
    np.testing.assert_array_equal(pixels(file), np.asarray(expected))


def test_masks_grids_and_jobs_of_a_file(tmp_path, capsys):
    picture = Image.new("RGB", (70, 64), "orange")
    picture.save(tmp_path / "in.png")
    mask = Image.new("L", (35, 32))
    mask.paste(255, (0, 16, 35, 32))
    mask.save(tmp_path / "mask.png")
    painting = ("--image", tmp_path / "in.png", "--mask", tmp_path / "mask.png", "--mask-blur", 2)
    flags = ("--prompt", "red heart", *painting, "--grid-x", "guidance=2,3,4", "--grid-y", "seed=1,2")
    assert run(*flags, "--steps", 2, "--out", tmp_path / "grid") == 0
    names = sorted(os.listdir(tmp_path / "grid"))
    assert len(names) == 7 and names[-1] == "grid.png"
    for i, name in enumerate(names[:-1]):
        drawn = pixels(tmp_path / "grid" / name)
        np.testing.assert_array_equal(drawn[:31], np.asarray(picture)[:31])
        text = recorded(tmp_path / "grid" / name)
        assert f"CFG scale: {2 + i % 3}" in text and f"Seed: {1 + i // 3}," in text and "Mask blur: 2" in text
    lines = [
        {"prompt": "red heart", "seed": 3, "steps": 2, "variation_strength": 0.2, "variation_seed": 4},
        {"prompt": "pizza", "seed": 9, "steps": 2},
        {"prompt": "red heart", "seed": 4, "steps": 2},
        {"prompt": "pizza", "lora": "none", "image": str(tmp_path / "in.png"), "outpaint": [0, 0, 10, 0], "steps": 2},
    ]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run("--jobs", tmp_path / "jobs.jsonl", "--out", tmp_path / "jobs") == 0
    names = sorted(os.listdir(tmp_path / "jobs"))
    assert names == ["00000-3-red-heart.png", "00001-9-pizza.png", "00002-4-red-heart.png", "00003-0-pizza.png"]
    assert "Variation seed: 4, Variation seed strength: 0.2" in recorded(tmp_path / "jobs" / names[0])
    wider = pixels(tmp_path / "jobs" / names[3])
    assert wider.shape == (64, 80, 3)
    np.testing.assert_array_equal(wider[:, :70], np.asarray(picture))


def test_finished_pictures_are_enlarged(tmp_path, tiny):
    flags = ("--prompt", "red heart", "--prompt", "pizza", "--upscale", "tiny", *ONE, *STEPS)
    assert run(*flags, "--out", tmp_path / "four") == 0
    names = ["00000-0-red-heart.png", "00001-1-pizza.png"]
    for i, name in enumerate(names):
        drawn = tiny.text2image(["red heart", "pizza"][i], seed=i, steps=2, guidance=3.0, progress=False)[0]
        np.testing.assert_array_equal(pixels(tmp_path / "four" / name), np.asarray(sdjax.upscale(drawn, "tiny")))
        assert ", Postprocess upscale by: 4, Postprocess upscaler: tiny" in recorded(tmp_path / "four" / name)
    assert pixels(tmp_path / "four" / "grid.png").shape == (256, 512, 3)
    lines = [{"prompt": "pizza", "seed": 1, "scale": 2.5}, {"prompt": "pizza", "hires_scale": 1.25}]
    (tmp_path / "jobs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ("--jobs", tmp_path / "jobs.jsonl", "--upscale", "tiny", "--hires-upscaler", "tiny", *ONE, *STEPS)
    assert run(*flags, "--out", tmp_path / "jobs") == 0
    first, second = (tmp_path / "jobs" / name for name in ("00000-1-pizza.png", "00001-0-pizza.png"))
    assert pixels(first).shape == (160, 160, 3) and pixels(second).shape == (320, 320, 3)
    assert "Postprocess upscale by: 2.5, Postprocess upscaler: tiny" in recorded(first)
    assert "Hires upscaler: tiny, Version: sdjax, Postprocess upscale by: 4" in recorded(second)


@pytest.mark.parametrize(
    ("flags", "code", "expected"),
    [
        (["--mask", "IN"], 2, "--mask and --outpaint need an --image"),
        (["--image", "IN", "--outpaint", "1,2"], 2, "--outpaint = [1, 2]: expected a list of 4"),
        (["--image", "IN", "--mask", "none.png"], 3, "--mask none.png: no such file"),
        (["--image", "IN", "--mask", "IN", "--fill", "magic"], 2, "--fill = 'magic': expected one of"),
        (["--grid-x", "colour=1,2"], 2, "give NAME=VALUE,VALUE with a name of prompt"),
        (["--grid-y", "steps=1,many"], 2, "steps = 'many': expected a whole number"),
        (["--hires-scale", "9"], 2, "--hires-scale = 9.0: expected at least 1 and at most 8"),
        (["--hires-scale", "2", "--hires-steps", "1"], 2, "strength 0.5 of 1 steps leaves none to run"),
        (["--hires-scale", "2", "--hires-upscaler", "magic"], 3, "upscaler 'magic': no such file; expected a file"),
        (["--upscale", "IN"], 3, "in.png: not a kind of weight file"),
        (["--upscale", "tiny", "--scale", "0"], 2, "--scale = 0.0: expected above 0 and at most 16"),
        (["--scale", "2"], 2, "scale is of an upscaler: give upscale too"),
        (["--hires-scale", "2", "--image", "IN"], 2, "--hires-scale cannot be used with an --image"),
        (["--variation-strength", "2"], 2, "--variation-strength = 2.0: expected at least 0 and at most 1"),
    ],
)
def test_bad_paintings_grids_and_jobs_are_told(flags, code, expected, tmp_path, capsys, no_weights):
    Image.new("RGB", (64, 64)).save(tmp_path / "in.png")
    flags = [str(tmp_path / "in.png") if flag == "IN" else flag for flag in flags]
    assert run("--prompt", "red heart", "--out", tmp_path, *flags) == code
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "code", "expected"),
    [
        ("{", 3, "not JSON"),
        ({"steps": 0}, 2, "steps = 0: expected at least 1 and at most 1000"),
        ({"clip_skip": 9}, 2, "clip_skip = 9: must lie in 1 (last layer)"),
        ({"prompt": "<lora:mine>"}, 2, "the prompt names the LoRA 'mine': give --lora-dir"),
        ({"lora": ["none.safetensors"]}, 3, "--lora none.safetensors: no such file"),
        ({"image": "none.png"}, 3, "--image none.png: no such file"),
    ],
)
def test_a_bad_line_of_jobs_is_told_before_weights(table, code, expected, tmp_path, capsys, no_weights):
    """By file and line, whatever is wrong with it."""
    line = json.dumps({"prompt": "a"} | table) if isinstance(table, dict) else table
    file = tmp_path / "jobs.jsonl"
    file.write_text('{"prompt": "a", "steps": 3}\n\n' + line + "\n")
    assert run("--jobs", file, "--out", tmp_path / "out") == code
    error = capsys.readouterr().err
    assert error.startswith(f"error: --jobs {file}, line 3: ") and error.count("\n") == 1
    assert expected in error


def test_a_file_of_jobs_must_be_readable_and_hold_one(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "gr\xf6\xdfe"}')
    for name, fault in (("none", "No such file"), ("empty", "holds no job"), ("latin", "not UTF-8 text")):
        assert run("--jobs", tmp_path / f"{name}.jsonl", "--out", tmp_path / "out") == 3
        error = capsys.readouterr().err
        assert error.startswith(f"error: --jobs {tmp_path / name}.jsonl: ") and fault in error


def test_a_size_far_from_the_models_is_mentioned(outline, caplog):
    wanted = [jobs.Job(complete_job({"prompt": "a", "width": 512, "height": 64}))]
    jobs.check(outline, wanted)
    assert "512x64 pixels are far from the 64 of tiny" in caplog.text
