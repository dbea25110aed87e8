"""Peak memory in a child process: what it counts, and what becomes of too much."""

import pytest
import torch

from fastssl.bench.measure import memory
from fastssl.bench.measure.memory import explain_failure, peaks_in_child

from .problems import with_fatal


def peaks(*rivals, n=1_000_000):
    return peaks_in_child(with_fatal, {"N": n}, torch.float32, rivals, threads=1)


def peak(rival, n=1_000_000):
    return peaks(rival, n=n)[rival]


def test_the_high_water_mark_counts_what_a_call_holds():
    found = peaks("fastssl", "greedy", "reference")
    lean, greedy, again = found["fastssl"], found["greedy"], found["reference"]
    assert lean.status == greedy.status == "ok"
    assert lean.extra is not None and greedy.extra is not None
    # The gradient alone is 4 MB, x.square() another 4, and what backward makes two more.
    assert 4e6 <= lean.extra <= 24e6
    assert 40e6 <= greedy.extra <= 60e6
    assert again.extra is not None and again.extra <= 24e6  # greedy's is not charged to the next


def test_a_rival_that_wants_too_much_is_out_of_memory():
    found = peak("endless", 10)
    assert (found.extra, found.status) == (None, "out of memory") and "alloc" in found.why


def test_a_rival_that_raises_has_failed_with_its_first_line():
    found = peak("explodes", 10)
    assert (found.status, found.why) == ("failed", "RuntimeError: no kernel for this device")


def test_a_rival_that_takes_the_process_down_leaves_the_rest_their_figures():
    found = peaks("fatal", "fastssl", "explodes", n=10)
    assert list(found) == ["fatal", "fastssl", "explodes"]
    assert (found["fatal"].status, found["fatal"].why) == (
        "out of memory",
        "killed by the operating system",
    )
    assert found["fastssl"].status == "ok" and found["explodes"].status == "failed"


def test_how_a_child_ended_is_said():
    assert memory._explain_exit(-9).status == "out of memory"
    assert memory._explain_exit(3) == memory.Peak(
        None, "failed", "the process ended with exit code 3"
    )


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
    assert explain_failure(error).status == status
