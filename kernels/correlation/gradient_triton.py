"""The last pass of a gradient by a Gram matrix or a covariance in Triton.

    gradient      dz_nd = factor (sum_m W_nm z_md + diagonal_n z_nd) + y_nd coef_d        by a Gram
    across        dz = factor y W^T + y coef_d                                    by a covariance

The matrices are those of gram_triton.py: W, in the inputs' dtype, and apart from it the
diagonal in float32.  W's products are cuBLAS's with float32 sums, a strip at a time that stays in
L2; one pass adds the rest to it and rounds once.
Traffic of that pass: z and y read once, the gradient written once.  In place: nothing.
In the kernel capitals are pointers.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.chunks import spans
from ..common.launch import kernel_by_part, launcher, random
from ..common.matmul import product
from ..common.triton import rows_contiguous
from ..common.tuning import Config, config_for
from . import configs
from .configs import shape_class
from .gram_torch import Matrix, Terms
from .gram_triton import strip_rows


@triton.jit
def _finish(
    P, FP16_SCALE, DIAGONAL, MINE, OTHER, COEF, FACTOR, OUT, R, D, mine_row, other_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A gradient's rows from those of the product W z."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = i.to(tl.int64)[:, None]
    ok = (i < R)[:, None] & (d < D)[None, :]
    out = tl.load(P + row * D + d[None, :], ok, 0.0)
    if FP16_SCALE is not None:
        out *= tl.load(FP16_SCALE)
    if DIAGONAL is not None:
        mine = tl.load(MINE + row * mine_row + d[None, :], ok, 0.0).to(tl.float32)
        out += tl.load(DIAGONAL + i, i < R, 0.0)[:, None] * mine
    out *= tl.load(FACTOR)
    if COEF is not None:
        other = tl.load(OTHER + row * other_row + d[None, :], ok, 0.0).to(tl.float32)
        out += other * tl.load(COEF + d, d < D, 0.0)[None, :]
    tl.store(OUT + row * D + d[None, :], out.to(OUT.dtype.element_ty), ok)


def finish(p: Tensor, matrix: Matrix, terms: Terms, out: Tensor) -> Tensor:
    """Write a strip of a gradient, out (R, D), from its product p (R, D) float32."""
    (R, D), part = p.shape, "across" if terms.mine is None else "rows"
    config = config_for(FINISH, shape_class(out, part), out.device)
    blocks, (mine, other, coef, factor) = config.blocks, terms
    grid = triton.cdiv(R, blocks["BLOCK_M"]), triton.cdiv(D, blocks["BLOCK_N"])
    mine_row, other_row = (0 if x is None else x.stride(0) for x in (mine, other))
    with torch.cuda.device_of(p):
        _finish[grid](
            p, matrix.fp16_scale, matrix.diagonal, mine, other, coef, factor, out, R, D, mine_row,
            other_row, **config.arguments,
        )  # fmt: skip
    return out


def finish_all(
    products: Callable[[slice], Tensor], matrix: Matrix, terms: Terms, out: Tensor
) -> Tensor:
    """The gradient a strip of rows at a time; products: the strip's W z."""
    n, D = out.shape
    for i in spans(n, strip_rows(D)):
        mine, other = (x if x is None else x[i] for x in terms[:2])
        diagonal = None if mine is None else matrix.diagonal
        if mine is not None and diagonal is not None:
            diagonal = diagonal[i]
        part = Matrix(matrix.values, diagonal, matrix.fp16_scale)
        finish(products(i), part, Terms(mine, other, *terms[2:]), out[i])
    return out


def gradient(matrix: Matrix, rows: Tensor | None, terms: Terms, transposed: bool) -> Tensor:
    """By a Gram, of all ranks' rows; rows None: by a covariance C, or C^T, of terms' `other`."""
    mine, other = (x if x is None else rows_contiguous(x) for x in terms[:2])
    coef = None if terms.coef is None else terms.coef.float().contiguous()
    factor = terms.factor.float().contiguous()
    if rows is not None:
        out = rows.new_empty(len(matrix.values), rows.shape[1])
        parts = Terms(mine, other, coef, factor)
        return finish_all(lambda i: product(matrix.values[i], rows), matrix, parts, out)
    assert other is not None
    values = matrix.values.T if transposed else matrix.values
    out = other.new_empty(len(other), values.shape[1])
    parts = Terms(None, None if coef is None else other, coef, factor)
    return finish_all(lambda i: product(other[i], values), matrix, parts, out)


def _try_finish(dtype: str, part: str, config: Config, device: torch.device) -> Any:
    mine, other = random(dtype, device, 2, *configs.TRIAL_STRIP, unit=True)
    diagonal, coef = (torch.linspace(0.5, 1.5, n, device=device) for n in mine.shape)
    one, rows = torch.ones((), device=device), part == "rows"
    matrix = Matrix(mine, diagonal if rows else None, one if dtype == "float16" else None)
    terms = Terms(mine if rows else None, other, coef, one)
    run = lambda: finish(other.float(), matrix, terms, torch.empty_like(other))  # noqa: E731
    return launcher(FINISH.name, config, run)


FINISH = kernel_by_part("correlation_finish", _finish, configs.TYPES, configs.FINISH, _try_finish)
