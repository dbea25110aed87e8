import math

import pytest
import torch

from fastssl.kernels import PairMask, exclude_self, pairwise_topk
from tests.oracle import DEVICE, largest_tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [None, exclude_self], ids=["all", "exclude_self"])
@pytest.mark.parametrize("M, N, n", [(1, 1, 1), (5, 3, 3), (67, 131, 5), (40, 90, 60)])
def test_matches_the_sorted_scores(M, N, n, mask, dtype):
    torch.manual_seed(N)
    q, k = (torch.randn(rows, 7, device=DEVICE).to(dtype) for rows in (M, N))
    values, indices = pairwise_topk(q, k, n, mask=mask)
    s = q.double() @ k.double().T  # 16-bit inputs have exact float32 products
    if mask is not None:
        s.fill_diagonal_(-math.inf)
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    want = s.sort(1, descending=True).values[:, :n]
    torch.testing.assert_close(values, want.float())
    left = want.isfinite()
    picked = s.gather(1, indices.clamp_min(0))
    torch.testing.assert_close(picked[left].float(), values[left])
    assert ((indices == -1) == ~left).all()
    assert all(len(set(row)) == len(row) for row in indices[left.all(1)].tolist())


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_rows_with_too_few_pairs_are_filled_up(impl):
    q, k = torch.eye(3, device=DEVICE), torch.ones(40, 3, device=DEVICE)
    two = PairMask("two", lambda rows, cols: (cols == 5) | (cols == 30) | (rows < 0))
    values, indices = pairwise_topk(q, k, 4, mask=two, impl=impl)
    assert values.tolist() == [[1.0, 1.0, -math.inf, -math.inf]] * 3
    assert [sorted(row) for row in indices.tolist()] == [[-1, -1, 5, 30]] * 3


def test_has_no_gradient_and_holds_only_tiles():
    q = torch.randn(300, 2, device=DEVICE, requires_grad=True)
    assert not pairwise_topk(q, q, 3)[0].requires_grad
    assert largest_tensor(lambda: pairwise_topk(q, q, 3)) <= 900


@pytest.mark.parametrize("n", [0, 5])
def test_refuses_n(n):
    with pytest.raises(ValueError, match=f"n must lie between 1 and N = 4, got {n}"):
        pairwise_topk(torch.zeros(2, 3), torch.zeros(4, 3), n)
