"""Values and gradients in every dtype, three upstream layouts: no worse than the formula."""

import pytest
import torch

from fastssl.kernels import PairMask, exclude_self, implementations, pairwise_lse, pairwise_topk
from tests.gpu.room import DEVICE, REHEARSAL, crossed, other_device, pick
from tests.gpu.subjects import SUBJECTS, impl, rows
from tests.oracle import UPSTREAM, as_accurate_as_eager, assert_no_worse

PRECISIONS = {  # the most used first
    "bfloat16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
    "float16": (torch.float16, "highest"),
}


def is_usual(subject, shape):
    """Whether it is the shape that a subject is mostly used at."""
    return shape == subject.shapes[0]


CASES = [  # of every subject its usual shape, before the odd ones
    pytest.param(subject, shape, precision, id=f"{subject.name}-{'x'.join(map(str, shape))}-{name}")
    for usual in (True, False)
    for (name, precision), (subject, shape) in crossed(
        PRECISIONS.items(),
        [(s, shape) for s in SUBJECTS for shape in s.shapes if is_usual(s, shape) == usual],
    )
]


def layouts_of(subject, shape):
    """The upstream layouts that are tried at a shape."""
    return UPSTREAM if is_usual(subject, shape) and not REHEARSAL else ["contiguous"]


@pytest.mark.parametrize("subject, shape, precision", CASES)
def test_no_worse_than_the_formula(subject, shape, precision):
    dtype, products = precision
    torch.set_float32_matmul_precision(products)
    trial = subject.trial(dtype, shape)
    for layout in layouts_of(subject, shape):
        assert_no_worse(*trial, UPSTREAM[layout])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("mask", [None, exclude_self], ids=["all", "exclude_self"])
def test_the_largest_similarities(mask, precision):
    dtype, products = PRECISIONS[precision]
    torch.set_float32_matmul_precision(products)
    M, N, D, n = pick((3000, 20_001, 128, 20), (17, 31, 5, 4))
    q, k = rows(dtype, M, D), rows(dtype, N, D)
    values, indices = pairwise_topk(q, k, n, mask=mask, impl=impl("pairwise_topk"))
    s, par = q.double() @ k.double().T, (q.float() @ k.float().T).double()
    if mask is not None:
        s.fill_diagonal_(-torch.inf), par.fill_diagonal_(-torch.inf)
    eager = par.topk(n, dim=1).values.float()
    as_accurate_as_eager(values, eager, s.topk(n, dim=1).values)
    as_accurate_as_eager(values, eager, s.gather(1, indices))
    assert (indices.sort(1).values.diff(dim=1) > 0).all()  # none twice


def test_a_gpu_uses_the_fused_kernels():
    chosen = implementations("cuda")
    assert chosen == {name: impl(name) for name in chosen}


def test_a_row_that_is_not_a_number_stays_alone():
    M, N, D = pick((300, 500, 128), (19, 21, 7))
    q, k = rows(torch.float32, M, D), rows(torch.float32, N, D)
    clean = pairwise_lse(q, k, 2.0, impl=impl("pairwise_lse"))
    q[5] = torch.nan
    lse = pairwise_lse(q, k, 2.0, impl=impl("pairwise_lse"))
    others = torch.arange(M, device=DEVICE) != 5
    assert lse[5].isnan() and torch.equal(lse[others], clean[others])


def test_a_row_with_no_pair_left():
    M, N, D = pick((300, 500, 128), (19, 21, 7))
    q, k = rows(torch.bfloat16, M, D), rows(torch.bfloat16, N, D)
    ids = torch.arange(M, device=DEVICE)
    ids[7] = -1
    everywhere = torch.full((N,), -1, device=DEVICE)
    q.requires_grad_(), k.requires_grad_()
    options = {"mask": exclude_self(ids, everywhere)}
    lse = pairwise_lse(q, k, 2.0, **options, impl=impl("pairwise_lse"))
    assert lse[7] == -torch.inf and int(lse.isfinite().sum()) == M - 1
    dq, dk = torch.autograd.grad(lse.sum(), [q, k])
    assert (dq[7] == 0).all() and dq.isfinite().all() and dk.isfinite().all()


def test_a_mask_from_one_side_is_not_mirrored():
    lower = PairMask("lower", lambda rows, cols: rows > cols)
    (N, D) = pick((900, 64), (23, 5))
    z, ids = rows(torch.float32, N, D), torch.arange(N, device=DEVICE)
    s = (z.double() @ z.double().T).masked_fill(ids[:, None] <= ids, -torch.inf)
    lse = pairwise_lse(z, z, 1.0, mask=lower)
    torch.testing.assert_close(lse[1:].double(), s.logsumexp(1)[1:], rtol=1e-5, atol=1e-5)


def test_tensors_on_two_devices_are_refused():
    q, k = torch.zeros(4, 3, device=DEVICE), torch.zeros(4, 3, device=other_device())
    with pytest.raises(ValueError, match="q and k must share dtype and device"):
        pairwise_lse(q, k, 1.0)
    with pytest.raises(ValueError, match="scale must be"):
        pairwise_lse(q, q, torch.ones((), device=other_device()))


def test_a_gpu_that_is_not_there_is_not_asked_for():
    """cuda and cuda:0 are one device, whatever the number of GPUs."""
    q = torch.ones(40, 8, device="cpu" if REHEARSAL else "cuda")
    lse = pairwise_lse(q, q.to(DEVICE), 1.0)
    assert lse.device == DEVICE and lse.isfinite().all()
