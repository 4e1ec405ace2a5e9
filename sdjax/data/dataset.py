"""Cached arrays + a plan -> the batches of a run, made ahead of time in the background."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float32, Int64, Shaped

from sdjax.data.cache import Arrays, Latents, Texts
from sdjax.data.plan import Plan, choose
from sdjax.errors import ConfigError

T = TypeVar("T")

Batch = dict[str, Shaped[np.ndarray, " B *S"]]


class Dataset(NamedTuple):
    """Everything a batch is gathered from; the arrays may lie on disk."""

    moments: Float32[np.ndarray, "N F h w C2"]
    texts: Arrays
    text_row: Int64[np.ndarray, " N"]
    """Row of each example's caption in `texts`."""
    empty_row: int
    """Row of the empty caption."""


def join(latents: Latents, texts: Texts) -> Dataset:
    """The data set of these images and their captions."""
    rows = np.array([texts.rows[record.caption] for record in latents.records], np.int64)
    return Dataset(latents.moments, texts.arrays, rows, texts.rows[""])


def make_batch(dataset: Dataset, plan: Plan, number: int) -> Batch:
    """Batch `number` of the plan: `moments [B, h, w, 2C]`, `index [B]` (int32: place in the batch), and the texts.

    `index` is what an example's randomness is drawn from, so that it does not depend on the device it lands on.
    """
    if plan.flip and dataset.moments.shape[1] < 2:
        raise ConfigError("the plan flips images, but the cached latents hold no mirrored ones")
    choice = choose(plan, number)
    rows = np.where(choice.drop, dataset.empty_row, dataset.text_row[choice.example])
    return {
        "moments": dataset.moments[choice.example, choice.flip.astype(np.int64)],
        "index": np.arange(plan.batch_size, dtype=np.int32),
        **{name: np.asarray(array[rows]) for name, array in dataset.texts.items()},
    }


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
