"""Heads that stand between an encoder and its loss, and batch norms over every rank's rows."""

from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.distributed import all_gather_nograd, all_reduce_sum, world_size
from fastssl.kernels.common import FirstOrder, first_order

from .frozen import moving_in


class _GlobalNorm(FirstOrder):
    """x (N, C, ...) normalized by the joined batch's statistics, and those: (C,), biased variance.

    Every rank has as many rows.  Statistics are float32 at least; the gradient goes through them.
    """

    whose, instead = "a batch norm over all ranks", "take torch's own, of each rank's rows alone"

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
        wide = x if x.dtype == torch.float64 else x.float()
        own = torch.stack(torch.var_mean(wide, _all_but_channels(x), correction=0))
        variances, means = all_gather_nograd(own[None], check=False).unbind(1)
        mean = means.mean(0)
        var = (variances + (means - mean).square()).mean(0)
        weight_, bias_ = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.mark_non_differentiable(mean, var)
        return F.batch_norm(x, mean, var, weight_, bias_, eps=eps), mean, var

    @staticmethod
    @partial(first_order, whose=whose, instead=instead)
    def backward(ctx: Any, grad: Tensor, *_: Any):
        x, weight, mean, scale = ctx.saved_tensors

        def per_channel(v: Tensor) -> Tensor:
            return v.view(-1, *[1] * (x.ndim - 2))

        z = (x - per_channel(mean)) * per_channel(scale)
        dims, grad = _all_but_channels(x), grad.to(z.dtype)
        sums = torch.stack([grad.sum(dims), (grad * z).sum(dims)])
        count = x.numel() // x.shape[1] * world_size()
        shared = all_reduce_sum(sums) / count
        slope = scale if weight is None else scale * weight
        dx = per_channel(slope) * (grad - per_channel(shared[0]) - z * per_channel(shared[1]))
        affine = (None, None) if weight is None else (sums[1].to(weight), sums[0].to(weight))
        return dx.to(x.dtype), *affine, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _normalize_globally(norm: _BatchNorm, x: Tensor) -> Tensor:
    norm._check_input_dim(x)
    count = x.numel() // x.shape[1] * world_size()
    if count < 2:
        raise ValueError(f"batch normalization needs 2 values a channel, got {tuple(x.shape)}")
    y, mean, var = _GlobalNorm.call(x, norm.weight, norm.bias, norm.eps)  # type: ignore[misc]
    if norm.running_mean is not None and norm.running_var is not None:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        seen = float(norm.num_batches_tracked) if norm.momentum is None else 1 / norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean), 1 / seen)
        norm.running_var.lerp_((var * count / (count - 1)).to(norm.running_var), 1 / seen)
    return y


class BatchNorm1d(nn.BatchNorm1d):
    """Batch normalization over the *global* batch (N, D), exact value and gradient on any back end.

    torch's SyncBatchNorm refuses CPU tensors; a projection head's statistics are part of the loss,
    so they must be those of the joined batch under gloo as well.  Every rank has as many rows.
    Raises ValueError for fewer than 2 rows in all.
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167; biased variance, unbiased running variance.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        return _normalize_globally(self, input)


def synchronize_batch_norms(model: nn.Module) -> int:
    """Let torch's and timm's batch norms train on the batch of all ranks; how many there are.

    Names, parameters and state_dict stay as they are.
    """
    norms = [m for m in moving_in(model) if isinstance(m, _BatchNorm) and not is_global(m)]
    for norm in norms:
        plain = type(norm).forward is _BatchNorm.forward
        if plain or hasattr(norm, "act"):  # else it computes something of its own
            norm.__class__ = _synchronized(type(norm))
    return len(norms)


def is_global(module: nn.Module) -> bool:
    """Whether a module is a batch norm whose statistics are those of all ranks."""
    return isinstance(module, BatchNorm1d) or hasattr(module, "synchronized")


@lru_cache
def _synchronized(kind: type) -> type:
    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return kind.forward(self, x)  # type: ignore[attr-defined]
        y = _normalize_globally(self, x)
        return self.act(self.drop(y)) if hasattr(self, "act") else y  # timm's BatchNormAct2d

    return type(kind.__name__, (kind,), {"forward": forward, "synchronized": True})


@torch.no_grad()
def average_running_statistics(model: nn.Module) -> None:
    """Replace running statistics that ranks keep apart by their mean over the ranks.  Collective.

    They are moving averages, so that to average after each step or once at the end is the same.
    """
    if world_size() == 1:
        return
    statistics = [
        buffer
        for module in moving_in(model)
        if not is_global(module)
        for name, buffer in module.named_buffers(recurse=False)
        if name.startswith("running_")
    ]
    if statistics:
        mean = all_reduce_sum(torch.cat([b.flatten().float() for b in statistics])) / world_size()
        parts = mean.split([b.numel() for b in statistics])
        for buffer, part in zip(statistics, parts, strict=True):
            buffer.copy_(part.view_as(buffer))


def widen_batch_norms(model: nn.Module) -> None:
    """Let every batch norm of a bfloat16 model compute in float32, as its statistics are.

    The engine casts parameters and leaves buffers; torch refuses the mixture.  The layer then sees
    float32 copies of its weight and bias; names, parameters and state_dict stay as they are.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = _widened(type(module))


@lru_cache
def _widened(kind: type) -> type:
    def wide(name: str) -> property:
        def get(module: nn.Module) -> Tensor | None:
            value = module._parameters[name]
            return None if value is None else value.float()

        return property(get)

    return type(kind.__name__, (kind,), {"weight": wide("weight"), "bias": wide("bias")})


def projection_head(dim: int, hidden: int, out: int, layers: int, *, final_norm: bool):
    """Linear - batch norm - ReLU, `layers` times, the last one without ReLU: (B, dim) -> (B, out).

    final_norm: batch norm after the last layer as well (as SimCLR and MoCo v3; not Barlow Twins).
    Raises ValueError for fewer than one layer.
    """
    if layers < 1:
        raise ValueError(f"a projection head needs at least 1 layer, got layers={layers}")
    widths = [dim, *[hidden] * (layers - 1), out]
    modules: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        normed = final_norm or not last
        modules.append(nn.Linear(widths[i], widths[i + 1], bias=not normed))
        if normed:
            modules.append(BatchNorm1d(widths[i + 1], affine=not last))
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)
