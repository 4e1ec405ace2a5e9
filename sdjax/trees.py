"""Parameter trees: nested dictionaries with arrays as leaves. Functions that flatten, nest and change them.

A layer is an inner dictionary that holds arrays, such as `{"kernel": ..., "bias": ...}`. A path is the tuple of names
that leads from the root to a leaf or a layer:

    >>> tree = {"mid": {"to_q": {"kernel": 1, "bias": 2}}}
    >>> list(leaves(tree))
    [(("mid", "to_q", "kernel"), 1), (("mid", "to_q", "bias"), 2)]
    >>> list(layers(tree, "kernel"))
    [(("mid", "to_q"), {"kernel": 1, "bias": 2})]
    >>> nest(dict(leaves(tree))) == tree
    True
"""

from collections.abc import Iterator, Mapping
from typing import Any

Tree = dict[str, Any]
Path = tuple[str, ...]


def leaves(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields (path, leaf) for every leaf, in the order of the tree."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def layers(tree: Mapping[str, Any], leaf: str, path: Path = ()) -> Iterator[tuple[Path, Tree]]:
    """Yields (path, layer) for every layer that holds a leaf of this name, in the order of the tree."""
    if leaf in tree:
        yield path, dict(tree)
        return
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from layers(child, leaf, (*path, name))


def nest(flat: Mapping[Path, Any]) -> Tree:
    """Returns the nested tree of a flat one, which has paths as keys."""
    tree: Tree = {}
    for path, value in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def replaced(tree: Mapping[str, Any], leaves: Mapping[Path, Any], path: Path = ()) -> Tree:
    """Returns the tree with the leaves at the given paths replaced, and no path added.

    >>> replaced({"mid": {"kernel": 1, "bias": 2}}, {("mid", "kernel"): 3})
    {"mid": {"kernel": 3, "bias": 2}}
    """
    return {
        name: replaced(child, leaves, (*path, name)) if isinstance(child, Mapping) else leaves.get((*path, name), child)
        for name, child in tree.items()
    }
