"""Every Triton kernel once, forward and backward, at small odd shapes: the sanitizer's prey.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.gpu.sanitize

Without PyTorch's cache each tensor is an allocation of its own, so that an access one element past
its end is seen.  Values are only asked to be finite: tests/gpu/test_accuracy.py judges them.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

from fastssl.bench.gpu.watched import Case, run, share
from fastssl.kernels import exclude_self, pairwise_topk
from tests.gpu.room import REHEARSAL, crossed
from tests.gpu.subjects import SUBJECTS, Subject, rows
from tests.oracle import UPSTREAM, grads

PRECISIONS = (  # the most used first
    (torch.bfloat16, "highest"),
    (torch.float32, "high"),
    (torch.float32, "highest"),
    (torch.float16, "highest"),
)
SHAPES = {  # beside each subject's tiny one: a block and a bit, and D above a block
    "pairwise_sigmoid": [(131, 67, 21), (33, 70, 300)],
    "pairwise_lse": [(131, 67, 21), (33, 70, 135), (1, 1, 1)],
    "pairwise_lse-masked": [(67, 131, 21)],
    "pairwise_lse-self": [(131, 70), (2, 300)],
    "pairwise_lse_nested": [(131, 67, 70)],
    "matryoshka": [(67, 70)],
    "standardize": [(131, 70)],
    "frobenius_sq": [(131, 70), (20, 135)],
    "gather_patches": [(3, 30, 10)],
    "patch_mse": [(3, 30, 10), (3, 12, 2)],
    "patch_mse-clip": [(2, 4, 72, 36)],
    "restore_tokens": [(5, 17, 33)],
    "gather_tokens": [(5, 17, 33)],
    "gather_table": [(37, 17, 33)],
    "scatter_tokens": [(5, 17, 33)],
    "gather_packed": [(5, 17, 33)],
    "gather_bias": [(5, 67, 3)],
    "scaled_cosine_error": [(5, 17, 300)],
    "soft_cross_entropy": [(10, 3, 300), (1, 2, 5000)],
    "linear_soft_cross_entropy": [(67, 131, 21), (33, 70, 300)],
    "chamfer": [(3, 67, 35)],
}


def fused() -> list[Subject]:
    """The subjects that have a Triton kernel."""
    return [subject for subject in SUBJECTS if subject.fused]


def cases() -> list[Case]:
    """(name, call) of all of them; a call says why, where a result is not finite."""
    found: list[Case] = []
    for (dtype, products), subject in crossed(PRECISIONS, fused()):
        for shape in [subject.tiny, *([] if REHEARSAL else SHAPES.get(subject.name, []))]:
            name = f"{subject.name} {'x'.join(map(str, shape))} {dtype} {products}"
            found.append((name, partial(run_one, subject, shape, dtype, products)))
    for dtype, products in PRECISIONS[: 1 if REHEARSAL else None]:
        found.append((f"pairwise_topk {dtype} {products}", partial(search, dtype, products)))
    return found


def run_one(
    subject: Subject, shape: tuple[int, ...], dtype: torch.dtype, products: str
) -> dict[str, str]:
    """Run it under each upstream layout, and look whether all that came out is finite."""
    torch.set_float32_matmul_precision(products)
    trial = subject.trial(dtype, shape)
    layouts = list(UPSTREAM.values())[REHEARSAL * 2 :]  # the last one, or each of them
    runs = [grads(trial.ours, trial.inputs, reduce) for reduce in layouts]
    finite = all(bool(x.isfinite().all()) for run in runs for x in run)
    return {} if finite else {"why": "a result is not finite"}


def search(dtype: torch.dtype, products: str) -> None:
    """The largest similarities among few rows, none with itself."""
    torch.set_float32_matmul_precision(products)
    q, k = rows(dtype, 67, 21), rows(dtype, 131, 21)
    pairwise_topk(q, k, 5, mask=exclude_self, impl="triton")


def main() -> int:
    """Run this share of them, as a watched child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", default="0/1", metavar="I/N", help="every Nth, from the Ith")
    part, parts = share(parser.parse_args().share)
    return run(cases()[part::parts])


if __name__ == "__main__":
    sys.exit(main())
