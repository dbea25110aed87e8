"""Rows whose nested prefixes are compared: their scaling, their lengths, and the way back.

    a_pi = 1 / |x_i over the features of prefix p|, or 0 where that prefix is zero
    b_ci = a_pi of the least p >= c whose prefix is not zero, or 1
    y_ci = b_ci x_ci, the features that prefix c adds: of length 1 at most

Each row is multiplied by a power of two first, which is exact, so that float32 can add the squares
and the products of rows of any size.  A prefix below 1e-27 of its row's largest number counts as
zero, with gradient zero (float16 has none so faint).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.autograd import accumulator

LEAST_SQUARE = 1e-36  # of a prefix's length
HIGHEST = {torch.float16: 16, torch.float64: 400}  # the exponent of rows' largest numbers
STEEPEST = {torch.float64: 1000}  # of a power of two


class Rows:
    """x (N, D), with every prefix's end at a multiple of `even`, where zeros fill up.

    dims: where the prefixes end in the rows as they were given; ends: where they do here, with 0.
    power (N, 1) and inverse (P, N) are None for prefixes that stay as long as they are.
    """

    def __init__(self, x: Tensor, dims: Sequence[int], normalize: bool, even: int = 1) -> None:
        self.dims, self.width, self.power = tuple(dims), x.shape[1], None
        x = x[:, : dims[-1]]
        if normalize:
            self.power = power_of_two(x)
            x = (x.to(self.power.dtype) * self.power).to(x.dtype)
        self.x, self.ends = _evened(x, self.dims, even)
        self.inverse = inverse_lengths(self.x, self.ends) if normalize else None

    def __len__(self) -> int:
        return len(self.x)

    @property
    def parts(self) -> list[slice]:
        """The features that each prefix adds."""
        return [slice(a, b) for a, b in zip(self.ends, self.ends[1:], strict=False)]

    @cached_property
    def factors(self) -> Tensor:
        """a (P, N) in the dtype of sums: 1 where the rows stay as long as they are."""
        if self.inverse is not None:
            return self.inverse
        return self.x.new_ones(len(self.dims), len(self), dtype=accumulator(self.x.dtype))

    def side(self, weights: Tensor | None) -> Tensor:
        """(P, N, 3): a and the weights' m and w of each row, so that one address serves them."""
        a = self.factors
        return torch.stack([a, *(a.new_zeros(2, *a.shape) if weights is None else weights)], 2)

    def prefix(self, p: int) -> Tensor:
        """The rows' first features, of length one where they are to be."""
        x = self.x[:, : self.ends[p + 1]]
        return x if self.inverse is None else x * self.inverse[p].unsqueeze(1)

    @cached_property
    def references(self) -> Tensor:
        """b (P + 1, N), of rows with lengths; the last are 1."""
        inverse: Any = self.inverse
        found = [torch.ones_like(inverse[0])]
        for a in inverse.flip(0):
            found.append(torch.where(a > 0, a, found[-1]))
        return torch.stack(found[::-1])

    @cached_property
    def ratios(self) -> Tensor | None:
        """b_p+1 / b_p, (P, N)."""
        return None if self.inverse is None else self.references[1:] / self.references[:-1]

    @cached_property
    def referred(self) -> list[Tensor]:
        """y_c, in the dtype of x."""
        if self.inverse is None:
            return [self.x[:, part] for part in self.parts]
        pairs = zip(self.parts, self.references.unsqueeze(2), strict=False)
        return [(self.x[:, part] * b).to(self.x.dtype) for part, b in pairs]

    def gradient(self, by_part: Sequence[Tensor], scale: Tensor, radial: Tensor) -> Tensor:
        """(N, D) to the rows as given, of u_c by part, which are used up.

        radial (P, N): the sums of W times cosine, which the lengths take away.
        """
        if self.inverse is not None:
            along = (radial * self.inverse * self.inverse).flip(0).cumsum(0).flip(0).unsqueeze(2)
            each = zip(by_part, self.references.unsqueeze(2), self.parts, along, strict=False)
            for u, b, part, t in each:
                u.mul_(b).addcmul_(self.x[:, part].to(u.dtype), t, value=-1)
        widths = [b - a for a, b in zip((0, *self.dims), self.dims, strict=False)]
        made = [u[:, :width] for u, width in zip(by_part, widths, strict=True)]
        dx = F.pad(torch.cat(made, 1), (0, self.width - self.dims[-1])) * scale
        return dx if self.power is None else dx.mul_(self.power)


def power_of_two(x: Tensor) -> Tensor:
    """(N, 1), by which the largest number of each row gets the dtype's HIGHEST exponent."""
    _, exponent = torch.frexp(x.detach().abs().amax(1, keepdim=True).to(accumulator(x.dtype)))
    missing = HIGHEST.get(x.dtype, 30) - exponent
    one = torch.ones_like(missing, dtype=accumulator(x.dtype))
    return torch.ldexp(one, missing.clamp_max(STEEPEST.get(x.dtype, 126)))


def prefix_sums(by_part: Sequence[Tensor]) -> Tensor:
    """(P, N) sums over each prefix, of those over what it adds."""
    return torch.stack(tuple(by_part)).cumsum(0)


def inverse_lengths(x: Tensor, ends: Sequence[int]) -> Tensor:
    """a (P, N) of rows, in the dtype of sums."""
    acc = accumulator(x.dtype)
    pairs = zip(ends, ends[1:], strict=False)
    squares = [torch.linalg.vector_norm(x[:, a:b], dim=1, dtype=acc).square() for a, b in pairs]
    length = prefix_sums(squares)
    there = length >= LEAST_SQUARE
    return torch.where(there, length, 1).sqrt().reciprocal() * there


def _evened(x: Tensor, dims: tuple[int, ...], even: int) -> tuple[Tensor, tuple[int, ...]]:
    if not any(m % even for m in dims):
        plain = x.stride(1) == 1 and x.stride(0) % even == 0
        return x if plain else x.contiguous(), (0, *dims)
    parts = [x[:, a:b] for a, b in zip((0, *dims), dims, strict=False)]
    padded = [F.pad(part, (0, -part.shape[1] % even)) for part in parts]
    widths = (part.shape[1] for part in padded)
    return torch.cat(padded, 1), tuple(accumulate(widths, initial=0))


class Nested(NamedTuple):
    """What the scores are made of.

    scale 0-d; row_ids (T, M), col_ids (T, N) or None and mask: those of `Masks.ids` and
    `Masks.key`.  same: k is q, and the scores symmetric.
    """

    q: Rows
    k: Rows
    scale: Tensor
    row_ids: Tensor | None
    col_ids: Tensor | None
    mask: str
    same: bool
