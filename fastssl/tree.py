"""Trees of tensors: dictionaries, lists and tuples, nested, whose leaves have one first dimension.

A batch is one, and so is what a method makes of it: whoever cuts, moves or joins them knows no key.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any  # of tensors


def map_leaves(fn: Callable[[Tensor], Any], tree: Tree) -> Tree:
    """The same tree with fn(leaf) for each leaf."""
    return pytree.tree_map(fn, tree)


def leaves(tree: Tree) -> list[Any]:
    """The leaves, in the order in which `map_leaves` comes by."""
    return pytree.tree_leaves(tree)


def count_rows(tree: Tree, name: str = "batch") -> int:
    """The first dimension of all leaves.

    Raises ValueError, naming the leaf, for one that is no tensor or has another first dimension,
    and for a tree without leaves.

    >>> count_rows({"views": [torch.zeros(4, 3), torch.zeros(4)]})
    4
    >>> count_rows({"views": [torch.zeros(4, 3), torch.zeros(5)]})
    Traceback (most recent call last):
    ValueError: batch['views'][1] has 5 rows, and batch['views'][0] has 4
    """
    found = pytree.tree_flatten_with_path(tree)[0]
    if not found:
        raise ValueError(f"{name} has no tensor in it")
    first: tuple[str, int] | None = None
    for path, leaf in found:
        place = name + pytree.keystr(path)
        if not isinstance(leaf, Tensor) or not leaf.ndim:
            got = "0-d" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(f"{place} must be a tensor with a row for each sample, got {got}")
        if first is None:
            first = place, len(leaf)
        elif len(leaf) != first[1]:
            raise ValueError(f"{place} has {len(leaf)} rows, and {first[0]} has {first[1]}")
    assert first is not None
    return first[1]


def cut(tree: Tree, sizes: Sequence[int]) -> list[Tree]:
    """Trees of `sizes` rows each, one after another; the sizes' sum is the tree's rows.

    >>> cut([torch.arange(3)], [1, 2])
    [[tensor([0])], [tensor([1, 2])]]
    """
    flat, spec = pytree.tree_flatten(tree)
    parts = zip(*(leaf.split(list(sizes)) for leaf in flat), strict=True)
    return [pytree.tree_unflatten(list(part), spec) for part in parts]


def join(trees: Sequence[Tree]) -> Tree:
    """Trees of one structure as one, the rows of each leaf one after another: undoes `cut`."""
    if len(trees) == 1:
        return trees[0]
    flat = [pytree.tree_flatten(tree) for tree in trees]
    rows = zip(*(found for found, _ in flat), strict=True)
    return pytree.tree_unflatten([torch.cat(parts) for parts in rows], flat[0][1])
