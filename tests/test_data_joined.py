"""Arrays in several files, read as one."""

import numpy as np
import pytest

from sdjax.data.joined import joined

WHOLE = np.arange(7 * 3 * 2).reshape(7, 3, 2)
PARTS = [WHOLE[:2], WHOLE[2:2], WHOLE[2:6], WHOLE[6:]]
ROWS, VIEWS = np.array([6, 0, 3, 3, 1]), np.array([2, 1, 0, 2, 1])


@pytest.mark.parametrize(
    "index",
    [
        (ROWS, VIEWS),
        ROWS,
        (ROWS, 1),
        (slice(None), 0),
        slice(1, 6, 2),
        slice(None, None, -3),
        5,
        np.int64(2),
        (3, 1, ..., 0),
        (-1, 0),
        np.array([], np.int64),
        (np.array([], np.int64), 1),
    ],
    ids=str,
)
def test_the_parts_are_indexed_as_the_whole(index):
    np.testing.assert_array_equal(joined(PARTS)[index], WHOLE[index])


def test_an_array_of_arrays():
    array = joined(PARTS)
    assert (array.shape, array.dtype, len(array)) == (WHOLE.shape, WHOLE.dtype, 7)
    np.testing.assert_array_equal(np.asarray(array), WHOLE)
    assert joined([WHOLE]) is WHOLE
    with pytest.raises(IndexError):
        array[np.array([7])]
