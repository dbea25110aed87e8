"""The primitives over pairs and columns, beside the formula as written and that compiled.

N rows (M against N), D features.  Floors as in losses.py; where there is no product, every
elementwise operation is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.cases.rivals import by_implementation, nbytes, weigh
from fastssl.bench.measure.gate import SLACK_OTHERS, SLACK_OURS, why_wrong
from fastssl.bench.registry import (
    OURS,
    REFERENCE,
    Absent,
    Problem,
    Rival,
    Shape,
    Sweep,
    case,
    shapes_of,
)
from fastssl.kernels import (
    column_moments,
    cross_diagonal,
    exclude_self,
    frobenius_sq,
    pairwise_lse,
    pairwise_topk,
    standardize,
)
from fastssl.kernels.common.gpu import on_gpu
from fastssl.kernels.pairwise import Masks, Pairs, as_masks
from fastssl.kernels.pairwise import lse_ops as pairwise_ops

_SCALE = 1 / 0.1


def _rows(n: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(n, d, device=device).to(dtype)


def _unit(n: int, d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return F.normalize(torch.randn(n, d, device=device)).to(dtype)


@case(
    "pairwise-lse",
    test="tests/kernels/test_pairwise.py",
    shapes=shapes_of(
        "M N D",
        quick=[(256, 512, 128)],
        cpu=[(1024, 4096, 128), (2048, 2048, 512)],
        cuda=[(8192, 65536, 128), (16384, 16384, 768)],
    ),
    sweeps={"cuda": [Sweep("D", (64, 128, 256, 384, 512, 1024), {"M": 16384, "N": 16384})]},
    gate_shape={"M": 333, "N": 1111},
    gpu_gate_shape={"M": 9000, "N": 9000},
)
def lse(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Row log-sum-exp of scaled similarities, rows against other keys.

    Products: 2 M N D forward; backward one as large for each side, 4 M N D.
    On a GPU the two schedules of Triton stand beside each other.
    """
    M, N, D = shape["M"], shape["N"], shape["D"]
    inputs = tuple(_unit(n, D, dtype, device).requires_grad_() for n in (M, N))
    rivals = by_implementation(pairwise_lse, device, scale=_SCALE) | _schedules(device)
    return Problem(
        inputs=inputs,
        rivals=rivals,
        flops={"fwd": 2.0 * M * N * D, "bwd": 4.0 * M * N * D},
        bytes_moved={"fwd": nbytes(*inputs) + 4 * M, "bwd": 2 * nbytes(*inputs) + 4 * M},
    )


def _schedules(device: torch.device) -> dict[str, Rival | Absent]:
    """On a GPU both of Triton's, which `classes.schedule` picks from for each pass."""
    names = ("tiles", "products") if on_gpu(device) else ()
    return {f"{OURS} {name}": partial(_by_schedule, name) for name in names}


def _by_schedule(name: str, q: Tensor, k: Tensor | None = None) -> Tensor:
    """Rows against keys, or without k each row against the others."""
    masks = Masks() if k is not None else as_masks(exclude_self)
    scale, ids = torch.full((), _SCALE, device=q.device), masks.ids()
    pairs = Pairs(q, q if k is None else k, scale, None, *ids, masks.key, k is None)
    return pairwise_ops.lse(pairs, False, name)[0]


@case(
    "pairwise-lse-self",
    test="tests/kernels/test_pairwise.py",
    shapes=shapes_of(
        "N D",
        quick=[(512, 128)],
        cpu=[(2048, 128), (4096, 256)],
        cuda=[(16384, 128), (65536, 128), (16384, 1024)],
    ),
    gate_shape={"N": 1111},
    gpu_gate_shape={"N": 24000},  # where symmetric scores take half the tiles
)
def lse_self(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Row log-sum-exp of similarities among themselves, each row without itself.

    The scores are symmetric: N^2 D flops for half of them; backward N x N weights times the rows,
    2 N^2 D.  On a GPU the two schedules of Triton stand beside each other.
    """
    N, D = shape["N"], shape["D"]
    z = _unit(N, D, dtype, device).requires_grad_()
    return Problem(
        inputs=(z,),
        rivals=by_implementation(_lse_self, device, primitive="pairwise_lse") | _schedules(device),
        flops={"fwd": 1.0 * N * N * D, "bwd": 2.0 * N * N * D},
        bytes_moved={"fwd": nbytes(z) + 4 * N, "bwd": 2 * nbytes(z) + 4 * N},
    )


def _lse_self(z: Tensor, *, impl: str) -> Tensor:
    return pairwise_lse(z, z, _SCALE, mask=exclude_self, impl=impl)


@case(
    "pairwise-topk",
    test="tests/kernels/test_topk.py",
    shapes=shapes_of(
        "M N D K",
        quick=[(128, 2048, 64, 20)],
        cpu=[(1024, 16384, 384, 20)],
        cuda=[(8192, 262144, 384, 20)],
    ),
    gate_shape={"M": 111, "N": 3333},
)
def topk(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """The K nearest of N keys for each of M rows: a k-nearest-neighbor search.

    2 M N D flops of scores; to select is not counted.  Two keys nearly as near may change places:
    the gate asks how near the named ones are, not which they are.
    """
    M, N, D, K = (shape[name] for name in "MNDK")
    q, k = _unit(M, D, dtype, device), _unit(N, D, dtype, device)
    rivals = by_implementation(pairwise_topk, device, n=K)
    return Problem(
        inputs=(q, k),
        rivals=rivals,
        flops={"run": 2.0 * M * N * D},
        bytes_moved={"run": nbytes(q, k) + 12.0 * M * K},
        items=(M, "rows"),
        check=_nearest(q, k, K, rivals[REFERENCE]),
    )


def _nearest(
    q: Tensor, k: Tensor, n: int, reference: Rival
) -> Callable[[str, Sequence[Tensor]], str]:
    """The check of a search: its values, and the true scores of the keys it names, are the best."""

    @cache
    def truth() -> tuple[Tensor, list[Tensor], list[Tensor]]:
        scores = q.double() @ k.double().T
        best = scores.topk(n, dim=1).values
        return scores, judged(scores, reference(q, k)), [best, best]

    def judged(scores: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
        values, indices = outputs
        return [values, scores.gather(1, indices).to(values.dtype)]

    def check(name: str, outputs: Sequence[Tensor]) -> str:
        scores, eager, best = truth()
        ordered = outputs[1].sort(dim=1).values
        if not (ordered[:, 1:] > ordered[:, :-1]).all():
            return "a row names a key twice"
        slack = SLACK_OURS if name.startswith(OURS) else SLACK_OTHERS
        return why_wrong(judged(scores, outputs), eager, best, slack=slack)

    return check


_COLUMN_SHAPES = shapes_of(
    "N D", quick=[(256, 1024)], cpu=[(256, 2048), (2048, 1024)], cuda=[(2048, 8192), (8192, 8192)]
)


@case("standardise", test="tests/kernels/test_moments.py", shapes=_COLUMN_SHAPES)
def standardised(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Each column of a batch to mean 0 and variance 1.

    An element takes 1 flop for the mean, 2 for the variance, 2 to normalize; backward 3 for the
    two sums and 4 for its gradient.  Forward reads z and writes the result; backward reads that and
    its gradient, and writes z's; all in z's dtype.
    """
    z = _rows(shape["N"], shape["D"], dtype, device).requires_grad_()
    w = torch.randn(z.shape, device=device).to(dtype)
    return Problem(
        inputs=(z, w),
        rivals=weigh(by_implementation(standardize, device, eps=1e-5)),
        flops={"fwd": 5.0 * z.numel(), "bwd": 7.0 * z.numel()},
        bytes_moved={"fwd": 2 * nbytes(z), "bwd": 3 * nbytes(z)},
    )


@case("column-moments", test="tests/kernels/test_moments.py", shapes=_COLUMN_SHAPES)
def moments(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Mean and variance of each column of a batch.

    An element takes 1 flop for the mean and 2 for the variance; backward 3.
    """
    z = _rows(shape["N"], shape["D"], dtype, device).requires_grad_()
    return Problem(
        inputs=(z,),
        rivals=by_implementation(_moments, device, primitive="column_moments"),
        flops={"fwd": 3.0 * z.numel(), "bwd": 3.0 * z.numel()},
        bytes_moved={"fwd": nbytes(z) + 8 * shape["D"], "bwd": 2 * nbytes(z) + 8 * shape["D"]},
    )


def _moments(z: Tensor, *, impl: str) -> Tensor:
    return torch.stack(column_moments(z, impl=impl))


@case(
    "frobenius-sq",
    test="tests/kernels/test_correlation.py",
    shapes=_COLUMN_SHAPES,
    dtypes=("float32", "bfloat16"),  # in float16 the formula as written overflows
)
def frobenius(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Squared Frobenius norm of a cross-correlation.

    By the D x D matrix 2 N D^2 flops, by two symmetric Gram matrices 2 N^2 D: the lesser of them,
    and backward twice that.
    """
    N, D = shape["N"], shape["D"]
    inputs = tuple(_rows(N, D, dtype, device).requires_grad_() for _ in range(2))
    product = 2.0 * N * D * min(N, D)
    return Problem(
        inputs=inputs,
        rivals=by_implementation(frobenius_sq, device),
        flops={"fwd": product, "bwd": 2 * product},
        bytes_moved={"fwd": nbytes(*inputs) + 4, "bwd": 2 * nbytes(*inputs)},
    )


@case("cross-diagonal", test="tests/kernels/test_moments.py", shapes=_COLUMN_SHAPES)
def diagonal(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Diagonal of a cross-correlation: 2 flops for each element of a pair, and 2 backward."""
    N, D = shape["N"], shape["D"]
    inputs = tuple(_rows(N, D, dtype, device).requires_grad_() for _ in range(2))
    return Problem(
        inputs=inputs,
        rivals=by_implementation(cross_diagonal, device),
        flops={"fwd": 2.0 * N * D, "bwd": 2.0 * N * D},
        bytes_moved={"fwd": nbytes(*inputs) + 4 * D, "bwd": 2 * nbytes(*inputs) + 4 * D},
    )
