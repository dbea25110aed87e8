"""iBOT: the student predicts the teacher's distribution of the patches that it did not see."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.distributed import Group
from fastssl.kernels import linear_soft_cross_entropy
from fastssl.kernels.common import can_read_values, full_precision
from fastssl.losses._checks import check_counts, check_not_negative, check_positive, check_within
from fastssl.losses._loss import Loss
from fastssl.losses.dino import check_mean, cross_entropies, joined_mean, moved


class Center(nn.Module):
    """The moving mean of the teacher's logits, of all ranks: center (1, K), in state_dict."""

    center: Tensor

    def __init__(self, K: int, momentum: float, group: Group) -> None:
        super().__init__()
        self.momentum, self.group = momentum, group
        self.register_buffer("center", torch.zeros(1, K))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Move towards the mean of x (R, K)."""
        self._move(joined_mean([x], self.group))

    @torch.no_grad()
    def update_linear(self, x: Tensor, w: Tensor) -> None:
        """Move towards the mean of x w^T, of x (R, E) and w (K, E)."""
        mean = joined_mean([x], self.group)
        with full_precision(mean.device):
            self._move(w.to(mean.dtype) @ mean)

    def _move(self, mean: Tensor) -> None:
        self.center = moved(self.center, mean.view_as(self.center), self.momentum)


class IBOTPatchLoss(Loss):
    """The cross-entropy at masked patches, averaged over those of an image, then over images.

    In training the center then moves to the mean of teacher_out, as in DINOLoss.

    Shapes   teacher_out, student_out (N, output_dim): logits of the N masked patches, image after
             image in the order of the mask; any float dtype each.  mask (B, H, W) or (B, L) bool:
             N are True.  No gradient to teacher_out.
    Returns  scalar float32: a sum over the masked patches of CE / (B * masked in its image), so
             that images without a mask count as 0.
    State    center.center (1, output_dim), in state_dict.
    Raises   ValueError: shapes that disagree, a mask with another number of True than N (looked at
             on a CPU, elsewhere with FASTSSL_CHECK=1), no masked patch at all, temperatures not
             > 0, a momentum outside 0..1.
    Ranks    the value is of this rank's images; the center that of the patches of all ranks.
    Source   Zhou et al. 2021, arXiv:2111.07832, eq. 2; Oquab et al. 2023, DINOv2, arXiv:2304.07193.
    Differs  from lightly.loss.IBOTPatchLoss, whose value, gradient and center it has: in eval mode
             the center stays; ranks with different numbers of patches count by them.

    >>> mask = torch.tensor([[[True, False], [True, False]], [[False, True], [False, False]]])
    >>> loss = IBOTPatchLoss(4)
    >>> round(loss(torch.zeros(3, 4), torch.zeros(3, 4), mask).item(), 4)  # log 4
    1.3863
    """

    shown = ("teacher_temp", "student_temp")

    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
        *,
        process_group: Group = None,
    ) -> None:
        super().__init__(process_group=process_group)
        check_counts(output_dim=output_dim)
        check_positive(teacher_temp=teacher_temp, student_temp=student_temp)
        check_within(0, 1, center_momentum=center_momentum)
        check_mean(center_mode)
        self.teacher_temp, self.student_temp = teacher_temp, student_temp
        self.center = Center(output_dim, center_momentum, self.process_group)

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor,
        teacher_temp: float | None = None,
    ) -> Tensor:
        weight = _weight(mask, len(student_out), "student_out")
        return self._loss(teacher_out, student_out, weight, teacher_temp)

    def _loss(
        self, teacher: Tensor, student: Tensor, weight: Tensor, teacher_temp: float | None
    ) -> Tensor:
        temps = self.student_temp, self.teacher_temp if teacher_temp is None else teacher_temp
        loss = cross_entropies([student], [teacher], self.center.center, [[1.0]], temps, weight)
        if self.training:
            self.center.update(teacher.detach())
        return loss


class LinearIBOTPatchLoss(IBOTPatchLoss):
    """IBOTPatchLoss of features and prototypes, whose logits are never stored.

        logits x w^T:  loss(teacher_x, teacher_w, x, w, mask)

    Shapes   teacher_x (N, E) and teacher_w (output_dim, E), x (N, D) and w (output_dim, D): what
             the heads' last layers are given, and their weights; any float dtype, one on each side.
             The rest, the state and the ranks are IBOTPatchLoss's.  Gradient to x and w; to
             weight_g and weight_v, where w is made of them.
    Raises   ValueError too: shapes, dtypes or devices that disagree.
    On a CPU the gradient is made with the loss, and backward only multiplies.

    >>> loss, x, w = LinearIBOTPatchLoss(4), torch.zeros(2, 3), torch.ones(4, 3)
    >>> round(loss(x, w, x, w, torch.tensor([[True, True, False]])).item(), 4)  # log 4
    1.3863
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        teacher_x: Tensor,
        teacher_w: Tensor,
        x: Tensor,
        w: Tensor,
        mask: Tensor,
        teacher_temp: float | None = None,
    ) -> Tensor:
        loss = linear_soft_cross_entropy(
            x,
            w,
            teacher_x,
            teacher_w,
            assign=self.center.center,
            student_temp=self.student_temp,
            teacher_temp=self.teacher_temp if teacher_temp is None else teacher_temp,
            weight=_weight(mask, len(x), "x"),
            reduction="sum",
        )
        if self.training:
            self.center.update_linear(teacher_x.detach(), teacher_w.detach())
        return loss


class IBOTPlusPlusPatchLoss(IBOTPatchLoss):
    """The cross-entropy at all patches, masked and visible ones averaged apart.

        loss = mean over images of (mean over masked + visible_loss_weight mean over visible)

    Shapes   teacher_out, student_out (B, N, output_dim), or (B * N, output_dim) with a mask;
             mask (B, H, W) or (B, N) bool: True is masked.  Without one every patch counts alike.
    Returns  scalar float32.  State, ranks and what else is raised: IBOTPatchLoss.
    Raises   ValueError too: visible_loss_weight < 0.
    Source   TIPSv2, arXiv:2604.12012, as in lightly, whose value, gradient and center it has.

    >>> loss = IBOTPlusPlusPatchLoss(4)
    >>> round(loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)).item(), 4)  # log 4
    1.3863
    """

    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor | None = None,
        teacher_temp: float | None = None,
        visible_loss_weight: float = 1.0,
    ) -> Tensor:
        check_not_negative(visible_loss_weight=visible_loss_weight)
        if teacher_out.shape != student_out.shape or student_out.ndim not in (2, 3):
            got = f"{tuple(teacher_out.shape)} and {tuple(student_out.shape)}"
            raise ValueError(f"teacher_out and student_out must be (B, N, K) alike, got {got}")
        if mask is None and student_out.ndim == 2:
            got = f"{tuple(student_out.shape)}"
            raise ValueError(f"mask must be given for student_out (B * N, K), got {got}")
        teacher, student = (x.flatten(0, -2) for x in (teacher_out, student_out))
        if mask is None:
            weight = torch.full((len(student),), 1 / max(len(student), 1), device=student.device)
            return self._loss(teacher, student, weight, teacher_temp)
        _check_mask(mask)
        masked = mask.flatten(1)
        if (
            masked.numel() != len(student)
            or student_out.ndim == 3
            and len(mask) != len(student_out)
        ):
            got = f"{tuple(mask.shape)} for {tuple(student_out.shape)}"
            raise ValueError(f"mask must have an entry for each patch, got {got}")
        hidden = masked.float()
        shares = [x / x.sum(1, keepdim=True).clamp_min(1) for x in (hidden, 1 - hidden)]
        weight = (shares[0] + visible_loss_weight * shares[1]).flatten() / len(mask)
        return self._loss(teacher, student, weight, teacher_temp)


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.ndim < 2 or len(mask) == 0:
        got = f"{tuple(mask.shape)} {mask.dtype}"
        raise ValueError(f"mask must be (B, H, W) or (B, L) bool, got {got}")


def _weight(mask: Tensor, rows: int, name: str) -> Tensor:
    """`by_image` of a mask (B, ...), after refusing one that has not so many True."""
    _check_mask(mask)
    masked = mask.flatten(1)
    if can_read_values(masked) and int(masked.sum()) != rows:
        got = f"{int(masked.sum())} of {rows} rows"
        raise ValueError(f"mask must be True once for each row of {name}, got {got}")
    if rows == 0:
        raise ValueError(f"{name} must have at least 1 row, got 0")
    return by_image(masked, rows)


def by_image(masked: Tensor, rows: int) -> Tensor:
    """1 / (B n) of each of so many True of masked (B, L), n being those of its image: (rows,).

    Without waiting for the device: a row's image is where it falls among their running sums.
    """
    counts = masked.sum(1)
    image = torch.searchsorted(
        counts.cumsum(0), torch.arange(rows, device=masked.device), right=True
    ).clamp_max_(len(masked) - 1)
    return 1 / (counts.clamp_min(1)[image].float() * len(masked))
