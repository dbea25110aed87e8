"""Empty inputs: the empty value, or a ValueError that names the argument (fault 35)."""

import pytest
import torch

from fastssl.kernels import (
    chamfer,
    column_moments,
    cross_correlation,
    cross_diagonal,
    frobenius_sq,
    gather_bias,
    gather_packed,
    gather_patches,
    gather_tokens,
    linear_soft_cross_entropy,
    mixed_correlation,
    pairwise_lse,
    pairwise_topk,
    patch_mse,
    restore_tokens,
    scaled_cosine_error,
    scatter_tokens,
    soft_cross_entropy,
    standardize,
)


def ids(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def cu(*ends):
    return torch.tensor(ends, dtype=torch.int32)


ORDER = torch.arange(4).expand(2, 4)
# A function of a maker of leaves, and the shape of the result or the words of the refusal.
CASES = [
    (lambda x, i: standardize(x(4, 0), eps=0.1, impl=i), "z must have at least 1 feature"),
    (lambda x, i: standardize(x(0, 3), eps=0.1, impl=i), "z must have at least 2 rows"),
    (lambda x, i: column_moments(x(4, 0), impl=i), "z must have at least 1 feature"),
    (lambda x, i: cross_diagonal(x(0, 3), x(0, 3), impl=i), (3,)),
    (lambda x, i: cross_diagonal(x(3, 0), x(3, 0), impl=i), "a must have at least 1 feature"),
    (lambda x, i: frobenius_sq(x(3, 2), x(3, 0), impl=i), "b must have at least 1 feature"),
    (lambda x, i: frobenius_sq(x(0, 2), x(0, 2), impl=i), "a must have at least 1 rows"),
    (lambda x, i: cross_correlation(x(3, 0), x(3, 0), impl=i), "a must have at least 1 feature"),
    (lambda x, i: mixed_correlation(*x(3, 3, 0), impl=i), "a must have at least 1 feature"),
    (lambda x, i: pairwise_lse(x(2, 0), x(4, 0), 1.0, impl=i), "q and k must be .* none of them"),
    (lambda x, i: pairwise_topk(x(2, 3), x(0, 3), 1, impl=i), "q and k must be .* none of them"),
    (lambda x, i: gather_tokens(x(0, 5, 3), ids(0, 2), impl=i), (0, 2, 3)),
    (lambda x, i: gather_tokens(x(2, 5, 3), ids(2, 0), impl=i), (2, 0, 3)),
    (lambda x, i: gather_tokens(x(2, 5, 0), ids(2, 3), impl=i), (2, 3, 0)),
    (lambda x, i: gather_tokens(x(2, 0, 3), ids(2, 0), impl=i), (2, 0, 3)),
    (lambda x, i: gather_tokens(x(5, 3), ids(0, 2), impl=i), (0, 2, 3)),
    (lambda x, i: scatter_tokens(x(0, 2, 3), ids(0, 2), 4, impl=i), (0, 4, 3)),
    (lambda x, i: scatter_tokens(x(2, 0, 3), ids(2, 0), 4, impl=i), (2, 4, 3)),
    (lambda x, i: scatter_tokens(x(2, 2, 0), ids(2, 2), 4, impl=i), (2, 4, 0)),
    (lambda x, i: scatter_tokens(x(2, 0, 3), ids(2, 0), -1, impl=i), "length must be >= 0"),
    (lambda x, i: restore_tokens(x(0, 2, 3), ids(0, 4), x(3), x(4, 3), impl=i), (0, 4, 3)),
    (lambda x, i: restore_tokens(x(2, 2, 0), ORDER, x(0), x(4, 0), impl=i), (2, 4, 0)),
    (lambda x, i: restore_tokens(x(2, 0, 3), ids(2, 0), x(3), impl=i), (2, 0, 3)),
    (lambda x, i: gather_packed(x(0, 5, 3), ids(0), cu(0), impl=i), (0, 3)),
    (lambda x, i: gather_packed(x(2, 5, 0), ids(3), cu(0, 1, 3), impl=i), (3, 0)),
    (lambda x, i: gather_bias(x(0, 5, 5), ids(2, 1), impl=i), (2, 0, 1, 1)),
    (lambda x, i: gather_bias(x(2, 5, 5), ids(0, 3), impl=i), (0, 2, 3, 3)),
    (lambda x, i: scaled_cosine_error(*x(2, 2, 4, 3), ids(2, 0), impl=i), (2, 0)),
    (lambda x, i: scaled_cosine_error(*x(2, 0, 3), impl=i), (0,)),
    (lambda x, i: soft_cross_entropy(x(0, 3), ORDER[:0, :3].float(), impl=i), (0,)),
    (
        lambda x, i: linear_soft_cross_entropy(
            x(0, 3), x(4, 3), ORDER[:0, :3].float(), ORDER.float()[:, :3].repeat(2, 1), impl=i
        ),
        (0,),
    ),
    (
        lambda x, i: linear_soft_cross_entropy(*x(4, 2, 0), impl=i),
        "x must have at least 1 feature",
    ),
    (lambda x, i: chamfer(x(0, 4, 3), x(0, 5, 3), impl=i), (0,)),
    (
        lambda x, i: gather_patches(x(2, 0, 4, 4), ids(2, 1), 2, impl=i),
        "images must have .* channel",
    ),
    (lambda x, i: patch_mse(x(0, 2, 4), torch.ones(0, 1, 4, 4), ids(0, 2), 2, impl=i), (0, 2)),
]


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_empty_inputs_give_the_empty_value_or_name_the_argument(impl):
    """Fault 35."""
    for call, expected in CASES:
        leaves = []

        def make(*shape, leaves=leaves):
            leaves.append(torch.ones(shape, requires_grad=True))
            return leaves[-1]

        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                call(make, impl)
            continue
        out = call(make, impl)
        assert out.shape == expected
        for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert grad.shape == x.shape and (grad == 0).all()


def test_what_is_no_tensor_or_number_is_named():
    """Kin of fault 35: plain errors for wrong types, not tracebacks from within."""
    x, images = torch.ones(2, 5, 3), torch.ones(2, 3, 4, 4)
    for call, words in [
        (lambda: gather_tokens(x, [[0]]), "ids must be a tensor, got list"),
        (lambda: gather_bias(None, ids(2, 1)), "bias must be a tensor, got NoneType"),
        (lambda: gather_patches([1], ids(2, 1), 2), "images must be a tensor, got list"),
        (lambda: gather_packed(x, ids(0), [0, 0, 0]), "cu_seqlens must be a tensor, got list"),
        (lambda: standardize(x[0], eps=None), "eps must be >= 0, got None"),
        (lambda: patch_mse(x, images, ids(2, 1), 2, eps="a"), "pred must be"),
        (lambda: pairwise_lse(x[0], x[0], "a"), "scale must be a number or a tensor, got str"),
        (lambda: pairwise_lse(x[0], x[0], 1.0, bias=1.0), "bias must be a tensor, got float"),
        (lambda: pairwise_topk(x[0], x[0], 1.5), "n must be an integer, got 1.5"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
