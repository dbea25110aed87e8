"""Heads that stand between an encoder and its loss."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from fastssl.distributed import world_size
from fastssl.kernels import column_moments, standardize


class BatchNorm1d(nn.BatchNorm1d):
    """Batch normalisation over the *global* batch (N, D), exact value and gradient on any back end.

    torch's SyncBatchNorm refuses CPU tensors; a projection head's statistics are part of the loss,
    so they must be those of the joined batch under gloo as well.
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167; biased variance, unbiased running variance.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        with torch.no_grad():
            self._track(input)
        x = standardize(input, eps=self.eps)
        x = x if self.weight is None else x * self.weight + self.bias
        return x.to(input.dtype)

    def _track(self, x: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        mean, var = column_moments(x)
        n = x.shape[0] * world_size()
        assert self.momentum is not None, "a cumulative average is not offered across ranks"
        momentum = self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((var * n / max(n - 1, 1)).to(self.running_var.dtype), momentum)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def widen_batch_norms(model: nn.Module) -> None:
    """Let every batch norm of a bfloat16 model compute in float32, as its statistics are.

    The engine casts parameters and leaves buffers; torch refuses the mixture.  The layer then sees
    float32 copies of its weight and bias; names, parameters and state_dict stay as they are.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
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
