"""How kernels are launched: no wait for the GPU, graphs, streams, memory, the same bits twice."""

import pytest
import torch

from fastssl.kernels import pairwise_topk
from tests.gpu.room import (
    DEVICE,
    Replay,
    chunk_bytes,
    crossed,
    late_stream,
    no_host_sync,
    peak_bytes,
    pick,
)
from tests.gpu.subjects import SUBJECTS, impl, rows
from tests.oracle import grads

FEW = pick(SUBJECTS, SUBJECTS[1::5])  # what a rehearsal can afford
DTYPES = [torch.float32, torch.bfloat16]
by_subject = pytest.mark.parametrize("subject", FEW, ids=str)
by_dtype = pytest.mark.parametrize("subject, dtype", crossed(FEW, DTYPES), ids=str)


def step_of(ours):
    """Value and gradients of a sum, as a function of the inputs."""
    return lambda *inputs: grads(ours, inputs, lambda out: out.float().sum())


def close(found, want):
    """The same up to the order of sums, which may differ between two launches of a library."""
    for a, b in zip(found, want, strict=True):
        eps = torch.finfo(b.dtype).eps
        error, largest = (a.double() - b.double()).abs().amax(), b.double().abs().amax()
        assert error <= 64 * eps * largest, (
            f"off by {error:.2e}, where the largest is {largest:.2e}"
        )


@by_dtype
def test_never_waits_for_the_gpu(subject, dtype):
    trial = subject.trial(dtype)
    step = step_of(trial.ours)
    step(*trial.inputs)  # compiles
    with no_host_sync():
        step(*trial.inputs)


@by_dtype
def test_replays_from_a_graph(subject, dtype):
    trial = subject.trial(dtype)
    step = step_of(trial.ours)
    replay = Replay(step, trial.inputs)
    for factor in (1.0, 0.7):  # the second time other numbers
        inputs = [x * factor for x in trial.inputs]
        close(replay(inputs), step(*inputs))


@by_subject
def test_runs_on_the_callers_stream(subject):
    trial = subject.trial(torch.float32)
    step = step_of(trial.ours)
    want = step(*trial.inputs)
    inputs = [torch.zeros_like(x) for x in trial.inputs]
    with late_stream():
        for x, late in zip(inputs, trial.inputs, strict=True):
            x.copy_(late)
        found = step(*inputs)
    close(found, want)


@by_dtype
def test_gives_the_same_bits_twice(subject, dtype):
    trial = subject.trial(dtype)
    step = step_of(trial.ours)
    for first, second in zip(step(*trial.inputs), step(*trial.inputs), strict=True):
        assert torch.equal(first, second)


LARGE = {  # a matrix of all pairs, or of all features, would hold 8 to 32 GiB in float32
    "pairwise_lse": (65_536, 65_536, 128),
    "pairwise_lse-self": (65_536, 128),
    "ntxent": (32_768, 128),
    "matryoshka": (32_768, 128),
    "barlow-twins": (512, 65_536),
}


@pytest.mark.parametrize("name", LARGE)
def test_memory_grows_with_rows_not_with_pairs(name):
    """Forward and backward hold a few copies of the inputs in float32, and a few chunks."""
    subject = next(s for s in SUBJECTS if s.name == name)
    trial = subject.trial(torch.bfloat16, pick(LARGE[name], subject.tiny))
    step = step_of(trial.ours)
    inputs = sum(4 * x.numel() for x in trial.inputs)
    assert peak_bytes(lambda: step(*trial.inputs)) <= 15 * inputs + 6 * chunk_bytes()


def test_the_largest_similarities_hold_no_pairs_and_never_wait():
    N, D, n = pick((65_536, 128, 10), (23, 5, 3))
    z = rows(torch.bfloat16, N, D)
    call = lambda: pairwise_topk(z, z, n, impl=impl("pairwise_topk"))  # noqa: E731
    assert peak_bytes(call) <= 16 * N * D + 40 * n * N + 12 * chunk_bytes()
    with no_host_sync():
        values, indices = call()
    assert values.device == indices.device == DEVICE
