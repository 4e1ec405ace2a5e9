"""Token ids of prompts: short ones as transformers gives them, long ones in chunks, and nothing cut unasked."""

import json
import shutil

import micro
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sdjax
from sdjax.errors import ConfigError, DataError
from sdjax.text.syntax import emphasis
from sdjax.text.tokenizer import Tokenizer

FOLDER = micro.TOKENIZER
WINDOW = 16
BEGIN, END = 0, 1


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_folder(FOLDER, window=WINDOW)


def with_pad(folder, token):
    """The tokenizer with another padding token: SD2 and SDXL's second encoder pad with `!`."""
    shutil.copytree(FOLDER, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": token}))
    return folder


def unwrapped(ids):
    """The ids of one prompt's chunks [n, T] without begin tokens, end tokens and padding."""
    words = []
    for chunk in ids:
        assert chunk[0] == BEGIN
        end = int(np.argmax(chunk == END))
        assert end > 0
        words += chunk[1:end].tolist()
    return words


@pytest.mark.parametrize("prompt", ["", "a red heart", "Water WAVE, 3 o'clock!", "雪だるま", "  joker\n\tcyclone "])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_short_prompts_are_what_transformers_gives(tmp_path, prompt, pad):
    from transformers import CLIPTokenizer

    folder = with_pad(tmp_path / "tokenizer", pad)
    theirs = CLIPTokenizer.from_pretrained(folder, model_max_length=WINDOW)
    expected = theirs([prompt], padding="max_length", max_length=WINDOW, truncation=True)["input_ids"]
    ids = Tokenizer.from_folder(folder, window=WINDOW).encode([prompt])
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids[:, 0], expected)


PIECES = st.text("aZ,.'<|é雪İΣ\u0301\u00a0\x1c\t\n!07", max_size=6) | st.sampled_from(["<|endoftext|>", "heart", ""])


@given(st.lists(PIECES, max_size=24).map(" ".join))
@settings(max_examples=200, deadline=None)
def test_chunks_are_counted_as_they_are_cut(tokenizer, prompt):
    """Word by word, which is how a million captions are counted."""
    assert tokenizer.chunks(prompt) == tokenizer.encode([prompt]).shape[1]


def test_padding_follows_the_tokenizers_own_token(tmp_path, tokenizer):
    other = Tokenizer.from_folder(with_pad(tmp_path / "tokenizer", "!"), window=WINDOW)
    exclamation = tokenizer.vocabulary.convert_tokens_to_ids("!")  # as a beginning of words; alone it is another
    assert (tokenizer.pad, other.pad) == (END, exclamation)
    first, second = tokenizer.encode(["taco"])[0, 0], other.encode(["taco"])[0, 0]
    count = len(tokenizer.words("taco")) + 2
    np.testing.assert_array_equal(first[:count], second[:count])
    assert (first[count:] == END).all()
    assert (second[count:] == exclamation).all()


@settings(deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["red", "heart,", "cyclone", "a", "!", "umbrellas"]), max_size=40),
        min_size=1,
        max_size=4,
    )
)
def test_nothing_is_cut(prompts):
    tokenizer = Tokenizer.from_folder(FOLDER, window=WINDOW)
    prompts = [" ".join(words) for words in prompts]
    ids = tokenizer.encode(prompts)
    longest = max(len(tokenizer.words(prompt)) for prompt in prompts)
    fewest = max(1, -(-longest // (WINDOW - 2)))
    assert ids.shape[::2] == (len(prompts), WINDOW) and fewest <= ids.shape[1] <= 2 * fewest
    if not any("," in prompt for prompt in prompts):
        assert ids.shape[1] == fewest
    assert ids.shape[1] == max(tokenizer.chunks(prompt) for prompt in prompts)
    for prompt, row in zip(prompts, ids, strict=True):
        assert unwrapped(row) == tokenizer.words(prompt)


@pytest.mark.parametrize(("words", "chunks"), [(0, 1), (1, 1), (14, 1), (15, 2), (28, 2), (29, 3)])
def test_chunks_hold_all_but_begin_and_end(tokenizer, words, chunks):
    prompt = " ".join(["a"] * words)
    assert len(tokenizer.words(prompt)) == words
    assert tokenizer.chunks(prompt) == chunks
    ids = tokenizer.encode([prompt])[0]
    assert (ids[:-1, -1] == END).all()  # every chunk but the last is full
    assert (ids[:, 0] == BEGIN).all()


def test_a_shorter_prompt_has_empty_chunks_beside_a_longer_one(tokenizer):
    ids = tokenizer.encode(["taco", "a " * 20])
    assert ids.shape == (2, 2, WINDOW)
    np.testing.assert_array_equal(ids[0, 0], tokenizer.encode(["taco"])[0, 0])
    np.testing.assert_array_equal(ids[0, 1], tokenizer.encode([""])[0, 0])


def test_the_number_of_chunks_can_be_given(tokenizer):
    words = tokenizer.words("a red heart " * 10)
    assert unwrapped(tokenizer.encode(["a red heart " * 10], chunks=2)[0]) == words[:28]
    assert unwrapped(tokenizer.encode(["a red heart " * 10], chunks=5)[0]) == words
    assert tokenizer.encode(["taco"], chunks=3).shape == (1, 3, WINDOW)
    assert tokenizer.encode([]).shape == (0, 1, WINDOW)


def test_another_window(tokenizer):
    """Stable Diffusion's window is 77. The text model says so, since tokenizer folders often leave it out."""
    wide = Tokenizer.from_folder(FOLDER, window=77)
    assert wide.chunks("a " * 75) == 1
    assert wide.chunks("a " * 76) == 2
    assert unwrapped(wide.encode(["a " * 76])[0]) == tokenizer.words("a " * 76)


def test_the_model_draws_with_every_chunk():
    """Two prompts that differ only after the first chunk give different contexts, of two chunks."""
    sd = sdjax.load("tiny")
    first, second = sd.encode_text(["a " * 14 + "heart", "a " * 14 + "taco"])
    assert first.shape == (2 * WINDOW, sd.model.outline.unet.config.cross_attention_dim[0])
    np.testing.assert_array_equal(first[:WINDOW], second[:WINDOW])
    assert np.abs(np.asarray(first[WINDOW:] - second[WINDOW:])).max() > 0.1
    np.testing.assert_allclose(sd.encode_text("a " * 14)[0], first[:WINDOW], atol=1e-5)


# Where a chunk ends.


def lengths(tokenizer, prompt):
    """The number of tokens in each chunk."""
    return [int(np.argmax(row == END)) - 1 for row in tokenizer.encode([prompt])[0]]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a " * 10 + ", " + "a " * 5, [11, 5]),
        ("a " * 10 + ", " + "a " * 3, [14]),  # nothing is divided
        (", " + "a " * 17, [1, 14, 3]),
        ("a " * 13 + ", a", [14, 1]),
        ("a " * 14 + ", " + "a " * 15, [14, 14, 2]),  # a comma that begins a chunk does not count
        ("a , " * 10, [14, 6]),
        ("a " * 10 + ", " + "a " * 3 + ", a", [14, 2]),
    ],
)
def test_the_text_after_a_chunks_last_comma_goes_to_the_next(tokenizer, prompt, expected):
    assert lengths(tokenizer, prompt) == expected
    assert unwrapped(tokenizer.encode([prompt])[0]) == tokenizer.words(prompt)


def test_a_comma_too_far_back_does_not_count():
    wide = Tokenizer.from_folder(FOLDER, window=77)
    assert lengths(wide, "a " * 55 + ", " + "a " * 20) == [56, 20]
    assert lengths(wide, "a " * 54 + ", " + "a " * 21) == [75, 1]


def test_breaks_and_weights(tokenizer):
    sections = emphasis("a (heart:1.5) BREAK BREAK " + "a " * 15 + "[taco] BREAK")
    assert tokenizer.chunks(sections) == 4
    ids, weights = tokenizer.encode_weighted([sections, "taco"])
    np.testing.assert_array_equal(ids[0], tokenizer.encode(["a heart", "", "a " * 14, "a taco"])[:, 0])
    assert weights.dtype == np.float32 and weights.shape == ids.shape
    heart = len(tokenizer.words("heart"))
    np.testing.assert_allclose(weights[0, 0], [1, 1] + [1.5] * heart + [1] * (WINDOW - heart - 2))
    assert (weights[0, 1:3] == 1).all() and (weights[1] == 1).all()
    assert weights[0, 3, 2] == np.float32(1 / 1.1)
    assert tokenizer.chunks(emphasis("")) == tokenizer.chunks(emphasis("BREAK")) == 1
    cut, _ = tokenizer.encode_weighted([sections], chunks=2)
    np.testing.assert_array_equal(cut[0], ids[0, :2])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such tokenizer folder"),
        ({}, "no CLIP vocabulary with begin and end tokens"),
        ({"tokenizer.json": '{"a":'}, "not a readable CLIP tokenizer"),
        ({"tokenizer.json": "{}"}, "not a readable CLIP tokenizer"),
    ],
)
def test_a_bad_folder_is_named(tmp_path, files, message):
    folder = tmp_path / "tokenizer"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.from_folder(folder, window=77)
    assert str(folder) in str(caught.value)


# New words.

FIRST = 2263  # number of rows of the table


def test_a_new_word_is_all_its_vectors_anywhere_in_a_prompt(tokenizer):
    extended = tokenizer.with_placeholders({"<w>": 2, "Cat2": 1}, first=FIRST)
    a, heart = tokenizer.words("a"), tokenizer.words("heart")
    assert extended.words("a <w> heart") == [*a, FIRST, FIRST + 1, *heart]
    assert extended.words("a<W>heart") == [*a, FIRST, FIRST + 1, *heart]
    assert extended.words("cat2, a cat2s") == [FIRST + 2, *tokenizer.words(", a cat2s")]
    assert tokenizer.words("<w>") and max(tokenizer.words("<w>")) < FIRST  # the first tokenizer has not changed
    later = extended.with_placeholders({"x1y": 3}, first=FIRST)
    assert later.words("x1y <w>") == [FIRST + 3, FIRST + 4, FIRST + 5, FIRST, FIRST + 1]
    assert later.new_words == {"<w>": 2, "Cat2": 1, "x1y": 3}


def test_a_new_word_never_straddles_two_chunks(tokenizer):
    extended = tokenizer.with_placeholders({"<w>": 4}, first=FIRST)
    ids = extended.encode(["a " * 12 + "<w> heart"])[0]
    assert len(ids) == 2 and ids[0].max() < FIRST
    assert ids[1, 1:5].tolist() == [FIRST, FIRST + 1, FIRST + 2, FIRST + 3]
    ids, weights = extended.encode_weighted([emphasis("a " * 9 + ", " + "a " * 4 + "(<w>:2)")])
    assert (ids[0] >= FIRST).sum(1).tolist() == [0, 4]
    assert lengths(extended, "a " * 9 + ", " + "a " * 4 + "<w>") == [10, 8]
    assert (weights[0, 1, 5:9] == 2).all() and weights[0].sum() == 2 * WINDOW + 4
    # Only a full chunk gives away the text after its comma, and that text may not fit beside the word either.
    assert lengths(extended, "a " * 9 + ", a a <w>") == [12, 4]
    assert lengths(extended, "a , " + "a " * 12 + "<w>") == [2, 12, 4]
    with pytest.raises(ConfigError, match="15 vectors"):
        tokenizer.with_placeholders({"<w>": 15}, first=FIRST).chunks("<w>")


@pytest.mark.parametrize("word", ["heart", "Heart", "<w>", "<W>", "<w>_1", "<|endoftext|>", "a b", "", " ", "cat"])
def test_taken_and_malformed_words_are_refused(tokenizer, word):
    known = tokenizer.with_placeholders({"<w>": 1, "cat_3": 1}, first=FIRST)
    with pytest.raises(ConfigError, match="placeholder token"):
        known.with_placeholders({word: 1}, first=FIRST)


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_new_words_are_kept_in_a_tokenizers_files(tmp_path, tokenizer, form):
    source = tmp_path / "source"
    shutil.copytree(FOLDER, source)
    if form == "vocab.json":
        model = json.loads((source / "tokenizer.json").read_text())["model"]
        (source / "vocab.json").write_text(json.dumps(model["vocab"]))
        lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
        (source / "tokenizer.json").unlink()
    extended = Tokenizer.from_folder(source, window=WINDOW)
    extended = extended.with_placeholders({"<w>": 3, "Plana9": 1, "雪1x": 2}, first=FIRST)
    assert extended.save(source, tmp_path / "saved") == FIRST
    again = Tokenizer.from_folder(tmp_path / "saved", window=WINDOW)
    assert again.placeholders == extended.placeholders and again.new_words == {}
    for prompt in ["a <w> heart", "plana9 <W>s, plana9s", "雪1x雪 雪1x <w>_1"]:
        np.testing.assert_array_equal(again.encode([prompt]), extended.encode([prompt]))
    if form == "vocab.json":
        assert json.loads((tmp_path / "saved" / "added_tokens.json").read_text())["<w>_2"] == FIRST + 2
    more = again.with_placeholders({"<x>": 1}, first=FIRST + 6)
    assert more.words("<x><w>") == [FIRST + 6, FIRST, FIRST + 1, FIRST + 2]
    assert more.save(tmp_path / "saved", tmp_path / "twice") == FIRST + 6
    twice = Tokenizer.from_folder(tmp_path / "twice", window=WINDOW)
    assert twice.words("<x><w>") == more.words("<x><w>")
    with pytest.raises(ConfigError, match="vocabulary already"):
        twice.with_placeholders({"<W>": 1}, first=FIRST)
