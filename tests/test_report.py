"""`sdjax report`: what the page of a run shows, that it loads nothing, and that texts of the run stay texts."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from sdjax import report
from sdjax.train import curves
from sdjax.train.config_file import from_table, to_toml

EVIL = "<script>alert('x')</script> & \"cat\""


@pytest.fixture
def run(tmp_path):
    """The folder of a run of two stages that stopped in the second, with texts that look like HTML."""
    folder = tmp_path / "red & blue"
    config = from_table(
        {
            "model": EVIL,
            "output": str(folder),
            "data": {"path": "pictures"},
            "stages": [
                {"name": "style", "train": "lora", "steps": 40, "learning_rate": 1e-3, "lora_rank": 3},
                {
                    **{"name": "cat", "train": "textual_inversion", "steps": 20, "learning_rate": 1e-2},
                    **{"placeholder_tokens": "<cat>", "init_tokens": EVIL},
                },
            ],
            "validation": {"prompts": [EVIL]},
        }
    )
    (folder / "samples").mkdir(parents=True)
    (folder / "export" / "style").mkdir(parents=True)
    (folder / "export" / "style" / "lora.safetensors").write_bytes(bytes(250_000))
    (folder / "config.toml").write_text(to_toml(config))
    held_out = [{"stage": "style", "step": step, "held_out_loss": 0.8 - step / 100} for step in (0, 20, 40)]
    steps = [{"stage": "style", "step": step, "loss": 1 / step, "examples_per_second": 8} for step in range(1, 41)]
    begun = [{"stage": "cat", "step": step, "loss": 0.5} for step in range(1, 8)]
    lines = [json.dumps(line) for line in [*steps, *held_out, *begun]]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"stage": "cat", "st']))
    for step, colour in ((0, "red"), (20, "green"), (40, "blue")):
        Image.new("RGB", (40, 20), colour).save(folder / "samples" / f"style-{step}.png")
    Image.new("RGB", (3000, 20), "red").save(folder / "samples" / "style-before-after.png")
    return folder


class Tags(HTMLParser):
    """The tags of a page, each with its attributes, and what is open at the end."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(run, capsys) -> str:
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    return (run / "report.html").read_text("utf-8")


def test_texts_of_the_run_are_escaped_and_every_tag_is_closed(run, capsys):
    text = page(run, capsys)
    found = Tags(text)
    assert found.open == [] and "script" not in {tag for tag, _ in found.tags}
    assert "&lt;script&gt;" in text and "<h1>red &amp; blue</h1>" in text


def test_the_page_loads_nothing(run, capsys):
    found = Tags(page(run, capsys))
    named = [
        attrs[name] for _, attrs in found.tags for name in ("src", "href", "srcset", "xlink:href") if name in attrs
    ]
    assert len(named) == 4 and all(name.startswith("data:image/") for name in named)  # three sheets, before and after
    assert not any("@import" in part or "url(" in part for part in report_style(found))


def report_style(found: Tags) -> list[str]:
    from sdjax.train.report import _STYLE, CURVES

    return [_STYLE, CURVES, *(attrs["style"] for _, attrs in found.tags if "style" in attrs)]


def test_the_page_shows_curves_numbers_files_and_settings(run, capsys):
    text = page(run, capsys)
    assert text.count("<svg") == 2
    assert "47 of 60" in text and "7 of 20" in text  # the line that is cut off does not count
    assert "0.4000 at step 40" in text and "0.2 MB" in text
    assert re.findall(r"<figcaption>(.*?)</figcaption>", text) == ["step 0", "step 20", "step 40"]
    assert "<th>lora_rank</th><td>3</td>" in text and "<th>lora_dropout</th>" not in text


def test_large_pictures_are_made_smaller(run, capsys):
    assert "data:image/webp" in page(run, capsys)
    assert len(page(run, capsys)) < 60_000


def test_a_run_without_a_step_has_a_report(run, capsys):
    (run / "metrics.jsonl").unlink()
    (run / "samples" / "style-0.png").write_bytes(b"no picture")
    text = page(run, capsys)
    assert "No step has been taken yet." in text and "style-0.png cannot be read" in text
    assert Tags(text).open == []


def test_a_folder_that_is_no_run_gives_one_error(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 3
    assert capsys.readouterr().err == f"error: {tmp_path}: not the folder of a run, which holds config.toml\n"
    assert report.main([]) == 2


def test_curves_of_many_steps_keep_their_ends_and_few_points():
    losses = [{"stage": "style", "step": step, "loss": 1.0 + step} for step in range(1, 100_001)]
    drawn = curves.svg("style", curves.stage_curves(losses, "style"))
    assert len(drawn) < 60_000
    first = re.findall(r'points="([^"]*)"', drawn)[0].split()
    assert len(first) == 1000 and first[0].startswith("64.0,") and first[-1].startswith("708.0,")
