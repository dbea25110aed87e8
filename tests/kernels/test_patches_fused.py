"""The Triton kernels at blocks that small odd shapes cross and do not divide, and as operators."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch

from fastssl.kernels import Normalized, gather_patches, patch_mse
from fastssl.kernels.common import tuning as _tuning
from fastssl.kernels.patches import patches_configs as configs
from fastssl.kernels.patches import patches_triton
from fastssl.kernels.patches.patches_configs import shape_class
from fastssl.kernels.patches.patches_ops import fused
from tests.kernels.test_patches import (
    CASES,
    CLIP,
    DTYPES,
    IMAGE,
    KINDS,
    by_hand,
    channels,
    mae,
    patchify,
    pick,
)
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads

KERNELS = (
    patches_triton.GATHER,
    patches_triton.SPREAD,
    patches_triton.MSE,
    patches_triton.MSE_LONG,
    patches_triton.MSE_GRAD,
)
PARTS = {configs.measured(P) for P in range(1, 10_000)}
# Patches and values of a step, and steps of a program.
BLOCKS = {"several": (4, 16, 1), "held": (2, 128, 2), "alone": (1, 128, 3)}


once = pytest.mark.parametrize("small_blocks", [BLOCKS["several"]], indirect=True, ids=["several"])


@pytest.fixture(autouse=True, params=BLOCKS.values(), ids=BLOCKS)
def small_blocks(request, nan_filled, monkeypatch):
    if request.param == BLOCKS["several"]:
        monkeypatch.setattr(configs, "HELD", {})  # patches of more values than a step
    sizes = dict(zip(configs.BLOCKS, (*request.param, 4), strict=True))
    with ExitStack() as stack:
        for kernel in KERNELS:
            blocks = {name: sizes[name] for name in configs.BLOCKS if name in kernel.fn.arg_names}
            stack.enter_context(_tuning.forced(kernel.name, _tuning.Config(blocks)))
        yield


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.uint8, *DTYPES], ids=str)
def test_patches_are_the_pixels(case, dtype):
    images, ids = case.problem()
    images = (images * 50).abs().to(dtype)
    got = gather_patches(images, ids, case.patch, impl="triton")
    assert torch.equal(got, pick(patchify(images, case.patch), ids))


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("case", [CASES[1], IMAGE, CLIP], ids=str)
def test_gradient_adds_up_over_repeats(case, reduce):
    images, ids = case.problem()
    ids[:, -1], ids[0, 1] = ids[:, 0], ids[0, 0]
    assert_no_worse(
        lambda x: gather_patches(
            Normalized(x, *channels(case.C)), ids, case.patch, repeats=True, impl="triton"
        ),
        lambda x: pick(patchify(by_hand(x, x.dtype), case.patch), ids),
        [images],
        reduce,
    )


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("norm_pix", [True, False], ids=["norm_pix", "raw"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_patch_mse(case, norm_pix, reduce):
    images, ids = case.problem()
    pred = torch.randn(*ids.shape, case.values, device=DEVICE)
    seen = Normalized(images, *channels(case.C))
    assert_no_worse(
        lambda p: patch_mse(p, seen, ids, case.patch, norm_pix=norm_pix, impl="triton"),
        lambda p: mae(p, by_hand(images, p.dtype), ids, case.patch, norm_pix),
        [pred],
        reduce,
    )


@pytest.mark.parametrize("layout", ["transposed", "gaps"])
def test_predictions_of_any_layout(layout):
    images, ids = IMAGE.problem()
    pred = torch.randn(5, 5, 24, device=DEVICE)
    other = (
        pred.mT.contiguous().mT if layout == "transposed" else torch.stack([pred] * 2, -1)[..., 0]
    )
    run = lambda p: patch_mse(p, images, ids, (4, 2), impl="triton")  # noqa: E731
    for got, want in zip(grads_as_is(run, other), grads_as_is(run, pred), strict=True):
        assert torch.equal(got, want)


def grads_as_is(fn, x):
    """grads() without its copy, which would be contiguous."""
    x = x.detach().requires_grad_()
    out = fn(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


@once
def test_constant_patches_and_nothing_cancels_far_from_zero():
    images, ids = IMAGE.problem()
    images = 1000 + 0.01 * images
    images[0] = 0.1
    pred = torch.randn(5, 5, 24, device=DEVICE)
    got = patch_mse(pred, images, ids, (4, 2), impl="triton")
    truth = mae(pred.double(), images, ids, (4, 2))
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=0)
    assert torch.equal(got[0], patch_mse(pred, images * 0, ids, (4, 2), impl="triton")[0])


def test_a_nan_stays_in_its_patch():
    images, ids = IMAGE.problem()
    every = patchify(torch.arange(96, device=DEVICE).view(1, 1, 12, 8), (4, 2))[0]
    images[2].view(3, -1)[1, every[ids[2, 3], 5]] = torch.nan
    pred = torch.randn(5, 5, 24, device=DEVICE)
    for kind in KINDS:
        run = lambda p: patch_mse(p, images, ids, (4, 2), kind=kind, impl="triton")  # noqa: B023, E731
        loss, slope = grads(run, [pred])
        for found in (loss.isnan(), slope.isnan().any(-1)):
            assert found.nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize("stride", ["channels", "images"])
def test_offsets_beyond_32_bits(stride):
    """Bytes 2^31 apart, most of which are never touched."""
    memory = torch.from_numpy(np.zeros(2**31 + 64, dtype=np.uint8))
    far = {"channels": (48, 2**31, 6, 1), "images": (2**31, 24, 6, 1)}[stride]
    images = memory.as_strided((2, 1, 4, 6) if stride == "images" else (1, 2, 4, 6), far)
    images.copy_(torch.arange(48).view(images.shape))
    ids = torch.tensor([[5, 0, 3]]).expand(len(images), 3)
    near = images.clone(memory_format=torch.contiguous_format)
    got, want = (gather_patches(x, ids, 2, impl="triton") for x in (images, near))
    assert torch.equal(got, want) and torch.equal(want, pick(patchify(near, (2, 2)), ids))
    pred = torch.randn(want.shape)
    both = [grads(lambda p: patch_mse(p, x, ids, 2, impl="triton"), [pred]) for x in (images, near)]  # noqa: B023
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


@once
@pytest.mark.parametrize("norm", [True, False], ids=["normalized", "plain"])
def test_operators_keep_torchs_rules(norm):
    images = torch.randn(1, 1, 1, 2, 4, device=DEVICE)
    ids = torch.tensor([[1]], device=DEVICE)
    table = torch.tensor([[0.5], [2.0]], device=DEVICE) if norm else None
    pred, check = torch.randn(1, 1, 4, device=DEVICE), torch.library.opcheck
    check(fused.gather, (images, table, ids, (1, 2, 2), torch.bfloat16))
    check(fused.spread, (pred, table, ids, (1, 2, 2), images.shape, torch.float16))
    given, eps = (images, table, ids), 1e-6 if norm else None
    check(fused.mse, (pred, *given, (1, 2, 2, 2), eps))
    _, stats = fused.mse(pred, *given, (1, 2, 2, 2), eps)
    check(fused.mse_grad, (pred[..., 0], pred, *given, stats, (1, 2, 2, 2)))


@once
@pytest.mark.parametrize("images", [torch.uint8, *DTYPES], ids=str)
@pytest.mark.parametrize("pred", DTYPES, ids=str)
def test_images_and_predictions_of_any_two_dtypes(images, pred):
    bytes_ = torch.randint(100, (1, 3, 4, 6), device=DEVICE)
    ids = torch.tensor([[2, 0]], device=DEVICE)
    x, p = bytes_.to(images), torch.randn(1, 2, 24, device=DEVICE).to(pred)
    assert torch.equal(
        gather_patches(x, ids, (4, 2), dtype=pred, impl="triton"),
        pick(patchify(x, (4, 2)), ids).to(pred),
    )
    assert_no_worse(
        lambda p: patch_mse(p, x, ids, (4, 2), impl="triton"),
        lambda p: mae(p, bytes_, ids, (4, 2)),
        [p],
    )


@once
def test_what_no_kernel_is_made_for_is_refused_by_name():
    images, ids = IMAGE.problem()
    for dtype in (torch.float64, torch.int32):
        with pytest.raises(ValueError, match=f"impl='triton' is for .* got images in {dtype}"):
            gather_patches(images.to(dtype), ids, (4, 2), impl="triton")
    with pytest.raises(ValueError, match="got dtype in torch.float64"):
        gather_patches(images, ids, (4, 2), dtype=torch.float64, impl="triton")
    with pytest.raises(ValueError, match="got pred in torch.float64"):
        pred = torch.zeros(5, 5, 24, dtype=torch.float64, device=DEVICE)
        patch_mse(pred, images, ids, (4, 2), impl="triton")


@once
def test_a_class_for_every_dtype_and_size():
    for kernel in (patches_triton.GATHER, patches_triton.MSE, patches_triton.MSE_GRAD):
        for images in (torch.uint8, *DTYPES):
            for result in (*DTYPES, torch.uint8):
                part = "P64" if kernel is patches_triton.MSE else "narrow"
                assert shape_class(images, result, part) in kernel.variants
    measuring = {*patches_triton.MSE.variants, *patches_triton.MSE_LONG.variants}
    assert {f"float32-{part}" for part in PARTS} <= measuring
    for name, variant in patches_triton.MSE.variants.items():  # what is said to be held is
        values = int(name.rpartition("-P")[2])
        assert all(config.blocks["BLOCK_P"] >= values for config in variant.candidates)
