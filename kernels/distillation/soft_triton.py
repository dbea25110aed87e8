"""The soft cross-entropy in Triton, by the functions that soft.py has in torch.

A program of the first kernel has a row of all views, and goes over its prototypes once with running
maxima; of few rows the prototypes are split among programs, whose parts are joined afterwards.  The
gradient has a program for each block of a row:

    ds_v = g_v / a (m_v softmax(s_v / a) - sum_t m_vt q_t),  m_v = sum_t m_vt

No atomics.  In the kernels capitals are pointers; r is a row of R, k a prototype of K, v a view of
V by the student, t one of T by the teacher.  Logits are scaled when the largest is taken off.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.gpu import gpu_of, on_gpu
from ..common.launch import ROWS, Part, configs, dtype_name, kernel_by_part, launcher, named, random
from ..common.tuning import Config, Kernel, config_for
from .soft import MOST, pairs_on

LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _student(S, v, k, V, K, s_v, s_k):
    """(v, k) logits; 0 of views that are not, -inf of prototypes that are not."""
    there = (v < V)[:, None] & (k < K)[None, :]
    at = v.to(tl.int64)[:, None] * s_v + k.to(tl.int64)[None, :] * s_k
    x = tl.load(S + at, there, 0.0).to(tl.float32)
    return tl.where((k < K)[None, :], x, -float("inf"))


@triton.jit
def _teacher(X, C, t, k, T, K, t_v, t_k, c_v):
    there = (t < T)[:, None] & (k < K)[None, :]
    at = t.to(tl.int64)[:, None] * t_v + k.to(tl.int64)[None, :] * t_k
    x = tl.load(X + at, there, 0.0).to(tl.float32)
    if C is not None:
        x -= tl.load(C + t[:, None] * c_v + k[None, :], there, 0.0).to(tl.float32)
    return tl.where((k < K)[None, :], x, -float("inf"))


@triton.jit
def _forward(
    S, X, C, PAIRS, LOSS, TOP, SUM, FAR, R, K, V, T, span, sharp_s, sharp_t,
    s_v, s_r, s_k, t_v, t_r, t_k, c_v,
    SPLIT: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """TOP, SUM (parts, V + T, R): the largest logit, and the sum of exps from there; of parts of
    the prototypes also FAR (parts, V, T, R), sum_k q_tk (s_vk - top_v)."""
    r, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v, t = tl.arange(0, BV), tl.arange(0, BT)
    S += r * s_r
    X += r * t_r
    top_s, top_t = (
        tl.full([BV], -float("inf"), tl.float32),
        tl.full([BT], -float("inf"), tl.float32),
    )
    sum_s, sum_t = tl.zeros([BV], tl.float32), tl.zeros([BT], tl.float32)
    far = tl.zeros([BV, BT], tl.float32)
    for start in range(part * span, tl.minimum((part + 1) * span, K), BLOCK):
        k = start + tl.arange(0, BLOCK)
        s = _student(S, v, k, V, K, s_v, s_k)
        x = _teacher(X, C, t, k, T, K, t_v, t_k, c_v)
        high_s, high_t = tl.maximum(top_s, tl.max(s, 1)), tl.maximum(top_t, tl.max(x, 1))
        s -= high_s[:, None]
        e = tl.exp2((x - high_t[:, None]) * sharp_t)
        fade_t = tl.exp2((top_t - high_t) * sharp_t)
        sum_s = sum_s * tl.exp2((top_s - high_s) * sharp_s) + tl.sum(tl.exp2(s * sharp_s), 1)
        s = tl.where((k < K)[None, :], s, 0.0)
        moved = tl.where(start == part * span, 0.0, top_s - high_s)
        far = (far + moved[:, None] * sum_t[None, :]) * fade_t[None, :]
        far += tl.sum(s[:, None, :] * e[None, :, :], 2)
        sum_t = sum_t * fade_t + tl.sum(e, 1)
        top_s, top_t = high_s, high_t
    far = far / sum_t[None, :]
    rows = part * (V + T) * R + r
    tl.store(TOP + rows + v * R, top_s, v < V)
    tl.store(SUM + rows + v * R, sum_s, v < V)
    tl.store(TOP + rows + (V + t) * R, top_t, t < T)
    tl.store(SUM + rows + (V + t) * R, sum_t, t < T)
    both = (v < V)[:, None] & (t < T)[None, :]
    if SPLIT:
        at = (part * V + v[:, None]) * T + t[None, :]
        tl.store(FAR + at * R + r, far, both)
    else:
        pairs = tl.load(PAIRS + v[:, None] * T + t[None, :], both, 0.0)
        loss = tl.sum(pairs, 1) * tl.log2(sum_s) - sharp_s * tl.sum(pairs * far, 1)
        tl.store(LOSS + v * R + r, loss * LN2, v < V)


@triton.jit
def _backward(
    G, S, X, C, PAIRS, TOP, SUM, OUT, R, K, V, T, sharp_s, sharp_t, scale, g_v, g_r,
    s_v, s_r, s_k, t_v, t_r, t_k, c_v,
    BV: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT (V, R, K).  scale: 1 / student_temp."""
    r, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v, t = tl.arange(0, BV), tl.arange(0, BT)
    s = _student(S + r * s_r, v, k, V, K, s_v, s_k)
    x = _teacher(X + r * t_r, C, t, k, T, K, t_v, t_k, c_v)
    both = (v < V)[:, None] & (t < T)[None, :]
    pairs = tl.load(PAIRS + v[:, None] * T + t[None, :], both, 0.0)
    top_s, top_t = tl.load(TOP + v * R + r, v < V, 0.0), tl.load(TOP + (V + t) * R + r, t < T, 0.0)
    sum_s, sum_t = tl.load(SUM + v * R + r, v < V, 1.0), tl.load(SUM + (V + t) * R + r, t < T, 1.0)
    g = tl.load(G + v * g_v + r * g_r, v < V, 0.0) * scale
    p = tl.exp2((s - top_s[:, None]) * sharp_s) * (tl.sum(pairs, 1) / sum_s)[:, None]
    q = tl.exp2((x - top_t[:, None]) * sharp_t)
    mix = tl.sum((pairs / sum_t[None, :])[:, :, None] * q[None, :, :], 1)
    at = (v.to(tl.int64)[:, None] * R + r) * K + k[None, :]
    out = (p - mix) * g[:, None]
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), (v < V)[:, None] & (k < K)[None, :])


CORES, WAVES, LEAST = 8, 2, 2  # without a GPU; programs a core, blocks of a part at least
VIEWS = {"one": (1, 1), "two": (2, 2), "crops": MOST}  # the student's and the teacher's at most


def part_of(V: int, T: int) -> str:
    """The class of so many views; "" for more than any takes."""
    fits = (name for name, most in VIEWS.items() if V <= most[0] and T <= most[1])
    return next(fits, "")


def _by_view(center: Tensor | None) -> tuple[Tensor | None, int]:
    """The center, and how far that of the next view is."""
    if center is None:
        return None, 0
    return center.contiguous(), center.shape[1] if len(center) > 1 else 0


def _sides(V: int, T: int) -> dict[str, int]:
    return dict(zip(("BV", "BT"), VIEWS[part_of(V, T)], strict=True))


def cross_entropies(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    pairs: list[float],
    sharp_s: float,
    sharp_t: float,
) -> tuple[Tensor, Tensor]:
    (V, R, K), T = student.shape, len(teacher)
    span, parts = _split(student, T)
    config = _config(FORWARD, student, T, "-split" if parts > 1 else "")
    top, sums = student.new_empty(2, parts, V + T, R, dtype=torch.float32)
    loss = top.new_empty(V, R)
    far = top.new_empty(parts, V, T, R) if parts > 1 else None
    on = pairs_on(student.device, tuple(pairs))
    center, c_v = _by_view(center)
    if R:
        with torch.cuda.device_of(student):
            _forward[(R, parts)](
                student, teacher, center, on, loss, top, sums, far, R, K, V, T, span,
                sharp_s * LOG2E, sharp_t * LOG2E, *student.stride(), *teacher.stride(), c_v,
                SPLIT=parts > 1, **_sides(V, T), **config.arguments,
            )  # fmt: skip
    if far is None:
        return loss, torch.cat([top, sums])
    return joined(top, sums, far, on.view(V, T), sharp_s, sharp_t)


def _split(student: Tensor, T: int) -> tuple[int, int]:
    """How many prototypes a program has, in how many parts of a row: as many as fill the device."""
    _, R, K = student.shape
    step = _config(FORWARD, student, T, "-split").blocks["BLOCK"]
    cores = gpu_of(student.device).processors if on_gpu(student.device) else CORES
    parts = max(1, min(cores * WAVES // max(R, 1), triton.cdiv(K, LEAST * step)))
    span = triton.cdiv(triton.cdiv(K, parts), step) * step
    return span, triton.cdiv(K, span)


def _config(kernel: Kernel, student: Tensor, T: int, ending: str = "") -> Config:
    part = part_of(len(student), T) + ending
    return config_for(kernel, f"{dtype_name(student)}-{part}", student.device)


def joined(
    top: Tensor, sums: Tensor, far: Tensor, pairs: Tensor, sharp_s: float, sharp_t: float
) -> tuple[Tensor, Tensor]:
    """What `_forward` would have given of all prototypes at once."""
    V = len(pairs)
    high = top.amax(0)
    below = top - high
    sharp = torch.cat([below[:, :V] * sharp_s, below[:, V:] * sharp_t], 1)
    share = sums * sharp.exp()
    whole = share.sum(0)
    near = (far + below[:, :V, None]) * (share / whole)[:, None, V:]
    own = (pairs[..., None] * near.sum(0)).sum(1)
    loss = pairs.sum(1, keepdim=True) * whole[:V].log() - sharp_s * own
    return loss, torch.stack([high, whole])


def gradients(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    stats: Tensor,
    pairs: list[float],
    sharp_s: float,
    sharp_t: float,
) -> Tensor:
    (V, R, K), T = student.shape, len(teacher)
    out = torch.empty_like(student, memory_format=torch.contiguous_format)
    config = _config(BACKWARD, student, T)
    center, c_v = _by_view(center)
    if R:
        with torch.cuda.device_of(student):
            _backward[(R, triton.cdiv(K, config.blocks["BLOCK"]))](
                grad, student, teacher, center, pairs_on(student.device, tuple(pairs)), *stats, out,
                R, K, V, T, sharp_s * LOG2E, sharp_t * LOG2E, sharp_s, *grad.stride(),
                *student.stride(), *teacher.stride(), c_v, **_sides(V, T), **config.arguments,
            )  # fmt: skip
    return out


TRIAL = {"one": (1, 1, 1024), "two": (2, 2, 256), "crops": (10, 2, 64)}  # V, T, rows
PROTOTYPES = 65536


def _trial(dtype: str, part: str, device: torch.device) -> tuple[Any, ...]:
    V, T, R = TRIAL[part.removesuffix("-split")]
    R = 16 if part.endswith("-split") else R
    student, teacher = (random(dtype, device, n, R, PROTOTYPES) for n in (V, T))
    center = torch.zeros(1, PROTOTYPES, device=device)
    return student, teacher, center, [1.0] * (V * T), 10.0, 25.0


def _try_forward(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    return launcher(FORWARD.name, config, cross_entropies, *_trial(dtype, part, device))


def _try_backward(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    student, teacher, center, *rest = _trial(dtype, part, device)
    loss, stats = cross_entropies(student, teacher, center, *rest)
    arguments = torch.ones_like(loss), student, teacher, center, stats, *rest
    return launcher(BACKWARD.name, config, gradients, *arguments)


# Sizes and strides are taken to be divisible by 16, prototypes adjacent, a center to be there.
TYPES = named("i32:16", "R K span s_v s_r t_v t_r g_v c_v") | named("i32", "V T g_r")
TYPES |= named("fp32", "sharp_s sharp_t scale") | named(ROWS, "S X OUT")
TYPES |= named("*fp32:16", "C PAIRS LOSS TOP SUM FAR G")
ONE_WAY = {"s_k": 1, "t_k": 1}
BLOCKS = {
    "one": ([(2048, 4, 2), (4096, 8, 2)], [(2048, 4, 2), (4096, 8, 2)]),
    "two": ([(1024, 4, 2), (2048, 8, 2)], [(1024, 4, 2), (512, 4, 2)]),
    "crops": ([(256, 4, 2), (256, 8, 2)], [(128, 4, 2), (256, 8, 2)]),
}


def _part(name: str, way: int, **given: Any) -> Part:
    BV, BT = VIEWS[name]
    return Part({**ONE_WAY, "BV": BV, "BT": BT, **given}, configs("BLOCK", BLOCKS[name][way]))


WHOLE = {name: _part(name, 0, SPLIT=False, FAR=None) for name in VIEWS}
SPLIT = {f"{name}-split": _part(name, 0, SPLIT=True) for name in VIEWS}
GRADIENTS = {name: _part(name, 1) for name in VIEWS}
FORWARD = kernel_by_part("soft_forward", _forward, TYPES, WHOLE | SPLIT, _try_forward)
BACKWARD = kernel_by_part("soft_backward", _backward, TYPES, GRADIENTS, _try_backward)
