"""Peak memory in a child process: what it counts, and what becomes of too much."""

import pytest
import torch

from fastssl.bench import memory
from fastssl.bench.memory import failure, peak_in_child

from .problems import make


def peak(rival, n=1_000_000):
    return peak_in_child(make, {"N": n}, torch.float32, rival, threads=1)


def test_the_high_water_mark_counts_what_a_call_holds():
    lean, greedy = peak("fastssl"), peak("greedy")
    assert lean.status == greedy.status == "ok"
    assert lean.extra is not None and greedy.extra is not None
    # The gradient alone is 4 MB, x.square() another 4, and what backward makes two more.
    assert 4e6 <= lean.extra <= 24e6
    assert 40e6 <= greedy.extra <= 60e6


def test_a_rival_that_wants_too_much_is_out_of_memory():
    found = peak("endless", 10)
    assert (found.extra, found.status) == (None, "out of memory") and "alloc" in found.why


def test_a_rival_that_raises_has_failed_with_its_first_line():
    found = peak("explodes", 10)
    assert (found.status, found.why) == ("failed", "RuntimeError: no kernel for this device")


def test_a_killed_child_is_out_of_memory():
    assert memory._ended(-9).status == "out of memory"
    assert memory._ended(3) == memory.Peak(None, "failed", "the process ended with exit code 3")


def test_an_absent_rival_says_so():
    assert peak("missing", 10) == memory.Peak(None, "absent", "pip install missing")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "out of memory"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (ImportError("no module x"), "failed"),
    ],
)
def test_what_an_exception_means(error, status):
    assert failure(error).status == status
