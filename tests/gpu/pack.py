"""What the GPU's commands will launch, compiled without one into a cache to carry.

    make gpu-pack        under the Triton of the GPU's machine, into .gpu/triton.tar.gz

It takes what they run from where they take it: the headlines and the tuner's candidates
(bench/gpu/headlines.py), the tests of this folder, the sanitizer's shapes; the first needed first.
There `tar -xzf .gpu/triton.tar.gz -C /` puts it where it was made, since Triton's cache holds
absolute paths, and TRITON_CACHE_DIR=/tmp/fastssl-triton finds it.  A compilation takes seconds, and
a launch from the cache a moment.  The cache's keys are of the source, the configuration and the
compiler's version: after a change to any, pack again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from fastssl.bench.cases import all_cases
from fastssl.bench.compiler.launches import GPUS
from fastssl.bench.compiler.recording import Launch, compile_launch, recorded
from fastssl.bench.gpu import carried
from fastssl.bench.gpu.headlines import HEADLINES, RIVALS, TUNED, Headline
from fastssl.bench.gpu.tuning import candidates
from fastssl.bench.measure.gate import step
from fastssl.bench.registry import OURS, Shape
from fastssl.kernels import exclude_self, pairwise_topk
from fastssl.kernels.common import tuning
from tests.gpu import sanitize, test_large
from tests.gpu.room import DEVICE, RECORDING
from tests.gpu.subjects import SUBJECTS, rows
from tests.gpu.test_accuracy import CASES, PRECISIONS, layouts_of
from tests.gpu.test_launch import DTYPES, LARGE, step_of
from tests.oracle import UPSTREAM, grads

LOOKED = DataDependentOutputException  # a recording has no values to look at
Call = tuple[str, Callable[[], object]]


def headlines() -> Iterator[Call]:
    """Each at its shape, and at the one that its gate is checked at."""
    for headline in HEADLINES:
        case = all_cases()[headline.case]
        for shape in (headline.shape, case.gate(headline.shape, torch.device("cuda"))):
            yield f"{headline} at {shape}", partial(_headline, headline, shape)


def _headline(headline: Headline, shape: Shape) -> None:
    torch.set_float32_matmul_precision("highest")
    case = all_cases()[headline.case]
    problem = case.make(dict(shape), getattr(torch, headline.dtype), DEVICE)
    for name, rival in problem.rivals.items():
        if name == OURS or name in RIVALS:
            run: Any = rival
            step(run, problem.inputs)


def trials(target: str = "sm_90") -> Iterator[Call]:
    """Every candidate of the classes in TUNED, at the size that the tuner launches."""
    for kernel, name, variant, config in candidates(tuning.kernels(), target):
        yield f"{kernel} {name}", lambda v=variant, c=config: v.trial(c, DEVICE)()


def accuracy() -> Iterator[Call]:
    """The calls of test_accuracy.py, in its order."""
    for param in CASES:
        values: Any = param.values
        subject, shape, (dtype, products) = values

        def call(s=subject, h=shape, d=dtype, p=products):
            torch.set_float32_matmul_precision(p)
            trial = s.trial(d, h)
            for layout in layouts_of(s, h):
                grads(trial.ours, trial.inputs, UPSTREAM[layout])

        yield str(param.id), call
    for name, (dtype, products) in PRECISIONS.items():
        for mask in (None, exclude_self):

            def search(d=dtype, p=products, mask=mask):
                torch.set_float32_matmul_precision(p)
                q, k = rows(d, 3000, 128), rows(d, 20_001, 128)
                pairwise_topk(q, k, 20, mask=mask, impl="triton")

            yield f"pairwise_topk {name}", search


def others() -> Iterator[Call]:
    """Of the second command: launch tests, the sanitizer's shapes, 2^31 elements."""
    torch.set_float32_matmul_precision("highest")
    by_name = {subject.name: subject for subject in SUBJECTS}
    plans = [(s, dtype, s.shapes[0]) for s in SUBJECTS for dtype in DTYPES]
    plans += [(by_name[name], torch.bfloat16, shape) for name, shape in LARGE.items()]
    for subject, dtype, shape in plans:

        def launch(s=subject, d=dtype, h=shape):
            trial = s.trial(d, h)
            step_of(trial.ours)(*trial.inputs)

        yield f"launch {subject} {shape}", launch
    for name, call in sanitize.cases():
        yield f"sanitize {name}", call
    for name, test in vars(test_large).items():
        if name.startswith("test_"):
            for words in _arguments(test):
                yield name, partial(test, **words)


def _arguments(test: Callable[..., None]) -> list[dict[str, Any]]:
    """Those of a test of test_large.py: some take a dtype, and whether both sides are one."""
    if not signature(test).parameters:
        return [{}]
    return [{"same": s, "dtype": d} for s in (True, False) for d in DTYPES]


def launches(target: str) -> tuple[dict[str, Launch], list[str]]:
    """All of them by key, the first needed first, and what could not be called.

    A test launches, then looks at values, which a recording has not: what came before is packed.
    """
    gpu, found, failed = GPUS[target], {}, []
    for make in (headlines, partial(trials, target), accuracy, others):
        for name, call in make():
            try:
                with recorded(gpu) as seen:
                    call()
            except Exception as error:
                if not isinstance(error, LOOKED) and not isinstance(error.__cause__, LOOKED):
                    failed.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            found |= {key: launch for key, launch in seen.items() if key not in found}
    torch.set_float32_matmul_precision("highest")
    return found, failed


def not_tuned(target: str) -> list[str]:
    """Classes with a choice that the headlines launch, and that TUNED has not; and the reverse."""
    asked: set[tuple[str, str]] = set()

    class Asked(dict):
        def get(self, key: tuple[str, str, str], default: Any = None) -> Any:
            asked.add((key[0], key[2]))
            return super().get(key, default)

    table = Asked(tuning.table())
    with patch.object(tuning, "table", lambda: table):
        for _, call in headlines():
            with recorded(GPUS[target]):
                call()
    known = tuning.kernels()
    with_choice = {x for x in asked if len(known[x[0]].variants[x[1]].candidates) > 1}
    return [" ".join(x) for x in sorted(with_choice ^ set(TUNED))]


def main() -> int:
    """Compile this part of the launches; 1 where something could not be called or compiled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=list(GPUS), default="sm_90")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    parser.add_argument("--list", action="store_true", help="compile nothing; check TUNED")
    args = parser.parse_args()
    if not RECORDING:
        parser.error("FASTSSL_GPU_RECORDING=1 must be set: run it by make gpu-pack")
    (part, parts), start = args.part, time.monotonic()
    found, failed = launches(args.target)
    if args.list:
        failed += [f"TUNED and the headlines differ in {x}" for x in not_tuned(args.target)]
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton/cache"))
    mine = [] if args.list else list(found.values())[part::parts]
    if mine:
        carried.note(folder)
    for launch in mine:
        try:
            compile_launch(launch, GPUS[args.target])
        except Exception as error:
            failed.append(f"{launch.name}: {type(error).__name__}: {str(error).splitlines()[-1:]}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(*failed, sep="\n")
    words = f"{len(mine)} compiled, {len(failed)} failed, {time.monotonic() - start:.0f} s"
    print(f"{len(found)} launches; {words}; {folder} has {size / 2**20:.1f} MiB")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
