"""Large shapes, and tensors of more than 2^31 elements, where a 32-bit index would wrap.

What lies past the boundary is held to a recomputation of those rows alone.
"""

import gc

import pytest
import torch

from fastssl import kernels
from fastssl.kernels import exclude_self, pairwise_lse
from fastssl.kernels.pairwise.lse import pairwise_lse_reference
from fastssl.losses import BarlowTwinsLoss, CLIPLoss, NTXentLoss, SigLIPLoss
from tests.gpu.room import DEVICE, PRETENDED, peak_bytes, pick
from tests.gpu.subjects import impl, rows
from tests.oracle import as_accurate_as_eager

BOUNDARY = pick(1 << 31, 1 << 9)
TAIL = pick(100, 3)  # rows that are looked at, all of them past the boundary


@pytest.fixture(autouse=True)
def give_back():
    """A tensor here may be 8 GiB."""
    yield
    if not PRETENDED:
        gc.collect()
        torch.cuda.empty_cache()


def _past(width):
    """So many rows of `width` elements that the last TAIL rows lie past the boundary."""
    return -(-BOUNDARY // width) + TAIL


def _in_chunks(q, k, scale, grad, mask, chunk):
    """lse, dq, dk, dscale by the formula, a chunk of rows at a time, in q's dtype."""
    sums = [torch.zeros_like(k, dtype=torch.float64), torch.zeros_like(scale, dtype=torch.float64)]
    parts, ids = [], torch.arange(max(len(q), len(k)), device=DEVICE)
    for start in range(0, len(q), chunk):
        here = slice(start, start + chunk)
        leaves = [x.detach().requires_grad_() for x in (q[here], k, scale)]
        here_only = mask and mask(ids[here], ids[: len(k)])
        lse = pairwise_lse_reference(*leaves, here_only)
        dq, *rest = torch.autograd.grad(lse, leaves, grad[here].to(lse.dtype))
        parts.append((lse.detach(), dq))
        for total, part in zip(sums, rest, strict=True):
            total += part
    lse, dq = (torch.cat(part) for part in zip(*parts, strict=True))
    return lse, dq, sums[0].to(k.dtype), sums[1].to(scale.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("same", [True, False], ids=["self", "rows"])
def test_all_pairs_of_65536_rows(same, dtype):
    N, D, chunk = pick((65_536, 128, 4096), (37, 6, 10))
    torch.manual_seed(0)
    q = rows(dtype, N, D)
    k = q if same else rows(dtype, N, D)
    scale, mask = torch.tensor(2.0, device=DEVICE), exclude_self if same else None
    grad = torch.rand(N, device=DEVICE) / N
    leaves = [x.clone().requires_grad_() for x in ([q, scale] if same else [q, k, scale])]
    ours = pairwise_lse(leaves[0], leaves[-2], leaves[-1], mask=mask, impl=impl("pairwise_lse"))
    found = [ours.detach(), *torch.autograd.grad(ours, leaves, grad)]
    answers = []
    for wide in (dtype, torch.float64):
        lse, dq, dk, dscale = _in_chunks(q.to(wide), k.to(wide), scale.to(wide), grad, mask, chunk)
        answers.append([lse, dq + dk, dscale] if same else [lse, dq, dk, dscale])
    found[-1] = found[-1].to(dtype)  # one number may be right by luck: not below its rounding
    for mine, eager, truth in zip(found, *answers, strict=True):
        as_accurate_as_eager(mine, eager.to(mine.dtype), truth)


def _check_tail(q, k):
    """The last TAIL rows of q, alone in having an upstream gradient."""
    q, k = q.requires_grad_(), k.requires_grad_()
    grad = torch.zeros(len(q), device=DEVICE)
    grad[-TAIL:] = torch.rand(TAIL, device=DEVICE)
    lse = pairwise_lse(q, k, 1.5, impl=impl("pairwise_lse"))
    dq, dk = torch.autograd.grad(lse, [q, k], grad)
    assert lse.isfinite().all() and not dq[:-TAIL].any()
    found = [lse.detach()[-TAIL:], dq[-TAIL:], dk]
    answers = []
    for wide in (q.dtype, torch.float64):
        few, keys = q.detach()[-TAIL:].to(wide), k.detach().to(wide)
        scale = torch.tensor(1.5, device=DEVICE, dtype=wide)
        answers.append(_in_chunks(few, keys, scale, grad[-TAIL:], None, TAIL))
    for mine, eager, truth in zip(found, *(answer[:3] for answer in answers), strict=True):
        as_accurate_as_eager(mine, eager.to(mine.dtype), truth)


def test_rows_past_the_boundary():
    D, N = pick((128, 512), (8, 13))
    _check_tail(rows(torch.bfloat16, _past(D), D), rows(torch.bfloat16, N, D))


def test_keys_past_the_boundary():
    """Few rows against more than 2^31 elements of keys; dk is looked at past the boundary."""
    D, M = pick((128, 64), (8, 5))
    q, k = rows(torch.bfloat16, M, D), rows(torch.bfloat16, _past(D), D)
    q, k = q.requires_grad_(), k.requires_grad_()
    lse = pairwise_lse(q, k, 1.5, impl=impl("pairwise_lse"))
    dq, dk = torch.autograd.grad(lse.sum(), [q, k])
    s = torch.cat([1.5 * q.detach().double() @ x.double().T for x in k.detach().split(1 << 20)], 1)
    truth = s.logsumexp(1)
    torch.testing.assert_close(lse.detach().double(), truth, rtol=0, atol=1e-4)
    want = 1.5 * (s[:, -TAIL:] - truth[:, None]).exp().T @ q.detach().double()
    assert (dk[-TAIL:].double() - want).abs().max() <= 0.01 * want.abs().max()
    assert dq.isfinite().all()


def test_wide_strides_past_the_boundary():
    """Fewer rows of a wider matrix: an offset, not a number of elements, passes 2^31."""
    width, D, N = pick((1 << 14, 128, 512), (64, 8, 13))
    wide = torch.empty(_past(width), width, dtype=torch.bfloat16, device=DEVICE)
    wide[:, :D] = rows(torch.bfloat16, len(wide), D)
    _check_tail(wide[:, :D].detach(), rows(torch.bfloat16, N, D))


def test_similarities_past_the_boundary():
    D, N, n = pick((128, 512, 5), (8, 13, 2))
    q, k = rows(torch.bfloat16, _past(D), D), rows(torch.bfloat16, N, D)
    values, indices = kernels.pairwise_topk(q, k, n, impl=impl("pairwise_topk"))
    s = q[-TAIL:].double() @ k.double().T
    torch.testing.assert_close(values[-TAIL:].double(), s.topk(n).values, rtol=1e-4, atol=1e-5)
    picked = s.gather(1, indices[-TAIL:])
    torch.testing.assert_close(values[-TAIL:].double(), picked, rtol=1e-4, atol=1e-5)


def test_columns_of_a_matrix_past_the_boundary():
    """Each column stands alone: some of them, the last one included, in float64."""
    D = pick(4096, 16)
    N, few = _past(D), torch.tensor([0, 1, D // 2, D - 1], device=DEVICE)
    z = torch.randn(N, D, device=DEVICE)
    grad = torch.randn(N, D, device=DEVICE)
    z.requires_grad_()
    out = kernels.standardize(z, eps=1e-5, impl=impl("standardize"))
    (dz,) = torch.autograd.grad(out, z, grad)
    x = z.detach()[:, few].double().requires_grad_()
    want = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    (dx,) = torch.autograd.grad(want, x, grad[:, few].double())
    torch.testing.assert_close(out.detach()[:, few].double(), want.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(dz[:, few].double(), dx, rtol=0, atol=1e-4)
    diagonal = kernels.cross_diagonal(z.detach(), grad, impl=impl("cross_diagonal"))
    dots = (x.detach() * grad[:, few].double()).sum(0)
    torch.testing.assert_close(diagonal[few].double(), dots, rtol=0, atol=2e-5 * N**0.5)


def test_correlation_of_a_matrix_past_the_boundary():
    D = pick(4096, 16)
    N = _past(D)
    a, b = (torch.randn(N, D, device=DEVICE).requires_grad_() for _ in range(2))
    out = kernels.frobenius_sq(a, b, impl=impl("frobenius_sq"))
    da, db = torch.autograd.grad(out, [a, b])
    c = torch.zeros(D, D, dtype=torch.float64, device=DEVICE)
    for x, y in zip(a.detach().split(1 << 16), b.detach().split(1 << 16), strict=True):
        c.addmm_(x.double().T, y.double())
    torch.testing.assert_close(out.detach().double(), c.square().sum(), rtol=1e-5, atol=0)
    for found, want in ((da, 2 * b[-TAIL:].double() @ c.T), (db, 2 * a[-TAIL:].double() @ c)):
        error = (found[-TAIL:].double() - want).abs().max()
        assert error <= 1e-4 * want.abs().max()


def test_65_536_features_without_their_matrix():
    """Barlow Twins whose D x D correlation alone would be 16 GiB in float32."""
    N, D = pick((2048, 65_536), (12, 40))
    views = [torch.randn(N, D, device=DEVICE).bfloat16().requires_grad_() for _ in range(2)]
    peak = peak_bytes(lambda: BarlowTwinsLoss()(*views).backward())
    assert peak < pick(4 << 30, 1 << 24)


def test_patches_of_images_past_the_boundary():
    """Each image stands alone: the last ones, in float32."""
    size, side = pick((224, 16), (12, 4))
    L = (size // side) ** 2
    B = _past(3 * size * size)
    images = torch.randint(256, (B, 3, size, size), dtype=torch.uint8, device=DEVICE)
    ids = torch.rand(B, L, device=DEVICE).argsort(1)
    few = slice(-3, None)
    options = {"patch": side, "impl": impl("gather_patches")}
    found = kernels.gather_patches(images, ids, **options)  # as many elements again
    want = kernels.gather_patches(images[few], ids[few], side, impl="reference")
    assert torch.equal(found[few], want)
    del found
    pred = torch.randn(B, L, 3 * side * side, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    error = kernels.patch_mse(pred, images, ids, side, impl=impl("patch_mse"))
    (d_pred,) = torch.autograd.grad(error.sum(), pred)
    last = pred.detach()[few].double().requires_grad_()
    truth = kernels.patch_mse(last, images[few].double(), ids[few], side, impl="reference")
    (d_last,) = torch.autograd.grad(truth.sum(), last)
    torch.testing.assert_close(error.detach()[few].double(), truth.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d_pred[few].double(), d_last, rtol=1e-2, atol=1e-6)


def test_tokens_past_the_boundary():
    L, D = pick((196, 768), (9, 5))
    K, B = L // 4, _past(L * D)
    visible = torch.randn(B, K, D, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    token, pos = (torch.randn(*s, D, device=DEVICE).requires_grad_() for s in ((), (L,)))
    order = torch.rand(B, L, device=DEVICE).argsort(1)
    out = kernels.restore_tokens(visible, order, token, pos, impl=impl("restore_tokens"))
    grad = torch.zeros_like(out)
    grad[-3:] = torch.randn_like(grad[-3:])
    found = torch.autograd.grad(out, [visible, token, pos], grad)
    last = visible.detach()[-3:].requires_grad_()
    leaves = [last, token, pos]
    want = kernels.restore_tokens(*leaves[:1], order[-3:], *leaves[1:], impl="reference")
    expected = torch.autograd.grad(want, leaves, grad[-3:])
    torch.testing.assert_close(out.detach()[-3:], want.detach(), rtol=0.02, atol=0.02)
    torch.testing.assert_close(found[0][-3:], expected[0])
    assert not found[0][:-3].any()
    for mine, eager in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, eager, rtol=0.02, atol=0.1)
    del out, grad, found
    tokens = torch.randn(B, L, D, device=DEVICE, dtype=torch.bfloat16)
    places = order[:, :K].contiguous()
    image = torch.arange(3, device=DEVICE)[:, None]
    picked = kernels.gather_tokens(tokens, places)
    assert torch.equal(picked[-3:], tokens[-3:][image, places[-3:]])


def _peak_gib(run):
    """GiB that `run` holds at its most, beside what is there before."""
    if PRETENDED:
        run()
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def test_a_million_views_in_4_gib():
    B, D = pick((524_288, 128), (20, 6))
    z0, z1 = (rows(torch.bfloat16, B, D).requires_grad_() for _ in range(2))
    peak = _peak_gib(lambda: NTXentLoss(0.1)(z0, z1).backward())
    assert z0.grad.isfinite().all() and z0.grad.any() and peak < 4


def test_pairs_of_65536_images_and_texts_in_2_gib():
    B, D = pick((65_536, 768), (20, 6))
    x, t = (rows(torch.bfloat16, B, D).requires_grad_() for _ in range(2))
    for loss in (CLIPLoss(), lambda x, t, s: SigLIPLoss()(x, t, s, -10.0)):
        peak = _peak_gib(lambda: loss(x, t, 10.0).backward())  # noqa: B023
        assert x.grad.isfinite().all() and t.grad.any() and peak < 2


def test_a_search_holds_no_scores():
    M, N, D, n = pick((50_000, 1_310_720, 1024, 20), (9, 31, 5, 3))
    q, k = (rows(torch.bfloat16, count, D) for count in (M, N))
    peak = _peak_gib(lambda: kernels.pairwise_topk(q, k, n, impl=impl("pairwise_topk")))
    assert peak < 1
