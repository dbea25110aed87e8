"""Kernels for the tests of the ahead-of-time proof: good ones, and one for each way to fail.

    python -m fastssl.bench.aot --module tests.bench.demo_kernels:register_all --kernel 'proof_*'

They are registered by the function, not by the import, so that no other test meets them.
"""

import triton
import triton.language as tl

from fastssl.kernels.common.tuning import Config, Kernel, Variant, register


@triton.jit
def _lse(
    Q, K, OUT, M, N, row,
    D: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[i] = log sum_j exp(q_i . k_j), the rows of q and k D long and `row` apart."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)[None, :]
    q = tl.load(Q + rows[:, None] * row + d, (rows < M)[:, None], 0.0)
    m = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for n in range(0, N, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        k = tl.load(K + cols[:, None] * row + d, (cols < N)[:, None], 0.0)
        s = tl.dot(q, k.T, input_precision=PRECISION)
        s = tl.where((cols < N)[None, :], s, -1e30)
        peak = tl.maximum(m, tl.max(s, 1))
        total = total * tl.exp(m - peak) + tl.sum(tl.exp(s - peak[:, None]), 1)
        m = peak
    tl.store(OUT + rows, m + tl.log(total), rows < M)


@triton.jit
def _scale(X, OUT, N, FACTOR, BLOCK_N: tl.constexpr, TWICE: tl.constexpr = False):
    """out = x * factor, one block a program, no loop."""
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = tl.load(X + i, i < N) * FACTOR
    tl.store(OUT + i, x * 2 if TWICE else x, i < N)


@triton.jit
def _broken(X, BLOCK_N: tl.constexpr):
    tl.store(X + tl.arange(0, BLOCK_N), tl.zeros((BLOCK_N // 2,), tl.float32))


def lse(name: str, config: Config, dtype: str = "bf16", precision: str = "tf32") -> Kernel:
    types = {"Q": f"*{dtype}:16", "K": f"*{dtype}:16", "OUT": "*fp32:16", "M": "i32", "N": "i32"}
    return one(name, _lse, types | {"row": "i32:16"}, config, D=64, PRECISION=precision)


def one(name: str, fn, signature: dict, config: Config, product: bool = True, **values) -> Kernel:
    """A kernel of one variant and one configuration."""

    def trial(config, device):
        raise NotImplementedError("these kernels are compiled, never launched")

    candidates = (config,)
    variant = Variant("D64", signature, values, product, candidates, config, trial)
    return register(Kernel(name, fn, {variant.name: variant}))


def tiles(m: int, n: int, warps: int = 4, stages: int = 2) -> Config:
    return Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)


def register_all() -> None:
    lse("proof_good", tiles(64, 64))
    lse("proof_narrow", tiles(32, 64))
    scale = {"X": "*fp32:16", "OUT": "*fp32:16", "N": "i32", "FACTOR": "fp32"}
    one("proof_scale", _scale, scale, Config({"BLOCK_N": 1024}), product=False)
    lse("proof_bad_spill", tiles(64, 128, warps=1))
    lse("proof_bad_shared", tiles(64, 128, stages=16))
    lse("proof_bad_product", tiles(16, 16), "fp32", "ieee")
    lse("proof_bad_warps", tiles(64, 64, warps=2))
    one("proof_bad_shape", _broken, {"X": "*fp32:16"}, Config({"BLOCK_N": 64}))
    one("proof_bad_signature", _scale, {"X": "*fp32:16", "n": "i32"}, Config({"BLOCK_N": 64}))
