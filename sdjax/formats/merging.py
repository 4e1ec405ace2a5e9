"""Adapters merged into a model while it is written, a layer at a time, so that memory does not hold the model."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax import lora
from sdjax.errors import ConfigError
from sdjax.formats.deferred import Deferred
from sdjax.trees import Path, Tree, layers, replaced


def merged(params: Mapping[str, Any], weighted: Sequence[tuple[Mapping[str, Any], float]]) -> Tree:
    """Returns the parameters of one part with adapter trees merged in their order, each with its weight.

    params: those of `outline.Outline.view_weights`. A merged leaf is computed in float32 when it is written; the
    formula is that of `lora.merge`. Raises ConfigError for a layer that the parameters lack.
    """
    found = lora.adaptable(params)
    changes: dict[Path, list[tuple[Tree, float]]] = {}
    for tree, weight in weighted:
        for path, adapter in layers(tree, "scale"):
            if path not in found:
                raise ConfigError(f"the adapter has a layer the model lacks: {'/'.join(path)}")
            for leaf, change in lora.changes(found[path], adapter, "/".join(path)).items():
                changes.setdefault((*path, leaf), []).append((change, weight))
    leaves = {path: found[path[:-1]][path[-1]] for path in changes}
    return replaced(
        params,
        {
            path: Deferred(leaf.shape, np.dtype(np.float32), functools.partial(_merge, leaf, changes[path]))
            for path, leaf in leaves.items()
        },
    )


def _merge(leaf: Any, changes: Sequence[tuple[Tree, float]]) -> np.ndarray:
    value = jnp.asarray(np.asarray(leaf), jnp.float32)
    for change, weight in changes:
        value = lora.merge_leaf(value, change, weight)
    return np.asarray(value)
