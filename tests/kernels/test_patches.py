import pytest
import torch

from fastssl.kernels import gather_patches, patch_mse
from fastssl.kernels.patches import gather_patches_reference, patch_mse_reference
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor, saved_elements

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [  # B, C, H, W, (ph, pw), K: one image passes a chunk in the last, none fits evenly
    (1, 1, 2, 2, (1, 2), 1),
    (7, 3, 12, 8, (4, 2), 5),
    (3, 2, 15, 25, (3, 5), 19),
]


def patchify(images, patch):
    """MAE's own order, 'n c h p w q -> n (h w) (p q c)', written out place by place."""
    (ph, pw), (_, _, H, W) = patch, images.shape
    blocks = [
        images[:, :, y : y + ph, x : x + pw].permute(0, 2, 3, 1).flatten(1)
        for y in range(0, H, ph)
        for x in range(0, W, pw)
    ]
    return torch.stack(blocks, 1)


def problem(B, C, H, W, patch, K, dtype=torch.float32):
    torch.manual_seed(B * K)
    images = torch.randn(B, C, H, W, device=DEVICE).to(dtype)
    L = (H // patch[0]) * (W // patch[1])
    return images, torch.rand(B, L, device=DEVICE).argsort(1)[:, :K]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, *DTYPES], ids=str)
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_patches_in_hwc_order(case, dtype, impl):
    images, ids = problem(*case)
    images = (images * 50).to(dtype)
    got = gather_patches(images, ids, case[4], impl=impl)
    every = patchify(images, case[4])
    want = torch.stack([image[row] for image, row in zip(every, ids, strict=True)])
    assert got.dtype == dtype and got.is_contiguous() and torch.equal(got, want)


def test_strides_of_the_images_do_not_matter():
    images, ids = problem(*CASES[1])
    last = images.contiguous(memory_format=torch.channels_last)
    wide = torch.stack([images, images + 1], -1)[..., 0]
    want = gather_patches(images, ids, (4, 2))
    for other in (last, wide, images.transpose(2, 3).contiguous().transpose(2, 3)):
        assert torch.equal(gather_patches(other, ids, (4, 2)), want)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_adds_up_over_repeats(dtype, reduce):
    images, ids = problem(*CASES[1], dtype=dtype)
    ids[:, -1] = ids[:, 0]
    assert_no_worse(
        lambda x: gather_patches(x, ids, (4, 2)),
        lambda x: gather_patches_reference(x, ids, (4, 2)),
        [images],
        reduce,
    )


def test_gradient_of_16_bits_adds_up_in_float32():
    images = torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    ids = torch.zeros(1, 300, dtype=torch.int64, device=DEVICE)
    gather_patches(images, ids, 2).sum().backward()
    assert images.grad is not None and (images.grad == 300).all()  # in bfloat16 256 + 1 is 256


def test_no_patch_chosen():
    images, ids = problem(2, 1, 4, 4, (2, 2), 0)
    assert gather_patches(images, ids, 2).shape == (2, 0, 4)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "raw"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_patch_mse(case, norm_pix, dtype, reduce):
    images, ids = problem(*case)
    pixels = case[1] * case[4][0] * case[4][1]
    pred = torch.randn(*ids.shape, pixels, device=DEVICE).to(dtype)
    images = images.bfloat16().float()  # exact in eager's dtype, but for fp16's range
    options = (ids, case[4], norm_pix, 1e-6)
    assert_no_worse(
        lambda p: patch_mse(p, images, ids, case[4], norm_pix=norm_pix),
        lambda p: patch_mse_reference(p, images.to(p.dtype), *options),
        [pred],
        reduce,
    )


def test_patch_mse_by_hand():
    images = torch.tensor([[[[0, 2, 7, 7], [4, 6, 7, 7]]]], dtype=torch.uint8, device=DEVICE)
    ids = torch.tensor([[1, 0]], device=DEVICE)
    pred = torch.zeros(1, 2, 4, device=DEVICE)
    raw = patch_mse(pred, images, ids, 2, norm_pix=False)
    assert raw.tolist() == [[49.0, 14.0]]
    # A constant patch's target is 0; elsewhere the unbiased variance leaves (P - 1) / P.
    torch.testing.assert_close(patch_mse(pred, images, ids, 2).tolist(), [[0.0, 0.75]])


def test_patch_mse_ignores_shift_and_scale_of_a_patch():
    images, ids = problem(*CASES[1])
    pred = torch.randn(7, 5, 24, device=DEVICE)
    first, second = (patch_mse(pred, x, ids, (4, 2)) for x in (images, 40 * images - 9))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_patch_mse_leaves_its_inputs_and_gives_images_no_gradient():
    images, ids = problem(*CASES[1])
    pred = torch.randn(7, 5, 24, device=DEVICE)
    before = [x.clone() for x in (pred, images)]
    _, d_pred, *none = grads(lambda p: patch_mse(p, images.requires_grad_(), ids, (4, 2)), [pred])
    assert not none and images.grad is None and d_pred.shape == pred.shape
    assert torch.equal(pred, before[0]) and torch.equal(images.detach(), before[1])


def test_holds_no_patchified_copy():
    images, ids = problem(50, 3, 16, 16, (4, 4), 8)
    pred = torch.randn(50, 8, 48, device=DEVICE, requires_grad=True)  # 19,200; the images 38,400
    run = lambda: patch_mse(pred, images, ids, 4).sum()  # noqa: E731
    saved = pred.numel() + images.numel() + ids.numel() + 2 * ids.numel()
    assert saved_elements(run) == saved
    assert largest_tensor(lambda: run().backward()) == pred.numel()  # its gradient
    assert largest_tensor(lambda: gather_patches(images, ids, 4)) == pred.numel()


X, I = torch.zeros(2, 3, 4, 6), torch.zeros(2, 1, dtype=torch.int64)  # noqa: E741
P = torch.zeros(2, 1, 12)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gather_patches(X[0], I, 2), r"images must be \(B, C, H, W\), got \(3, 4, 6\)"),
        (lambda: gather_patches(X, I, 4), "patch must divide the image's 4 x 6 pixels, got 4 x 4"),
        (lambda: gather_patches(X, I, 0), "got 0 x 0"),
        (lambda: gather_patches(X, I[:1], 2), r"ids must be \(2, K\) int64, got \(1, 1\)"),
        (lambda: gather_patches(X, I.int(), 2), "int64, got .* torch.int32"),
        (lambda: gather_patches(X, I.to("meta"), 2), "ids must be on cpu .* got meta"),
        (lambda: gather_patches(X, I + 6, 2), r"ids must lie in 0\.\.5, got 6\.\.6"),
        (lambda: gather_patches(X, I - 1, 2), r"ids must lie in 0\.\.5, got -1\.\.-1"),
        (lambda: gather_patches(X, I, 2, impl="triton"), "torch, reference for gather_patches"),
        (lambda: patch_mse(P[..., 1:], X, I, 2), r"pred must be \(2, 1, 12\) .* \(2, 1, 11\)"),
        (lambda: patch_mse(P.to("meta"), X, I, 2), "pred must be .* on cpu, got .* on meta"),
        (lambda: patch_mse(P.long(), X, I, 2), "pred must be a floating-point tensor"),
        (lambda: patch_mse(P[..., :1], X[:, :1], I, 1), "at least 2 pixels a patch, got 1"),
        (lambda: patch_mse(P, X, I, 2, eps=-1e-6), "eps must be >= 0, got -1e-06"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
