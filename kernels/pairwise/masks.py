"""Pair masks: which pairs of rows and columns take part, as functions of their ids.

    kept_ij = rule(row id of i, column id of j)          ids: by default the positions i and j
    same_group(labels)                                   a rule, given ids of rows and columns
    exclude_self & same_group(labels)                    both must keep a pair

A mask is never a matrix: the kernels ask the rule tile by tile.  Your own rule, in ten lines of a
module:

    import triton, triton.language as tl

    @triton.jit
    def _near(rows, cols):                  # blocks that broadcast: (R, 1) and (1, C)
        return tl.abs(rows - cols) <= 2

    near = PairMask("near", lambda rows, cols: (rows - cols).abs() <= 2,
                    symmetric=True, triton=_near)

    pairwise_lse(q, k, 10.0, mask=near(frame_numbers))

Without a Triton twin a rule runs in torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.dispatch import HAS_TRITON

_rules: dict[str, PairMask] = {}


class _Rules:
    """What rules and joined rules share: `&`, and a plain word for what there is not."""

    def __and__(self, other: PairMask | Masks) -> Masks:
        return Masks(as_masks(self).parts + as_masks(other).parts)

    def __invert__(self) -> Any:
        raise TypeError(
            "a mask cannot be negated with ~: take the opposite rule, as different_group for "
            "same_group, or write one as a PairMask"
        )

    def __or__(self, other: Any) -> Any:
        raise TypeError(
            "masks cannot be joined by |, only by &: write the rule that keeps either pair as a "
            "PairMask"
        )


class _Own(NamedTuple):
    """The twin of that name in masks_triton.py, which imports Triton."""

    name: str


def _is_twin(function: Any) -> bool:
    """Whether None, one of ours, or a @triton.jit function, as far as Triton is there to tell."""
    if function is None or type(function) is _Own or not HAS_TRITON:
        return True
    from triton import KernelInterface

    return isinstance(function, KernelInterface)


@dataclass(frozen=True)
class PairMask(_Rules):
    """A rule: keep(row_ids, col_ids) is a bool tensor, broadcasting the two.

    Called with ids it is a rule on those; joined by `&` to another, both must keep a pair.
    symmetric: keep(a, b) == keep(b, a) for all ids, so that a pair may be judged from either side.
    triton: the same judgement for the Triton kernels, a @triton.jit function of the row and the
    column ids: blocks (R, 1) and (1, C) or (1, R) and (C, 1), of int64 where ids are given, else
    of int32 positions.  Its module must import triton.language, and it may read nothing but the
    ids.  Without one the mask runs in torch.
    unequal: what keep says of any two ids that differ, where that is one answer: then the kernels
    need not ask it where no two ids of a tile are equal.  None where it depends on the ids.
    Raises ValueError when triton is something else.
    """

    name: str
    keep: Callable[[Tensor, Tensor], Tensor]
    symmetric: bool = False
    triton: Any = None
    unequal: bool | None = None
    key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not _is_twin(self.triton):
            raise ValueError(
                f"triton must be a @triton.jit function of (row_ids, col_ids) in mask "
                f"{self.name!r}, got {self.triton!r}"
            )
        key = self.name if self.name not in _rules else f"{self.name}#{len(_rules)}"
        object.__setattr__(self, "key", key)
        _rules[key] = self

    def __call__(self, row_ids: Tensor, col_ids: Tensor | None = None) -> Masks:
        """This rule on row_ids (M,) and col_ids (N,), by default the same; integers of any size.

        Raises ValueError for ids that are not one-dimensional integers.
        """
        rows = _ids(self.name, "row_ids", row_ids)
        cols = rows if col_ids is None else _ids(self.name, "col_ids", col_ids)
        return Masks((Part(self, rows, cols),))

    def __deepcopy__(self, memo: Any) -> PairMask:
        return self  # nothing in it changes, and Triton's functions cannot be copied


class Part(NamedTuple):
    """A rule and its ids; without ids it judges positions."""

    rule: PairMask
    rows: Tensor | None = None
    cols: Tensor | None = None


@dataclass(frozen=True)
class Masks(_Rules):
    """Rules that must all keep a pair; made by calling a PairMask, and by `&`."""

    parts: tuple[Part, ...] = ()

    @property
    def problem(self) -> str:
        """Why no Triton kernel takes this mask, as a sentence; "" where all rules have a twin."""
        for rule, *_ in self.parts:
            if rule.triton is None:
                return (
                    f"mask {rule.name!r} has no Triton twin: give PairMask a @triton.jit function "
                    "as `triton`, or leave impl='triton' for 'torch'"
                )
        return ""

    @property
    def symmetric(self) -> bool:
        """Whether a pair of one tensor's rows is judged alike from either side."""
        return all(part.rule.symmetric and part.rows is part.cols for part in self.parts)

    @property
    def key(self) -> str:
        """The rules by name, each with the place of its ids in `ids`, -1 for positions."""
        names, place = [], 0
        for rule, rows, _ in self.parts:
            names.append(f"{rule.key}@{-1 if rows is None else place}")
            place += rows is not None
        return "|".join(names)

    def ids(self) -> tuple[Tensor | None, Tensor | None]:
        """All row ids (P, M) and column ids (P, N) that were given; None when none was."""
        rows = [part.rows for part in self.parts if part.rows is not None]
        cols = [part.cols for part in self.parts if part.cols is not None]
        return (torch.stack(rows), torch.stack(cols)) if rows else (None, None)

    def check(self, M: int, N: int, device: torch.device) -> None:
        """Raise ValueError, naming the mask, for ids that are not M and N on `device`."""
        for rule, *sides in self.parts:
            for name, ids, length in zip(("row_ids", "col_ids"), sides, (M, N), strict=True):
                if ids is not None and (len(ids) != length or ids.device != device):
                    raise ValueError(
                        f"{name} of mask {rule.name!r} must be ({length},) on {device}, "
                        f"got {tuple(ids.shape)} on {ids.device}"
                    )

    def keep(self, M: int, N: int, device: torch.device) -> Tensor:
        """The whole (M, N) bool tensor, which only a reference makes."""
        tile = Tile(self.key, *self.ids(), device)
        return tile.keep(slice(0, M), slice(0, N)).expand(M, N)


class Tile:
    """What an implementation asks: which pairs of a slice of rows and one of columns are kept."""

    def __init__(
        self, key: str, row_ids: Tensor | None, col_ids: Tensor | None, device: torch.device
    ) -> None:
        self.rules, self.places = decode(key)
        self.row_ids, self.col_ids, self.device = row_ids, col_ids, device

    def drop(self, s: Tensor, rows: slice, cols: slice) -> Tensor:
        """The tile s of scores with the pairs that are not kept at -inf, in place."""
        if self.rules:
            line = self._dropped_line(s, rows, cols)
            if line is None:
                s.masked_fill_(self.keep(rows, cols).logical_not(), -math.inf)
            else:
                line.fill_(-math.inf)
        return s

    def _dropped_line(self, s: Tensor, rows: slice, cols: slice) -> Tensor | None:
        """A view of the pairs that one rule on positions drops, where they are a diagonal of s.

        To fill it costs a row's time, where a comparison of all positions costs the tile's.
        """
        if self.places != (-1,):
            return None
        offset = rows.start - cols.start
        if self.rules[0] in (exclude_self, different_group):
            return s.diagonal(offset)
        blocks = all(n % 2 == 0 for n in (*s.shape, rows.start, cols.start))
        if self.rules[0] is exclude_self_and_pair and blocks:
            return s.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).diagonal(offset // 2, 0, 2)
        return None

    def keep(self, rows: slice, cols: slice) -> Tensor:
        """A bool tensor that broadcasts to the tile."""
        kept_by_all = None
        for rule, place in zip(self.rules, self.places, strict=True):
            if place < 0 or self.row_ids is None or self.col_ids is None:
                i = torch.arange(rows.start, rows.stop, device=self.device)
                j = torch.arange(cols.start, cols.stop, device=self.device)
            else:
                i, j = self.row_ids[place, rows], self.col_ids[place, cols]
            kept = rule.keep(i[:, None], j[None, :])
            kept_by_all = kept if kept_by_all is None else kept_by_all & kept
        return (
            torch.ones(1, 1, dtype=torch.bool, device=self.device)
            if kept_by_all is None
            else kept_by_all
        )


def decode(key: str) -> tuple[tuple[PairMask, ...], tuple[int, ...]]:
    """The rules of a `Masks.key`, and the place of each one's ids."""
    parts = [part.rpartition("@") for part in key.split("|") if part]
    return tuple(_rules[name] for name, _, _ in parts), tuple(int(at) for _, _, at in parts)


class TritonRules(tuple[Any, ...]):
    """Rules for Triton, whose cache on the disk knows an argument by its cache_key, if it has one.

    Of a plain tuple it takes the functions' names alone: a rule of the same name that was edited
    would run as it was compiled before.
    """

    @property
    def cache_key(self) -> str:
        return "-".join(rule.cache_key for rule in self)


def triton_rules(key: str) -> tuple[TritonRules, tuple[int, ...]]:
    """RULES and PLACES of a `Masks.key`, as the Triton kernels take them."""
    from . import masks_triton

    rules, places = decode(key)
    twins = (rule.triton for rule in rules)
    found = (getattr(masks_triton, t.name) if type(t) is _Own else t for t in twins)
    return TritonRules(found), places


def unequal(key: str) -> tuple[int, ...]:
    """UNEQUAL of a `Masks.key`: by rule 1 where it keeps all unequal ids, 0 where none, else -1."""
    return tuple(-1 if rule.unequal is None else int(rule.unequal) for rule in decode(key)[0])


def id_ranges(key: str, ids: Tensor | None, step: int) -> tuple[Tensor | None, Tensor | None]:
    """The least and the greatest of each `step` ids (P, N), (P, N / step); None if no rule asks."""
    if ids is None or all(answer < 0 for answer in unequal(key)):
        return None, None
    P, N = ids.shape
    if N % step:
        ids = torch.cat([ids, ids[:, -1:].expand(P, -N % step)], 1)
    return torch.aminmax(ids.view(P, -1, step), dim=2)


def as_masks(mask: Any) -> Masks:
    """A rule by itself judges positions; None keeps every pair.

    Raises ValueError for anything else.
    """
    if mask is None:
        return Masks()
    if isinstance(mask, PairMask):
        return Masks((Part(mask),))
    if not isinstance(mask, Masks):
        raise ValueError(f"mask must be a PairMask, one given ids, or None, got {describe(mask)}")
    return mask


def _ids(mask: str, name: str, ids: Tensor) -> Tensor:
    if not isinstance(ids, Tensor) or ids.ndim != 1 or ids.dtype not in _INTEGERS:
        got = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else describe(ids)
        raise ValueError(f"{name} of mask {mask!r} must be one-dimensional integers, got {got}")
    return ids.to(torch.int64)


def describe(x: Any) -> str:
    """What was given instead of a mask or ids, without its values."""
    if isinstance(x, Tensor):
        return (
            f"a {tuple(x.shape)} {x.dtype} tensor: a mask is a rule on ids, as same_group(labels)"
        )
    return f"a {type(x).__name__}"


_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _rule(
    name: str, keep: Callable[[Tensor, Tensor], Tensor], unequal: bool | None = None
) -> PairMask:
    return PairMask(name, keep, symmetric=True, triton=_Own(name), unequal=unequal)


exclude_self = _rule("exclude_self", lambda i, j: i != j, unequal=True)
exclude_self_and_pair = _rule("exclude_self_and_pair", lambda i, j: i // 2 != j // 2)
same_group = _rule("same_group", lambda i, j: i == j, unequal=False)
different_group = _rule("different_group", lambda i, j: i != j, unequal=True)
