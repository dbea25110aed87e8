"""The Chamfer distance of two point clouds.

    s(x, y) = mean_n min_m f(x_n - y_m)       chamfer(p, t) = s(p, t) + s(t, p)
    "l2": f(d) = |d|^2                        "l1": f(d) = |d| / 2

G pairs of clouds, of N and M points in D <= 8 dimensions.
Why: eager makes all (G, N, M, D) differences and (G, N, M) distances, and keeps them for backward.
Here a tile of distances is made at a time; each point's nearest one, 4 bytes, is all that is kept,
and the gradient goes through it alone: exact, wherever the nearest is one.  Where several are
equally near it goes through the first.  Differences are squared, not expanded to products: clouds
far from the origin lose nothing.
In Triton a program has a block of one cloud's points and goes over the other cloud in blocks:

    nearest   least_n = min_m |x_n - y_m|^2, at the lowest m that has it
    pull      dx_n = a c (x_n - y_at(n)) + b sum_(m: back(m) = n) c (x_n - y_m)
              c = 2 for squares, 1 / distance (0 at distance 0) for distances

A place of a block keeps its own best, and the block's best is taken once, at the end.  `pull` finds
the points whose nearest is n by looking through all of `back`: no atomics.
In the kernels capitals are pointers; g is a cloud, k a coordinate.
Cost: 3 D N M operations a pair, each way in Triton; in torch, backward costs N + M.
Memory: O(N + M), and one chunk.  In place: nothing.
Source: Pang et al. 2022, Point-MAE, arXiv:2203.06604, section 3.3, whose reconstruction loss is
"l2"; "l1", half the sum of both mean distances, is usual for completion of point clouds.
"""


# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportGeneralTypeIssues=false
# Triton states the types of its functions for its own compiler.

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..common.autograd import accumulator, finished, first_order
from ..common.checks import require_float
from ..common.chunks import row_spans
from ..common.dispatch import declare
from ..common.launch import ROWS, config_by_dtype, kernel_by_dtype, launcher
from ..common.operators import operator
from ..common.triton import tl, triton
from ..common.tuning import Config

DIMENSIONS = 8


def chamfer_reference(pred, target, root):
    """The formula, eager, in the dtype it is given: all differences at once."""
    pairs = (pred[:, :, None] - target[:, None]).square().sum(-1)
    loss = 0
    for axis in (1, 2):
        least = pairs.min(axis).values
        loss = loss + (_root(least) if root else least).mean(1)
    return loss / 2 if root else loss


def _root(least: Tensor) -> Tensor:
    """Its square root, with gradient 0 at 0."""
    return torch.where(least > 0, least, 1).sqrt() * (least > 0)


def _squares_torch(x: Tensor, y: Tensor) -> Tensor:
    """|x - y|^2 of every pair, (..., N, M), by coordinates: nothing cancels far from the origin."""
    acc = accumulator(x.dtype)
    total = x.new_zeros(*x.shape[:-1], y.shape[-2], dtype=acc)
    for k in range(x.shape[-1]):
        delta = x[..., k, None].to(acc) - y[..., None, :, k].to(acc)
        total.addcmul_(delta, delta)
    return total


def _nearest_torch(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squared distance and place of the nearest of y to each x, (G, N), and of x to each y, (G, M).

    Of several nearest, the first.  A tile of distances is one chunk, and serves both ways.
    """
    (G, N), M, acc = x.shape[:2], y.shape[1], accumulator(x.dtype)
    near_x = x.new_empty(G, N, dtype=acc), torch.empty(G, N, dtype=torch.int32, device=x.device)
    near_y = x.new_empty(G, M, dtype=acc), torch.empty(G, M, dtype=torch.int32, device=x.device)
    near_y[0].fill_(torch.inf)
    near_y[1].fill_(0)
    points = list(row_spans(near_x[0].T, M))
    for g in row_spans(near_x[0], points[0].stop * M):
        for i in points:
            tile = _squares_torch(x[g, i], y[g])
            near_x[0][g, i], near_x[1][g, i] = tile.min(2)
            least, places = tile.min(1)
            closer = (least < near_y[0][g]) | least.isnan()
            near_y[0][g] = torch.where(closer, least, near_y[0][g])
            near_y[1][g] = torch.where(closer, places.int() + i.start, near_y[1][g])
    return *near_x, *near_y


def _pull_torch(
    grad: Tensor, x: Tensor, y: Tensor, places: Tensor, back: Tensor, weights: list[float],
    root: bool,
) -> Tensor:  # fmt: skip
    """The gradient to x, (G, N, D) as x; weights: those of x's nearest and of y's."""
    acc = accumulator(x.dtype)
    x_acc, y_acc = x.to(acc), y.to(acc)
    own = x_acc - _points(y_acc, places)
    dx = own * (_factor_torch(own, root) * (weights[0] * grad)[:, None, None])
    other = _points(x_acc, back) - y_acc
    other = other * (_factor_torch(other, root) * (weights[1] * grad)[:, None, None])
    dx.scatter_add_(1, back.long()[..., None].expand_as(other), other)
    return dx.to(x.dtype)


def _points(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places.long()[..., None].expand(-1, -1, x.shape[2]))


def _factor_torch(delta: Tensor, root: bool) -> Tensor | float:
    if not root:
        return 2.0
    far = torch.linalg.vector_norm(delta, dim=-1, keepdim=True)
    return torch.where(far > 0, 1 / far, 0.0)


@triton.jit
def _squares(X, Y, x_at, y_at, row, column, x_k, y_k, DIMS: tl.constexpr):
    """|x - y|^2 of every pair of a block, by coordinates: nothing cancels far from the origin."""
    total = tl.zeros([x_at.shape[0], y_at.shape[0]], tl.float32)
    for k in tl.static_range(DIMS):
        x = tl.load(X + x_at + k * x_k, row, 0.0).to(tl.float32)
        y = tl.load(Y + y_at + k * y_k, column, 0.0).to(tl.float32)
        delta = x[:, None] - y[None, :]
        total += delta * delta
    return total


@triton.jit
def _nearest(
    X, Y, LEAST, PLACES, N, M, x_g, x_n, x_k, y_g, y_n, y_k,
    DIMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """LEAST float32 and PLACES int32 (G, N).  What is not a number is as far as infinity."""
    g = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_at, y_at = g * x_g + n.to(tl.int64) * x_n, g * y_g
    best = tl.full([BLOCK_N, BLOCK_M], float("inf"), tl.float32)
    places = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        total = _squares(
            X, Y, x_at, y_at + m.to(tl.int64) * y_n, n < N, m < M, x_k, y_k, DIMS
        )  # fmt: skip
        closer = (total < best) & (m < M)[None, :]
        best = tl.where(closer, total, best)
        places = tl.where(closer, m[None, :], places)
    least = tl.min(best, 1)
    places = tl.min(tl.where(best == least[:, None], places, 2147483647), 1)
    tl.store(LEAST + g * N + n, least, n < N)
    tl.store(PLACES + g * N + n, tl.where(least < float("inf"), places, 0), n < N)


@triton.jit
def _factor(total, ROOT: tl.constexpr):
    """c, of squared distances."""
    if ROOT:
        far = tl.where(total > 0, total, 1.0)
        return tl.where(total > 0, tl.div_rn(1.0, tl.sqrt_rn(far)), 0.0)
    else:
        return tl.full(total.shape, 2.0, tl.float32)


@triton.jit
def _pull(
    GRAD, X, Y, PLACES, BACK, DX, N, M, a, b, grad_g, x_g, x_n, x_k, y_g, y_n, y_k,
    ROOT: tl.constexpr, DIMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """DX (G, N, DIMS), its gradients in float32 until they are stored; WIDTH >= DIMS."""
    g = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row, column = n < N, tl.arange(0, WIDTH)
    x_at, y_at = g * x_g + n.to(tl.int64) * x_n, g * y_g
    dx = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        there = y_at + m.to(tl.int64) * y_n
        back = tl.load(BACK + g * M + m, m < M, -1)
        mine = back[None, :] == n[:, None]
        total = _squares(X, Y, x_at, there, row, m < M, x_k, y_k, DIMS)
        factor = _factor(total, ROOT)
        for k in tl.static_range(DIMS):
            x = tl.load(X + x_at + k * x_k, row, 0.0).to(tl.float32)
            y = tl.load(Y + there + k * y_k, m < M, 0.0).to(tl.float32)
            part = tl.sum(tl.where(mine, factor * (x[:, None] - y[None, :]), 0.0), 1)
            dx += tl.where((column == k)[None, :], b * part[:, None], 0.0)
    nearest = y_at + tl.load(PLACES + g * N + n, row, 0).to(tl.int64) * y_n
    own = tl.zeros([BLOCK_N], tl.float32)
    for k in tl.static_range(DIMS):
        x = tl.load(X + x_at + k * x_k, row, 0.0).to(tl.float32)
        delta = x - tl.load(Y + nearest + k * y_k, row, 0.0).to(tl.float32)
        own += delta * delta
    factor = _factor(own, ROOT)
    for k in tl.static_range(DIMS):
        x = tl.load(X + x_at + k * x_k, row, 0.0).to(tl.float32)
        delta = x - tl.load(Y + nearest + k * y_k, row, 0.0).to(tl.float32)
        dx += tl.where((column == k)[None, :], (a * factor * delta)[:, None], 0.0)
    dx *= tl.load(GRAD + g * grad_g)
    at = (g * N + n)[:, None] * DIMS + column[None, :]
    tl.store(DX + at, dx.to(DX.dtype.element_ty), row[:, None] & (column < DIMS)[None, :])


def _nearest_one_way(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    (G, N, D), M, config = x.shape, y.shape[1], config_by_dtype(NEAREST, x)
    least = x.new_empty(G, N, dtype=torch.float32)
    places = torch.empty(G, N, dtype=torch.int32, device=x.device)
    if G:
        with torch.cuda.device_of(x):
            _nearest[G, triton.cdiv(N, config.blocks["BLOCK_N"])](
                x, y, least, places, N, M, *x.stride(), *y.stride(), DIMS=D, **config.arguments
            )
    return least, places


def _nearest_triton(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_nearest_one_way(x, y), *_nearest_one_way(y, x)


def _pull_triton(
    grad: Tensor, x: Tensor, y: Tensor, places: Tensor, back: Tensor, weights: list[float],
    root: bool,
) -> Tensor:  # fmt: skip
    (G, N, D), M, config = x.shape, y.shape[1], config_by_dtype(PULL, x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if G:
        with torch.cuda.device_of(x):
            _pull[G, triton.cdiv(N, config.blocks["BLOCK_N"])](
                grad, x, y, places, back, dx, N, M, *weights, *grad.stride(), *x.stride(),
                *y.stride(), ROOT=root, DIMS=D, WIDTH=triton.next_power_of_2(D), **config.arguments,
            )  # fmt: skip
    return dx


def _fake_nearest(x, y):
    sizes = (x.shape[:2], torch.float32), (x.shape[:2], torch.int32)
    sizes += (y.shape[:2], torch.float32), (y.shape[:2], torch.int32)
    return tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in sizes)


backends: dict[str, Any] = {
    "torch": SimpleNamespace(nearest=_nearest_torch, pull=_pull_torch),
    "triton": SimpleNamespace(
        nearest=operator("chamfer_nearest", _nearest_triton, _fake_nearest),
        pull=operator(
            "chamfer_pulled", _pull_triton, lambda grad, x, *arguments: x.new_empty(x.shape)
        ),
    ),
}


class _Chamfer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred, target, root, impl):
        least_p, places_p, least_t, places_t = backends[impl].nearest(pred, target)
        ctx.save_for_backward(pred, target, places_p, places_t)
        ctx.root, ctx.impl = root, impl
        if root:
            return (least_p.sqrt().mean(1) + least_t.sqrt().mean(1)) / 2
        return finished(least_p.mean(1) + least_t.mean(1))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad):
        pred, target, at_p, at_t = ctx.saved_tensors
        half = 0.5 if ctx.root else 1.0
        w_p, w_t = half / pred.shape[1], half / target.shape[1]
        pull, (need_p, need_t) = backends[ctx.impl].pull, ctx.needs_input_grad[:2]
        d_p = pull(grad, pred, target, at_p, at_t, [w_p, w_t], ctx.root) if need_p else None
        d_t = pull(grad, target, pred, at_t, at_p, [w_t, w_p], ctx.root) if need_t else None
        return d_p, d_t, None, None


_CHAMFER = declare("chamfer", _Chamfer.apply, chamfer_reference)


def chamfer(pred: Tensor, target: Tensor, *, kind: str = "l2", impl: str = "auto") -> Tensor:
    """The Chamfer distance of each pair of clouds: (G,) float32.

    pred (G, N, D), target (G, M, D): any float dtype, D <= 8, N and M at least 1.
    kind: "l2" sums both means of squared distances, in the points' unit squared; "l1" averages
    both means of distances, in the points' unit, with gradient 0 at distance 0.
    Gradients to pred and target, through each point's nearest, the first of several; first order
    only.  A cloud with a coordinate that is not finite has a loss that is not finite.
    impl: "auto", "triton", "torch" or "reference" (makes all differences, in the inputs' dtype).
    Raises ValueError for shapes that disagree, an empty cloud, an unknown kind and an unknown impl.

    >>> chamfer(torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[3.0]]]))
    tensor([10.5000])
    """
    require_float(pred=pred, target=target)
    shapes = tuple(pred.shape), tuple(target.shape)
    if not (pred.ndim == target.ndim == 3 and shapes[0][::2] == shapes[1][::2]):
        got = f"{shapes[0]} and {shapes[1]}"
        raise ValueError(f"pred and target must be (G, N, D) and (G, M, D), got {got}")
    if not 1 <= pred.shape[2] <= DIMENSIONS:
        raise ValueError(f"points must have 1 to {DIMENSIONS} coordinates, got {pred.shape[2]}")
    if 0 in (pred.shape[1], target.shape[1]):
        got = f"{shapes[0]} and {shapes[1]}"
        raise ValueError(f"pred and target must have points, got {got}")
    if kind not in ("l2", "l1"):
        raise ValueError(f"kind must be 'l2' or 'l1', got {kind!r}")
    loss = _CHAMFER(impl, pred, target, kind == "l1", inputs={"pred": pred, "target": target})
    return loss.to(accumulator(pred.dtype))


TRIAL = (64, 1024, 3)  # clouds, points, coordinates


def _trial(dtype: str, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, *TRIAL, generator=generator, device=device)
    return list(x.to(getattr(torch, dtype)))


def _try_nearest(dtype: str, config: Config, device: torch.device) -> Any:
    return launcher(NEAREST.name, config, _nearest_triton, *_trial(dtype, device))


def _try_pull(dtype: str, config: Config, device: torch.device) -> Any:
    x, y = _trial(dtype, device)
    _, places, _, back = _nearest_triton(x, y)
    arguments = torch.ones(len(x), device=device), x, y, places, back, [1.0, 1.0], False
    return launcher(PULL.name, config, _pull_triton, *arguments)


def _config(rows: int, columns: int, warps: int) -> Config:
    return Config({"BLOCK_N": rows, "BLOCK_M": columns}, warps, 2)


# Points of three coordinates, as they come; sizes are not taken to be divisible by anything.
_TYPES = {name: "i32" for name in ("N", "M", "x_g", "x_n", "y_g", "y_n")} | {"X": ROWS, "Y": ROWS}
_CONSTANTS = {"DIMS": 3, "x_k": 1, "y_k": 1}
_PULL_TYPES = {"GRAD": "*fp32:16", "PLACES": "*i32:16", "BACK": "*i32:16", "DX": ROWS}
_PULL_TYPES |= {"a": "fp32", "b": "fp32", "grad_g": "i32"}
NEAREST = kernel_by_dtype(
    "chamfer_nearest",
    _nearest,
    {**_TYPES, "LEAST": "*fp32:16", "PLACES": "*i32:16"},
    _CONSTANTS,
    [_config(32, 32, 4), _config(64, 64, 4), _config(32, 128, 4)],
    _try_nearest,
)
PULL = kernel_by_dtype(
    "chamfer_pull",
    _pull,
    {**_TYPES, **_PULL_TYPES},
    {**_CONSTANTS, "ROOT": False, "WIDTH": 4},
    [_config(32, 32, 4), _config(64, 64, 4)],
    _try_pull,
)
