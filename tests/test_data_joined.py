"""Arrays in several files, read as one."""

import numpy as np
import pytest

from sdjax.data.joined import Stored, joined

WHOLE = np.arange(7 * 3 * 2).reshape(7, 3, 2)
ROWS, VIEWS = np.array([6, 0, 3, 3, 1]), np.array([2, 1, 0, 2, 1])


def stored(path, array):
    path.write_bytes(array.tobytes())
    return Stored(path, array.dtype, array.shape)


@pytest.fixture
def parts(tmp_path):
    pieces = [WHOLE[:2], WHOLE[2:2], WHOLE[2:6], WHOLE[6:]]
    return [stored(tmp_path / str(i), piece) for i, piece in enumerate(pieces)]


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
def test_the_parts_are_indexed_as_the_whole(parts, index):
    np.testing.assert_array_equal(joined(parts)[index], WHOLE[index])


def test_an_array_of_arrays(parts, tmp_path):
    array = joined(parts)
    assert (array.shape, array.dtype, len(array)) == (WHOLE.shape, WHOLE.dtype, 7)
    np.testing.assert_array_equal(np.asarray(array), WHOLE)
    alone = joined([stored(tmp_path / "alone", WHOLE)])
    assert isinstance(alone, np.memmap)
    np.testing.assert_array_equal(alone, WHOLE)
    for wrong in (np.array([7]), -8):
        with pytest.raises(IndexError):
            array[wrong]


def test_more_files_than_a_process_may_open(tmp_path):
    """A million images lie in thousands of entries."""
    resource = pytest.importorskip("resource")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    pieces = [stored(tmp_path / str(i), np.full((1, 4), i)) for i in range(300)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, most[1]))
    try:
        array = joined(pieces)
        kept = [array[row] for row in range(0, 300, 60)]
        np.testing.assert_array_equal(array[:, 0], np.arange(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, most)
    assert [row[0] for row in kept] == list(range(0, 300, 60))
