"""A loss of all nested prefixes of its embeddings at once, where one sweep over them serves all.

Of NTXentLoss and CLIPLoss, as they are, in one process on a CPU, in float32 and float64: elsewhere
the prefixes are taken one after another, which has the same value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.distributed import LOCAL, world_size
from fastssl.kernels import exclude_self, pairwise_lse_nested
from fastssl.kernels.common import can_read_values
from fastssl.losses._checks import check_batch
from fastssl.losses._contrastive import info_nce, twice
from fastssl.losses.clip import CLIPLoss
from fastssl.losses.ntxent import NTXentLoss


def nested_values(
    loss: nn.Module,
    dims: Sequence[int],
    normalize: bool,
    inputs: Sequence[Any],
    named: Mapping[str, Any],
) -> Tensor | None:
    """The loss of each prefix, (P,), or None where they are to be taken one after another.

    normalize: whether the prefixes' rows are made one long, for a loss that takes them as they are.
    """
    if type(loss) not in (NTXentLoss, CLIPLoss) or len(dims) < 2 or torch.compiler.is_compiling():
        return None
    try:
        given = signature(loss.forward).bind(*inputs, **named).arguments
    except TypeError:  # by other names, or wrong: the loss itself will say
        return None
    first, second, *rest = given.values()
    if not _fits(loss, first, second):
        return None
    if type(loss) is NTXentLoss:
        return _nt_xent(loss, dims, first, second)
    return _clip(dims, normalize, first, second, *rest)


def _fits(loss: Any, *rows: Tensor) -> bool:
    plain = all(x.ndim == 2 and x.dtype in (torch.float32, torch.float64) for x in rows)
    alone = world_size(loss.process_group) == 1 and rows[0].device.type == "cpu"
    return plain and alone and all(can_read_values(x) for x in rows)


def _nt_xent(loss: NTXentLoss, dims: Sequence[int], out0: Tensor, out1: Tensor) -> Tensor | None:
    if loss.memory_bank is not None:
        return None
    count, t = check_batch(LOCAL, out0=out0, out1=out1), loss.temperature
    positive = _cosines(out0, out1, dims)
    if positive is None:
        return None
    z, images = torch.stack([out0, out1], 1).flatten(0, 1), twice(torch.arange(count))
    others, _ = pairwise_lse_nested(z, z, dims, 1 / t, normalize=True, mask=exclude_self(images))
    own = positive.unsqueeze(-1) / t
    return info_nce(own, others.unflatten(1, (-1, 2))).mean((1, 2))


def _clip(
    dims: Sequence[int],
    normalize: bool,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: float | Tensor,
    *rest: Any,
) -> Tensor | None:
    x, t, scale = image_features, text_features, logit_scale
    if rest or isinstance(scale, Tensor) and scale.ndim:
        return None
    check_batch(LOCAL, image_features=x, text_features=t)
    own = _cosines(x, t, dims) if normalize else _sums(x * t, _parts(dims))
    if own is None:
        return None
    options = {"normalize": normalize, "mask": exclude_self}
    rows, cols = pairwise_lse_nested(x, t, dims, scale, **options)
    own = own * scale
    return (info_nce(own, rows) + info_nce(own, cols)).mean(1) / 2


def _cosines(x: Tensor, y: Tensor, dims: Sequence[int]) -> Tensor | None:
    """The cosines (P, B) of each row's prefixes; None of lengths that `unit` treats apart."""
    parts, lengths = _parts(dims), []
    for z in (x, y):
        length = _sums(z * z, parts).sqrt()
        low, high = length[0].detach().min(), length[-1].detach().max()
        if not (low >= 1e-9 and high <= 1e15):
            return None
        lengths.append(length)
    return _sums(x * y, parts) / (lengths[0] * lengths[1])


def _parts(dims: Sequence[int]) -> list[slice]:
    """The features that each prefix adds to the one before it."""
    return [slice(a, b) for a, b in zip((0, *dims), dims, strict=False)]


def _sums(x: Tensor, parts: list[slice]) -> Tensor:
    """The sums of x (B, D) over each prefix: (P, B)."""
    return torch.stack([x[:, part].sum(1) for part in parts]).cumsum(0)
