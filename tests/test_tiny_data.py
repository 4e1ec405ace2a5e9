"""The recipe of the embedded model: subjects, captions, pictures, tokenizer, untrained folder and settings."""

import io
import json
import tarfile

import numpy as np
import pytest
import tiny_data
from PIL import Image

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


def png(colour: str = "red") -> bytes:
    image = Image.new("RGBA", (64, 64))
    image.paste(colour, (16, 16, 48, 48))
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


def test_data_from_an_archive(tmp_path):
    package = tmp_path / "package.tgz"
    codes = [*(subject.code for subject in ALL), "1f1e6-1f1e8"]
    with tarfile.open(package, "w:gz") as archive:
        for code in codes:
            member = tarfile.TarInfo(f"package/img/google/64/{code}.png")
            member.size = len(png())
            archive.addfile(member, io.BytesIO(png()))
    counts = tiny_data.write_data(tmp_path / "data", package)
    assert counts["pictures"] == len(TEXTS) and counts["withheld"] == len(tiny_data.WITHHELD)
    assert counts["vae"] + counts["held_out"] == len(codes)
    pictures = records.scan(tmp_path / "data/pictures")
    assert sorted(record.caption for record in pictures) == sorted(TEXTS)
    assert not {r.name for r in records.scan(tmp_path / "data/vae")} & {
        r.name for r in records.scan(tmp_path / "data/held_out")
    }
    picture = Image.open(pictures[0].file)
    assert picture.mode == "RGB" and picture.size == (64, 64)
    assert picture.getpixel((0, 0)) == (255, 255, 255) and picture.getpixel((32, 32)) == (255, 0, 0)
    names = [json.loads(line)["name"] for line in (tmp_path / "data/pictures/metadata.jsonl").read_text().splitlines()]
    assert set(names) == {subject.name for subject in ALL} - set(tiny_data.WITHHELD)


@pytest.mark.parametrize("content", ["nothing", "folder", "some"])
def test_a_package_of_another_kind_is_one_line(tmp_path, capsys, content):
    package = tmp_path / "package"
    if content != "nothing":
        package.mkdir()
    if content == "some":
        (package / "img/google/64").mkdir(parents=True)
        (package / "img/google/64/1f600.png").write_bytes(png())
    assert tiny_data.main(["data", str(tmp_path / "data"), "--noto", str(package)]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and str(package) in error


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


def test_untrained_model_loads_and_its_branches_start_at_zero(tmp_path):
    counts = tiny_data.write_model(tmp_path / "model", ["red heart", "a cat"], seed=1)
    model = Model.load(tmp_path / "model")
    unet, vae, text = model.params["unet"], model.params["vae"], model.params["text_encoder"]
    for ends in (
        unet["conv_out"],
        unet["mid_block"]["resnets_0"]["conv2"],
        unet["mid_block"]["attentions_0"]["proj_out"],
        vae["decoder"]["mid_block"]["attentions_0"]["to_out_0"],
        vae["encoder"]["down_blocks_0"]["resnets_0"]["conv2"],
        text["encoder"]["layers_0"]["mlp"]["fc2"],
    ):
        assert not np.any(np.asarray(ends["kernel"]))
    kernel = np.asarray(unet["mid_block"]["resnets_0"]["conv1"]["kernel"])
    assert np.std(kernel) * np.sqrt(9 * 128) == pytest.approx(1, abs=0.02)
    assert model.outline.schedule.prediction_type == "v_prediction"
    # The real vocabulary is larger than that of these two captions. Weights are float16; the tokenizer is below 100 kB.
    whole = 2 * (
        sum(counts.values())
        + (512 + tiny_data.MERGES + 2 - model.outline.text_models["text_encoder"].config.vocab_size) * 128
    )
    assert whole + 100_000 < 12_000_000


@pytest.mark.parametrize("name", ["tiny_vae", "tiny_model"])
def test_settings_are_read(name):
    arguments = parse_args([f"configs/{name}.toml"])
    (stage,) = arguments.config.stages
    assert stage.train == (("vae",) if name == "tiny_vae" else ("unet", "text_encoder"))
    assert arguments.config.data.resolution == 64
    assert not set(tiny_data.WITHHELD) - set(arguments.config.validation.prompts) or name == "tiny_vae"
