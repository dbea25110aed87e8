"""What a recording sees, as JSON: run in a process of its own, in which Triton compiles."""

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from fastssl.bench.compiler import launches
from fastssl.bench.compiler.recording import lower, recorded
from fastssl.bench.gpu.watched import Watch
from fastssl.kernels import PairMask, pairwise_lse, standardize
from fastssl.kernels.common.gpu import Gpu
from fastssl.kernels.correlation import moments_triton

H200 = Gpu("sm_90", 132)
RULE = """
import triton
import triton.language as tl

@triton.jit
def near(rows, cols):
    return tl.abs(rows - cols) {} 2
"""
CASES = ["clip", "barlow-twins", "siglip", "pairwise-topk", "patch-mse", "restore-tokens"]
CASES += ["gather-bias", "scaled-cosine", "matryoshka"]


@triton.jit
def _fill(OUT, n, VALUE: tl.constexpr):
    tl.store(OUT + tl.program_id(1) * n, VALUE)


def keys(call):
    """Those of a call's launches."""
    with recorded(H200) as found:
        call()
    return sorted(found)


def caught(call):
    """What a call that is recorded raises, as a word and a sentence."""
    try:
        keys(call)
    except Exception as error:
        return [type(error).__name__, str(error).splitlines()[0]]
    return []


def edited(folder: Path) -> bool:
    """Whether a mask rule of another body is another kernel."""
    found = []
    for relation in ("<=", ">"):  # the same name, file and line
        source = folder / "rules.py"
        source.write_text(RULE.format(relation))
        names: dict = {"__name__": "rules", "__file__": str(source)}
        exec(compile(source.read_text(), str(source), "exec"), names)
        rule = PairMask(
            "near", lambda i, j: (i - j).abs() <= 2, symmetric=True, triton=names["near"]
        )
        found.append(keys(lambda rule=rule: pairwise_lse(rows(), rows(), 1.0, mask=rule)))
    return found[0] != found[1]


def rows(n=256, d=64, first=0):
    return torch.empty(n, d + first, dtype=torch.bfloat16)[:, first:]


def fill(programs, value=1.0, n=2, first=0):
    _fill[1, programs](torch.empty(8)[first:], n, VALUE=value)


def joined_once():
    """One rank's one row: sizes of 1 are constants to the compiler."""
    with recorded(H200) as found:
        moments_triton.join(torch.empty(1, 3, 5), 1)
    return [len(lower(launch, H200)) > 0 for launch in found.values()]


def left_out(pack, packed):
    """Names of what the GPU's children run that none of the packed names begins with."""
    from fastssl.bench.gpu import times, tuning
    from fastssl.kernels.common import tuning as known

    cpu, watch = torch.device("cpu"), Watch(Path("unused"), "x", 0.0)
    ran = [name for name, _ in times.cases("before", cpu, watch)[1:]]
    ran += [f"{kernel} {name}" for kernel, name, *_ in tuning.candidates(known.kernels(), "sm_90")]
    ran += [case.id for case in pack.CASES]
    ran += [f"sanitize {name}" for name, _ in pack.sanitize.cases()]
    ran += [name for name in vars(pack.test_large) if name.startswith("test_")]
    counted = len(ran) > 500 and len(packed) >= len(ran)
    return [name for name in ran if not any(p.startswith(name) for p in packed)] + [counted]


def main(folder: Path) -> None:
    from tests.gpu import (
        pack,
    )  # not where a test process looks for examples: it reads the environment

    makers = (pack.headlines, pack.trials, pack.accuracy, pack.others)
    found = {
        "edited": edited(folder),
        "joined once": joined_once(),
        "grid": caught(lambda: fill(65536)),
        "waits": caught(lambda: standardize(rows(), eps=1e-5).sum().item()),
        "packed": [len(keys(next(calls())[1])) for calls in makers],
        "left out": left_out(pack, [name for make in makers for name, _ in make()]),
        "same": keys(lambda: (fill(3), fill(5), fill(3))),
        "others": [keys(lambda o=o: fill(3, **o)) for o in ({"n": 1}, {"n": 16}, {"first": 1})],
    }
    print(json.dumps(found), flush=True)
    print(launches.main([*CASES, *"--quick --dtype bfloat16 --target sm_90 --jobs 1".split()]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
