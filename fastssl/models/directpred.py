"""DirectPred: a predictor that is computed from what it is shown, not trained.

    F <- rho F + (1 - rho) mean_n x_n x_n^T          x (N, D): the predictor's inputs; F: D x D
    F = U diag(lambda) U^T          s_j = max(lambda_j, 0) / max_k lambda_k
    W = U diag(sqrt(s_j) + eps) U^T          predictor(x) = x W

The first batch sets F.  F is a correlation about 0: means are not taken away.  Dividing by the
largest eigenvalue makes the largest of W 1 + eps; the paper's eps * max_j s_j is then eps.  W does
not see how large the inputs are, and the loss it is made for, on normalized rows, would not either.
Why: in BYOL and SimSiam a trained linear predictor aligns its eigenvectors with F's, slowly; this
sets them.  Cost: a product of N D^2 at each update, an eigendecomposition of O(D^3) at every
`every`-th.
Source: Tian, Chen & Ganguli 2021, arXiv:2102.06810, equations 18 and 19; the division as in the
authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.distributed import LOCAL, Group, all_reduce_sum, require_even, world_size


class DirectPred(nn.Module):
    """The linear map W of its inputs' running correlation; its weights are never trained.

    Shapes   forward: (..., dim) -> (..., dim) in x's dtype; gradients reach x, and W has none.
             update: x (N, dim), any float: the inputs of a step, all views' rows together.
    State    weight (dim, dim), symmetric, its eigenvalues in [eps, 1 + eps]; the identity before
             the first update.  correlation (dim, dim), 0 before it.  updates, int64.  Buffers,
             float32, in state_dict.
    Use      update() after the step; forward() only reads, so that it may be repeated.  W is
             computed anew at the first update and at every `every`-th after it.
    Raises   ValueError: dim < 1, rho outside [0, 1), eps < 0, every < 1; inputs of another width;
             updates that are not (N, dim) floats with a row, or differ between ranks (on every
             rank).  A non-finite input is not an error here: it makes W nan, and so the loss.
    Ranks    the correlation is the joined batch's: W is the same on every rank, and as in one
             process.  process_group=LOCAL: of this rank's rows alone, and W differs.
    Source   Tian et al. 2021, arXiv:2102.06810; rho and eps as in the authors' own example.

    >>> head = DirectPred(2, eps=0.1)
    >>> head.update(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))  # F = diag(4, 1) / 2
    >>> head(torch.eye(2))
    tensor([[1.1000, 0.0000],
            [0.0000, 0.6000]])
    """

    weight: Tensor
    correlation: Tensor
    updates: Tensor

    def __init__(
        self,
        dim: int,
        *,
        rho: float = 0.3,
        eps: float = 0.01,
        every: int = 1,
        process_group: Group = None,
    ) -> None:
        super().__init__()
        if dim < 1 or every < 1:
            raise ValueError(f"dim and every must be at least 1, got {dim} and {every}")
        if not 0 <= rho < 1:
            raise ValueError(f"rho must lie in [0, 1), got {rho}")
        if not eps >= 0:
            raise ValueError(f"eps must be >= 0, got {eps}")
        self.dim, self.rho, self.eps, self.every = dim, rho, eps, every
        self.process_group = process_group
        self.steps = 0  # as `updates`, on the host: a choice by a device's number would wait for it
        self.register_buffer("weight", torch.eye(dim))
        self.register_buffer("correlation", torch.zeros(dim, dim))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim:
            raise ValueError(f"x must be (..., {self.dim}), got {tuple(x.shape)}")
        return x @ self.weight.to(x.dtype)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Take a step's inputs (N, dim) into the correlation, and W from that when it is time."""
        require_even(x, self.process_group)
        if x.ndim != 2 or x.shape[1] != self.dim or not len(x) or not x.is_floating_point():
            got = f"{tuple(x.shape)} {x.dtype}"
            raise ValueError(f"x must be (N, {self.dim}) floats with a row, got {got}")
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.correlation)
            n = len(x) * world_size(self.process_group)
            now = all_reduce_sum(x.T @ x, self.process_group) / n
            self.correlation.lerp_(now, 1 - self.rho if self.steps else 1.0)
            if self.steps % self.every == 0:
                self.weight.copy_(_predictor(self.correlation, self.eps))
        self.steps += 1
        self.updates.add_(1)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self.steps = int(self.updates)

    def extra_repr(self) -> str:
        alone = ", process_group=LOCAL" if self.process_group == LOCAL else ""
        return f"dim={self.dim}, rho={self.rho}, eps={self.eps}, every={self.every}{alone}"


def _predictor(correlation: Tensor, eps: float) -> Tensor:
    """W of F; nan when F is not finite, which no eigendecomposition takes."""
    finite = correlation.isfinite()
    values, vectors = torch.linalg.eigh(torch.where(finite, correlation, 0))
    largest = values[-1].clamp_min(torch.finfo(values.dtype).tiny)  # all inputs 0: W = eps I
    p = (values.clamp_min(0) / largest).sqrt() + eps
    w = (vectors * p) @ vectors.T
    return torch.where(finite.all(), (w + w.T) / 2, torch.nan)
