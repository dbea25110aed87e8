"""Problems and cases for the benchmark's own tests; importable, since child processes make them."""

import multiprocessing
import os
import signal
from dataclasses import replace

import torch
from torch import Tensor

from fastssl.bench.registry import OURS, REFERENCE, Absent, Case, Problem, Shape

CPU = torch.device("cpu")


def square(x: Tensor) -> Tensor:
    return x.square().sum()


def greedy(x: Tensor) -> Tensor:
    """The same, with 40 MB that it does not need."""
    waste = torch.ones(10_000_000)
    return x.square().sum() + 0 * waste[0]


def explodes(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel for this device\nand a second line")


def endless(x: Tensor) -> Tensor:
    return torch.empty(1 << 42).sum() + square(x)


def fatal(x: Tensor) -> Tensor:
    """In a child process: what the system does to one that takes too much."""
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return square(x)


def with_fatal(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """As `make`, and a rival that takes its process down."""
    made = make(shape, dtype, device)
    return replace(made, rivals={**made.rivals, "fatal": fatal})


def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """The sum of squares of N numbers."""
    x = torch.randn(shape["N"], dtype=dtype, device=device).requires_grad_()
    rivals = {
        OURS: square,
        REFERENCE: square,
        "greedy": greedy,
        "wrong": lambda x: 1.001 * square(x),
        "explodes": explodes,
        "endless": endless,
        "missing": Absent("pip install missing"),
    }
    work = {"fwd": 2.0 * shape["N"], "bwd": shape["N"]}
    size = shape["N"] * dtype.itemsize
    return Problem(
        (x,), rivals, work, {"fwd": size, "bwd": 2 * size}, items=(shape["N"], "numbers")
    )


def sorted_make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    """Sorting, which nothing differentiates."""
    x = torch.randn(shape["N"], dtype=dtype, device=device)
    return Problem((x,), {OURS: lambda x: x.sort()[0], REFERENCE: lambda x: x.msort()})


def case_of(make_problem=make, **changes) -> Case:
    fields = {"name": "square", "make": make_problem, "test": "tests/bench/problems.py"}
    fields |= {"shapes": {"quick": [{"N": 100}]}, "sweeps": {}, "dtypes": ("float32",)}
    return Case(**fields | changes)
