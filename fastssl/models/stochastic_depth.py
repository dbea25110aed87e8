"""Stochastic depth that computes only the samples it keeps.

    x_b <- x_b + B / K branch(x_b)   for K = max(1, int(B (1 - rate))) random samples b of B
    x_b <- x_b                       for the others

Drop path computes a branch of every sample and throws a share of them away: at rate 0.4 that is
40 % of the blocks' work.  In expectation both are the same; here K is fixed.
Source: Oquab et al. 2023, DINOv2, arXiv:2304.07193, section 5, "Efficient stochastic depth".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from timm.layers import DropPath  # type: ignore[attr-defined]
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn


def drop_samples(vit: nn.Module, rate: float) -> None:
    """Let each branch of each block of a timm VisionTransformer or Eva leave out samples at `rate`,
    while it trains.

    Names, parameters and state_dict stay as they are.
    Raises ValueError for blocks of another kind, and where they have a drop path of their own.
    """
    if rate == 0:
        return
    for block in getattr(vit, "blocks", ()):
        if type(block) not in (Block, EvaBlock):
            raise ValueError(f"drop_path={rate} is for blocks of a plain ViT, got {type(block)}")
        if any(isinstance(m, DropPath) and m.drop_prob for m in block.modules()):
            raise ValueError(f"drop_path={rate}: leave out model.kwargs.drop_path_rate")
        block.__class__ = _dropping(type(block))
        block.sample_rate = rate


def still(network: nn.Module) -> None:
    """Let a network drop nothing while it trains, as a teacher, which sees everything."""
    for module in network.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
        elif isinstance(module, nn.Dropout):
            module.p = 0.0


@lru_cache
def _dropping(kind: type) -> type:
    whole = kind.forward  # type: ignore[attr-defined]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.training:
            return whole(self, x, *args, **kwargs)
        rope, B = kwargs.pop("rope", None), len(x)

        def attend(y: Tensor, chosen: Tensor) -> Tensor:
            if rope is None:
                return self.attn(self.norm1(y), *args, **kwargs)
            own = rope[chosen] if rope.ndim == 4 and len(rope) == B else rope
            return self.attn(self.norm1(y), *args, rope=own, **kwargs)

        x = _of_some(x, self.sample_rate, attend, _scale(self, 1))
        return _of_some(x, self.sample_rate, lambda y, _: self.mlp(self.norm2(y)), _scale(self, 2))

    return type(kind.__name__, (kind,), {"forward": forward})


def _scale(block: Any, branch: int) -> Callable[[Tensor], Tensor]:
    if isinstance(block, Block):
        return getattr(block, f"ls{branch}")
    gamma = getattr(block, f"gamma_{branch}")
    return (lambda y: y) if gamma is None else gamma.mul


def _of_some(
    x: Tensor,
    rate: float,
    branch: Callable[[Tensor, Tensor], Tensor],
    scale: Callable[[Tensor], Tensor],
) -> Tensor:
    keep = max(1, int(len(x) * (1 - rate)))
    chosen = torch.randperm(len(x), device=x.device)[:keep]
    y = scale(branch(x[chosen], chosen))
    return x.index_add(0, chosen, y.to(x.dtype), alpha=len(x) / keep)
