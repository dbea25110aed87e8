"""Gram anchoring: patches are to one another as they are to an earlier teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels import gram_distance
from fastssl.kernels.common import accumulator, full_precision
from fastssl.losses._checks import check_counts
from fastssl.losses._loss import Loss
from fastssl.losses._unit import unit


class GramLoss(Loss):
    """The mean over images and pairs of patches of (x_i . x_j - y_i . y_j)^2.

    x are the student's patches, y the teacher's, of length one each.  The formula is
    `gram_reference`.

    Shapes   student (B, P, D) patches of a grid, row by row, any float dtype; teacher (B, Q, E)
             of its own dtype.  Where Q is not P the grids, (height, width) each, must be told: the
             teacher's is resized to the student's by bicubic interpolation before it is normalized.
    Returns  scalar float32, 0 <= loss <= 4.  The gradient goes to student alone.  A student very
             near the teacher has a loss with all its digits.
    Memory   normalized patches and a gradient; similarities of a few images at a time.
    Raises   ValueError: other shapes, grids that are not the patches, or that are missing.
    Ranks    no collective: with as many images on every rank, averaging gradients is exact.
    Source   Simeoni et al. 2025, DINOv3, arXiv:2508.10104, section 4.2: weight 2, and a teacher
             that saw twice the resolution.

    >>> from torch import eye
    >>> x = eye(2)[None]
    >>> GramLoss()(x, 3 * x).item(), round(GramLoss()(x, 0 * x + 1).item(), 4)  # 2 of 4 differ
    (0.0, 0.5)
    """

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        student_grid: tuple[int, int] | None = None,
        teacher_grid: tuple[int, int] | None = None,
    ) -> Tensor:
        _check_patches(student, teacher)
        with full_precision(student.device):
            y = teacher.detach().to(accumulator(student.dtype))
            if student.shape[1] != teacher.shape[1] or student_grid != teacher_grid:
                to = _check_grid("student_grid", student_grid, student.shape[1])
                y = _resize(y, _check_grid("teacher_grid", teacher_grid, teacher.shape[1]), to)
            return _distance(unit(student), unit(y)).mean()


def _distance(x: Tensor, y: Tensor) -> Tensor:
    """Of patches of as many features: zeros add nothing to a product."""
    more = x.shape[2] - y.shape[2]
    return gram_distance(F.pad(x, (0, max(0, -more))), F.pad(y, (0, max(0, more))))


def _resize(y: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Patches (B, Q, E) of one grid as those of another, (B, P, E)."""
    image = y.mT.unflatten(2, grid)
    return F.interpolate(image, to, mode="bicubic", align_corners=False).flatten(2).mT


def _check_patches(student: Tensor, teacher: Tensor) -> None:
    for name, x in (("student", student), ("teacher", teacher)):
        if x.ndim != 3 or 0 in x.shape or not x.is_floating_point():
            got = f"{tuple(x.shape)} {x.dtype}"
            raise ValueError(f"{name} must be (B, P, D), none of them empty, floats, got {got}")
    if len(teacher) != len(student) or teacher.device != student.device:
        want = f"{len(student)} images on {student.device}"
        raise ValueError(f"teacher must have {want}, got {len(teacher)} on {teacher.device}")


def _check_grid(name: str, grid: tuple[int, int] | None, patches: int) -> tuple[int, int]:
    """The grid, of so many patches."""
    if grid is None:
        want = f"(height, width) of the {patches} patches where the two grids differ"
        raise ValueError(f"{name} must be {want}, got None")
    check_counts(**{name + "[0]": grid[0], name + "[1]": grid[1]})
    if grid[0] * grid[1] != patches:
        raise ValueError(f"{name} must have {patches} patches, got {tuple(grid)}")
    return grid


def gram_reference(
    student: Tensor,
    teacher: Tensor,
    student_grid: tuple[int, int] | None = None,
    teacher_grid: tuple[int, int] | None = None,
) -> Tensor:
    """The formula, with all similarities (B, P, P)."""
    y = teacher.detach()
    if teacher_grid is not None and student_grid is not None:
        y = _resize(y, teacher_grid, student_grid)
    x, y = unit(student), unit(y)
    return (x @ x.mT - y @ y.mT).square().mean()
