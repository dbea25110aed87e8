"""Embeddings whose first few numbers are embeddings already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.losses._loss import Loss
from fastssl.losses._nested import nested_loss
from fastssl.losses._unit import unit


class MatryoshkaLoss(Loss):
    """The sum of one loss over nested prefixes of the embeddings: their first m of D numbers.

    The formula is `matryoshka_reference`.  A loss that normalizes its inputs, as ours do,
    normalizes each prefix on its own.

    loss     the loss; or one for each of dims, for those that keep state (a queue, per-sample
             temperatures): prefixes must not share it.
    dims     the prefixes' lengths, rising; the last is usually D.
    weights  w_m, one for each of dims; None: all 1.
    normalize  make the prefixes' rows one long, for a loss that takes them as they are: CLIPLoss,
             SigLIPLoss.
    Inputs   what the loss takes, by place or by name.  Cut are the floating-point tensors of two or
             more axes, which must share their last one, D; labels, indices and a scale go as they
             are.
    Raises   ValueError: dims that do not rise from 1 or pass D; weights or losses that are not one
             for each of dims; a weight < 0; a single loss with state; no embedding among the
             inputs, or embeddings of different D.  And what the loss raises.
    Cost     the prefixes one after another: products of all dims together.  NTXentLoss and CLIPLoss
             take one sweep, with the products of the longest prefix alone: on a GPU; and in one
             process on a CPU, in float32 or float64, where temperature, scale or lengths tell that
             no score passes 40 in magnitude, and the scores of all prefixes fit into 64 MiB.
    Ranks    as the loss: a sum of exact losses is exact.  Those two gather once for all prefixes,
             and not once for each; by strategy="ring" they are taken one after another.
    Source   Kusupati et al. 2022, Matryoshka Representation Learning, arXiv:2205.13147, eq. 1.

    >>> from fastssl.losses import NTXentLoss
    >>> loss = MatryoshkaLoss(NTXentLoss(temperature=0.5), dims=(2, 4))
    >>> z = torch.ones(4, 4)
    >>> round(loss(z, z).item(), 4)  # 2 ln 7
    3.8918
    """

    shown = ("dims", "weights")

    def __init__(
        self,
        loss: nn.Module | Iterable[nn.Module],
        dims: Sequence[int] = (8, 16, 32, 64, 128),
        weights: Sequence[float] | None = None,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        whole = all(isinstance(m, int) for m in dims)
        if not dims or not whole or any(a >= b for a, b in zip((0, *dims), dims, strict=False)):
            raise ValueError(f"dims must be integers that rise from 1 or more, got {tuple(dims)}")
        weights = [1.0] * len(dims) if weights is None else list(weights)
        if len(weights) != len(dims) or not all(0 <= w < float("inf") for w in weights):
            want = f"{len(dims)} finite numbers >= 0"
            raise ValueError(f"weights must be {want}, one for each of dims, got {weights}")
        one = isinstance(loss, nn.Module)
        if one and _has_state(loss):
            raise ValueError(f"a loss with state must be given once for each of dims, got {loss}")
        losses = [loss] if isinstance(loss, nn.Module) else list(loss)
        if not one and len(losses) != len(dims):
            raise ValueError(f"loss must be one, or {len(dims)} as dims, got {len(losses)}")
        self.losses = nn.ModuleList(losses)
        self.dims, self.weights, self.normalize = tuple(dims), weights, normalize

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        cut = [x for x in (*inputs, *named.values()) if _is_embedding(x)]
        widths = {x.shape[-1] for x in cut}
        if len(widths) != 1 or min(widths) < self.dims[-1]:
            got = [tuple(x.shape) for x in cut]
            raise ValueError(f"want embeddings (..., D) of one D >= {self.dims[-1]}, got {got}")
        at_once = None
        if len(self.losses) == 1:
            options = self.dims, self.weights, self.normalize
            at_once = nested_loss(self.losses[0], *options, inputs, named)
        if at_once is not None:
            return at_once
        losses = list(self.losses) * (len(self.dims) if len(self.losses) == 1 else 1)
        values = []
        for loss, m, weight in zip(losses, self.dims, self.weights, strict=True):
            prefixes = {name: self._prefix(x, m) for name, x in named.items()}
            values.append(weight * loss(*(self._prefix(x, m) for x in inputs), **prefixes))
        return torch.stack(values).sum()

    def _prefix(self, x: Any, m: int) -> Any:
        if not _is_embedding(x):
            return x
        return unit(x[..., :m]).to(x.dtype) if self.normalize else x[..., :m]


def _has_state(loss: nn.Module) -> bool:
    learnt = {name for name, _ in loss.named_parameters()}
    return bool(set(loss.state_dict()) - learnt or list(loss.buffers()))


def _is_embedding(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim > 1 and x.is_floating_point()


def matryoshka_reference(
    loss: Callable[[Tensor, Tensor], Tensor],
    z0: Tensor,
    z1: Tensor,
    dims: Sequence[int],
    weights: Sequence[float],
) -> Tensor:
    """The formula, of a loss of two embeddings (B, D)."""
    values = [w * loss(z0[:, :m], z1[:, :m]) for m, w in zip(dims, weights, strict=True)]
    return torch.stack(values).sum()
