"""Chooses the examples of each batch. The choice depends on the seed and the batch's number alone: no state is saved.

The examples of one shape (a bucket) form an endless stream: all of them in random order, each as often as its repeats
say, then all of them in another order, and so on. Every batch takes the next B examples of one bucket's stream. So a
batch may span two epochs, no batch is short, every image is seen as often as its share says (to within one batch), and
a bucket smaller than a batch repeats images inside it. The numbers of devices and workers make no difference.

The buckets take turns in a fixed pattern: after any n batches, each bucket has had its share of n, rounded down or up.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt64

MOST_REPEATS = 9999
"""How often an epoch may show an image. A larger number before the name of a folder is a date, or a mistake."""


class Order(NamedTuple):
    """The order of the batches, given by everything that it depends on."""

    repeats: tuple[Sequence[int] | Int32[np.ndarray, " N"], ...]
    """For each bucket, how often an epoch shows each image."""
    batch_size: int
    """Number of examples of a batch, over all devices."""
    seed: int
    """0 or more."""
    flip: bool = False
    """Whether images are mirrored at random."""
    caption_dropout: float = 0.0
    """Probability that the empty caption replaces the image's."""
    crops: int = 1
    """Number of crops of each image."""
    versions: int = 1
    """Number of versions of each caption."""
    holes: int = 1
    """Number of masks of each crop, in training for inpainting."""

    @property
    def size(self) -> int:
        """Number of examples of an epoch."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of examples of an epoch of each bucket."""
        return tuple(int(np.sum(repeats)) for repeats in self.repeats)


class Choice(NamedTuple):
    """The examples of one batch."""

    bucket: int
    example: Int64[np.ndarray, " B"]
    """Index of the image in the bucket."""
    flip: Bool[np.ndarray, " B"]
    """Whether the image is mirrored."""
    drop: Bool[np.ndarray, " B"]
    """Whether the empty caption replaces the image's."""
    crop: Int64[np.ndarray, " B"]
    """Index of the crop. Crops take turns: the k-th showing of an image shows crop k modulo `Order.crops`."""
    version: Int64[np.ndarray, " B"]
    """Index of the caption's version, drawn at random."""
    hole: Int64[np.ndarray, " B"]
    """Index of the crop's mask, drawn at random."""


def choose(order: Order, number: int) -> Choice:
    """The examples of batch `number`, counted from 0."""
    sizes = order.sizes
    bucket, turn = _turn(sizes, number)
    size, seed = sizes[bucket], order.seed + (bucket << 64)
    repeats = np.asarray(order.repeats[bucket], np.int64)
    first = np.arange(order.batch_size) + turn * order.batch_size
    epoch, place = first // size, first % size
    entry = np.empty(order.batch_size, np.int64)
    flip = np.zeros(order.batch_size, bool)
    drop = np.zeros(order.batch_size, bool)
    version = np.zeros(order.batch_size, np.int64)
    hole = np.zeros(order.batch_size, np.int64)
    for e in np.unique(epoch):
        here = epoch == e
        at = place[here]  # neighbours
        bits = functools.partial(_bits, seed, int(e), begin=int(at[0]), count=len(at))
        entry[here] = _shuffled(seed, int(e), size)[at]
        if order.flip:
            flip[here] = bits(purpose=1) >= 2**63
        if order.caption_dropout:
            drop[here] = bits(purpose=2) < order.caption_dropout * 2.0**64
        if order.versions > 1:
            version[here] = bits(purpose=3) % np.uint64(order.versions)
        if order.holes > 1:
            hole[here] = bits(purpose=4) % np.uint64(order.holes)
    ends = np.cumsum(repeats)  # entry -> image
    example = np.searchsorted(ends, entry, side="right")
    showing = entry - ends[example] + repeats[example]  # 0, 1, ... for each image
    crop = (epoch * repeats[example] + showing) % order.crops
    return Choice(bucket, example, flip, drop, crop, version, hole)


def beside(order: Order, count: int) -> Order:
    """The order of `count` class images, all in one bucket, for batches that go with the batches of `order`."""
    return Order((np.ones(count, np.int32),), order.batch_size, order.seed + (1 << 128), order.flip, holes=order.holes)


def describe(order: Order, batches: int, names: Sequence[object] = ()) -> str:
    """Describes, for the log, what `batches` batches show. names: of the buckets, if they have any."""
    count = sum(map(len, order.repeats))
    text = f"{count} images" + (f" ({order.size} with repeats)" if order.size != count else "")
    text += f", {order.batch_size} a batch: {batches * order.batch_size / order.size:.4g} epochs"
    if len(names) > 1:
        counts = ", ".join(f"{len(images)} at {name}" for name, images in zip(names, order.repeats, strict=True))
        text += f"; {len(names)} shapes: {counts}"
    small = [str(name) for name, size in zip(names or [""], order.sizes, strict=True) if size < order.batch_size]
    if small:
        text += "; fewer images than a batch holds" + (f" at {', '.join(small)}" if len(names) > 1 else "")
        text += ", so each such batch repeats some" if len(names) > 1 else ", so each batch repeats some"
    return text


def _turn(shares: tuple[int, ...], number: int) -> tuple[int, int]:
    """The bucket of batch `number`, and the number of earlier batches of that bucket."""
    turns = np.array(shares, np.int64) // math.gcd(*shares)
    rounds, place = divmod(number, int(turns.sum()))
    length = 1 << place.bit_length()  # computed again for twice as many batches, rather than for all of a large set
    buckets, earlier = _pattern(tuple(turns.tolist()), min(length, int(turns.sum())))
    bucket = int(buckets[place])
    return bucket, rounds * int(turns[bucket]) + int(earlier[place])


@functools.lru_cache(maxsize=8)
def _pattern(shares: tuple[int, ...], length: int) -> tuple[Int32[np.ndarray, " P"], Int32[np.ndarray, " P"]]:
    """The bucket of each of the first `length` batches, and how many batches that bucket has had before.

    shares: the number of batches of each bucket until each has had exactly its share; `length` is at most their sum.

    Let p be a bucket's fraction of all batches. Its turn k (from 0) may come at batch k/p or later and must come before
    batch (k+1)/p. Of the turns that may come, the one with the earliest deadline comes. This is the scheduling of unit
    jobs on one machine, where this rule finds a schedule whenever there is one. Here there is one (the quota method of
    Balinski and Young 1975), so at any time every bucket has had its share, rounded down or up.
    """
    turns = np.array(shares, np.int64)
    total = int(turns.sum())
    done = np.zeros(len(turns), np.int64)
    buckets, earlier = np.empty((2, length), np.int32)
    for n in range(length):
        deadline = np.where(done * total // turns <= n, -(-(done + 1) * total // turns), 2 * total)
        bucket = int(np.argmin(deadline))
        buckets[n], earlier[n] = bucket, done[bucket]
        done[bucket] += 1
    return buckets, earlier


@functools.lru_cache(maxsize=16)
def _shuffled(seed: int, epoch: int, size: int) -> Int32[np.ndarray, " N"]:
    """The numbers below `size` in the order of an epoch. Four bytes each, since they stay in memory."""
    return np.argsort(_bits(seed, epoch, purpose=0, begin=0, count=size), kind="stable").astype(np.int32)


def _bits(seed: int, epoch: int, *, purpose: int, begin: int, count: int) -> UInt64[np.ndarray, " N"]:
    """Random 64-bit words of Philox. NumPy never changes this raw stream, but may change `Generator.permutation`.

    Words `begin` to `begin + count` of the stream. Philox makes four words at a time, and can begin anywhere.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch, purpose]))
    return bits.advance(begin // 4).random_raw(begin % 4 + count)[begin % 4 :]
