"""DINO: each view of the student predicts what the teacher makes of the other views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.distributed import Group, all_reduce_sum, world_size
from fastssl.kernels import soft_cross_entropy
from fastssl.kernels.common import can_read_values
from fastssl.kernels.distillation import check_soft, soft_cross_entropy_ahead
from fastssl.kernels.distillation.soft import Pairs
from fastssl.losses._checks import check_counts, check_positive, check_within
from fastssl.losses._loss import Loss


class DINOLoss(Loss):
    """The teacher's centered, sharpened distribution of each view is the other views' target.

        loss = mean over s != t and images of CE(softmax((t - c) / teacher_temp), softmax(s / a))

    in nats; a is student_temp.  In training the center then moves to the mean of the teacher's
    logits: it is that of the batches before.

    Shapes   teacher_out, student_out: lists of T and V tensors (B, output_dim), the views in one
             order; any float dtype.  The teacher's views come first among the student's: view i of
             the one is not compared with view i of the other.  No gradient to teacher_out.
    Returns  scalar float32, 0 <= loss.
    State    center (1, 1, output_dim), in state_dict.
    teacher_temp of forward, or epoch, by which it rises from warmup_teacher_temp to teacher_temp,
             come before the constructor's.
    Raises   ValueError: no pair of different views; shapes or devices that disagree; another width
             than output_dim; temperatures not > 0; a momentum outside 0..1.
    Ranks    the value is of this rank's images, and its mean over ranks that of all; the center is
             that of the images of all ranks, with as many or as few on each.
    On a CPU the gradient is made with the loss, and backward only multiplies.
    Source   Caron et al. 2021, arXiv:2104.14294, algorithm 1.
    Differs  from lightly.loss.DINOLoss, whose value, gradient and center it has: in eval mode the
             center stays; ranks with different numbers of images count by them.

    >>> loss = DINOLoss(4)
    >>> views = [torch.zeros(2, 4), torch.zeros(2, 4)]
    >>> round(loss(views, views).item(), 4)  # log 4
    1.3863
    """

    shown = ("teacher_temp", "student_temp", "center_momentum")
    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(process_group=process_group)
        check_counts(output_dim=output_dim)
        check_counts(0, warmup_teacher_temp_epochs=warmup_teacher_temp_epochs)
        check_positive(warmup_teacher_temp=warmup_teacher_temp, teacher_temp=teacher_temp)
        check_positive(student_temp=student_temp)
        check_within(0, 1, center_momentum=center_momentum)
        check_mean(center_mode)
        self.teacher_temp, self.student_temp = teacher_temp, student_temp
        self.center_momentum = center_momentum
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs
        )
        self.register_buffer("center", torch.zeros(1, 1, output_dim))

    def forward(
        self,
        teacher_out: Sequence[Tensor],
        student_out: Sequence[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        if teacher_temp is None:
            warm = epoch is not None and epoch < self.warmup_teacher_temp_epochs
            teacher_temp = self.teacher_temp
            if warm and epoch is not None:
                teacher_temp = self.teacher_temp_schedule[epoch].item()
        V, T = len(student_out), len(teacher_out)
        terms = V * T - min(V, T)
        if terms == 0:
            raise ValueError(
                f"student_out and teacher_out must have two different views, got {V} and {T}"
            )
        pairs = [[float(v != t) for t in range(T)] for v in range(V)]
        temps = self.student_temp, teacher_temp
        loss = cross_entropies(student_out, teacher_out, self.center, pairs, temps)
        if self.training:
            self.update_center(teacher_out)
        return loss / terms

    @torch.no_grad()
    def update_center(self, teacher_out: Sequence[Tensor] | Tensor) -> None:
        """Move the center towards the mean of the teacher's logits, T x (B, output_dim)."""
        views = list(teacher_out)
        mean = joined_mean(views, self.process_group).view_as(self.center)
        self.center = moved(self.center, mean, self.center_momentum)


def check_mean(mode: str) -> None:
    """Refuse another kind of center than the mean."""
    if mode != "mean":
        raise ValueError(f"center_mode must be 'mean', got {mode!r}")


def cross_entropies(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    center: Tensor | None,
    pairs: Pairs,
    temps: tuple[float, float],
    weight: Tensor | None = None,
) -> Tensor:
    """The mean over rows, or the weighted sum, of what `soft_cross_entropy` gives for each, summed
    over the student's views.

    students, teachers: V and T tensors (R, K).  temps: the student's and the teacher's.
    """
    first = students[0]
    check_views(students, teachers)
    check_soft(first[None], teachers[0].expand(len(teachers), -1, -1), center, *temps)
    if can_read_values(first) and first.is_cpu:
        each: Tensor | float = 1 / max(len(first), 1) if weight is None else weight
        return soft_cross_entropy_ahead(students, teachers, center, pairs, temps, each)
    loss = soft_cross_entropy(
        torch.stack(tuple(students)),
        torch.stack(tuple(teachers)),
        student_temp=temps[0],
        teacher_temp=temps[1],
        center=center,
        weight=weight,
        pairs=pairs,
    )
    return loss.sum(0).mean() if weight is None else loss.sum()


def check_views(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> None:
    """Refuse views that are not (R, K) floats, alike in shape, and on each side in dtype."""
    for name, views in (("student_out", students), ("teacher_out", teachers)):
        for x in views:
            if x.ndim != 2 or not x.is_floating_point():
                got = f"{tuple(x.shape)} {x.dtype}"
                raise ValueError(f"{name} must have (B, K) floating-point tensors, got {got}")
            if x.shape != students[0].shape or x.dtype != views[0].dtype:
                want = f"{tuple(students[0].shape)} {views[0].dtype}"
                raise ValueError(f"{name} must all be {want}, got {tuple(x.shape)} {x.dtype}")
    if len(students[0]) == 0:
        raise ValueError(f"student_out must have at least 1 row, got {tuple(students[0].shape)}")


def joined_mean(views: Sequence[Tensor], group: Group) -> Tensor:
    """The mean of the rows of views (R, K), of all ranks: (K,) float32."""
    total = torch.stack([x.sum(0, dtype=torch.float32) for x in views]).sum(0)
    rows = sum(len(x) for x in views)
    if world_size(group) == 1:
        return total / rows
    return mean_of_all(torch.cat([total, total.new_tensor([float(rows)])]), group)[0]


def mean_of_all(both: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """The mean of the rows of all ranks, (K,), and their number, of each rank's sum and number
    (K + 1,)."""
    both = all_reduce_sum(both, group)
    return both[:-1] / both[-1], both[-1]


def moved(center: Tensor, mean: Tensor, momentum: float) -> Tensor:
    """The center, after a step towards the mean."""
    return center * momentum + mean.to(center.dtype) * (1 - momentum)


def dino_reference(
    teacher: Tensor, student: Tensor, center: Tensor, teacher_temp: float, student_temp: float
) -> Tensor:
    """The formula, of (T, B, K) and (V, B, K) in one process."""
    q = ((teacher - center) / teacher_temp).softmax(-1)
    log_p = (student / student_temp).log_softmax(-1)
    terms = [
        -(q[t] * log_p[v]).sum(-1).mean()
        for t in range(len(q))
        for v in range(len(log_p))
        if v != t
    ]
    return torch.stack(terms).mean()
