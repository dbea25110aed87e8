"""What compute-sanitizer watches runs by itself, and leaves no Triton kernel out."""

from fastssl.kernels.common import dispatch as _dispatch
from tests.gpu import sanitize


def test_all_of_it_runs():
    cases = sanitize.cases()
    assert len(cases) > len(sanitize.fused())
    assert not [(name, found) for name, call in cases if (found := call())]


def test_every_fused_primitive_is_in_it():
    declared = {n for n, p in _dispatch._primitives.items() if "triton" in p.implementations}
    covered = {subject.primitive for subject in sanitize.fused()} | {"pairwise_topk"}
    assert declared <= covered
