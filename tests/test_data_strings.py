"""Many texts in one block of bytes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sdjax.data.strings import Strings

TEXTS = st.lists(st.text(max_size=8) | st.just("na\udce9ve"), max_size=12)  # a file's name may be any bytes


@given(TEXTS)
def test_the_texts_come_back(texts):
    strings = Strings.of(iter(texts))
    assert list(strings) == texts
    assert list(Strings.from_arrays(*strings.arrays())) == texts
    assert list(strings[::-2]) == texts[::-2]
    rows = np.arange(len(texts))[1:]
    assert list(strings[rows]) == texts[1:]
    assert strings[rows].block is strings.block


@given(TEXTS)
def test_empty_ones_are_filled(texts):
    assert list(Strings.of(texts).filled("ä")) == [text or "ä" for text in texts]


def test_a_million_take_little_memory():
    strings = Strings.of(f"picture {i}" for i in range(100_000))
    assert len(strings.block) + strings.starts.nbytes + strings.ends.nbytes < 32 * len(strings)
