"""The losses beside the formula as written and beside lightly, when it is installed.

ntxent: B images, D features: 2B x 2B similarities.  barlow: B x D embeddings, a D x D correlation.
mae: B images of side S, patches of side P, three quarters of them hidden.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.harness import OURS, Case, Rival
from fastssl.kernels import exclude_self, frobenius_sq, pairwise_lse, patch_mse, standardise
from fastssl.losses import BarlowTwinsLoss, MAELoss, NTXentLoss

_TEMPERATURE, _LAMBDA = 0.5, 5e-3
_SHAPES = {
    "quick": {
        "ntxent": [{"B": 128, "D": 128}, {"B": 512, "D": 128}],
        "barlow": [{"B": 128, "D": 512}, {"B": 256, "D": 1024}],
        "mae": [{"B": 8, "S": 224, "P": 16}],
    },
    "cpu": {
        "ntxent": [{"B": 256, "D": 128}, {"B": 1024, "D": 128}, {"B": 2048, "D": 256}],
        "barlow": [{"B": 256, "D": 2048}, {"B": 2048, "D": 1024}],
        "mae": [{"B": 32, "S": 224, "P": 16}, {"B": 128, "S": 32, "P": 4}],
    },
    "cuda": {
        "ntxent": [{"B": 1024, "D": 128}, {"B": 4096, "D": 128}, {"B": 4096, "D": 1024}],
        "barlow": [{"B": 256, "D": 8192}, {"B": 2048, "D": 8192}, {"B": 8192, "D": 2048}],
        "mae": [{"B": 256, "S": 224, "P": 16}, {"B": 1024, "S": 224, "P": 16}],
    },
}


def cases(size: str) -> list[Case]:
    """The cases of "quick", "cpu" or "cuda" size."""
    kinds = {"ntxent": (_views, _ntxent), "barlow": (_views, _barlow), "mae": (_patches, _mae)}
    return [
        Case(name, shape, kinds[name][0], kinds[name][1](shape))
        for name, shapes in _SHAPES[size].items()
        for shape in shapes
    ]


def _views(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Two embeddings (B, D) of the same images: alike, as after some training."""
    z = torch.randn(shape["B"], shape["D"], device=device)
    views = (z + 0.5 * torch.randn_like(z) for _ in range(2))
    return tuple(v.to(dtype).requires_grad_() for v in views)


def _patches(shape: dict[str, int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Predictions (B, K, 3 P P), images (B, 3, S, S) and the hidden patches' places (B, K)."""
    B, S, P = shape["B"], shape["S"], shape["P"]
    length = (S // P) ** 2
    images = torch.rand(B, 3, S, S, device=device).to(dtype)
    hidden = torch.rand(B, length, device=device).argsort(1)[:, : 3 * length // 4]
    pred = torch.randn(*hidden.shape, 3 * P * P, device=device).to(dtype)
    return pred.requires_grad_(), images, hidden


def _ntxent(_: dict[str, int]) -> dict[str, Rival]:
    rivals: dict[str, Rival] = {
        OURS: NTXentLoss(_TEMPERATURE),
        "reference": ntxent_reference,
    }
    return rivals | _lightly(lambda loss: loss.NTXentLoss(_TEMPERATURE))


def ntxent_reference(z0: Tensor, z1: Tensor) -> Tensor:
    """SimCLR's equation 1 with all 2B x 2B similarities, in the dtype it is given."""
    z = F.normalize(torch.cat([z0, z1]))
    lse = pairwise_lse(z, z, 1 / _TEMPERATURE, mask=exclude_self, impl="reference")
    positive = (z * z.roll(len(z0), 0)).sum(1) / _TEMPERATURE
    return lse.mean() - positive.mean()


def _barlow(_: dict[str, int]) -> dict[str, Rival]:
    rivals: dict[str, Rival] = {
        OURS: BarlowTwinsLoss(_LAMBDA),
        "reference": barlow_reference,
    }
    return rivals | _lightly(lambda loss: loss.BarlowTwinsLoss(_LAMBDA))


def barlow_reference(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Barlow Twins' equation 1 with the D x D correlation, in the dtype it is given."""
    a, b = (standardise(z, eps=1e-5, impl="reference") for z in (z_a, z_b))
    diagonal = (a * b).sum(0) / len(a)
    total = frobenius_sq(a, b, impl="reference") / len(a) ** 2
    return (1 - diagonal).square().sum() + _LAMBDA * (total - diagonal.square().sum())


def _mae(shape: dict[str, int]) -> dict[str, Rival]:
    patch = shape["P"]
    rivals: dict[str, Rival] = {
        OURS: MAELoss(patch),
        "reference": partial(_mae_reference, patch),
    }
    if find_spec("lightly"):
        rivals["lightly"] = partial(_mae_lightly, patch)
    return rivals


def _mae_reference(patch: int, pred: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    return patch_mse(pred, images, hidden, patch, impl="reference").mean()


def _mae_lightly(patch: int, pred: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """What lightly's users write, with its tools: every patch, then the hidden ones."""
    from lightly.models import utils

    target = utils.get_at_index(utils.patchify(images, patch), hidden)
    return F.mse_loss(pred, utils.normalize_mean_var(target))


def _lightly(make: Callable[..., Rival]) -> dict[str, Rival]:
    if not find_spec("lightly"):
        return {}
    from lightly import loss

    return {"lightly": make(loss)}
