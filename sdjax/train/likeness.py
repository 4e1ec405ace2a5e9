"""Compares drawn pictures with those of a data set: how they are framed, and how near they are to the true ones."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from sdjax.data.images import find_subject, framed_on_subject

_SIDE, _CELL = 64, 4
"""Pictures are compared at _SIDE x _SIDE pixels, by means over _CELL x _CELL pixels."""


def distance(drawn: Sequence[Image.Image], true: Sequence[Image.Image]) -> float:
    """Returns the mean distance of drawn pictures from the true ones. 0: they are alike.

    Their `features` are compared, so place and size of a subject do not count, and a shape that falls apart does. The
    distance is the root of the mean squared difference.
    """
    apart = np.stack([features(a) - features(b) for a, b in zip(drawn, true, strict=True)])
    return float(np.sqrt(np.mean(np.square(apart), axis=1)).mean())


def features(picture: Image.Image) -> Float[np.ndarray, " F"]:
    """Returns what is compared of a picture, after it is framed on its subject.

    These are the means of red, green and blue over 4 x 4 of 64 x 64 pixels, and twice the means of the absolute
    horizontal and vertical differences of grey, all for values in [0, 1].
    """
    framed = framed_on_subject(picture).resize((_SIDE, _SIDE), Image.Resampling.BOX)
    colours = np.asarray(framed, np.float64) / 255
    grey = np.pad(colours @ np.array([0.299, 0.587, 0.114]), ((0, 1), (0, 1)), mode="edge")
    edges = np.abs(np.stack([np.diff(grey, axis=1)[:-1], np.diff(grey, axis=0)[:, :-1]], axis=-1))
    cells = np.concatenate([colours, 2 * edges], axis=-1).reshape(_SIDE // _CELL, _CELL, _SIDE // _CELL, _CELL, -1)
    return cells.mean((1, 3)).ravel()


def framing_advice(given: Sequence[Image.Image], drawn: Sequence[Image.Image]) -> str | None:
    """Returns what is worth saying if subjects are smaller in the given pictures than in those that a model draws.

    Returns None if their sizes are within a fifth, or most pictures have no plain background.
    """
    theirs, ours = _subject_share(given), _subject_share(drawn)
    if theirs is None or ours is None or theirs > 0.8 * ours:
        return None
    return (
        f"subjects fill {theirs:.0%} of the sides of these images, and {ours:.0%} of what the model draws: it has to "
        "learn the framing too; data.crop = 'subject' gives it the size it knows"
    )


def _subject_share(pictures: Sequence[Image.Image]) -> float | None:
    """Returns the median share of a picture's longer side that its subject fills."""
    found = [(find_subject(picture), max(picture.size)) for picture in pictures]
    shares = [subject.length / side for subject, side in found if subject is not None]
    return float(np.median(shares)) if shares and 2 * len(shares) > len(pictures) else None
