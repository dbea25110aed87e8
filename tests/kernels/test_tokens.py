import pytest
import torch

from fastssl.kernels import gather_tokens, restore_tokens
from fastssl.masking import random_masking
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, largest_tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem(B, K, L, D, dtype=torch.float32):
    torch.manual_seed(L)
    ids = random_masking(torch.arange(B, device=DEVICE), L, K)
    shapes = ((B, K, D), (D,), (L, D))
    return ids, [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_pos", [True, False], ids=["pos", "no_pos"])
@pytest.mark.parametrize("B, K, L, D", [(1, 1, 1, 1), (5, 3, 11, 7), (4, 49, 50, 13), (3, 6, 6, 2)])
def test_restore_tokens(B, K, L, D, with_pos, dtype, reduce):
    ids, (visible, token, pos) = problem(B, K, L, D, dtype)
    inputs = [visible, token, pos] if with_pos else [visible, token]

    def call(impl):
        return lambda v, t, p=None: restore_tokens(v, ids.restore, t, p, impl=impl)

    assert_no_worse(call("torch"), call("reference"), inputs, lambda x: reduce(x.float()))


def test_every_token_goes_back_to_its_place():
    ids, (_, token, pos) = problem(6, 4, 9, 5)
    tokens = torch.randn(6, 9, 5, device=DEVICE)
    out = restore_tokens(gather_tokens(tokens, ids.visible), ids.restore, token, pos)
    want = (token + pos).expand(6, 9, 5).clone()
    for b in range(6):
        for place in ids.visible[b].tolist():
            want[b, place] = tokens[b, place] + pos[place]
    torch.testing.assert_close(out, want)


def test_mixed_dtypes_give_visibles_dtype_and_each_its_own_gradient():
    ids, (visible, token, pos) = problem(2, 3, 5, 4)
    leaves = [visible.bfloat16().requires_grad_(), token.requires_grad_(), pos.requires_grad_()]
    out = restore_tokens(leaves[0], ids.restore, *leaves[1:])
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]
    assert (leaves[1].grad == 4).all() and (leaves[2].grad == 2).all()  # 2 images x 2 hidden


def test_frozen_inputs_get_no_gradient():
    ids, (visible, token, pos) = problem(2, 3, 5, 4)
    token.requires_grad_()
    restore_tokens(visible, ids.restore, token, pos).sum().backward()
    assert visible.grad is None and pos.grad is None and (token.grad == 4).all()


def test_the_mask_token_is_not_written_to():
    """One sequence of one place: the token, expanded over it, is the parameter itself."""
    token = torch.zeros(4)
    out = restore_tokens(torch.ones(1, 1, 4), torch.zeros(1, 1, dtype=torch.int64), token)
    assert (token == 0).all() and (out == 1).all()


def test_holds_nothing_larger_than_the_result():
    ids, (visible, token, pos) = problem(9, 30, 40, 8)
    leaves = [x.requires_grad_() for x in (visible, token, pos)]
    run = lambda: restore_tokens(leaves[0], ids.restore, *leaves[1:]).sum().backward()  # noqa: E731
    assert largest_tensor(run) == 9 * 40 * 8


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_gather_tokens(shared, reduce):
    ids, _ = problem(4, 5, 12, 3)
    tokens = torch.randn(*(() if shared else (4,)), 12, 3, device=DEVICE)
    image = torch.arange(4, device=DEVICE)[:, None]
    eager = lambda t: t[ids.visible] if shared else t[image, ids.visible]  # noqa: E731
    assert_no_worse(lambda t: gather_tokens(t, ids.visible), eager, [tokens], reduce)


V, T, R = torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(2, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: restore_tokens(V, R, T[:3]),
            r"\(B, K, D\) and \(D,\), got \(2, 3, 4\) and \(3,\)",
        ),
        (lambda: restore_tokens(V, R[:, :2], T), r"ids_restore must be \(2, L\) with L >= 3"),
        (lambda: restore_tokens(V, R[:1], T), r"ids_restore must be \(2, L\) .* got \(1, 5\)"),
        (lambda: restore_tokens(V, R.int(), T), "ids_restore must be int64, got torch.int32"),
        (lambda: restore_tokens(V, R, T, V[0]), r"pos must be \(5, 4\), got \(3, 4\)"),
        (lambda: restore_tokens(V.long(), R, T), "visible must be a floating-point tensor"),
        (lambda: restore_tokens(V, R, T, impl="triton"), "torch, reference for restore_tokens"),
        (lambda: gather_tokens(V, R.float()), r"ids must be \(B, K\) int64, got .* torch.float32"),
        (
            lambda: gather_tokens(V[:1], R),
            r"tokens must be \(2, L, D\) or \(L, D\), got \(1, 3, 4\)",
        ),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
