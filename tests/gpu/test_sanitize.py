"""The script that compute-sanitizer watches runs by itself, and leaves no Triton kernel out."""

from fastssl.kernels.common import dispatch as _dispatch
from tests.gpu import sanitize


def test_the_script_runs(capsys):
    assert sanitize.main() == 0
    assert " 0 not finite" in capsys.readouterr().out


def test_every_fused_primitive_is_in_it():
    declared = {n for n, p in _dispatch._primitives.items() if "triton" in p.implementations}
    covered = {subject.primitive for subject in sanitize.fused()} | {"pairwise_topk"}
    assert declared <= covered
