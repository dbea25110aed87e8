"""The losses, beside the formula as written, the authors' own and the libraries'.

B images (or pairs), D features; S pixels a side, P a patch's.  Floors count what a loss needs,
whoever computes it: the flops of its matrix products (2 for each multiply-add; exponentials and
what happens elementwise are left out where there are products), without computing anything twice;
inputs read and results written once in each pass, in the dtype they have.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.cases.rivals import beside, library, nbytes
from fastssl.bench.registry import Absent, Problem, Shape, Sweep, case, grid, shapes_of
from fastssl.kernels import exclude_self, pairwise_lse, patch_mse
from fastssl.losses import CLIPLoss, MAELoss, NTXentLoss, SigLIPLoss

_TEMPERATURE = 0.5
_CLIP_TEMPERATURE = 0.07
_SIGLIP_SCALE, _SIGLIP_BIAS = 10.0, -10.0
_HIDDEN = 3 / 4


def two_views(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two embeddings (B, D) of the same images: alike, as after some training."""
    z = torch.randn(shape["B"], shape["D"], device=device)
    first, second = (z + 0.5 * torch.randn_like(z) for _ in range(2))
    return first.to(dtype).requires_grad_(), second.to(dtype).requires_grad_()


def pairs(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Image and text embeddings (B, D) of unit length; a pair's cosine is near 0.3, as CLIP's."""
    z = torch.randn(shape["B"], shape["D"], device=device)
    first, second = (F.normalize(z + 1.5 * torch.randn_like(z)) for _ in range(2))
    return first.to(dtype).requires_grad_(), second.to(dtype).requires_grad_()


def _number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A learned number."""
    return torch.tensor(value, dtype=dtype, device=device, requires_grad=True)


@case(
    "ntxent",
    test="tests/losses/test_ntxent.py",
    shapes=shapes_of(
        "B D",
        quick=[(128, 128), (512, 128)],
        cpu=[(256, 128), (1024, 128), (2048, 256), (4096, 128), (8192, 128)],
        cuda=[(4096, 128), (4096, 1024), (16384, 128), (32768, 128), (32768, 1024)],
    )
    | {"grid": grid(8192)},  # 16384 views
    sweeps={
        "quick": [Sweep("B", (64, 128, 256), {"D": 64})],
        "cpu": [
            Sweep("B", (256, 512, 1024, 2048, 4096), {"D": 128}),
            Sweep("D", (64, 128, 256, 512, 1024), {"B": 1024}),
        ],
        "cuda": [
            Sweep("B", (1024, 2048, 4096, 8192, 16384, 32768), {"D": 128}),
            Sweep("D", (64, 128, 256, 512, 1024, 2048), {"B": 8192}),
        ],
    },
    gate_shape={"B": 600},
    gpu_gate_shape={"B": 12000},  # where Triton takes half the tiles
)
def ntxent(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """SimCLR's NT-Xent: each of 2B views finds its twin among all others.

    Products: the N x N similarities of N = 2B views are symmetric, so half of them, N^2 D flops;
    backward, the N x N weights times the N x D embeddings, 2 N^2 D (the weights of s_ij and s_ji
    are added first).
    pytorch-metric-learning stands here with its SupConLoss, which has the same value where a view
    has one positive; its NTXentLoss holds (2B)^3 numbers, a minute's work at B = 512.
    """
    views, n = two_views(shape, dtype, device), 2 * shape["B"]
    rivals = beside(NTXentLoss(_TEMPERATURE), ntxent_reference)
    rivals["simclr authors"] = ntxent_authors
    rivals["lightly"] = library("lightly.loss", lambda m: m.NTXentLoss(_TEMPERATURE))
    rivals["pytorch-metric-learning"] = library(
        "pytorch_metric_learning.losses",
        lambda m: m.SelfSupervisedLoss(m.SupConLoss(temperature=_TEMPERATURE)),
    )
    product = float(n * n * shape["D"])
    return Problem(
        inputs=views,
        rivals=rivals,
        flops={"fwd": product, "bwd": 2 * product},
        bytes_moved={"fwd": nbytes(*views) + 4, "bwd": 2 * nbytes(*views)},
        items=(shape["B"], "images"),
    )


def ntxent_reference(z0: Tensor, z1: Tensor) -> Tensor:
    """SimCLR's equation 1 with all 2B x 2B similarities, in the dtype it is given."""
    z = F.normalize(torch.cat([z0, z1]))
    lse = pairwise_lse(z, z, 1 / _TEMPERATURE, mask=exclude_self, impl="reference")
    positive = (z * z.roll(len(z0), 0)).sum(1) / _TEMPERATURE
    return lse.mean() - positive.mean()


def ntxent_authors(z0: Tensor, z1: Tensor) -> Tensor:
    """As google-research/simclr has it: four blocks of logits and a cross-entropy for each view.

    A view's similarity to itself is lowered by 1e9; the two cross-entropies are averaged here,
    where its training adds them.
    """
    a, b, n = F.normalize(z0), F.normalize(z1), len(z0)
    itself = torch.eye(n, dtype=z0.dtype, device=z0.device) * 1e9
    twin = torch.arange(n, device=z0.device)
    aa, ab = a @ a.T / _TEMPERATURE - itself, a @ b.T / _TEMPERATURE
    bb, ba = b @ b.T / _TEMPERATURE - itself, b @ a.T / _TEMPERATURE
    first = F.cross_entropy(torch.cat([ab, aa], 1), twin)
    return (first + F.cross_entropy(torch.cat([ba, bb], 1), twin)) / 2


@case(
    "mae",
    test="tests/losses/test_reconstruction.py",
    shapes=shapes_of(
        "B S P",
        quick=[(8, 224, 16)],
        cpu=[(32, 224, 16), (128, 32, 4)],
        cuda=[(256, 224, 16), (1024, 224, 16)],
    ),
    sweeps={
        "quick": [Sweep("B", (2, 4, 8), {"S": 64, "P": 16})],
        "cpu": [Sweep("B", (8, 16, 32, 64, 128), {"S": 224, "P": 16})],
        "cuda": [Sweep("B", (64, 128, 256, 512, 1024, 2048), {"S": 224, "P": 16})],
    },
)
def mae(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """MAE: the pixels of the hidden three quarters of the patches, each patch normalized.

    For each hidden pixel: 1 flop for the mean, 2 for the variance, 2 to normalize, 3 for the
    squared error and its sum; 2 backward.  Only hidden patches need be read.
    """
    B, S, P = shape["B"], shape["S"], shape["P"]
    length = (S // P) ** 2
    images = torch.rand(B, 3, S, S, device=device).to(dtype)
    hidden = torch.rand(B, length, device=device).argsort(1)[:, : int(_HIDDEN * length)]
    pred = torch.randn(*hidden.shape, 3 * P * P, device=device).to(dtype).requires_grad_()
    rivals = beside(MAELoss(P), partial(mae_reference, P))
    rivals["mae authors"] = partial(mae_authors, P)
    rivals["lightly"] = library("lightly.models.utils", lambda m: partial(_mae_lightly, m, P))
    read = 2 * nbytes(pred) + nbytes(hidden)  # the pixels are as many as the predictions
    return Problem(
        inputs=(pred, images, hidden),
        rivals=rivals,
        flops={"fwd": 8.0 * pred.numel(), "bwd": 2.0 * pred.numel()},
        bytes_moved={"fwd": read + 4, "bwd": read + nbytes(pred)},
        items=(B, "images"),
    )


def mae_reference(patch: int, pred: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """Every patch as a copy, the hidden ones of it, normalized; in the dtype it is given."""
    return patch_mse(pred, images, hidden, patch, impl="reference").mean()


def mae_authors(patch: int, pred: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """As facebookresearch/mae has it: every patch normalized.

    It then weighs the error of every patch with a mask; here predictions of hidden ones alone are
    at hand, and only their error is computed.
    """
    B, C, S, _ = images.shape
    grid = S // patch
    target = images.reshape(B, C, grid, patch, grid, patch)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(B, grid * grid, -1)
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    target = (target - mean) / (var + 1e-6) ** 0.5
    chosen = target.gather(1, hidden[..., None].expand(-1, -1, target.shape[-1]))
    return (pred - chosen).square().mean(-1).mean()


def _mae_lightly(utils, patch: int, pred: Tensor, images: Tensor, hidden: Tensor) -> Tensor:
    """What lightly's users write, with its tools: every patch, then the hidden ones."""
    target = utils.get_at_index(utils.patchify(images, patch), hidden)
    return F.mse_loss(pred, utils.normalize_mean_var(target))


_PAIR_SHAPES = shapes_of(
    "B D",
    quick=[(256, 256)],
    cpu=[(1024, 512), (4096, 512), (8192, 512)],
    cuda=[(4096, 768), (16384, 768), (32768, 768), (65536, 768)],
) | {"grid": grid(16384)}
_PAIR_SWEEPS = {
    "quick": [Sweep("B", (64, 128, 256), {"D": 64})],
    "cpu": [Sweep("B", (256, 512, 1024, 2048, 4096), {"D": 512})],
    "cuda": [Sweep("B", (1024, 2048, 4096, 8192, 16384, 32768, 65536), {"D": 768})],
}
_register_pair = partial(
    case,
    shapes=_PAIR_SHAPES,
    sweeps=_PAIR_SWEEPS,
    gate_shape={"B": 333},
    gpu_gate_shape={"B": 9000},
)


def pair_problem(shape: Shape, inputs: tuple[Tensor, ...], rivals: dict) -> Problem:
    """B x B logits, 2 B^2 D flops, and the gradients to both sides, 4 B^2 D."""
    product = 2.0 * shape["B"] ** 2 * shape["D"]
    return Problem(
        inputs=inputs,
        rivals=rivals,
        flops={"fwd": product, "bwd": 2 * product},
        bytes_moved={"fwd": nbytes(*inputs) + 4, "bwd": 2 * nbytes(*inputs)},
        items=(shape["B"], "pairs"),
    )


@_register_pair("clip", test="tests/losses/test_clip.py")
def clip(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """CLIP: each image finds its text among B, and each text its image; the scale is learned."""
    log_scale = _number(math.log(1 / _CLIP_TEMPERATURE), dtype, device)
    inputs = *pairs(shape, dtype, device), log_scale
    rivals = beside(partial(_clip_ours, CLIPLoss()), clip_reference)
    rivals["open_clip"] = library("open_clip.loss", lambda m: partial(_clip_open, m.ClipLoss()))
    rivals["cut-cross-entropy"] = library(
        "cut_cross_entropy", lambda m: partial(_clip_cut, m.linear_cross_entropy)
    )
    rivals["memeff"] = Absent("its temperature is a constant: see the case matryoshka")
    return pair_problem(shape, inputs, rivals)


def _clip_ours(loss, image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    return loss(image, text, log_scale.float().exp())


def clip_reference(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """The pseudocode of Radford et al. 2021, arXiv:2103.00020, figure 3, in the dtype given."""
    logits = image @ text.T * log_scale.exp()
    own = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def _clip_open(loss, image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    return loss(image, text, log_scale.exp())


def _clip_cut(linear_cross_entropy, image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """The rows' cross-entropy and the columns', the batch standing where a vocabulary would."""
    own, scale = torch.arange(len(image), device=image.device), log_scale.exp()
    rows = linear_cross_entropy(image * scale, text, own)
    return (rows + linear_cross_entropy(text * scale, image, own)) / 2


@_register_pair("siglip", test="tests/losses/test_siglip.py")
def siglip(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """SigLIP: every one of B^2 image-text pairs, by itself, is a match or is not."""
    values = math.log(_SIGLIP_SCALE), _SIGLIP_BIAS
    numbers = tuple(_number(value, dtype, device) for value in values)
    rivals = beside(partial(_siglip_open, SigLIPLoss()), siglip_reference)
    rivals["open_clip"] = library("open_clip.loss", lambda m: partial(_siglip_open, m.SigLipLoss()))
    rivals["siglip-kernel"] = library("siglip_kernel", lambda m: m.fused_siglip_loss)
    return pair_problem(shape, (*pairs(shape, dtype, device), *numbers), rivals)


def siglip_reference(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    """Algorithm 1 of Zhai et al. 2023, arXiv:2303.15343, in the dtype it is given."""
    logits = image @ text.T * log_scale.exp() + bias
    labels = 2 * torch.eye(len(image), dtype=logits.dtype, device=image.device) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def _siglip_open(loss, image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    return loss(image, text, log_scale.exp(), bias)
