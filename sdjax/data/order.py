"""Which examples make up batch number n: a pure function of the seed, with no state to save.

The examples of one shape (a bucket) form one endless stream: all of them in a shuffled order, each as often as its
repeats say, then all again in another order, and so on. Every batch takes the next B positions of one bucket's stream.
So a batch may span two epochs, none is short, every image is seen as often as its share says (to within one batch), and
a bucket smaller than a batch simply repeats inside it. Devices and workers play no part.

The buckets take turns in a fixed pattern: after any n batches, each has had its share of n, rounded down or up.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt64


class Order(NamedTuple):
    """What the order depends on."""

    repeats: tuple[tuple[int, ...], ...]
    """Bucket by bucket, how often an epoch shows each image."""
    batch_size: int
    """Examples a batch, over all devices."""
    seed: int
    """0 or more."""
    flip: bool = False
    caption_dropout: float = 0.0
    crops: int = 1
    versions: int = 1
    """Of each caption."""
    holes: int = 1
    """Masks of each crop, in training for inpainting."""

    @property
    def size(self) -> int:
        """Examples an epoch."""
        return sum(map(sum, self.repeats))


class Choice(NamedTuple):
    """The examples of one batch."""

    bucket: int
    example: Int64[np.ndarray, " B"]
    """Places in the bucket."""
    flip: Bool[np.ndarray, " B"]
    """Show it mirrored."""
    drop: Bool[np.ndarray, " B"]
    """Show it with the empty caption."""
    crop: Int64[np.ndarray, " B"]
    """In turn: an image's k-th showing takes crop k modulo their number."""
    version: Int64[np.ndarray, " B"]
    """Of the caption, drawn at random."""
    hole: Int64[np.ndarray, " B"]
    """Of the crop, drawn at random."""


def choose(order: Order, number: int) -> Choice:
    """The examples of batch `number` (0 is the first)."""
    bucket, turn = _turn(tuple(map(sum, order.repeats)), number)
    repeats = np.asarray(order.repeats[bucket])
    entries = np.repeat(np.arange(len(repeats)), repeats)
    showing = np.arange(len(entries)) - np.repeat(np.cumsum(repeats) - repeats, repeats)  # 0, 1, ... of its repeats
    size = len(entries)
    position = np.arange(order.batch_size) + turn * order.batch_size
    epoch, place = position // size, position % size
    entry = np.empty(order.batch_size, np.int64)
    flip = np.zeros(order.batch_size, bool)
    drop = np.zeros(order.batch_size, bool)
    version = np.zeros(order.batch_size, np.int64)
    hole = np.zeros(order.batch_size, np.int64)
    for e in np.unique(epoch):
        here = epoch == e
        at = place[here]
        bits = functools.partial(_bits, order.seed + (bucket << 64), int(e), size=size)
        entry[here] = np.argsort(bits(purpose=0), kind="stable")[at]
        if order.flip:
            flip[here] = bits(purpose=1)[at] >= 2**63
        if order.caption_dropout:
            drop[here] = bits(purpose=2)[at] < order.caption_dropout * 2.0**64
        if order.versions > 1:
            version[here] = bits(purpose=3)[at] % np.uint64(order.versions)
        if order.holes > 1:
            hole[here] = bits(purpose=4)[at] % np.uint64(order.holes)
    example = entries[entry]
    crop = (epoch * repeats[example] + showing[entry]) % order.crops
    return Choice(bucket, example, flip, drop, crop, version, hole)


def beside(order: Order, count: int) -> Order:
    """The order in which `count` class images (in one bucket) go along with the order's batches."""
    return Order(((1,) * count,), order.batch_size, order.seed + (1 << 128), order.flip, holes=order.holes)


def describe(order: Order, batches: int, names: Sequence[object] = ()) -> str:
    """What a run over `batches` batches will see, for the log; `names` are those of the buckets, if there are any."""
    images = sum(map(len, order.repeats))
    text = f"{images} images" + (f" ({order.size} with repeats)" if order.size != images else "")
    text += f", {order.batch_size} a batch: {batches * order.batch_size / order.size:.4g} epochs"
    if len(names) > 1:
        counts = ", ".join(f"{len(own)} at {name}" for name, own in zip(names, order.repeats, strict=True))
        text += f"; {len(names)} shapes: {counts}"
    small = [str(name) for name, own in zip(names or [""], order.repeats, strict=True) if sum(own) < order.batch_size]
    if small:
        text += "; fewer images than a batch holds" + (f" at {', '.join(small)}" if len(names) > 1 else "")
        text += ", so each such batch repeats some" if len(names) > 1 else ", so each batch repeats some"
    return text


def _turn(shares: tuple[int, ...], number: int) -> tuple[int, int]:
    """(bucket of batch `number`, batches of that bucket before it)."""
    pattern = _pattern(shares)
    rounds, place = divmod(number, len(pattern))
    bucket = int(pattern[place])
    return bucket, rounds * int(np.sum(pattern == bucket)) + int(np.sum(pattern[:place] == bucket))


@functools.lru_cache(maxsize=8)
def _pattern(shares: tuple[int, ...]) -> Int64[np.ndarray, " P"]:
    """The buckets in their turns, until each has had its share exactly.

    Turn k of bucket b, with p its share of all, may come from k/p on and must come before (k+1)/p; of those that may,
    the most urgent comes. These are unit jobs on one machine, which this rule schedules whenever it can be done, as it
    can here (the quota method of Balinski and Young 1975): every bucket always has had its share, rounded down or up.
    """
    divisor = math.gcd(*shares)
    own = np.array(shares, np.int64) // divisor
    total = int(own.sum())
    done = np.zeros(len(own), np.int64)
    pattern = np.empty(total, np.int64)
    for n in range(total):
        deadline = np.where(done * total // own <= n, -(-(done + 1) * total // own), 2 * total)
        pattern[n] = np.argmin(deadline)
        done[pattern[n]] += 1
    pattern.flags.writeable = False
    return pattern


@functools.lru_cache(maxsize=16)
def _bits(seed: int, epoch: int, *, purpose: int, size: int) -> UInt64[np.ndarray, " N"]:
    """Random words of Philox, whose raw stream NumPy never changes (that of `Generator.permutation` it may)."""
    key = np.random.SeedSequence([seed, epoch, purpose])
    bits = np.random.Philox(key).random_raw(size)
    bits.flags.writeable = False
    return bits
