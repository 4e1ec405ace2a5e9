"""Cached arrays + a order -> the batches of a run, made ahead of time in the background."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int64, Shaped

from sdjax.data.cache import Arrays, Images, Texts
from sdjax.data.order import Choice, Order, beside, choose
from sdjax.data.records import Record
from sdjax.errors import ConfigError

T = TypeVar("T")

Batch = dict[str, Shaped[np.ndarray, " B *S"]]


class Bucket(NamedTuple):
    """The images of one shape."""

    arrays: Arrays
    """`moments` or `pixels`, perhaps `mask`, `hole` and `kept`: each `[N, V, ...]`, see `cache.Images`."""
    text_rows: Int64[np.ndarray, "N K"]
    """Row in the texts of each of the K versions of each image's caption."""
    records: tuple[Record, ...]

    @property
    def repeats(self) -> tuple[int, ...]:
        """Times an epoch shows each image."""
        return tuple(record.repeats for record in self.records)


class Prior(NamedTuple):
    """Class images, which are learned beside the others so that the class stays what it was."""

    buckets: tuple[Bucket, ...]
    """The same images at the shape of each bucket of the data set."""
    weight: float
    """Of their loss."""


class Dataset(NamedTuple):
    """Everything a batch is gathered from; the arrays may lie on disk."""

    buckets: tuple[Bucket, ...]
    texts: Arrays
    """Without rows if no text is wanted: {}."""
    empty_row: int
    """Row of the empty caption."""
    prior: Prior | None = None

    @property
    def repeats(self) -> tuple[tuple[int, ...], ...]:
        """Of every bucket, which the order of batches depends on."""
        return tuple(bucket.repeats for bucket in self.buckets)


def join(images: Images, texts: Texts) -> Bucket:
    """Images of one shape with the rows of their captions."""
    rows = [[texts.rows[caption] for caption in record.captions] for record in images.records]
    return Bucket(images.arrays, np.array(rows, np.int64), images.records)


def make_batch(dataset: Dataset, order: Order, number: int) -> Batch:
    """Batch `number` of the order, for an optimizer step; every array has B rows.

    `moments [B, h, w, 2C]` or `pixels [B, H, W, 3]`, `mask [B, h, w, 1]` if the data set has masks, for inpainting
    `hole [B, h, w, 1]` and perhaps `kept [B, h, w, C]`, the texts, and `index [B]` (int32: place in the batch), which
    an example's randomness is drawn from so that it does not depend on the device it lands on. With class images B is
    twice the order's: as many of them follow, and `weight [B]` makes the mean over all of weight times error the mean
    over the images plus the prior's weight times that over class images.
    """
    choice = choose(order, number)
    parts = [_gather(dataset, dataset.buckets[choice.bucket], order, choice)]
    if dataset.prior is not None:
        other = dataset.prior.buckets[choice.bucket]
        class_order = beside(order, len(other.repeats))
        parts.append(_gather(dataset, other, class_order, choose(class_order, number)))
        for part, weight in zip(parts, (2.0, 2.0 * dataset.prior.weight), strict=True):
            part["weight"] = np.full(order.batch_size, weight, np.float32)
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts[1:] else parts[0]
    return {**batch, "index": np.arange(len(parts) * order.batch_size, dtype=np.int32)}


def _gather(dataset: Dataset, bucket: Bucket, order: Order, choice: Choice) -> Batch:
    flips = 2 if order.flip else 1
    batch = {}
    for name, array in bucket.arrays.items():
        holes, hole = (order.holes, choice.hole) if name in ("hole", "kept") else (1, 0)
        views = order.crops * holes * flips
        if array.shape[1] != views:
            raise ConfigError(f"the order wants {views} views of each image, but the cache holds {array.shape[1]}")
        view = (choice.crop * holes + hole) * flips + choice.flip
        batch[name] = np.asarray(array[choice.example, view])
    if dataset.texts:
        rows = bucket.text_rows[choice.example, choice.version]
        rows = np.where(choice.drop, dataset.empty_row, rows)
        batch |= {name: np.asarray(array[rows]) for name, array in dataset.texts.items()}
    return batch


def prefetch(make: Callable[[int], T], numbers: Iterable[int], *, depth: int = 2, workers: int = 1) -> Generator[T]:
    """`make(n)` for each n, in order, computed up to `depth` ahead by background threads.

    What `make` raises comes out at its own place. Closing the iterator drops what was not yet begun.
    """
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
    try:
        for number in numbers:
            waiting.append(pool.submit(make, number))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
