"""The commands, flags, settings and files that README.md and docs/ name exist, and the examples they show run."""

import pydoc
import re
import shlex
import tomllib
from pathlib import Path

import micro
import pytest

from sdjax import __main__, generate
from sdjax.train import config, config_file
from sdjax.train.loop import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    yield from micro.quick_compilation()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def assert_settings_exist(names: list[str]) -> None:
    run = config.RunConfig("MODEL", "OUTPUT", config.Data("FOLDER"), (config.Stage("NAME", ("lora",), 1, 1e-4),))
    for name in names:
        record = run
        for part in name.replace("stages.N", "stages.0").split("."):
            record = record[int(part)] if part.isdigit() else getattr(record, part)


def flags_of_generate(capsys) -> set[str]:
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    return set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_the_second_paragraph_holds_two_commands():
    paragraph = [p for p in README.split("\n\n") if not p.startswith("#")][1]
    commands = [text for text in re.findall(r"`([^`]+)`", paragraph) if " " in text]
    assert commands == [
        "pip install . && python -m sdjax.train configs/quickstart.toml",
        'pip install -e ".[test,parity]" && python -m pytest',
    ]


@pytest.mark.parametrize("name", ["../README.md", *DOCS])
def test_links_and_pictures_exist(name):
    page = ROOT / "docs" / name
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_files_named_exist():
    named = set(re.findall(r"`((?:sdjax|configs|tests|docs|\.ci)/[\w./]*)`", README + DOCS["architecture.md"]))
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_what_the_architecture_page_names_exists():
    names = re.findall(r"`([a-z_]+(?:\.\w+)+)`", DOCS["architecture.md"])
    names = [name for name in names if not name.startswith("sdjax.") and not name.endswith(".py")]
    assert len(names) > 15
    for name in names:
        assert pydoc.locate(f"sdjax.{name}") is not None, name


@pytest.mark.parametrize("text", blocks("toml"))
def test_configurations_are_valid(text):
    config_file.from_table(tomllib.loads(text))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_recipes_are_valid_and_open_with_their_command(path):
    config_file.load(path)
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"python -m sdjax.train configs/{path.name}" in head


def test_settings_in_the_tables_exist():
    rows = [line.split("|")[1] for line in DOCS["settings.md"].splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(names) > 50
    assert_settings_exist(names)


def test_flags_of_drawing_exist(capsys):
    flags = re.findall(r"`(--[\w-]+)", DOCS["drawing.md"].split("## Files")[0])
    assert len(flags) > 10 and set(flags) <= flags_of_generate(capsys)


def test_the_settings_and_flags_for_other_programs_flags_exist(capsys):
    training, drawing = DOCS["coming_from.md"].split("## A1111")
    rows = [line.split("|")[2] for line in training.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(names) > 70
    assert_settings_exist(names)
    flags = re.findall(r"`(--[\w-]+)`", drawing)
    assert len(flags) > 25 and set(flags) <= flags_of_generate(capsys)


def test_the_command_draws(tmp_path, monkeypatch):
    (line,) = (line for line in README.splitlines() if line.startswith("sdjax generate"))
    monkeypatch.chdir(tmp_path)
    assert generate.main([*shlex.split(line)[2:], "--steps", "2"]) == 0
    assert len(list(tmp_path.glob("outputs/*-*.png"))) == 2 and (tmp_path / "outputs/grid.png").exists()


def test_the_python_example_runs(tmp_path, monkeypatch):
    (example,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png", "2.png"]


def test_the_library_page_runs(tmp_path, monkeypatch):
    micro.make_images(tmp_path / "pictures", 3)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in blocks("python", DOCS["library.md"]):
        exec(compile(example, "library.md", "exec"), names)
    assert names["restored"].shape == (2, 64, 64, 3) and (tmp_path / "runs/mine/export/style/lora.safetensors").exists()


def test_the_guides_commands_run(tmp_path, monkeypatch, stand_in):
    """In their order, because later commands use the files of earlier ones. Two steps of training, two of drawing."""
    few = ["--stages.0.steps", "2", "--stages.0.warmup-steps", "0", "--validation.prompts", "[]"]
    for name in ("configs", "sdjax"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    pictures = re.findall(r"\(guide/(\w+)\.png\)", DOCS["guide.md"])
    for command in "".join(blocks("sh", DOCS["guide.md"])).splitlines():
        words = shlex.split(command)
        if words[0] == "sdjax":
            assert words[-2:] == ["--out", f"outputs/{pictures.pop(0)}"]
            steps = [] if "steps" in command else ["--steps", "2"]
            assert generate.main([*words[2:], *steps]) == 0
            assert Path(words[-1], "grid.png").exists()
        else:
            assert words[:3] == ["python", "-m", "sdjax.train"]
            arguments = config_file.parse_args([*words[3:], *few])
            assert train(arguments.config) == 0
    assert not pictures


def test_the_version_is_in_the_changelog(capsys):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{version}\n"
