"""`sdjax upscale`: pictures, and mistakes told in one line before the first picture is enlarged."""

import numpy as np
import pytest
from PIL import Image
from upscalers import save_compact

import sdjax
from sdjax import __main__, enlarge


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    # The command's own per-user cache is not the tests' to fill.
    monkeypatch.setattr("sdjax.runtime.compilation_cache.enable", lambda: None)


@pytest.fixture
def folder(tmp_path):
    """Two pictures and a random upscaler."""
    random = np.random.default_rng(0)
    for name, mode in (("a.png", "RGBA"), ("b.webp", "RGB")):
        values = random.integers(256, size=(12, 16, len(mode))).astype(np.uint8)
        Image.fromarray(values).save(tmp_path / name, lossless=True)
    save_compact(tmp_path / "m.safetensors", scale=2)
    return tmp_path


def test_files_are_enlarged(folder, capsys):
    files = [str(folder / name) for name in ("a.png", "b.webp")]
    flags = ["--model", str(folder / "m.safetensors"), "--scale", "3", "--out", str(folder / "out")]
    assert __main__.main(["upscale", *files, *flags]) == 0
    targets = [folder / "out" / "a.png", folder / "out" / "b.png"]
    assert capsys.readouterr().out.splitlines() == [str(target) for target in targets]
    for file, target in zip(files, targets, strict=True):
        with Image.open(file) as small, Image.open(target) as large:
            assert large.size == (48, 36) and large.mode == small.mode
            np.testing.assert_array_equal(large, sdjax.upscale(small, folder / "m.safetensors", 3))


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["a.png"], 2, "--model"),
        (["a.png", "--model", "none.pth"], 3, "upscaler 'none.pth': no such file"),
        (["a.png", "--model", "a.png"], 3, "a.png: not a kind of weight file"),
        (["a.png", "none.png", "--model", "m.safetensors"], 3, "none.png: cannot be read"),
        (["a.png", "m.safetensors", "--model", "m.safetensors"], 3, "m.safetensors: cannot be read as an image"),
        (["a.png", "--model", "m.safetensors", "--scale", "0"], 2, "scale = 0.0: expected above 0"),
        (["a.png", "--model", "m.safetensors", "--scale", "x"], 2, "--scale: invalid float value: 'x'"),
        (["a.png", "--model", "m.safetensors", "--out", "."], 2, "a.png: is there already"),
        (["a.png", "a.png", "--model", "m.safetensors"], 2, "would be written twice"),
        (["a.png", "--model", "m.safetensors", "--out", "b.webp"], 3, "b.webp"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(flags, code, message, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    assert enlarge.main(flags) == code
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.webp", "m.safetensors"]
