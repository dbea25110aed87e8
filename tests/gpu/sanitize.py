"""Every Triton kernel once, forward and backward, at small odd shapes: the sanitizer's prey.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.gpu.sanitize

Without PyTorch's cache each tensor is an allocation of its own, so that an access one element past
its end is seen.  Values are only asked to be finite: tests/gpu/test_accuracy.py judges them.
"""

from __future__ import annotations

import sys

import torch

from fastssl.kernels import exclude_self, pairwise_topk
from tests.gpu.room import DEVICE, REHEARSAL, crossed
from tests.gpu.subjects import SUBJECTS, Subject, impl, rows
from tests.oracle import UPSTREAM, grads

PRECISIONS = (
    (torch.float32, "highest"),
    (torch.float32, "high"),
    (torch.bfloat16, "highest"),
    (torch.float16, "highest"),
)
SHAPES = {  # beside each subject's tiny one: a block and a bit, and D above a block
    "pairwise_sigmoid": [(131, 67, 21), (33, 70, 300)],
    "pairwise_lse": [(131, 67, 21), (33, 70, 135), (1, 1, 1)],
    "pairwise_lse-masked": [(67, 131, 21)],
    "pairwise_lse-self": [(131, 70), (2, 300)],
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
    "chamfer": [(3, 67, 35)],
}


def fused() -> list[Subject]:
    """The subjects that have a Triton kernel."""
    return [subject for subject in SUBJECTS if subject.fused]


def main() -> int:
    """Run them all; 1 where there is no Triton kernel or a result is not finite."""
    ran, bad = 0, []
    for subject, (dtype, products) in crossed(fused(), PRECISIONS):
        torch.set_float32_matmul_precision(products)
        for shape in [subject.tiny, *([] if REHEARSAL else SHAPES.get(subject.name, []))]:
            ran += 1
            if not finite(subject, shape, dtype):
                bad.append(f"{subject.name} {shape} {dtype}")
    for M, (dtype, products) in crossed([67], PRECISIONS):
        torch.set_float32_matmul_precision(products)
        if impl("pairwise_topk") == "triton":
            ran += 1
            q, k = rows(dtype, M, 21), rows(dtype, 131, 21)
            pairwise_topk(q, k, 5, mask=exclude_self, impl="triton")
    if not REHEARSAL:
        torch.cuda.synchronize()
    print(f"{ran} cases on {DEVICE}, {len(bad)} not finite", *bad, sep="\n")
    return int(bool(bad) or not ran)


def finite(subject: Subject, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Run it under each upstream layout; whether all that came out is finite."""
    trial = subject.trial(dtype, shape)
    layouts = list(UPSTREAM.values())[REHEARSAL * 2 :]  # the last one, or each of them
    runs = [grads(trial.ours, trial.inputs, reduce) for reduce in layouts]
    return all(bool(x.isfinite().all()) for run in runs for x in run)


if __name__ == "__main__":
    sys.exit(main())
