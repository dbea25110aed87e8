"""What a GPU's tests, benchmark and tuner will launch, compiled without one into a cache to carry.

    make gpu-pack        under the Triton of the GPU's machine, into .gpu/triton.tar

There `tar -xf .gpu/triton.tar -C /` puts it where it was made, since Triton's cache holds absolute
paths, and TRITON_CACHE_DIR=/tmp/fastssl-triton finds it.  A compilation takes seconds, and a launch
from the cache a moment.  The cache's keys are of the source, the configuration and the compiler's
version: after a change to any, pack again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastssl.bench.cases import all_cases
from fastssl.bench.compiler.launches import GPUS, launches_of
from fastssl.bench.compiler.recording import Launch, compile_launch, recorded
from fastssl.kernels import exclude_self, pairwise_topk
from fastssl.kernels.common import tuning
from tests.gpu.room import DEVICE, RECORDING
from tests.gpu.subjects import SUBJECTS, rows
from tests.gpu.test_accuracy import PRECISIONS
from tests.oracle import UPSTREAM, grads

FIRST = ("ntxent", "clip", "siglip", "barlow-twins", "vicreg", "pairwise-lse", "pairwise-lse-self")
FIRST += ("pairwise-topk", "mae", "patch-mse", "restore-tokens", "standardise")
TUNED = {  # kernels by name, and the beginning of the classes that the first minutes try
    "pairwise_lse_fwd": "bfloat16-D128",
    "pairwise_lse_bwd": "bfloat16-D128",
    "correlation_tiles": "bfloat16",
    "pairwise_topk": "bfloat16-n64",
    "pairwise_sigmoid_weigh": "bfloat16-grad",
    "pairwise_weigh": "bfloat16",
    "pairwise_summarize": "bfloat16",
}
Call = tuple[str, Callable[[], object]]


def accuracy() -> Iterator[Call]:
    """The calls of test_accuracy.py and of the shapes that follow a subject's usual one."""
    for subject in SUBJECTS:
        for number, shape in enumerate(subject.gpu):
            for name, (dtype, products) in PRECISIONS.items():
                layouts = UPSTREAM if number == 0 else ["contiguous"]

                def call(s=subject, h=shape, d=dtype, p=products, layouts=layouts):
                    torch.set_float32_matmul_precision(p)
                    for layout in layouts:
                        trial = s.trial(d, h)
                        grads(trial.ours, trial.inputs, UPSTREAM[layout])

                yield f"{subject.name} {'x'.join(map(str, shape))} {name}", call
    for name, (dtype, products) in PRECISIONS.items():
        for mask in (None, exclude_self):

            def search(d=dtype, p=products, mask=mask):
                torch.set_float32_matmul_precision(p)
                q, k = rows(d, 3000, 128), rows(d, 20_001, 128)
                pairwise_topk(q, k, 20, mask=mask, impl="triton")

            yield f"pairwise_topk {name}", search


def trials() -> Iterator[Call]:
    """Every candidate of the classes in TUNED, at the size that the tuner launches."""
    known = tuning.kernels()
    for kernel, beginning in TUNED.items():
        for name, variant in known[kernel].variants.items():
            for config in variant.candidates if name.startswith(beginning) else ():
                yield f"{kernel} {name}", lambda v=variant, c=config: v.trial(c, DEVICE)()


def launches(target: str) -> tuple[dict[str, Launch], list[str]]:
    """All of them by key, and what could not be called."""
    gpu, found, failed = GPUS[target], {}, []
    for name, call in [*accuracy(), *trials()]:
        try:
            with recorded(gpu) as seen:
                call()
            found |= seen
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}")
    torch.set_float32_matmul_precision("highest")
    for name in FIRST:
        case = all_cases()[name]
        for dtype in ("bfloat16", "float32"):
            for shape in case.shapes["cuda"]:
                found |= launches_of(case, shape, getattr(torch, dtype), gpu)
    return found, failed


def main() -> int:
    """Compile this part of the launches; 1 where something could not be called or compiled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=list(GPUS), default="sm_90")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--list", action="store_true", help="compile nothing")
    args = parser.parse_args()
    if not RECORDING:
        parser.error("FASTSSL_GPU_RECORDING=1 must be set: run it by make gpu-pack")
    (part, parts), start = args.part, time.monotonic()
    found, failed = launches(args.target)
    mine = [] if args.list else [found[key] for key in sorted(found)][part::parts]
    for launch in mine:
        try:
            compile_launch(launch, GPUS[args.target])
        except Exception as error:
            failed.append(f"{launch.name}: {type(error).__name__}: {str(error).splitlines()[-1:]}")
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton/cache"))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(*failed, sep="\n")
    words = f"{len(mine)} compiled, {len(failed)} failed, {time.monotonic() - start:.0f} s"
    print(f"{len(found)} launches; {words}; {folder} has {size / 2**20:.1f} MiB")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
