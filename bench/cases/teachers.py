"""The losses of a student with a teacher, beside the formula as written and lightly's.

V views by the student and two by the teacher of B images, K prototypes; D features.  Exponentials
and what else happens elementwise is counted: a flop each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.cases.rivals import beside, by_implementation, library, nbytes
from fastssl.bench.registry import Problem, Shape, Sweep, case, shapes_of
from fastssl.kernels import linear_soft_cross_entropy, soft_cross_entropy
from fastssl.kernels.distillation.sinkhorn import sinkhorn_reference
from fastssl.losses import (
    CAPILoss,
    DINOLoss,
    GramLoss,
    KoLeoLoss,
    PatchKernelAlignmentLoss,
    SwaVLoss,
)
from fastssl.losses.capi import capi_reference
from fastssl.losses.dino import dino_reference
from fastssl.losses.gram import gram_reference
from fastssl.losses.koleo import koleo_reference
from fastssl.losses.patch_kernels import patch_kernel_alignment_reference

_STUDENT, _TEACHER = 0.1, 0.04
_EPSILON = 0.05


def _logits(n: int, shape: Shape, dtype: torch.dtype, device: torch.device, *, learn: bool) -> list:
    """Views (B, K) of the same images: alike, as after some training."""
    same = torch.randn(shape["B"], shape["K"], device=device)
    views = (same + 0.5 * torch.randn_like(same) for _ in range(n))
    return [(0.1 * view).to(dtype).requires_grad_(learn) for view in views]


_VIEWS = shapes_of(
    "V B K",
    quick=[(4, 16, 4096)],
    cpu=[(8, 64, 65536), (2, 256, 8192)],
    cuda=[(10, 64, 65536), (10, 64, 131072), (2, 1024, 65536)],
)


@case(
    "dino",
    test="tests/losses/test_teachers.py",
    shapes=_VIEWS,
    sweeps={
        "quick": [Sweep("K", (256, 1024, 4096), {"V": 4, "B": 16})],
        "cpu": [Sweep("K", (1024, 4096, 16384, 65536), {"V": 8, "B": 64})],
        "cuda": [Sweep("K", (4096, 16384, 65536, 262144), {"V": 10, "B": 64})],
    },
    gate_shape={"B": 16, "K": 4096},
)
def dino(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """DINO: each view predicts the teacher's distribution of two others.

    A logit takes 4 flops each way on the student's side (scale, exponential, sum, product), and 4
    on the teacher's.
    """
    V, K = shape["V"], shape["K"]
    teacher = _logits(2, shape, dtype, device, learn=False)
    student = _logits(V, shape, dtype, device, learn=True)
    ours = DINOLoss(K, center_momentum=1.0).to(device)  # the center stays, and is worked out
    zero = torch.zeros((), dtype=dtype, device=device)

    def reference(*views: Tensor) -> Tensor:
        return dino_reference(torch.stack(views[:2]), torch.stack(views[2:]), zero, 0.04, 0.1)

    rivals = beside(lambda *views: ours(views[:2], views[2:]), reference)
    rivals["lightly"] = library("lightly.loss", lambda m: _dino_lightly(m, zero.new_zeros(K)))
    each = float(shape["B"] * K)
    read = nbytes(*teacher, *student)
    return Problem(
        inputs=(*teacher, *student),
        rivals=rivals,
        flops={"fwd": 4 * (V + 2) * each, "bwd": 4 * V * each},
        bytes_moved={"fwd": read + 4, "bwd": read + nbytes(*student)},
        items=(shape["B"], "images"),
    )


def _dino_lightly(losses, like: Tensor):
    loss = losses.DINOLoss(len(like), center_momentum=1.0).to(like)  # its products want one dtype
    return lambda *views: loss(list(views[:2]), list(views[2:]))


@case(
    "soft-cross-entropy",
    test="tests/kernels/test_soft.py",
    shapes=shapes_of("B K", quick=[(64, 4096)], cpu=[(256, 65536)], cuda=[(1024, 65536)]),
    gate_shape={"B": 16, "K": 4096},
)
def soft(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Rows of patches, each with its own target: as `dino`, of one view."""
    (teacher,) = _logits(1, shape, dtype, device, learn=False)
    (student,) = _logits(1, shape, dtype, device, learn=True)
    each, read = float(shape["B"] * shape["K"]), nbytes(student, teacher)
    return Problem(
        inputs=(student, teacher),
        rivals=by_implementation(soft_cross_entropy, device),
        flops={"fwd": 8 * each, "bwd": 4 * each},
        bytes_moved={"fwd": read + 4 * shape["B"], "bwd": read + nbytes(student)},
        items=(shape["B"], "patches"),
    )


@case(
    "linear-soft-cross-entropy",
    test="tests/kernels/test_linear_soft.py",
    shapes=shapes_of(
        "R D K",
        quick=[(64, 64, 4096)],
        cpu=[(1024, 256, 65536), (256, 256, 8192)],
        cuda=[(4096, 256, 65536), (4096, 384, 131072), (512, 256, 65536)],
    ),
    sweeps={
        "quick": [Sweep("R", (16, 64, 256), {"D": 64, "K": 4096})],
        "cpu": [Sweep("R", (64, 256, 1024), {"D": 256, "K": 65536})],
        "cuda": [Sweep("R", (256, 1024, 4096, 16384), {"D": 256, "K": 65536})],
    },
    gate_shape={"R": 64, "K": 4096},
)
def linear_soft(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Masked patches through the prototypes, student's and teacher's, in one: eager 4 products.

    Unit rows and prototypes, as a head's; the gradient goes to both.  2 R D K flops a product, and
    `soft-cross-entropy`'s.
    """
    R, D, K = shape["R"], shape["D"], shape["K"]
    x, w = (F.normalize(torch.randn(n, D, device=device), dim=1) for n in (R, K))
    y, u = (F.normalize(z + 0.5 * F.normalize(torch.randn_like(z), dim=1), dim=1) for z in (x, w))
    sides = [z.to(dtype).requires_grad_(i < 2) for i, z in enumerate((x, w, y, u))]
    center = torch.zeros(K, device=device)
    products, each = 4.0 * R * D * K, float(R * K)
    read = nbytes(*sides, center)
    return Problem(
        inputs=(*sides, center),
        rivals=by_implementation(_linear_mean, device, primitive="linear_soft_cross_entropy"),
        flops={"fwd": products + 8 * each, "bwd": products + 4 * each},
        bytes_moved={"fwd": read + 4, "bwd": read + nbytes(*sides[:2])},
        items=(R, "patches"),
    )


def _linear_mean(x, w, teacher_x, teacher_w, center, *, impl: str) -> Tensor:
    sides = x, w, teacher_x, teacher_w
    return linear_soft_cross_entropy(*sides, assign=center, reduction="sum", impl=impl) / len(x)


@case(
    "swav",
    test="tests/losses/test_teachers.py",
    shapes=shapes_of(
        "V B K", quick=[(4, 64, 512)], cpu=[(8, 256, 3000), (2, 1024, 16384)], cuda=[(8, 512, 3000)]
    ),
    dtypes=("float32", "bfloat16"),  # exp(score / 0.05) is no float16, in any rival
    gate_shape={"B": 64, "K": 512},
)
def swav(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """SwAV: each crop predicts the Sinkhorn assignments of two others, three iterations.

    Scores are those of unit rows.  Beside `dino`'s flops, 4 a score and iteration.
    """
    V = shape["V"]
    views = _logits(V, shape, torch.float32, device, learn=False)
    crops = [(x / x.abs().max()).to(dtype).requires_grad_() for x in views]
    ours = SwaVLoss(_STUDENT, 3, _EPSILON)

    def reference(*crops: Tensor) -> Tensor:
        log_p = [F.log_softmax(x / _STUDENT, 1) for x in crops]
        q = [sinkhorn_reference(x.detach(), _EPSILON) for x in crops[:2]]
        pairs = [(t, v) for t in range(2) for v in range(V) if v != t]
        return torch.stack([-(q[t] * log_p[v]).sum(1).mean() for t, v in pairs]).mean()

    rivals = beside(lambda *crops: ours(crops[:2], crops[2:]), reference)
    rivals["lightly"] = library("lightly.loss", _swav_lightly)
    each = float(shape["B"] * shape["K"])
    return Problem(
        inputs=tuple(crops),
        rivals=rivals,
        flops={"fwd": (4 * V + 2 * 12) * each, "bwd": 4 * V * each},
        bytes_moved={"fwd": nbytes(*crops) + 4, "bwd": 2 * nbytes(*crops)},
        items=(shape["B"], "images"),
    )


def _swav_lightly(losses):
    loss = losses.SwaVLoss(_STUDENT, 3, _EPSILON)
    return lambda *crops: loss(list(crops[:2]), list(crops[2:])).squeeze()


@case(
    "koleo",
    test="tests/losses/test_teachers.py",
    shapes=shapes_of("B D", quick=[(256, 256)], cpu=[(8192, 384)], cuda=[(8192, 1024)]),
    gate_shape={"B": 333},
    gpu_gate_shape={"B": 3000},
)
def koleo(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """KoLeo: each embedding away from its nearest neighbor; B x B cosines, 2 B^2 D flops."""
    x = torch.randn(shape["B"], shape["D"], device=device).to(dtype).requires_grad_()
    rivals = beside(KoLeoLoss(), lambda x: koleo_reference(x, 2, 1e-8))
    rivals["lightly"] = library("lightly.loss", lambda m: m.KoLeoLoss())
    return Problem(
        inputs=(x,),
        rivals=rivals,
        flops={"fwd": 2.0 * shape["B"] ** 2 * shape["D"], "bwd": 6.0 * x.numel()},
        bytes_moved={"fwd": nbytes(x) + 4, "bwd": 2 * nbytes(x)},
        items=(shape["B"], "images"),
    )


_PATCHES = shapes_of(
    "B P D",
    quick=[(4, 64, 48)],
    cpu=[(16, 256, 384), (4, 1024, 384)],
    cuda=[(64, 256, 1024), (64, 1024, 1024)],
)


def _patches(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The student's, which learn, and the teacher's: alike, as after some training."""
    y = torch.randn(shape["B"], shape["P"], shape["D"], device=device)
    x = y + 0.3 * torch.randn_like(y)
    return x.to(dtype).requires_grad_(), y.to(dtype)


@case(
    "gram",
    test="tests/losses/test_relations.py",
    shapes=_PATCHES,
    gate_shape={"B": 3, "P": 50, "D": 24},
)
def gram(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Gram anchoring: similarities of an image's patches as the teacher's.

    P x P similarities by one product, and one for the gradient: 2 P^2 D flops each.
    """
    x, y = _patches(shape, dtype, device)
    each = 2.0 * shape["B"] * shape["P"] ** 2 * shape["D"]
    return Problem(
        inputs=(x, y),
        rivals=beside(GramLoss(), gram_reference),
        flops={"fwd": each, "bwd": each},
        bytes_moved={"fwd": nbytes(x, y) + 4, "bwd": nbytes(x, y, x)},
        items=(shape["B"], "images"),
    )


@case(
    "patch-kernels",
    test="tests/losses/test_relations.py",
    shapes=_PATCHES,
    gate_shape={"B": 3, "P": 50, "D": 24},
)
def patch_kernels(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """PaKA: the alignment of centered kernels: two products, and one for the gradient."""
    x, y = _patches(shape, dtype, device)
    each = 2.0 * shape["B"] * shape["P"] ** 2 * shape["D"]
    rivals = beside(PatchKernelAlignmentLoss(), patch_kernel_alignment_reference)
    rivals["lightly"] = library("lightly.loss", lambda m: m.PatchKernelAlignmentLoss())
    return Problem(
        inputs=(x, y),
        rivals=rivals,
        flops={"fwd": 2 * each, "bwd": each},
        bytes_moved={"fwd": nbytes(x, y) + 4, "bwd": nbytes(x, y, x)},
        items=(shape["B"], "images"),
    )


@case(
    "capi",
    test="tests/losses/test_relations.py",
    shapes=shapes_of("B P K", quick=[(8, 9, 256)], cpu=[(32, 49, 4096)], cuda=[(64, 196, 16384)]),
    dtypes=("float32", "bfloat16"),  # exp(logit / 0.06) is no float16, in any rival
    gate_shape={"B": 8, "P": 9, "K": 256},
)
def capi(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """CAPI: clusters evenly used at each position, three iterations, and the cross-entropy.

    4 flops a logit, iteration and side of it, and 4 each way on the student's side.
    """
    size = shape["B"], shape["P"], shape["K"]
    same = torch.randn(size, device=device)
    teacher = (0.1 * same).to(dtype)
    student = (0.1 * (same + 0.5 * torch.randn_like(same))).to(dtype).requires_grad_()
    loss = CAPILoss()
    rivals = beside(lambda s, t: loss(t, s), lambda s, t: capi_reference(t, s))
    rivals["lightly"] = library("lightly.loss", _capi_lightly)
    each, read = float(same.numel()), nbytes(student, teacher)
    return Problem(
        inputs=(student, teacher),
        rivals=rivals,
        flops={"fwd": (24 + 8) * each, "bwd": 4 * each},
        bytes_moved={"fwd": read + 4, "bwd": read + nbytes(student)},
        items=(shape["B"], "images"),
    )


def _capi_lightly(losses):
    loss = losses.CAPILoss()
    return lambda student, teacher: loss(teacher, student)
