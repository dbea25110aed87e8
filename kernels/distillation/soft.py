"""The cross-entropy of a student's distributions with a teacher's.

    p_v = softmax(s_v / a)      q_t = softmax((t_t - c) / b)
    loss_v = sum_t m_vt CE(q_t, p_v) = sum_t m_vt (lse(s_v / a) - q_t . s_v / a)

V views of R rows by the student and T by the teacher, over K prototypes; m says which are compared.
Why: eager holds the teacher's distributions, the student's log-distributions, their products and
the gradient's own exponentials: four to five copies of logits that are a gigabyte each.  Here every
logit is read once each way, whoever is compared with whom, and a number a row is kept.
Traffic: student and teacher once; backward once more, and the student's gradient.  Memory-bound.
In place: nothing.
Any assignment that is a softmax of the teacher's logits less a number a prototype fits: DINO's
centers, and Sinkhorn's (`sinkhorn`).
Source: Caron et al. 2021, DINO, arXiv:2104.14294, eq. 1 and algorithm 1.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..common.autograd import FirstOrder, accumulator, ahead, finished, first_order
from ..common.checks import require_features, require_float
from ..common.chunks import row_spans
from ..common.dispatch import declare
from ..common.operators import launches

Pairs = Sequence[Sequence[float]]
MOST = 16, 2  # views of the student and of the teacher that a program takes


def soft_cross_entropy_reference(student, teacher, center, pairs, sharp_s, sharp_t):
    """The formula, eager, in the dtype it is given; sharp: 1 / temperature."""
    q = ((teacher if center is None else teacher - center[:, None]) * sharp_t).softmax(-1)
    log_p = (student * sharp_s).log_softmax(-1)
    apart = -torch.einsum("vrk,trk->vtr", log_p, q.to(log_p.dtype))
    return (student.new_tensor(pairs)[..., None] * apart.to(accumulator(student.dtype))).sum(1)


def _distributions(
    views: Sequence[Tensor], i: slice, center: Tensor | None, sharp: float, acc: torch.dtype
) -> list[Tensor]:
    made = []
    for t, view in enumerate(views):
        x = view[i].to(acc, copy=center is None)
        x = x if center is None else x - center[t % len(center)]
        made.append(x.mul_(sharp).softmax(-1))
    return made


def mixture(of: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_t m_t q_t, which may be one of them itself."""
    chosen = [(q, m) for q, m in zip(of, weights, strict=True) if m]
    if len(chosen) == 1 and chosen[0][1] == 1:
        return chosen[0][0]
    mix = torch.zeros_like(of[0])
    for q, m in chosen:
        mix.add_(q, alpha=m)
    return mix


def _by_rows(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    center: Tensor | None,
    pairs: Pairs,
    sharp_s: float,
    sharp_t: float,
    made: Callable[[int, slice, Tensor, Tensor, float], None],
) -> None:
    """Call made(v, i, x, mix, mass) for each view and span of rows: x = s_v / a, which it may
    overwrite, the teacher's distributions that count, summed by their weights, and their weight.
    """
    first = students[0]
    acc = accumulator(first.dtype)
    center = None if center is None else center.to(acc)
    for i in row_spans(first, 4 * first.shape[1]):  # what is alive: q, their sum, x and p
        of = _distributions(teachers, i, center, sharp_t, acc)
        mixtures: dict[tuple[float, ...], Tensor] = {}
        for v, (student, weights) in enumerate(zip(students, pairs, strict=True)):
            weights = tuple(weights)
            if weights not in mixtures:
                mixtures[weights] = mixture(of, weights)
            x = student[i].to(acc, copy=True).mul_(sharp_s)
            made(v, i, x, mixtures[weights], sum(weights))


def _value(x: Tensor, p: Tensor | None, mix: Tensor, mass: float) -> Tensor:
    """mass lse(x) - mix . x of each row, from the largest on, so that a match keeps its digits.

    p: softmax(x), if it is there, whose largest tells the sum.
    """
    x.sub_(x.amax(-1, keepdim=True))
    far = torch.linalg.vecdot(x, mix)
    lse = x.exp_().sum(-1).log_() if p is None else p.amax(-1).log_().neg_()
    return far.neg_().add_(lse, alpha=mass)


def _slope(p: Tensor, mix: Tensor, mass: float, g: Tensor) -> Tensor:
    """g (mass p - mix), in p's memory."""
    return p.mul_(mass).sub_(mix).mul_(g)


def _cross_entropies(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    pairs: list[float],
    sharp_s: float,
    sharp_t: float,
) -> tuple[Tensor, Tensor]:
    """The losses (V, R), and what the gradients are helped by: of the kernels (2, V + T, R)."""
    loss = student.new_empty(student.shape[:2], dtype=accumulator(student.dtype))

    def made(v: int, i: slice, x: Tensor, mix: Tensor, mass: float) -> None:
        loss[v, i] = _value(x, None, mix, mass)

    sides = student.unbind(), teacher.unbind(), center, pairs_by_view(pairs, len(student))
    _by_rows(*sides, sharp_s, sharp_t, made)
    return loss, student.new_empty(0)


def _gradients(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    stats: Tensor,
    pairs: list[float],
    sharp_s: float,
    sharp_t: float,
) -> Tensor:
    """The gradient to student."""
    out = torch.empty_like(student, memory_format=torch.contiguous_format)

    def made(v: int, i: slice, x: Tensor, mix: Tensor, mass: float) -> None:
        out[v, i] = _slope(x.softmax(-1), mix, mass, (grad[v, i] * sharp_s).unsqueeze(-1))

    sides = student.unbind(), teacher.unbind(), center, pairs_by_view(pairs, len(student))
    _by_rows(*sides, sharp_s, sharp_t, made)
    return out


def pairs_by_view(pairs: list[float], V: int) -> Pairs:
    """m_vt, flat, by the student's V views."""
    T = len(pairs) // max(V, 1)
    return [pairs[v * T : (v + 1) * T] for v in range(V)]


def _fake_cross_entropies(student, teacher, center, pairs, sharp_s, sharp_t):
    (V, R, _), T = student.shape, len(teacher)
    loss = student.new_empty(V, R, dtype=torch.float32)
    return loss, loss.new_empty(2, V + T, R)


def _fake_gradients(grad, student, teacher, center, stats, pairs, sharp_s, sharp_t):
    return student.new_empty(student.shape)


_TORCH = SimpleNamespace(cross_entropies=_cross_entropies, gradients=_gradients)
_TRITON = launches(
    f"{__package__}.soft_triton",
    _TORCH,
    cross_entropies=_fake_cross_entropies,
    gradients=_fake_gradients,
)
backends = {"torch": _TORCH, "triton": _TRITON}


class _SoftCrossEntropy(FirstOrder):
    @staticmethod
    def forward(ctx: Any, student, teacher, center, pairs, sharp_s, sharp_t, impl):
        flat = [float(m) for row in pairs for m in row]
        ctx.rest, ctx.impl = (flat, sharp_s, sharp_t), impl
        loss, stats = backends[impl].cross_entropies(student, teacher, center, *ctx.rest)
        ctx.save_for_backward(student, teacher, center, stats)
        return finished(loss)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        return backends[ctx.impl].gradients(grad, *ctx.saved_tensors, *ctx.rest), *[None] * 6


_SOFT = declare("soft_cross_entropy", _SoftCrossEntropy.call, soft_cross_entropy_reference)


@lru_cache
def pairs_on(device: torch.device, pairs: tuple[float, ...]) -> Tensor:
    """m_vt, flat, where the kernels are; made once, so that no step waits for it."""
    return torch.tensor(pairs, dtype=torch.float32, device=device)


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    *,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    center: Tensor | None = None,
    weight: Tensor | None = None,
    pairs: Pairs | None = None,
    impl: str = "auto",
) -> Tensor:
    """The cross-entropy of softmax(student / student_temp) with softmax((teacher - center) /
    teacher_temp), of each row: (R,), or (V, R) of several views; float32, in nats.

    student, teacher: (R, K) logits over K prototypes, any float dtype each.  Or (V, R, K) and
    (T, R, K): V and T views of the same R things, where pairs, V rows of T numbers, weighs the
    cross-entropy of each view of the one with each of the other.  center: K numbers in any shape,
    or (T, K): one for each view.  weight: (R,), by which each row's is multiplied.
    Gradient to student, in its dtype; none to anything else; first order only.
    impl: "auto", "triton", "torch" or "reference" (holds both distributions, in the inputs' dtype).
    Triton takes up to 16 views and 2 of the teacher; more are torch's under auto.
    Raises ValueError for shapes or devices that disagree, a temperature <= 0 and an unknown impl.

    >>> s, t = torch.zeros(1, 4), torch.tensor([[9.0, 0.0, 0.0, 0.0]])
    >>> soft_cross_entropy(s, t)  # a student that knows nothing: log 4
    tensor([1.3863])
    """
    require_float(student=student, teacher=teacher)
    if student.ndim not in (2, 3) or student.ndim != teacher.ndim:
        got = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        raise ValueError(
            f"student and teacher must be (R, K), or (V, R, K) and (T, R, K), got {got}"
        )
    if student.ndim == 2:
        if pairs is not None:
            raise ValueError(f"pairs is for student (V, R, K), got {tuple(student.shape)}")
        student, teacher, pairs = student[None], teacher[None], ((1.0,),)
        one = True
    else:
        one = False
    check_soft(student, teacher, center, student_temp, teacher_temp)
    sizes = len(student), len(teacher)
    if pairs is None or len(pairs) != sizes[0] or any(len(row) != sizes[1] for row in pairs):
        raise ValueError(f"pairs must be {sizes[0]} rows of {sizes[1]} numbers, got {pairs!r}")
    if center is not None:
        center = center.detach().reshape(-1, student.shape[2])
    sharp = 1 / student_temp, 1 / teacher_temp
    arguments = student, teacher.detach(), center, tuple(map(tuple, pairs)), *sharp
    problem = ""
    if sizes[0] > MOST[0] or sizes[1] > MOST[1]:
        most = f"at most {MOST[0]} views of the student and {MOST[1]} of the teacher"
        problem = f"impl='triton' is for {most}, got {sizes[0]} and {sizes[1]}"
    inputs = {"student": student, "teacher": teacher}
    loss = _SOFT(impl, *arguments, inputs=inputs, problem=problem)
    loss = loss[0] if one else loss
    return loss if weight is None else loss * weight.detach()


def soft_cross_entropy_ahead(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    center: Tensor | None,
    pairs: Pairs,
    temps: tuple[float, float],
    weight: Tensor | float,
) -> Tensor:
    """The sum over views and rows of weight times `soft_cross_entropy`, its gradient made with it.

    students, teachers: V and T tensors (R, K); weight: a number, or (R,).  For what `ahead` is for.
    """
    sharp_s, sharp_t = 1 / temps[0], 1 / temps[1]
    teachers = [teacher.detach() for teacher in teachers]
    if center is not None:
        center = center.detach().reshape(-1, students[0].shape[1])

    def run(students: Sequence[Tensor], need: Sequence[bool]) -> tuple[Tensor, Sequence[Tensor]]:
        acc = accumulator(students[0].dtype)
        of_row = torch.as_tensor(weight, dtype=acc).expand(len(students[0]))
        value = torch.zeros((), dtype=acc)
        grads = [torch.empty_like(s) if n else s for s, n in zip(students, need, strict=True)]

        def made(v: int, i: slice, x: Tensor, mix: Tensor, mass: float) -> None:
            p = x.softmax(-1)
            value.add_(_value(x, p, mix, mass) @ of_row[i])
            if need[v]:
                grads[v][i] = _slope(p, mix, mass, (of_row[i] * sharp_s).unsqueeze(-1))

        _by_rows(students, teachers, center, pairs, sharp_s, sharp_t, made)
        return value, grads

    return ahead(run, *students)


def check_soft(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: float,
) -> None:
    """Refuse what `soft_cross_entropy` cannot take, of (V, R, K) and (T, R, K)."""
    require_features(student=student, teacher=teacher)
    if student.shape[1:] != teacher.shape[1:] or student.device != teacher.device:
        shapes = tuple(student.shape), tuple(teacher.shape)
        got = f"{shapes[0]} on {student.device} and {shapes[1]} on {teacher.device}"
        raise ValueError(f"student and teacher must share rows, prototypes and device, got {got}")
    check_center("center", center, (len(teacher), student.shape[-1]), student.device)
    check_temps(student_temp=student_temp, teacher_temp=teacher_temp)


def check_center(
    name: str, center: Tensor | None, sides: tuple[int, int], device: torch.device
) -> None:
    """Refuse what is not K float numbers, or (T, K), on the device; sides: T and K."""
    if center is None:
        return
    require_float(**{name: center})
    T, K = sides
    if center.numel() not in (K, T * K) or center.device != device:
        want = f"{K} numbers, or ({T}, {K}), on {device}"
        raise ValueError(f"{name} must be {want}, got {tuple(center.shape)} on {center.device}")


def check_temps(**temps: float) -> None:
    """Refuse, naming the argument, what is not > 0."""
    for name, temp in temps.items():
        if not temp > 0:
            raise ValueError(f"{name} must be > 0, got {temp!r}")
