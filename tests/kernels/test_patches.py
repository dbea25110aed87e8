"""Patches by every implementation, against the published formula written out place by place."""

from functools import partial
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastssl.kernels import Normalized, gather_patches, patch_mse
from fastssl.kernels.patches.patches_ops import backends
from tests.covering import crossed
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor, saved_elements

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = list(backends)
KINDS = ["l2", "l1", "smooth_l1"]


class Case(NamedTuple):
    """One chunk, one block and one image are passed, and none divides a shape."""

    B: int
    C: int
    size: tuple[int, ...]
    patch: tuple[int, ...]
    K: int

    def problem(self, dtype=torch.float32):
        torch.manual_seed(self.B * self.K)
        images = torch.randn(self.B, self.C, *self.size, device=DEVICE).to(dtype)
        L = len(corners(self.size, self.patch))
        return images, torch.rand(self.B, L, device=DEVICE).argsort(1)[:, : self.K]

    @property
    def values(self):
        return self.C * int(torch.tensor(self.patch).prod())


CASES = [
    Case(1, 1, (2, 2), (1, 2), 1),
    Case(3, 2, (35,), (5,), 5),
    Case(5, 3, (12, 8), (4, 2), 5),
    Case(3, 2, (15, 25), (3, 5), 7),
    Case(2, 3, (4, 9, 10), (2, 3, 5), 7),
]
IMAGE, CLIP = CASES[2], CASES[4]


def corners(size, patch):
    """The first pixel of each patch, row-major."""
    return list(product(*(range(0, s, p) for s, p in zip(size, patch, strict=True))))


def patchify(images, patch):
    """Every patch, one after another, its pixels row-major and a pixel's channels side by side."""
    found = []
    for corner in corners(images.shape[2:], patch):
        block = images
        for axis, (start, side) in enumerate(zip(corner, patch, strict=True)):
            block = block.narrow(axis + 2, start, side)
        found.append(block.movedim(1, -1).flatten(1))
    return torch.stack(found, 1)


def pick(every, ids):
    return every.gather(1, ids[..., None].expand(-1, -1, every.shape[2]))


def mae(pred, images, ids, patch, norm_pix=True, kind="l2", eps=1e-6):
    """The target and error of He et al. 2021, and two more errors; in the dtype of pred."""
    target = pick(patchify(images.to(pred.dtype), patch), ids)
    if norm_pix:
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (var + eps) ** 0.5
    reduce = {"reduction": "none"}
    if kind == "smooth_l1":
        return torch.nn.functional.smooth_l1_loss(pred, target, **reduce).mean(-1)
    e = (pred - target).abs()
    return (e if kind == "l1" else e * e).mean(-1)


def channels(C, dtype=torch.float32):
    return [torch.linspace(*ends, C, device=DEVICE).to(dtype) for ends in ((0.3, 0.6), (0.2, 0.4))]


def by_hand(images, dtype=torch.float64):
    """(x - mean_c) / std_c, with x / 255 first where x are bytes."""
    mean, std = (v.to(dtype).view(-1, *[1] * (images.ndim - 2)) for v in channels(images.shape[1]))
    x = images.to(dtype) if images.is_floating_point() else images.to(dtype) / 255
    return (x - mean) / std


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES], ids=str)
def test_patches_are_the_pixels(case, dtype, impl, nan_filled):
    images, ids = case.problem()
    images = (images * 50).abs().to(dtype)
    got = gather_patches(images, ids, case.patch, impl=impl)
    assert got.dtype == dtype and got.is_contiguous()
    assert torch.equal(got, pick(patchify(images, case.patch), ids))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_any_other_dtype_is_moved_too(dtype):
    images, ids = IMAGE.problem()
    images = (images * 2).to(dtype)
    got = gather_patches(images, ids, IMAGE.patch)
    assert got.dtype == dtype and torch.equal(got, pick(patchify(images, IMAGE.patch), ids))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_in_another_dtype(dtype, impl):
    images = torch.randint(256, (5, 3, 12, 8), dtype=torch.uint8, device=DEVICE)
    _, ids = IMAGE.problem()
    got = gather_patches(images, ids, IMAGE.patch, dtype=dtype, impl=impl)
    assert got.dtype == dtype and torch.equal(
        got, pick(patchify(images, IMAGE.patch), ids).to(dtype)
    )


def layouts(images):
    yield images.movedim(1, -1).contiguous().movedim(-1, 1)  # channels last
    yield torch.stack([images, images + 1], -1)[..., 0]
    yield images.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield torch.cat([images, images + 1])[: len(images)]
    yield torch.cat([images, images + 1], 1)[:, : images.shape[1]]
    yield images[:1].expand_as(images)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "normalized"])
def test_strides_of_the_images_do_not_matter(impl, normalized):
    case = IMAGE if normalized else CLIP
    images, ids = case.problem()
    pred = torch.randn(*ids.shape, case.values, device=DEVICE)

    def both(x):
        x = Normalized(x, *channels(case.C)) if normalized else x
        patches = gather_patches(x, ids, case.patch, impl=impl)
        return patches, patch_mse(pred, x, ids, case.patch, impl=impl)

    plain = both(images)
    for other in layouts(images):
        same = plain if torch.equal(other, images) else both(other.contiguous())
        patches, loss = both(other)
        assert torch.equal(patches, same[0])
        torch.testing.assert_close(loss, same[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@crossed(dtype={str(x): x for x in DTYPES}, reduce=UPSTREAM)
@pytest.mark.parametrize("case", [CASES[1], IMAGE, CLIP], ids=str)
def test_gradient_adds_up_over_repeats(case, dtype, reduce, impl, nan_filled):
    images, ids = case.problem(dtype)
    ids[:, -1], ids[0, 1] = ids[:, 0], ids[0, 0]  # twice, and in one image three times
    assert_no_worse(
        lambda x: gather_patches(x, ids, case.patch, repeats=True, impl=impl),
        lambda x: pick(patchify(x, case.patch), ids),
        [images],
        reduce,
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_of_16_bits_adds_up_in_float32(impl):
    images = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    ids = torch.zeros(1, 300, dtype=torch.int64, device=DEVICE)
    gather_patches(images, ids, 2, repeats=True, impl=impl).sum().backward()
    assert images.grad is not None and (images.grad == 300).all()  # in bfloat16 256 + 1 is 256


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalized_images_and_their_gradient(dtype, reduce, impl):
    images, ids = IMAGE.problem(dtype)
    assert_no_worse(
        lambda x: gather_patches(Normalized(x, *channels(3)), ids, IMAGE.patch, impl=impl),
        lambda x: pick(patchify(by_hand(x, x.dtype), IMAGE.patch), ids),
        [images],
        reduce,
    )


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_normalized_bytes(impl):
    images = torch.randint(256, (2, 3, 4, 9, 10), dtype=torch.uint8, device=DEVICE)
    _, ids = CLIP.problem()
    want = pick(patchify(by_hand(images), CLIP.patch), ids)
    for dtype, bound in ((None, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)):
        seen = Normalized(images, *channels(3, torch.float64))
        got = gather_patches(seen, ids, CLIP.patch, dtype=dtype, impl=impl)
        assert got.dtype == (dtype or torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=bound, atol=bound)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_patch_chosen_and_no_image(impl):
    images, ids = Case(2, 1, (4, 4), (2, 2), 0).problem()
    images.requires_grad_()
    got = gather_patches(images, ids, 2, impl=impl)
    assert got.shape == (2, 0, 4)
    assert torch.autograd.grad(got.sum(), images)[0].count_nonzero() == 0
    assert gather_patches(images[:0], ids[:0], 2, impl=impl).shape == (0, 0, 4)
    assert patch_mse(got.detach(), images, ids, 2, impl=impl).shape == (2, 0)


@pytest.mark.parametrize("impl", IMPLS)
@crossed(dtype={str(x): x for x in DTYPES}, reduce=UPSTREAM)
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "raw"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_patch_mse(case, norm_pix, dtype, reduce, impl, nan_filled):
    images, ids = case.problem()
    pred = torch.randn(*ids.shape, case.values, device=DEVICE).to(dtype)
    images = images.bfloat16().float()  # exact in eager's dtype, but for fp16's range
    assert_no_worse(
        lambda p: patch_mse(p, images, ids, case.patch, norm_pix=norm_pix, impl=impl),
        lambda p: mae(p, images, ids, case.patch, norm_pix),
        [pred],
        reduce,
    )


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "raw"])
def test_kinds_of_error(kind, norm_pix, dtype, impl):
    images, ids = CLIP.problem()
    images = images.bfloat16().float()
    pred = (2 * torch.randn(*ids.shape, CLIP.values, device=DEVICE)).to(dtype)
    if kind != "l2":  # not within rounding of a kink, where a slope turns
        target = pick(patchify(images.double(), CLIP.patch), ids)
        if norm_pix:
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (var + 1e-6).sqrt()
        e = pred.double() - target
        pred = (target + torch.where(e.abs() < 0.5, e.sign() * 0.5, e.round() * 1.25)).to(dtype)
    assert_no_worse(
        lambda p: patch_mse(p, images, ids, CLIP.patch, norm_pix=norm_pix, kind=kind, impl=impl),
        lambda p: mae(p, images, ids, CLIP.patch, norm_pix, kind),
        [pred],
    )


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_slopes_by_hand(impl):
    """Errors on, inside and outside the kinks, exactly."""
    pred = torch.tensor([[[0.0, 0.5, -0.25, 3.0, -3.0, 0.0]]], device=DEVICE)
    images = torch.zeros(1, 1, 6, device=DEVICE)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    want = {
        "l2": (18.3125, [0, 1, -0.5, 6, -6, 0]),
        "l1": (6.75, [0, 1, -1, 1, -1, 0]),
        "smooth_l1": (5.15625, [0, 0.5, -0.25, 1, -1, 0]),
    }
    for kind, (loss, slopes) in want.items():
        call = partial(patch_mse, images=images, ids=ids, patch=6, norm_pix=False, kind=kind)
        run = partial(call, impl=impl)
        value, slope = grads(run, [pred], lambda x: 6 * x.sum())
        assert value.item() == pytest.approx(loss / 6, rel=1e-6)
        torch.testing.assert_close(slope[0, 0].tolist(), [float(s) for s in slopes])


@pytest.mark.parametrize("impl", IMPLS)
def test_patch_mse_of_normalized_images(impl):
    images = torch.randint(256, (5, 3, 12, 8), dtype=torch.uint8, device=DEVICE)
    _, ids = IMAGE.problem()
    pred = torch.randn(5, 5, 24, device=DEVICE)
    for norm_pix in (True, False):
        assert_no_worse(
            lambda p: patch_mse(
                p,
                Normalized(images, *channels(3)),
                ids,
                IMAGE.patch,
                norm_pix=norm_pix,  # noqa: B023
                impl=impl,
            ),
            lambda p: mae(p, by_hand(images, p.dtype), ids, IMAGE.patch, norm_pix),  # noqa: B023
            [pred],
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_cancels_far_from_zero(impl):
    """A mean of 1e3 and a deviation of 1e-2: no worse than eager; in fact to 1e-5."""
    images, ids = IMAGE.problem()
    images = 1000 + 0.01 * images
    pred = torch.randn(5, 5, 24, device=DEVICE)
    ours = lambda p: patch_mse(p, images, ids, IMAGE.patch, impl=impl)  # noqa: E731
    assert_no_worse(ours, lambda p: mae(p, images, ids, IMAGE.patch), [pred])
    truth = mae(pred.double(), images, ids, IMAGE.patch)
    torch.testing.assert_close(ours(pred).double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_patch_mse_by_hand(impl):
    images = torch.tensor([[[[0, 2, 7, 7], [4, 6, 7, 7]]]], dtype=torch.uint8, device=DEVICE)
    ids = torch.tensor([[1, 0]], device=DEVICE)
    pred = torch.zeros(1, 2, 4, device=DEVICE)
    raw = patch_mse(pred, images, ids, 2, norm_pix=False, impl=impl)
    torch.testing.assert_close(raw.tolist(), [[49.0, 14.0]])
    # A constant patch's target is 0; elsewhere the unbiased variance leaves (P - 1) / P.
    assert patch_mse(pred, images, ids, 2, impl=impl)[0].tolist() == pytest.approx([0.0, 0.75])


@pytest.mark.parametrize("impl", IMPLS)
def test_eps_is_in_the_units_of_what_is_read(impl):
    """Of values 0 and 2 the unbiased variance is 2: with eps 6 targets are a third of it off."""
    images = torch.tensor([[[0.0, 2.0]]], device=DEVICE)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    got = patch_mse(torch.zeros(1, 1, 2, device=DEVICE), images, ids, 2, eps=6.0, impl=impl)
    assert got.item() == pytest.approx(1 / 8)


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_left_and_images_get_no_gradient(impl):
    images, ids = IMAGE.problem()
    pred = torch.randn(5, 5, 24, device=DEVICE)
    before = [x.clone() for x in (pred, images)]
    images.requires_grad_()
    _, d_pred = grads(lambda p: patch_mse(p, images, ids, (4, 2), impl=impl), [pred])
    assert images.grad is None and d_pred.shape == pred.shape
    assert torch.equal(pred, before[0]) and torch.equal(images.detach(), before[1])
    gather_patches(Normalized(images, *channels(3)), ids, (4, 2), impl=impl).sum().backward()
    assert torch.equal(images.detach(), before[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_over_the_same_graph(impl):
    images, ids = IMAGE.problem()
    pred = torch.randn(5, 5, 24, device=DEVICE, requires_grad=True)
    loss = patch_mse(pred, images, ids, (4, 2), impl=impl).sum()
    (first,) = torch.autograd.grad(loss, pred, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(loss, pred)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_derivative_is_refused(impl):
    images, ids = IMAGE.problem()
    pred = torch.randn(5, 5, 24, device=DEVICE, requires_grad=True)
    images.requires_grad_()
    for out, x in (
        (patch_mse(pred, images, ids, (4, 2), impl=impl), pred),
        (gather_patches(images, ids, (4, 2), impl=impl).square(), images),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.sum(), x, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiled_whole(impl):
    images, ids = IMAGE._replace(B=3).problem()  # two chunks
    pred = torch.randn(3, 5, 24, device=DEVICE)

    def run(p, x):
        seen = Normalized(x, *channels(3))
        tokens = gather_patches(seen, ids, (4, 2), impl=impl)
        error = patch_mse(p, x, ids, (4, 2), impl=impl)
        return (tokens * p).sum() + error.sum()

    whole = torch.compile(run, backend="aot_eager", fullgraph=True)
    for got, want in zip(grads(whole, [pred, images]), grads(run, [pred, images]), strict=True):
        torch.testing.assert_close(got, want)


def test_holds_no_patchified_copy():
    images, ids = Case(17, 3, (16, 16), (4, 4), 8).problem()
    pred = torch.randn(17, 8, 48, device=DEVICE, requires_grad=True)  # 6,528; the images 13,056
    run = lambda impl: patch_mse(pred, images, ids, 4, impl=impl).sum()  # noqa: E731
    kept = {"torch": pred.numel(), "triton": pred.numel() + images.numel() + 3 * ids.numel()}
    for impl in IMPLS:
        assert saved_elements(lambda: run(impl)) == kept[impl]  # noqa: B023
        assert largest_tensor(lambda: run(impl).backward()) == pred.numel()  # noqa: B023
        assert largest_tensor(lambda: gather_patches(images, ids, 4, impl=impl)) == pred.numel()  # noqa: B023
    with torch.no_grad():  # then there is no error to keep
        assert largest_tensor(lambda: run("torch")) < 2 * images[:1].numel()


@pytest.mark.parametrize("impl", IMPLS)
def test_runs_under_autocast_in_the_dtypes_given(impl):
    images, ids = IMAGE.problem()
    pred = torch.randn(5, 5, 24, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = patch_mse(pred, images, ids, (4, 2), impl=impl)
    assert torch.equal(got, patch_mse(pred, images, ids, (4, 2), impl=impl))


def test_repeats_are_refused_where_they_are_not_asked_for(monkeypatch):
    images, ids = IMAGE.problem()
    ids[3, 4] = ids[3, 1]
    words = f"ids must not repeat within a row, got {ids[3, 1]} twice in row 3"
    monkeypatch.setenv("FASTSSL_CHECK", "1")
    for call in (gather_patches, lambda *x: patch_mse(torch.zeros(5, 5, 24, device=DEVICE), *x)):
        with pytest.raises(ValueError, match=words):
            call(images, ids, (4, 2))


X, I = torch.zeros(2, 3, 4, 6), torch.zeros(2, 1, dtype=torch.int64)  # noqa: E741
P = torch.zeros(2, 1, 12)
ONE = torch.ones(3)


def seen(images: Tensor = X, mean: Tensor = ONE, std: Tensor = ONE):
    return Normalized(images, mean, std)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gather_patches(X[0, 0], I, 2), r"images must be \(B, C, \*S\) .* got \(4, 6\)"),
        (lambda: gather_patches(X[..., None, None], I, 2), r"got \(2, 3, 4, 6, 1, 1\)"),
        (lambda: gather_patches(X, I, 4), "patch must divide the image's 4 x 6 pixels, got 4 x 4"),
        (lambda: gather_patches(X, I, 0), "got 0 x 0"),
        (lambda: gather_patches(X, I, (2, 2, 2)), "4 x 6 pixels, got 2 x 2 x 2"),
        (lambda: gather_patches(X, I[:1], 2), r"ids must be \(2, K\) int64, got \(1, 1\)"),
        (lambda: gather_patches(X, I.int(), 2), "int64, got .* torch.int32"),
        (lambda: gather_patches(X, I.to("meta"), 2), "ids must be on cpu .* got meta"),
        (lambda: gather_patches(X, I + 6, 2), r"ids must lie in 0\.\.5, got 6\.\.6"),
        (lambda: gather_patches(X, I - 1, 2, repeats=True), r"lie in 0\.\.5, got -1\.\.-1"),
        (lambda: gather_patches(X, I, 2, impl="cuda"), "reference for gather_patches, got 'cuda'"),
        (lambda: gather_patches(seen(mean=ONE[:2]), I, 2), r"mean must be \(3,\) float .* \(2,\)"),
        (lambda: gather_patches(seen(std=ONE.long()), I, 2), "std must be .* float .* torch.int64"),
        (lambda: gather_patches(seen(std=ONE.to("meta")), I, 2), "std must be .* cpu, got .* meta"),
        (lambda: gather_patches(seen(X.long()), I, 2), "must be float or uint8, got torch.int64"),
        (lambda: gather_patches(seen(), I, 2, dtype=torch.uint8), "dtype must be a floating-point"),
        (lambda: patch_mse(P[..., 1:], X, I, 2), r"pred must be \(2, 1, 12\) .* \(2, 1, 11\)"),
        (lambda: patch_mse(P.to("meta"), X, I, 2), "pred must be .* on cpu, got .* on meta"),
        (lambda: patch_mse(P.long(), X, I, 2), "pred must be a floating-point tensor"),
        (lambda: patch_mse(P, X.cfloat(), I, 2), "images must be real, got torch.complex64"),
        (lambda: patch_mse(P, X, I + 6, 2), r"ids must lie in 0\.\.5, got 6\.\.6"),
        (lambda: patch_mse(P[..., :1], X[:, :1], I, 1), "at least 2 values a patch, got 1"),
        (lambda: patch_mse(P, X, I, 2, eps=-1e-6), "eps must be >= 0, got -1e-06"),
        (lambda: patch_mse(P, X, I, 2, kind="mse"), "one of l2, l1, smooth_l1, got 'mse'"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
