"""The recipe of the embedded model: subjects, captions, pictures, tokenizer, untrained folder and settings."""

import io
import json

import jax
import numpy as np
import pytest
import tiny_data
import tiny_sets
from PIL import Image, ImageDraw

from sdjax.data import records
from sdjax.model import Model
from sdjax.text.tokenizer import Tokenizer
from sdjax.train.config_file import parse_args

ALL = tiny_data.subjects()
TEXTS = [text for subject in ALL if subject.name not in tiny_data.WITHHELD for text in tiny_data.captions(subject)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_data.write_tokenizer(folder, TEXTS, merges=150)
    return folder


COUNTS = {"whole": 30, "one": 60, "recoloured": 20, "two": 20, "worn": 20}
"""Pictures of each kind."""


def emoji(colour: str) -> bytes:
    """A disc with a dark middle, 128 x 128 with transparency."""
    image = Image.new("RGBA", (128, 128))
    pen = ImageDraw.Draw(image)
    pen.ellipse([8, 20, 120, 108], colour)
    pen.ellipse([50, 50, 70, 70], "black")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_subjects_are_many_and_no_name_means_two_of_them():
    names = [name for subject in ALL for name in (subject.name, *subject.others)]
    assert len(ALL) - len(tiny_data.WITHHELD) >= 600
    assert len(set(names)) == len(names)
    assert len({subject.code for subject in ALL}) == len(ALL)
    assert all(name == " ".join(name.lower().split()) and name.isascii() for name in names)


def test_every_subject_has_as_many_captions_and_no_caption_two_subjects():
    assert {len(tiny_data.captions(subject)) for subject in ALL} == {tiny_data.CAPTIONS}
    sets = [set(tiny_data.captions(subject)) for subject in ALL]
    assert sum(map(len, sets)) == len(set().union(*sets))


@pytest.mark.parametrize(
    "phrase",
    ["an umbrella", "a unicorn", "the cherries", "an octopus", "a glass of milk", "the bow and arrow", "an ice"],
)
def test_articles(phrase):
    name = phrase.split(" ", 1)[1]
    assert set(tiny_data.captions(tiny_data.Subject("", name, ()))) == {name, phrase, f"{name} emoji"}


def test_withheld_names_are_subjects_whose_words_are_trained():
    names = {subject.name for subject in ALL}
    words = {word for text in TEXTS for word in text.split()}
    for name in tiny_data.WITHHELD:
        assert name in names and name not in " | ".join(TEXTS)
        assert set(name.split()) <= words


def test_families_are_held_out_together():
    assert tiny_data.family("1f469-1f3fd-200d-1f373") == tiny_data.family("1f9d1-200d-1f373") == "person-1f373"
    assert tiny_data.family("1f3c3-1f3fb-200d-2640-fe0f-200d-27a1-fe0f") == tiny_data.family("1f3c3")
    assert tiny_data.family("1f408-200d-2b1b") != tiny_data.family("1f408")
    codes = [f"1f3{a}{b}{tone}" for a in "01" for b in "0123456789abcdef" for tone in ("", "-1f3fb", "-1f3ff")]
    chosen = tiny_data.held_out(codes)
    assert len(chosen) == 3 * round(tiny_data.HELD_OUT * 32)
    assert all((code in chosen) == (tiny_data.family(code) in chosen) for code in codes)
    assert tiny_data.held_out(codes[::-1]) == chosen


@pytest.fixture(scope="module")
def drawn_sets(tmp_path_factory):
    """Folders of all sets: noto has all subjects, the others every 20th. A picture is a disc of some hue."""
    folder = tmp_path_factory.mktemp("sets")
    for word in (*(s.word for s in tiny_sets.SETS), *tiny_data.TAUGHT):
        (folder / word).mkdir()
        for i, subject in enumerate(ALL):
            if word == "noto" or i % 20 == 0:
                (folder / word / f"{subject.code}.png").write_bytes(emoji(f"hsl({i * 37 % 360}, 80%, 50%)"))
    return folder


@pytest.fixture(scope="module")
def written(drawn_sets, tmp_path_factory):
    """The data made from these sets, a few pictures of each kind, with the number of pictures of each folder."""
    folder = tmp_path_factory.mktemp("data")
    return folder, tiny_data.write_data(folder, drawn_sets, COUNTS, first=20)


def entries(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_all_pictures_can_be_read_by_the_trainer(written):
    folder, counts = written
    assert counts["pictures"] == sum(COUNTS.values())
    for name, count in counts.items():
        found = records.scan(folder / name, missing_caption="empty" if "-" in name else "fail")  # a character has none
        assert len(found) == count > 0
        with Image.open(found[0].file) as picture:
            assert picture.mode == "RGB" and picture.size == (64, 64)


def test_training_begins_with_emoji_that_fill_the_picture(written):
    folder, counts = written
    assert counts["first"] == 20
    for entry in entries(folder / "first"):
        assert entry["text"].endswith(f", {entry['set']}")
        other = np.asarray(Image.open(folder / "first" / entry["file_name"])).min(-1) < 240
        rows, columns = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
        assert abs(max(np.ptp(rows), np.ptp(columns)) - 0.95 * 64) <= 3
        assert abs(rows[0] - (63 - rows[-1])) <= 3 and abs(columns[0] - (63 - columns[-1])) <= 3


def test_the_autoencoder_is_tested_on_emoji_it_never_sees_in_any_set(written):
    folder, _ = written
    seen, unseen = ({e["file_name"].split("/")[1] for e in entries(folder / name)} for name in ("vae", "held_out"))
    assert not seen & unseen


def test_captions_name_the_style_or_leave_it_open_and_keep_what_is_withheld(written):
    lines = entries(written[0] / "pictures")
    named = [e for e in lines if e["text"].endswith(f", {e['set']}")]
    assert 0.4 < len(named) / len(lines) < 0.9
    assert all("," not in e["text"] for e in lines if e not in named)
    assert {e["set"] for e in lines} <= {s.word for s in tiny_sets.SETS}  # and none of those that are taught
    assert not any(name in e["text"] for e in lines for name in tiny_data.WITHHELD)
    assert all(len(e["text"].split()) <= tiny_data.LONGEST for e in lines)
    assert not any(e["set"] == "glyph" and "heart" in e["text"] and "red" in e["text"] for e in lines)


def test_the_measures_find_the_subjects_in_each_set(written):
    folder, counts = written
    true = entries(folder / "true")
    assert {e["name"] for e in true if e["set"] == "noto"} == {subject.name for subject in ALL}
    assert {e["set"] for e in entries(folder / "taught")} == set(tiny_data.TAUGHT)
    assert all(counts[f"{kind}/green-fox-crown"] == 6 for kind in ("characters", "poses"))


def test_pictures_and_captions_are_the_same_each_time(drawn_sets):
    def paint() -> list[tuple[bytes, dict[str, str]]]:
        painter = tiny_data.Painter(tiny_data.read_sets(drawn_sets), ALL, np.random.default_rng(1))
        return [(picture.image.tobytes(), picture.fields) for picture in painter.pictures(COUNTS)]

    assert paint() == paint()


@pytest.mark.parametrize("content", ["nothing", "some"])
def test_a_folder_without_the_sets_is_one_line(tmp_path, capsys, content):
    sets = tmp_path / "sets"
    if content == "some":
        for word in ("noto", "twemoji"):
            (sets / word).mkdir(parents=True)
            (sets / word / "1f600.png").write_bytes(emoji("red"))
    assert tiny_data.main(["data", str(tmp_path / "data"), "--sets", str(sets)]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(sets) in error


def test_byte_pairs_merge_the_most_frequent_first():
    vocabulary, merges = tiny_data.train_tokenizer(["aab aab ab", "xb"], merges=3)
    assert merges[0] == ("a", "b</w>") and merges[1] == ("a", "ab</w>")
    assert len(vocabulary) == 512 + 3 + 2 and vocabulary["<|endoftext|>"] == 516
    assert vocabulary["!"] == 0 and vocabulary["!</w>"] == 256
    assert tiny_data.train_tokenizer(["aab aab ab", "xb"])[1][:3] == merges  # the merges end when all words are whole


def test_clip_reads_the_tokenizer_as_we_do(tokenizer_folder):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(tokenizer_folder)
    ours = Tokenizer.from_folder(tokenizer_folder, window=tiny_data.WINDOW)
    size = 512 + 150 + 2
    assert (len(theirs), ours.begin, ours.end, ours.pad) == (size, size - 2, size - 1, size - 1)
    assert theirs.model_max_length == tiny_data.WINDOW
    for text in [*TEXTS[::40], "", "Red  HEART", "santa claus's t-rex, 3 of them!", "éü 火"]:
        ids = theirs(text, padding="max_length", truncation=True)["input_ids"]
        assert ids == ours.encode([text], chunks=1)[0, 0].tolist()
        assert theirs.decode(ours.words(text)).replace(" ", "") == text.lower().replace(" ", "")
    merges = [tuple(line.split()) for line in (tokenizer_folder / "merges.txt").read_text("utf-8").splitlines()[1:]]
    assert merges == tiny_data.train_tokenizer(TEXTS, merges=150)[1]


def test_the_first_model_knows_what_the_model_before_knew(tmp_path):
    texts = ["red heart", "a cat", "red heart, glyph"]
    counts = tiny_data.write_model(tmp_path / "model", texts, before="tiny", vae="tiny")
    ours, before = Model.load(tmp_path / "model"), Model.load("tiny")
    for part in ("unet", "vae"):
        assert jax.tree.all(jax.tree.map(np.array_equal, ours.params[part], before.params[part]))
    assert ours.outline.schedule.config == before.outline.schedule.config
    context, known = ours.encode_text("red heart"), before.encode_text("red heart")
    assert context.shape[1] == tiny_data.WINDOW
    np.testing.assert_allclose(context[:, :3], known[:, :3], atol=1e-5)  # the beginning, red, heart
    rows, positions = (
        ours.params["text_encoder"]["embeddings"][f"{kind}_embedding"]["embedding"] for kind in ("token", "position")
    )
    new = ours.outline.tokenizers["tokenizer"].words("glyph")
    assert len(new) == 1
    assert 0.015 < np.std(rows[np.array(new)]) < 0.025
    assert np.array_equal(positions[-1], positions[-2])
    # The real vocabulary is larger than that of these captions. Weights are float16; the tokenizer is below 100 kB.
    missing = 512 + tiny_data.MERGES + 2 - len(rows)
    assert 2 * (sum(counts.values()) + missing * rows.shape[1]) + 100_000 < 24_000_000


@pytest.mark.parametrize("name", ["tiny_vae", "tiny_model"])
def test_settings_are_read(name):
    arguments = parse_args([f"configs/{name}.toml"])
    trained = {stage.name: stage.train for stage in arguments.config.stages}
    whole = ("unet", "text_encoder")
    assert trained == ({"vae": ("vae",)} if name == "tiny_vae" else {"words": whole, "model": whole})
    assert arguments.config.data.resolution == 64
    assert not set(tiny_data.WITHHELD) - set(arguments.config.validation.prompts) or name == "tiny_vae"
