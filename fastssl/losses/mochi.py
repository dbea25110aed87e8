"""MoCHi: MoCo with harder negatives, mixed of those that are hard already."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import Group
from fastssl.kernels import pairwise_lse, pairwise_topk
from fastssl.losses._checks import check_batch, check_counts
from fastssl.losses._contrastive import ContrastiveLoss, info_nce, joined_ids
from fastssl.losses._unit import unit
from fastssl.losses.queue import Queue
from fastssl.random import finish, uniform


class MoCHiLoss(ContrastiveLoss):
    """MoCo's loss, where each query also meets synthetic negatives made for it.

    Of the top_n keys of the queue most alike to query q, picked at random with replacement:

        h_k  = normalize(a_k n_i + (1 - a_k) n_j)      a_k ~ U(0, 1)      s of them
        h'_k = normalize(b_k q + (1 - b_k) n_j)        b_k ~ U(0, 0.5)    s_prime of them

    The formula of the loss is `mochi_reference`, in nats.  The synthetic ones are constants: no
    gradient passes through them to q.  s = s_prime = 0 is MoCo, as for a warm-up: both may be set
    between steps.

    Shapes   query, key (B, dim): normalized here; any float dtype.  key gets no gradient.
    Returns  scalar float32: the mean over this rank's B queries.  0 <= loss.
    State    queue: a `Queue` of `size` keys; steps, 0-d int64, how often the queue was moved.  The
             draws depend on it and a query's place in the joined batch alone.  Both are
             in state_dict.
    Memory   B (s + s_prime) dim floats, a few times over; nothing of B x size is held.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank;
             temperature not > 0; size or dim below 1; top_n outside 1..size; s or s_prime below 0.
    Ranks    every rank has the same queue, meets it with its own queries, and draws what one
             process would: the mean over ranks of value and gradient is the joined batch's.
    Source   Kalantidis et al. 2020, arXiv:2010.01028, sections 3.2, 4.1 and 4.2.

    >>> loss = MoCHiLoss(4, temperature=1.0, size=2, top_n=1, s=1, s_prime=0)
    >>> _ = loss.queue.push(torch.eye(4)[:2])
    >>> z = torch.eye(4)[2:]
    >>> round(loss(z, z).item(), 4)  # two keys and their mix: ln(e + 3) - 1
    0.7437
    """

    steps: Tensor
    shown = ("temperature", "top_n", "s", "s_prime")

    def __init__(
        self,
        dim: int,
        temperature: float = 0.2,
        size: int = 65536,
        *,
        top_n: int = 1024,
        s: int = 1024,
        s_prime: int = 128,
        process_group: Group = None,
    ) -> None:
        super().__init__(temperature, process_group=process_group)
        self.queue = Queue(size, dim)
        check_counts(top_n=top_n)
        check_counts(0, s=s, s_prime=s_prime)
        if top_n > size:
            raise ValueError(f"top_n must be at most size = {size}, got {top_n}")
        self.top_n, self.s, self.s_prime = top_n, s, s_prime
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, query: Tensor, key: Tensor, *, update: bool = True) -> Tensor:
        check_batch(self.process_group, query=query, key=key)
        self.queue.fit(key)
        q, t = unit(query), self.temperature
        keys = self.queue.keys.to(q)
        positive = (q * unit(key.detach())).sum(-1) / t
        rows = q.to(query.dtype)  # see TwoViews
        negative = pairwise_lse(rows, keys.to(rows), 1 / t)
        if self.s + self.s_prime > 0:
            scores = torch.einsum("bd,bsd->bs", q, self._mix_negatives(q, keys)) / t
            negative = torch.logaddexp(negative, scores.logsumexp(1))
        if self.training and update:
            self.remember(key)
        return info_nce(positive, negative).mean()

    def remember(self, key: Tensor) -> None:
        """Every rank's keys (B, dim) take the oldest ones' place; the next step draws anew."""
        self.queue.push(key, self.process_group, check=False)
        self.steps.add_(1)

    @torch.no_grad()
    def _mix_negatives(self, q: Tensor, keys: Tensor) -> Tensor:
        """(B, s + s_prime, dim): each query's own negatives."""
        hardest = pairwise_topk(q, keys, self.top_n)[1]
        sizes = [self.s] * 3 + [self.s_prime] * 2
        rows = joined_ids(len(q), self.process_group, q.device)
        i, j, a, at, b = uniform(finish(self.steps + 1) + rows, sum(sizes)).split(sizes, 1)

        def pick(place: Tensor) -> Tensor:
            return keys[hardest.gather(1, (place * self.top_n).long())]

        a, b = a.unsqueeze(-1), b.unsqueeze(-1) / 2
        pairs = a * pick(i) + (1 - a) * pick(j)
        with_query = b * q.unsqueeze(1) + (1 - b) * pick(at)
        return F.normalize(torch.cat([pairs, with_query], dim=1), dim=-1)


def mochi_reference(
    query: Tensor, key: Tensor, queue: Tensor, synthetic: Tensor, temperature: float
) -> Tensor:
    """The formula, all scores at once; queue (size, D), synthetic (B, s + s_prime, D) as drawn."""
    q, k = unit(query), unit(key.detach())
    mixed = torch.einsum("bd,bsd->bs", q, synthetic.to(q))
    scores = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.to(q).T, mixed], dim=1)
    return F.cross_entropy(scores / temperature, scores.new_zeros(len(q), dtype=torch.int64))
