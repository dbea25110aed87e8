"""Log-sum-exps over the pairs of a batch whose gathered keys would not fit on a rank.

Each rank keeps its own rows (q).  The blocks of keys (k) travel round the ring of W ranks:

    step t    rank r works on the keys of rank r - t, and sends them on to rank r + 1
    forward   the scores of its rows with those keys are added to two running log-sum-exps: that of
              its rows, which stays, and that of the keys, which travels with them and is sent
              back to its owner after the last step
    backward  the same steps; what travels with the keys is their gradient

At any time a rank holds two blocks beside its own: the one it works on, and the next, which it
receives meanwhile.  Where the scores are symmetric (k is q), W / 2 steps are enough, since the
scores of blocks i and j are those of j and i; where W is even, two ranks meet the same pair of
blocks in the last step, and the one of lower rank computes.
Source: the ring of Liu et al. 2023, arXiv:2310.01889, for a log-sum-exp instead of attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastssl.distributed import Group, rank, shift, world_size
from fastssl.kernels.common import FirstOrder, accumulator, first_order
from fastssl.kernels.pairwise import Masks, Pairs, blockwise


class _Journey:
    """The steps of the ring.  symmetric: half of them are enough."""

    def __init__(self, group: Group, symmetric: bool) -> None:
        self.group, self.symmetric = group, symmetric
        self.W, self.rank = world_size(group), rank(group)
        self.steps = self.W // 2 + 1 if symmetric else self.W

    def computes(self, t: int) -> bool:
        """Whether the pairs of step t are this rank's to compute."""
        met_twice = self.symmetric and 0 < t == self.W - t
        return not met_twice or self.rank < (self.rank - t) % self.W

    def visits(self, block: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yield (t, block) at each step, and receive the next block meanwhile.

        `block` itself, a list, is emptied and filled anew for the next step.
        """
        for t in range(self.steps):
            on_their_way = None if t + 1 == self.steps else shift(block, 1, self.group)
            yield t, block
            block.clear()
            if on_their_way is not None:
                block += on_their_way()

    def send_on(self, carried: Tensor, t: int) -> Tensor:
        """Send what belongs to the block that is here to the next rank, at the end to its owner."""
        return shift([carried], -t if t + 1 == self.steps else 1, self.group)()[0]


class _RingLSE(FirstOrder):
    """k is None for symmetric scores of q with itself."""

    @staticmethod
    def forward(ctx: Any, q, k, scale, row_ids, col_ids, *options):
        mask, both, engine, group = ctx.options = options
        same = k is None
        journey, scoring = _Journey(group, same), (scale, row_ids, mask)
        rows = _empty_statistics(len(q), q)
        of_block = _empty_statistics(len(q if same else k), q)  # its keys', by the ranks so far
        for t, block in journey.visits(_present(q if same else k, col_ids)):
            alone = same and t == 0
            if journey.computes(t):
                pairs = _pairs(q, block, scoring, alone)
                of_rows, of_cols = engine.statistics(pairs, (both or same) and not alone)
                del pairs  # and with it the block
                rows = engine.join(rows, of_rows)
                if of_cols.numel():
                    of_block = engine.join(of_block, of_cols)
            if both or same:
                of_block = journey.send_on(of_block, t)
        if same:
            rows = engine.join(rows, of_block)
        cols = of_block if both and not same else rows if both else rows.new_empty(2, 0)
        ctx.save_for_backward(q, k, scale, row_ids, col_ids, rows, cols)
        return engine.log_sum(rows), engine.log_sum(cols)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_rows, grad_cols):
        q, k, scale, row_ids, col_ids, rows, cols = ctx.saved_tensors
        mask, both, engine, group = ctx.options
        same = k is None
        if same and both:  # the two are one
            grad_rows = grad_rows + grad_cols
        mine = engine.weights(rows, grad_rows)
        theirs = mine if same else engine.weights(cols, grad_cols) if both else mine.new_empty(2, 0)
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1] or same, ctx.needs_input_grad[2])
        journey, scoring = _Journey(group, same), (scale, row_ids, mask)
        dq, carried = (torch.zeros_like(x, dtype=rows.dtype) for x in (q, q if same else k))
        dscale = torch.zeros_like(scale, dtype=rows.dtype)
        for t, block in journey.visits(_present(q if same else k, col_ids, theirs)):
            alone = same and t == 0
            if journey.computes(t):
                pairs, side = _pairs(q, block[:-1], scoring, alone), block[-1]
                side = None if alone or not side.numel() else side
                grads = engine.gradients(pairs, mine, side, (*need, False))
                del pairs, side
                dq += grads.q if need[0] else 0
                carried += grads.k if need[1] and not alone else 0
                dscale += grads.scale if need[2] else 0
            if need[1]:
                carried = journey.send_on(carried, t)
        if same:
            dq += carried
        dk = None if same or not need[1] else carried.to(k.dtype)
        return dq.to(q.dtype), dk, dscale.to(scale.dtype), *(None,) * 6


def _pairs(q: Tensor, block: list[Tensor], scoring: Any, alone: bool) -> Pairs:
    """This rank's rows and a block of keys, with their ids if there are any."""
    scale, row_ids, mask = scoring
    col_ids = block[1] if len(block) > 1 else None
    return Pairs(q, q if alone else block[0], scale, None, row_ids, col_ids, mask, alone)


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _empty_statistics(n: int, like: Tensor) -> Tensor:
    """Statistics (2, n) of no pair."""
    acc = accumulator(like.dtype)
    least = torch.finfo(torch.float32).min
    return torch.stack([torch.full((n,), least), torch.zeros(n)]).to(like.device, acc)


def ring_lse(q: Tensor, k: Tensor, scale: Tensor, masks: Masks, both: bool, group: Group):
    """`sharded_lse` by a ring.  masks: of this rank's rows and of its keys."""
    symmetric = q is k and scale.ndim == 0 and masks.symmetric
    engine, (row_ids, col_ids) = blockwise(q, masks), masks.ids()
    keys = None if symmetric else k
    return _RingLSE.call(q, keys, scale, row_ids, col_ids, masks.key, both, engine, group)
