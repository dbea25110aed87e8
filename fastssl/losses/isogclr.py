"""Contrast with a temperature for each image, and normalizers that remember past batches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.distributed import Group, all_gather_nograd, all_reduce_sum, rank, world_size
from fastssl.kernels.common import can_read_values, refuse_torch_func
from fastssl.losses._checks import check_counts, check_not_negative, check_positive
from fastssl.losses._contrastive import ContrastiveLoss, twice
from fastssl.losses._unit import unit


class ISogCLRLoss(ContrastiveLoss):
    """A global contrastive objective: each image has its own temperature and its own normalizer.

    Of a view z of image i, with s_j = z.z_j over the n = 2N - 2 views of the batch's other images:

        g = mean_j exp(s_j / t_i)         u = (1 - gamma) u_i + gamma g   (g on the first visit)

    The value and the gradient are those of `isogclr_reference`, two formulas: the value is a report
    alone.  u stands for the mean over the whole data set, so that a small batch has nearly the
    gradient of a large one.  Then, in training, unless update=False:

        G = log u + rho - mean_j exp(s_j / t_i) / u s_j / t_i, the objective's slope in t_i
        m_i = (1 - beta) m_i + beta G     G the two views' mean, cut to +-3
        t_i = t_i - eta m_i, kept in tau_range          u_i = the two views' mean u

    Shapes   out0, out1 (B, D): the two views of the same B images, row by row; any float dtype.
             index (B,): integers in [0, size), each image's place in the data set.  Of an image
             that a batch has twice, the last update is kept.
    Returns  scalar float32: the mean over this rank's 2B rows.  Nothing of N x N is held; G costs
             a second pass over the pairs, 6 units where the loss alone has 4 (`pairwise_lse`).
             torch.compile breaks its graph there.
    State    t_i, log u_i and m_i: 12 bytes an image, float32.  Rank r of W keeps images r, r + W,
             ...  state_dict has this rank's alone: each rank saves and loads its own.
             `gather_state` and `load_state` have all of it, for another number of ranks.
             sharded=False: every rank keeps every image's, in a buffer, which any number of ranks
             loads; nothing is sent to read it.
             Without gradients, in eval(), and for an image whose new numbers would not be finite,
             nothing is updated.  `measure` and `remember` are the two halves of a call, for who
             knows only after the loss whether its step counts.
    Fixed    gamma = 0.8, beta = 0.9, as the authors' code: attributes, to be set if need be.
    Raises   ValueError: other shapes, dtypes or devices, or other ones on another rank; an index
             (on a CPU, where looking costs no wait) outside the data set; a joined batch of one
             image; size < 1; not 0 < tau_range[0] <= tau_init <= tau_range[1]; rho or eta < 0;
             more ranks than when it was made.
    Ranks    as one process with the joined batch: value, mean gradient, and state.
    Source   Qiu et al. 2023, arXiv:2305.11965, algorithm 1; as in the authors' code for images,
             the positive stands outside u, and G is cut.  Their loss is the sum of the two views',
             which here are averaged, and their value the gradient's linear form.

    >>> loss, z = ISogCLRLoss(size=9, tau_init=1.0, rho=0.5), torch.eye(4)
    >>> round(loss(z, z, torch.arange(4)).item(), 4)  # u = 1, so rho - 1
    -0.5
    """

    gamma, beta, grad_clip = 0.8, 0.9, 3.0
    shown = ("size", "tau_range", "rho", "eta")

    def __init__(
        self,
        size: int,
        tau_init: float = 0.07,
        tau_range: tuple[float, float] = (0.05, 1.0),
        rho: float = 6.0,
        eta: float = 1e-3,
        process_group: Group = None,
        strategy: str = "gather",
        *,
        sharded: bool = True,
    ) -> None:
        check_positive(tau_init=tau_init)
        super().__init__(tau_init, process_group=process_group, strategy=strategy)
        check_counts(size=size)
        if not 0 < tau_range[0] <= tau_init <= tau_range[1] < math.inf:
            got = f"{tau_init} and {tau_range}"
            raise ValueError(f"tau_init must lie in tau_range, above 0, got {got}")
        check_not_negative(rho=rho, eta=eta)
        self.size, self.tau_range, self.rho, self.eta = size, tau_range, rho, eta
        self.samples = _Samples(size, (tau_init, -math.inf, 0.0), process_group, sharded)

    def forward(self, out0: Tensor, out1: Tensor, index: Tensor, *, update: bool = True) -> Tensor:
        loss, where, state = self._measure(out0, out1, index)
        if self._trains() and update:
            self.samples.write(where, state)
        return loss

    def measure(self, out0: Tensor, out1: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and what this rank's images (B, 3) are to `remember` of it."""
        loss, _, state = self._measure(out0, out1, index)
        return loss, state

    def remember(self, index: Tensor, state: Tensor) -> None:
        """Keep what `measure` gave for these images, of every rank."""
        self.samples.write(self.samples.places(index), state)

    def _trains(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _measure(self, out0: Tensor, out1: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, the places (W B,) of every rank's images, and this rank's new state (B, 3)."""
        refuse_torch_func()  # it asks for a gradient of its own
        views = self.two_views(out0, out1, least=2, index=index)
        log_n = math.log(2 * views.count - 2)
        where = self.samples.places(index)
        state = self.samples.read(where)
        tau, log_u, _ = state.to(views.rows).unsqueeze(1).unbind(-1)  # (b, 1) each
        train = self._trains()
        scale = twice(1 / tau.squeeze(1)).requires_grad_(train)
        lse = views.others(scale)
        log_g = (lse - log_n).detach()
        moved = torch.logaddexp(log_u + math.log1p(-self.gamma), log_g + math.log(self.gamma))
        now = torch.where(log_u == -math.inf, log_g, moved)
        if train:
            (slope,) = torch.autograd.grad(lse.sum(), scale, retain_graph=True)
            slope = slope.view_as(now) * (log_g - now).exp() / tau
            state = self._moved(state, now, (now + self.rho - slope).mean(1))
        value = tau * (now + self.rho)
        share = tau * (lse - log_n - now).exp()  # its gradient is the loss's, its value is not
        loss = (value + share - share.detach() - views.positives()).mean()
        return loss, where, state

    @torch.no_grad()
    def _moved(self, state: Tensor, log_u: Tensor, slope: Tensor) -> Tensor:
        slope = slope.clamp(-self.grad_clip, self.grad_clip)
        momentum = (1 - self.beta) * state[:, 2] + self.beta * slope
        tau = (state[:, 0] - self.eta * momentum).clamp(*self.tau_range)
        mean = log_u.logsumexp(1) - math.log(2)
        new = torch.stack([tau, mean, momentum], 1)
        # One bad batch must not stay with its images for ever.
        good = new.isfinite().all(1, keepdim=True)
        return torch.where(good, new, state)

    def gather_state(self) -> Tensor:
        """t, log u and m of every image, (size, 3) float32, on every rank: all must ask for it."""
        mine, size = self.samples.values[:-1], self.size
        if self.samples.sharded:
            mine = all_gather_nograd(mine, self.process_group, check=False)
        by_place = mine.unflatten(0, (self.samples.world, -1)).transpose(0, 1)
        return by_place.flatten(0, 1)[:size].clone()

    def load_state(self, state: Tensor) -> None:
        """Take what `gather_state` gave.  Raises ValueError unless it is (size, 3)."""
        if state.shape != (self.size, 3):
            raise ValueError(f"state must be ({self.size}, 3), got {tuple(state.shape)}")
        mine = state[self.samples.rank :: self.samples.world].to(self.samples.values)
        self.samples.values[: len(mine)] = mine

    def get_extra_state(self) -> dict[str, Any]:
        kept = {"values": self.samples.values[:-1].clone()} if self.samples.sharded else {}
        return {**kept, **self.samples.about()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        want = self.samples.about()
        got = {name: state[name] for name in want}
        if got != want:
            raise ValueError(f"want the per-sample state of {want}, got that of {got}")
        if self.samples.sharded:
            self.samples.values[:-1] = state["values"].to(self.samples.values)


class _Samples(nn.Module):
    """Three float32 numbers for each image of a data set: image i's on rank i % W, at i // W.

    Not sharded, each rank is as the one of W = 1.
    """

    values: Tensor

    def __init__(self, size: int, start: tuple[float, ...], group: Group, sharded: bool) -> None:
        super().__init__()
        self.size, self.group, self.sharded = size, group, sharded
        self.rank, self.world = (rank(group), world_size(group)) if sharded else (0, 1)
        rows = -(-size // self.world)
        # One row more, for writes of images that are other ranks'.
        values = torch.tensor(start, dtype=torch.float32).repeat(rows + 1, 1)
        if sharded:  # not a buffer: data-parallel wrappers would make rank 0's everybody's
            self.values = values
        else:
            self.register_buffer("values", values)

    def places(self, index: Tensor) -> Tensor:
        """Where the images of every rank's index (b,) are here, (W b,); the last row: not here."""
        if self.sharded and world_size(self.group) != self.world:
            ranks = f"{self.world} ranks, got {world_size(self.group)}"
            raise ValueError(f"this loss was made for {ranks}: join the ranks before making it")
        joined = all_gather_nograd(index.long(), self.group, check=False)
        if can_read_values(joined) and not 0 <= int(joined.min()) <= int(joined.max()) < self.size:
            seen = f"{int(joined.min())} to {int(joined.max())}"
            raise ValueError(f"index must be in [0, {self.size}), got {seen}")
        self.values = self.values.to(index.device)
        here = joined % self.world == self.rank
        return torch.where(here, joined // self.world, len(self.values) - 1)

    @torch.no_grad()
    def read(self, places: Tensor) -> Tensor:
        """(b, 3): the numbers of this rank's images, of every rank's places (W b,)."""
        numbers = self.values[places]
        if self.sharded:
            here = (places < len(self.values) - 1).unsqueeze(1)
            numbers = all_reduce_sum(torch.where(here, numbers, 0), self.group)
        return numbers.unflatten(0, (world_size(self.group), -1))[rank(self.group)]

    def write(self, places: Tensor, mine: Tensor) -> None:
        """Keep what is this rank's of every rank's (b, 3); of an image twice there, the last."""
        everyone = all_gather_nograd(mine.float(), self.group, check=False)
        sorted_places, order = places.sort(stable=True)
        last = order[torch.searchsorted(sorted_places, places, right=True) - 1]
        self.values.index_copy_(0, places, everyone[last])

    def about(self) -> dict[str, int]:
        return {"size": self.size, "rank": self.rank, "world": self.world}


def isogclr_reference(
    z0: Tensor, z1: Tensor, tau: Tensor, u: Tensor, rho: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The value and the gradient's linear form, and, for a step, u (B,) and the slope in tau (B,).

    tau, u (B,): each image's before the step, u 0 on the first visit.  The loss has the value of
    the first number and the gradient of the second.
    """
    z, n, t = unit(torch.cat([z0, z1])), 2 * len(z0) - 2, tau.repeat(2)
    image = torch.arange(len(z0), device=z.device).repeat(2)
    cosines = z @ z.T
    powers = (cosines.detach() / t[:, None]).exp() * (image[:, None] != image)  # e^(s_j / t)
    g, old = powers.sum(1) / n, u.repeat(2)
    new = torch.where(old == 0, g, (1 - gamma) * old + gamma * g)
    weights, positive = powers / new[:, None] / n, cosines.diagonal(len(z0)).repeat(2)
    value = (t * (new.log() + rho) - positive).mean()
    linear = ((weights * cosines).sum(1) - positive).mean()
    slope = new.log() + rho - (weights * cosines.detach()).sum(1) / t
    return value, linear, new.view(2, -1).mean(0), slope.view(2, -1).mean(0)
