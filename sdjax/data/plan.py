"""Which examples make up batch number n: a pure function of the seed, with no state to save.

The examples form one endless stream: all of them in a shuffled order, then all again in another, and so on. Batch n
is positions n*B .. n*B+B-1 of it. So a batch may span two epochs, none is short, every image is seen equally often
(to within one), and a data set smaller than a batch simply repeats inside it. Devices and workers play no part.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt64


class Plan(NamedTuple):
    """What the order depends on."""

    size: int
    """Examples in the data set."""
    batch_size: int
    """Examples a batch, over all devices."""
    seed: int
    """0 or more."""
    flip: bool = False
    caption_dropout: float = 0.0


class Choice(NamedTuple):
    """The examples of one batch."""

    example: Int64[np.ndarray, " B"]
    flip: Bool[np.ndarray, " B"]
    """Show it mirrored."""
    drop: Bool[np.ndarray, " B"]
    """Show it with the empty caption."""


def choose(plan: Plan, number: int) -> Choice:
    """The examples of batch `number` (0 is the first)."""
    position = np.arange(plan.batch_size) + number * plan.batch_size
    epoch, place = position // plan.size, position % plan.size
    example = np.empty(plan.batch_size, np.int64)
    flip = np.zeros(plan.batch_size, bool)
    drop = np.zeros(plan.batch_size, bool)
    for e in np.unique(epoch):
        here = epoch == e
        at = place[here]
        example[here] = np.argsort(_bits(plan.seed, int(e), 0, plan.size), kind="stable")[at]
        if plan.flip:
            flip[here] = _bits(plan.seed, int(e), 1, plan.size)[at] >= 2**63
        if plan.caption_dropout:
            drop[here] = _bits(plan.seed, int(e), 2, plan.size)[at] < plan.caption_dropout * 2.0**64
    return Choice(example, flip, drop)


def describe(plan: Plan, batches: int) -> str:
    """What a run over `batches` batches will see, for the log."""
    text = f"{plan.size} images, {plan.batch_size} a batch: {batches * plan.batch_size / plan.size:.4g} epochs"
    if plan.size < plan.batch_size:
        text += "; fewer images than a batch holds, so each batch repeats some"
    return text


@functools.lru_cache(maxsize=8)
def _bits(seed: int, epoch: int, purpose: int, size: int) -> UInt64[np.ndarray, " N"]:
    """Random words of Philox, whose raw stream NumPy never changes (that of `Generator.permutation` it may)."""
    key = np.random.SeedSequence([seed, epoch, purpose])
    bits = np.random.Philox(key).random_raw(size)
    bits.flags.writeable = False
    return bits
