"""Gathers the batches of a run from cached arrays, ahead of time and in the background."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from sdjax.data.cache import Arrays, Images, Texts
from sdjax.data.order import Choice, Order, beside, choose
from sdjax.data.records import Record, captions_of, repeats_of
from sdjax.errors import ConfigError

T = TypeVar("T")

Batch = dict[str, Shaped[np.ndarray, " B *S"]]

NEGATIVE = "negative_"
"""What the names of the texts of the empty caption begin with, beside those of the captions."""


class Bucket(NamedTuple):
    """The images of one shape."""

    arrays: Arrays
    """`moments` or `pixels`, perhaps `mask`, `sizes`, `hole` and `kept`; each `[N, V, ...]`, see `cache.Images`."""
    text_rows: Int64[np.ndarray, "N K"]
    """For each image, the rows of the K versions of its caption in `Dataset.texts`."""
    records: Sequence[Record]

    @property
    def repeats(self) -> Int32[np.ndarray, " N"]:
        """How often an epoch shows each image."""
        return repeats_of(self.records)


class Prior(NamedTuple):
    """Class images. Training shows them with the data set, so that the model keeps its idea of the class."""

    buckets: tuple[Bucket, ...]
    """The same class images at the shape of each bucket of the data set."""
    weight: float
    """Weight of their loss."""


class Dataset(NamedTuple):
    """The arrays that batches are gathered from. They may lie on disk."""

    buckets: tuple[Bucket, ...]
    texts: Arrays
    """Empty if batches need no text."""
    empty_row: int
    """Row of the empty caption in `texts`."""
    prior: Prior | None = None
    with_empty: bool = False
    """Whether batches hold the texts of the empty caption too, as a teacher with guidance needs them."""

    @property
    def repeats(self) -> tuple[Int32[np.ndarray, " N"], ...]:
        """The repeats of every bucket, on which the order depends."""
        return tuple(bucket.repeats for bucket in self.buckets)


def join(images: Images, texts: Texts) -> Bucket:
    """Joins images of one shape with the rows of their captions."""
    rows = np.fromiter((texts.rows[text] for shown in captions_of(images.records) for text in shown), np.int64)
    return Bucket(images.arrays, rows.reshape(len(images.records), -1), images.records)


def make_batch(dataset: Dataset, order: Order, number: int) -> Batch:
    """Batch `number` of the order, for one optimizer step. Every array has B rows.

    The arrays are `moments [B, h, w, 2C]` or `pixels [B, H, W, 3]`, `mask [B, h, w, 1]` if the data set has masks,
    `sizes [B, 6]` for SDXL, `hole [B, h, w, 1]` and perhaps `kept [B, h, w, C]` for inpainting, the texts, and
    `index [B]` (int32), the place in the batch. An example's randomness is drawn from its index, so that it does not
    depend on the example's device.

    With class images, B is twice the order's batch size: as many class images follow the images. The mean over the
    batch of `weight [B]` times the error is then the mean error of the images plus the prior's weight times the mean
    error of the class images.
    """
    choice = choose(order, number)
    batch = _gather(dataset, dataset.buckets[choice.bucket], order, choice)
    if dataset.prior is not None:
        class_bucket = dataset.prior.buckets[choice.bucket]
        class_order = beside(order, len(class_bucket.repeats))
        class_batch = _gather(dataset, class_bucket, class_order, choose(class_order, number))
        batch = {name: np.concatenate([array, class_batch[name]]) for name, array in batch.items()}
        batch["weight"] = np.repeat(np.array([2, 2 * dataset.prior.weight], np.float32), order.batch_size)
    return {**batch, "index": np.arange(order.batch_size * (1 if dataset.prior is None else 2), dtype=np.int32)}


def _gather(dataset: Dataset, bucket: Bucket, order: Order, choice: Choice) -> Batch:
    """The chosen examples of a bucket, with their texts."""
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
        batch |= texts_of(dataset, np.where(choice.drop, dataset.empty_row, rows))
    return batch


def texts_of(dataset: Dataset, rows: Int64[np.ndarray, " B"]) -> Batch:
    """The texts of some rows and, in a data set `with_empty`, those of the empty caption, as often."""
    batch = {name: np.asarray(array[rows]) for name, array in dataset.texts.items()}
    if dataset.with_empty:
        empty = np.full_like(rows, dataset.empty_row)
        batch |= {NEGATIVE + name: np.asarray(array[empty]) for name, array in dataset.texts.items()}
    return batch


def prefetch(make: Callable[[int], T], numbers: Iterable[int], *, depth: int = 2, workers: int = 1) -> Generator[T]:
    """Yields `make(n)` for each n, in order. Background threads compute up to `depth` results ahead.

    An exception of `make(n)` is raised where its result would be yielded. Closing the iterator cancels the calls that
    have not begun.
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
