"""The Triton log-sum-exps: which schedule runs, fused tiles or products with an elementwise pass.

Evidence of others on Hopper: up to 256 features a fused tile loop wins; above, where a program can
no longer keep a row of gradient in registers, products by cuBLAS and one pass over the scores.
float32 stays with the tiles, which multiply as torch.set_float32_matmul_precision says.
"""

import torch
from torch import Tensor

from . import lse_gemm, lse_triton
from .lse_torch import Grads, Pairs
from .scores_triton import INTERPRETED, join, log_sum, weights

FUSED_UP_TO = 256  # features; from others' measurements, to be confirmed by `make gpu-bench`

SCHEDULES = {"tiles": lse_triton, "products": lse_gemm}

__all__ = ["INTERPRETED", "gradients", "join", "log_sum", "statistics", "weights"]


def schedule(x: Tensor):
    """The module that runs: lse_triton or lse_gemm."""
    large = x.dtype != torch.float32 and x.shape[1] > FUSED_UP_TO
    return lse_gemm if large else lse_triton


def statistics(pairs: Pairs, both: bool) -> tuple[Tensor, Tensor]:
    """As lse_torch.statistics, in log2 units."""
    return schedule(pairs.q).statistics(pairs, both)


def gradients(
    pairs: Pairs, rows: Tensor | None, cols: Tensor | None, need: tuple[bool, bool, bool, bool]
) -> Grads:
    """As lse_torch.gradients."""
    return schedule(pairs.q).gradients(pairs, rows, cols, need)
