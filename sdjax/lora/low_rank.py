"""Low-rank adapters that are nearest to a change of weights: adapters are resized, summed, converted and extracted.

The nearest adapter of rank R is the change's singular value decomposition cut off after R values (Eckart and Young
1936). What it loses is the root of the sum of the squares of the others. The decompositions are LAPACK's, on the host.
Of a large matrix of which few values are wanted, only these are computed.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdjax import lora
from sdjax.errors import ConfigError
from sdjax.trees import Path, Tree, layers, nest

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limit:
    """The rule that chooses the rank of each layer from its singular values. The smallest of the three counts.

    rank: at most this rank. ratio: drop the singular values below the largest divided by `ratio`. energy: the least
    rank that keeps this share, in (0, 1], of the squared norm of the change.
    """

    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None

    def choose(self, values: np.ndarray) -> int:
        """Returns the rank, at least 1, for singular values in falling order."""
        ranks = [len(values)]
        if self.rank is not None:
            ranks.append(self.rank)
        if self.ratio is not None:
            ranks.append(int((values * self.ratio >= values[0]).sum()))
        if self.energy is not None:
            kept = np.cumsum(np.square(values, dtype=np.float64))
            ranks.append(1 + int((kept < self.energy * kept[-1] * (1 - 1e-12)).sum()))
        return max(1, min(ranks))


class Nearest(NamedTuple):
    """An adapter tree, with the squared norm of each layer's change and of what the adapter lacks of it."""

    adapters: Tree
    norms: dict[Path, float]
    lost: dict[Path, float]

    @property
    def error(self) -> float:
        """Norm of everything that is lost / norm of the whole change."""
        return math.sqrt(sum(self.lost.values()) / (sum(self.norms.values()) or 1.0))

    @property
    def worst(self) -> tuple[Path, float]:
        """The layer that loses the largest share of its norm, and this share."""
        shares = {path: math.sqrt(lost / (self.norms[path] or 1.0)) for path, lost in self.lost.items()}
        return max(shares.items(), key=lambda item: item[1])


def extract(
    tuned: Mapping[str, Any], base: Mapping[str, Any], limit: Limit, *, which: str | Sequence[str] = "attention"
) -> Nearest:
    """Returns the adapter trees that are nearest to `tuned - base`, for the parts that differ.

    tuned, base: part -> tree of arrays, of which one layer at a time is read. which: see `lora.targets`.
    """

    def rows():
        for part, tree in base.items():
            found = dict(layers(tuned[part], "kernel"))
            changes = (
                ((part, *path), _nearest(_float32(found[path]["kernel"]) - _float32(kernel), limit))
                for path, kernel in lora.targets(tree, which).items()
            )
            of_part = [(path, *nearest) for path, nearest in changes]
            if any(norm for _, _, norm, _ in of_part):
                yield from of_part

    return _gather(rows())


def combined(
    params: Mapping[str, Any], weighted: Sequence[tuple[Mapping[str, Any], float]], limit: Limit | None
) -> Nearest:
    """Returns the plain LoRA that is nearest to the sum of several adapter trees of any kinds, each times its weight.

    params: the tree that they adapt. Its weights are read for the kinds whose change depends on them, DoRA and GLoRA.
    limit: None keeps the sum as it is, side by side along the rank, which only layers of plain LoRA allow.
    The changes of biases and norms, which a LoRA cannot hold, are left out with a warning.
    Raises ConfigError for a layer that the parameters lack, and without a limit for layers of other kinds.
    """
    found, gathered = lora.adaptable(params), {}
    outside = 0
    for tree, weight in weighted:
        for path, adapter in layers(tree, "scale"):
            if path not in found:
                raise ConfigError(f"the adapter has a layer the model lacks: {'/'.join(path)}")
            changes = lora.changes(found[path], adapter, "/".join(path))
            if "kernel" in changes:
                gathered.setdefault(path, []).append((changes["kernel"], weight))
            outside += len(changes) - ("kernel" in changes)
    if outside:
        log.warning("%d changes of biases and norms are left out: a LoRA cannot hold them", outside)
    if limit is None:
        others = {lora.kind(adapter) for adapters in gathered.values() for adapter, _ in adapters} - {"LoRA"}
        if others:
            raise ConfigError(f"{', '.join(sorted(others))} is no plain LoRA: give --rank, --ratio or --energy")
    return _gather((path, *_sum(adapters, found[path]["kernel"], limit)) for path, adapters in gathered.items())


def norm(adapter: Mapping[str, Any]) -> float:
    """Returns the Frobenius norm of a plain LoRA's change `scale * down up`, from products of rank R alone."""
    down, up = _float32(adapter["down"]), _float32(adapter["up"])
    down = down.reshape(-1, down.shape[-1]).astype(np.float64)
    gram = np.sum((down.T @ down) * (up @ up.T.astype(np.float64)))
    return abs(float(adapter["scale"])) * math.sqrt(max(0.0, float(gram)))


def _sum(
    adapters: Sequence[tuple[Mapping[str, Any], float]], kernel: Any, limit: Limit | None
) -> tuple[Tree, float, float]:
    """Returns the nearest adapter of one layer to the sum of its adapters, its squared norm and what is lost of it."""
    if all(lora.kind(adapter) == "LoRA" for adapter, _ in adapters):
        downs = [_float32(adapter["down"]) for adapter, _ in adapters]
        ups = [_float32(adapter["up"]) * np.float32(float(adapter["scale"]) * weight) for adapter, weight in adapters]
        down, up = np.concatenate(downs, axis=-1), np.concatenate(ups)
        one = {"down": down, "up": up, "scale": np.float32(1.0)}
        if limit is None:
            if len(adapters) == 1:  # the alpha of the file stays
                adapter, weight = adapters[0]
                one = {"down": downs[0], "up": _float32(adapter["up"]), "scale": np.float32(adapter["scale"] * weight)}
            return one, norm(one) ** 2, 0.0
        if down.shape[-1] < min(down[..., 0].size, up.shape[1]):
            return _nearest_product(down, up, limit)
    change = sum(np.float32(weight) * _change(adapter, kernel) for adapter, weight in adapters)
    assert limit is not None and isinstance(change, np.ndarray)
    return _nearest(change, limit)


def _change(adapter: Mapping[str, Any], kernel: Any) -> np.ndarray:
    """Returns what an adapter of any kind adds to a kernel. The kernel is read only if that depends on it."""
    if lora.kind(adapter) in ("DoRA", "GLoRA"):
        kernel = _float32(kernel)
        return np.asarray(lora.merge_leaf(kernel, dict(adapter), 1.0)) - kernel
    return np.asarray(lora.delta(adapter))


def _nearest(change: np.ndarray, limit: Limit) -> tuple[Tree, float, float]:
    """Returns the adapter nearest to a change [.., in, out], its squared norm, and what is lost of it.

    If the rank is far below that of the matrix and nothing else limits it, only the leading part is decomposed.
    """
    matrix, rank = change.reshape(-1, change.shape[-1]), limit.rank
    if rank is not None and limit.ratio is None and limit.energy is None and 8 * rank <= min(matrix.shape):
        u, s, v = _leading(matrix, rank)
        adapter, _, _ = _cut(u, s, v, change.shape[:-1], limit)
        norm, lost = (float(np.sum(np.square(each, dtype=np.float64))) for each in (matrix, matrix - (u * s) @ v))
        return adapter, norm, lost
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return _cut(u, s, v, change.shape[:-1], limit)


def _leading(matrix: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the first `count` singular vectors and values: u [m, R], s [R], v [R, n].

    They are found by iterating a random subspace (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1). Exact for
    a matrix of this rank; of noise alone, whose values hardly fall, half a percent more is lost than must be.
    """
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], count + _MORE)).astype(np.float32)
    basis, _ = np.linalg.qr(matrix @ start)
    for _ in range(_ROUNDS):
        across, _ = np.linalg.qr(matrix.T @ basis)
        basis, _ = np.linalg.qr(matrix @ across)
    u, s, v = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u[:, :count], s[:count], v[:count]


_MORE, _ROUNDS = 16, 4
"""Dimensions of the subspace beside those wanted, and rounds of the iteration."""


def _nearest_product(down: np.ndarray, up: np.ndarray, limit: Limit) -> tuple[Tree, float, float]:
    """`_nearest` to the change `down up`, from decompositions of rank R alone."""
    q, left = np.linalg.qr(down.reshape(-1, down.shape[-1]))
    p, right = np.linalg.qr(up.T)
    u, s, v = np.linalg.svd(left @ right.T)
    return _cut(q @ u, s, v @ p.T, down.shape[:-1], limit)


def _cut(
    u: np.ndarray, s: np.ndarray, v: np.ndarray, shape: tuple[int, ...], limit: Limit
) -> tuple[Tree, float, float]:
    rank = limit.choose(s)
    root = np.sqrt(s[:rank])
    down = (u[:, :rank] * root).reshape(*shape, rank)
    squares = np.square(s, dtype=np.float64)
    adapter = {"down": down, "up": root[:, None] * v[:rank], "scale": np.float32(1.0)}
    return adapter, float(squares.sum()), float(squares[rank:].sum())


def _gather(found: Iterable[tuple[Path, Tree, float, float]]) -> Nearest:
    rows = list(found)
    adapters = nest({path: adapter for path, adapter, _, _ in rows})
    return Nearest(adapters, {path: norm for path, _, norm, _ in rows}, {path: lost for path, _, _, lost in rows})


def _float32(array: Any) -> np.ndarray:
    return np.asarray(np.asarray(array), np.float32)
