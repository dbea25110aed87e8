"""Losses and primitives at the edges, by seeded chance: empty, single, huge, tiny, in 16 bits.

A call gives what float64 gives, to the rounding of its dtype, or raises ValueError.  What float32
cannot hold, a sum of squares past 3e38, may be infinite or NaN, which stops a run; never a wrong
number.  (fault 35, fault 9)
"""

import random

import pytest
import torch

from fastssl import kernels as K
from fastssl.losses import (
    barlow_twins,
    clip,
    co2,
    dcl,
    dense,
    detcon,
    emp_ssl,
    frossl,
    gram,
    groco,
    grouped,
    hcl,
    hypersphere,
    isogclr,
    latents,
    macl,
    matryoshka,
    mmcr,
    mochi,
    moco,
    nnclr,
    ntxent,
    patch_kernels,
    reconstruction,
    ressl,
    sie,
    siglip,
    ssl_ey,
    supcon,
    tico,
    vibcreg,
    vicreg,
    vicregl,
)
from fastssl.losses._unit import unit
from tests.oracle import DEVICE

LARGEST = torch.finfo(torch.float32).max
SIZES = [(0, 3), (3, 0), (1, 3), (3, 1), (2, 1), (2, 2), (5, 4), (4, 9), (1, 1)]
MAGNITUDES = [0.0, 1e-30, 1e-13, 1.0, 1.0, 1e15, 1e25]
DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16]


def ids(z):
    return torch.arange(len(z), device=z.device)


def with_queue(make, truth, *arguments):
    """Ours with a queue of 6 keys, which the reference is given."""

    def ours(z0, z1):
        return make(z0.shape[1]).eval().to(z0.device)(z0, z1, *arguments)

    def reference(z0, z1):
        return truth(z0, z1, make(z0.shape[1]).queue.keys.double())

    return ours, reference


def local(z):
    return z.unflatten(1, (1, 1, -1)).expand(-1, 2, 1, -1) * torch.tensor(
        [1, 2], device=z.device
    ).view(1, 2, 1, 1)


def vicregl_views(z0, z1):
    grid = torch.rand(len(z0), 2, 1, 2, generator=torch.Generator().manual_seed(0)).to(z0)
    return [(z0, local(z0)), (z1, local(z1))], [grid, grid]


def stack(z0, z1):
    return torch.stack([z0, z1], 1)


def isog_value(z0, z1):
    one = torch.ones(len(z0), dtype=z0.dtype, device=z0.device)
    return isogclr.isogclr_reference(z0, z1, 0.5 * one, 0 * one, 0.3, 0.8)[0]


def mae_inputs(z0, z1):
    """(B, 1, 2D) predictions of one hidden patch of images (B, 1, 1, 2D)."""
    return torch.cat([z0, z0], 1)[:, None], torch.cat([z1, -z1], 1)[:, None, None]


def detcon_masks(z):
    return [ids(z)[:, None] * 0, ids(z)[:, None] % 2]


def first_half(z):
    return z[:, : z.shape[1] // 2]


def pointing(z):
    """Without rows of zeros, which have no nearest neighbor."""
    return torch.where((z == 0).all(1, keepdim=True), 1, z)


LOSSES = {  # name: (ours, the reference; whether it sums squares of the embeddings as they are)
    "ntxent": (ntxent.NTXentLoss(0.1), lambda a, b: ntxent.ntxent_reference(a, b, 0.1), False),
    "ntxent bank": (
        lambda a, b: ntxent.NTXentLoss(0.1, (6, a.shape[1])).to(a.device)(a, b),
        lambda a, b: moco.moco_reference(
            a, b, ntxent.NTXentLoss(0.1, (6, a.shape[1])).memory_bank.keys.double(), 0.1
        ),
        False,
    ),
    "dcl": (dcl.DCLLoss(0.1), lambda a, b: dcl.dcl_reference(a, b, 0.1), False),
    "dclw": (dcl.DCLWLoss(0.1, 0.5), lambda a, b: dcl.dclw_reference(a, b, 0.1, 0.5), False),
    "hcl": (hcl.HCLLoss(0.5, 0.1, 1), lambda a, b: hcl.hcl_reference(a, b, 0.5, 0.1, 1), False),
    "grouped": (
        lambda a, b: grouped.GroupedNTXentLoss(0.1)(a, b, ids(a) % 2),
        lambda a, b: grouped.grouped_ntxent_reference(a, b, ids(a) % 2, 0.1, "same"),
        False,
    ),
    "supcon": (
        lambda a, b: supcon.SupConLoss(0.01)(stack(a, b), ids(a) // 2),
        lambda a, b: supcon.supcon_reference(stack(a, b), ids(a) // 2, 0.01),
        False,
    ),
    "supcon unlabeled": (
        lambda a, b: supcon.SupConLoss(0.01)(stack(a, b)),
        lambda a, b: supcon.supcon_reference(stack(a, b), ids(a), 0.01),
        False,
    ),
    "moco": (
        *with_queue(
            lambda D: moco.MoCoLoss(D, 0.1, 6), lambda a, b, q: moco.moco_reference(a, b, q, 0.1)
        ),
        False,
    ),
    "moco v3": (moco.MoCoV3Loss(0.1), lambda a, b: moco.moco_v3_reference(a, b, 0.1), False),
    "mochi": (
        *with_queue(
            lambda D: mochi.MoCHiLoss(D, 0.1, 6, top_n=2, s=0, s_prime=0),
            lambda a, b, q: mochi.mochi_reference(a, b, q, q.new_zeros(len(a), 0, a.shape[1]), 0.1),
        ),
        False,
    ),
    "nnclr": (
        lambda a, b: (
            nnclr.NNCLRLoss(6, a.shape[1]).eval().to(a.device)(pointing(a), pointing(b), b, a)
        ),
        lambda a, b: nnclr.nnclr_reference(
            pointing(a), pointing(b), b, a, nnclr.NNCLRLoss(6, a.shape[1]).queue.keys.double(), 0.1
        ),
        False,
    ),
    "groco": (groco.GroCoLoss(3), lambda a, b: groco.groco_reference(a, b, 3, 1.0), False),
    "isogclr": (
        lambda a, b: isogclr.ISogCLRLoss(9, 0.5, rho=0.3).to(a.device)(a, b, ids(a)),
        isog_value,
        False,
    ),
    "dense": (
        lambda a, b: dense.DenseInfoNCELoss(0.1)(a[None], b[None]),
        lambda a, b: dense.dense_info_nce_reference(a[None], b[None], ids(a)[None], 0.1, "image"),
        False,
    ),
    "matryoshka": (
        lambda a, b: matryoshka.MatryoshkaLoss(ntxent.NTXentLoss(), (1, 3))(a, b),
        lambda a, b: matryoshka.matryoshka_reference(
            lambda x, y: ntxent.ntxent_reference(x, y, 0.5), a, b, (1, 3), (1, 1)
        ),
        False,
    ),
    "tico": (
        lambda a, b: tico.TiCoLoss()(a, b),
        lambda a, b: tico.tico_reference(a, b, 0.0, 0.9, 8.0)[0],
        False,
    ),
    "detcon": (
        lambda a, b: detcon.DetConSLoss(0.1)(a[:, None], b[:, None], *detcon_masks(a)),
        lambda a, b: detcon.detcon_reference(*[(a[:, None], b[:, None])] * 2, detcon_masks(a), 0.1),
        False,
    ),
    "macl": (macl.MACLLoss(0.3), lambda a, b: macl.macl_reference(a, b, 0.3), False),
    "hypersphere": (
        hypersphere.HypersphereLoss(),
        lambda a, b: hypersphere.hypersphere_reference(a, b, 1.0, 1.0, 2.0),
        False,
    ),
    "co2": (co2.CO2Regularizer(), lambda a, b: co2.co2_reference(a, b, 1, 0.05), False),
    "ressl": (
        lambda a, b: ressl.ReSSLLoss()(a, b, a + b),
        lambda a, b: ressl.ressl_reference(a, b, (a + b).detach()),
        True,
    ),
    "frossl": (
        lambda a, b: frossl.FroSSLLoss()([pointing(a), pointing(b)]),
        lambda a, b: frossl.frossl_reference([pointing(a), pointing(b)]),
        True,
    ),
    "emp-ssl": (
        lambda a, b: emp_ssl.EMPSSLLoss()([a, b]),
        lambda a, b: emp_ssl.emp_ssl_reference([a, b], 0.2, 200.0),
        True,
    ),
    "vibcreg": (vibcreg.VIbCRegLoss(), vibcreg.vibcreg_reference, True),
    "clip": (
        lambda a, b: clip.CLIPLoss()(a, b, 0.5),
        lambda a, b: clip.clip_reference(a, b, torch.tensor(0.5)),
        True,
    ),
    "siglip": (
        lambda a, b: siglip.SigLIPLoss()(a, b, 0.5, -1.0),
        lambda a, b: siglip.siglip_reference(a, b, torch.tensor(0.5), torch.tensor(-1.0)),
        True,
    ),
    "barlow": (
        barlow_twins.BarlowTwinsLoss(),
        lambda a, b: barlow_twins.barlow_twins_reference(a, b, 5e-3),
        True,
    ),
    "mixed barlow": (
        lambda a, b: barlow_twins.MixedBarlowTwinsLoss()(a, b, a, ids(a).flip(0), 0.5),
        lambda a, b: barlow_twins.mixed_barlow_twins_reference(
            a, b, a, ids(a).flip(0), 0.5, 5e-3, 5.0
        ),
        True,
    ),
    "vicreg": (vicreg.VICRegLoss(), vicreg.vicreg_reference, True),
    "vicreg positions": (
        lambda a, b: vicreg.VICRegLoss()(stack(a, b), stack(b, a)),
        lambda a, b: vicreg.vicreg_reference(stack(a, b), stack(b, a)),
        True,
    ),
    "vicregl": (
        lambda a, b: vicregl.VICRegLLoss()(*vicregl_views(a, b)),
        lambda a, b: vicregl.vicregl_reference(*vicregl_views(a, b), 2),
        True,
    ),
    "sie": (
        lambda a, b: sie.SIELoss()(a, b, first_half(a)),
        lambda a, b: sie.sie_reference(a, b, first_half(a)),
        True,
    ),
    "ssl-ey": (
        lambda a, b: ssl_ey.SSLEYLoss()([a, b]),
        lambda a, b: ssl_ey.ssl_ey_reference([a, b]),
        True,
    ),
    "mmcr": (
        lambda a, b: mmcr.MMCRLoss()(a[:, None], b[:, None]),
        lambda a, b: mmcr.mmcr_reference(a[:, None], b[:, None], 5e-3),
        True,
    ),
    "mae": (
        lambda a, b: reconstruction.MAELoss((1, 2 * a.shape[1]))(
            *mae_inputs(a, b), ids(a)[:, None] * 0
        ),
        lambda a, b: mae_truth(*mae_inputs(a, b)),
        True,
    ),
    "scaled cosine": (
        latents.ScaledCosineLoss(2.0),
        lambda a, b: latents.scaled_cosine_reference(a, b, 2.0),
        True,
    ),
    "gram": (
        lambda a, b: gram.GramLoss()(a[None], b[None]),
        lambda a, b: gram.gram_reference(a[None], b[None]),
        False,
    ),
    "patch kernels": (
        lambda a, b: patch_kernels.PatchKernelAlignmentLoss()(a[None], b[None]),
        lambda a, b: patch_kernels.patch_kernel_alignment_reference(a[None], b[None]),
        True,
    ),
    "v-jepa": (
        lambda a, b: latents.VJEPALoss()(a[None], b[None]),
        lambda a, b: latents.vjepa_reference(a, b.detach()),
        True,
    ),
    "chamfer": (
        lambda a, b: latents.ChamferLoss()(a[None], b[None]),
        lambda a, b: latents.chamfer_reference(a[None], b[None], "l2"),
        True,
    ),
}
BELOW_ZERO = {"dcl", "dclw", "isogclr", "ssl-ey", "mmcr", "hypersphere", "frossl", "emp-ssl"}


def mae_truth(pred, images):
    target = images.flatten(2)  # (B, 1, P): the one patch
    mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
    return (pred - (target - mean) / (var + 1e-6).sqrt()).square().mean()


def rows(B):
    """A permutation's ids (1, B): each place once."""
    return torch.arange(B, device=DEVICE).flip(0)[None]


PRIMITIVES = {  # name: a function of two (B, D) and of impl
    "pairwise_lse": lambda a, b, impl: K.pairwise_lse(a, b, 0.5, impl=impl),
    "pairwise_sigmoid": lambda a, b, impl: K.pairwise_sigmoid(
        a, b, 0.5, -1.0, positive=K.same_group, impl=impl
    ),
    "pairwise_topk": lambda a, b, impl: K.pairwise_topk(a, b, 1, impl=impl)[0],
    "standardize": lambda a, b, impl: K.standardize(a, eps=1e-5, impl=impl),
    "column_moments": lambda a, b, impl: torch.stack(K.column_moments(a, impl=impl)),
    "cross_diagonal": lambda a, b, impl: K.cross_diagonal(a, b, impl=impl),
    "cross_correlation": lambda a, b, impl: K.cross_correlation(a, b, impl=impl)[1],
    "frobenius_sq": lambda a, b, impl: K.frobenius_sq(a, b, impl=impl),
    "mixed_correlation": lambda a, b, impl: K.mixed_correlation(a, b, a - b, impl=impl)[2],
    "gather_tokens": lambda a, b, impl: K.gather_tokens(a[None], rows(len(a)), impl=impl),
    "scatter_tokens": lambda a, b, impl: K.scatter_tokens(
        a[None], rows(len(a)), len(a) + 1, impl=impl
    ),
    "restore_tokens": lambda a, b, impl: K.restore_tokens(
        a[None], rows(len(a) + 1), a.new_ones(a.shape[1]), impl=impl
    ),
    "gather_bias": lambda a, b, impl: K.gather_bias(
        a[:, :1, None].expand(-1, -1, len(a)).transpose(0, 1) * 1, rows(len(a)), impl=impl
    ),
    "scaled_cosine_error": lambda a, b, impl: K.scaled_cosine_error(a, b, impl=impl),
    "gram_distance": lambda a, b, impl: K.gram_distance(a[None], b[None], impl=impl),
    "chamfer": lambda a, b, impl: K.chamfer(a[None], b[None], impl=impl),
}
CALLS = {name: loss[:2] for name, loss in LOSSES.items()} | {
    name: (lambda a, b, f=f: f(a, b, "auto"), lambda a, b, f=f: f(a, b, "reference"))
    for name, f in PRIMITIVES.items()
}
UNIT = {name for name, (_, _, squares) in LOSSES.items() if not squares}


def draw(chance):
    """Two tensors (B, D): of a magnitude, alike, opposite or apart, some with a row of zeros."""
    (B, D), dtype = chance.choice(SIZES), chance.choice(DTYPES)
    size, kind = chance.choice(MAGNITUDES), chance.choice(["apart", "alike", "near", "zero row"])
    generator = torch.Generator().manual_seed(chance.randrange(10**6))
    a, b = torch.randn(2, B, D, generator=generator).to(DEVICE)
    b = {"alike": a, "near": a + 1e-3 * b}.get(kind, b).clone()
    if kind == "zero row" and B:
        a[-1] = 0
    most = torch.finfo(dtype).max / 4
    return [(z.double() * size).clamp(-most, most).to(dtype) for z in (a, b)]


def check(name, inputs):
    ours, reference = CALLS[name]
    leaves = [z.clone().requires_grad_() for z in inputs]
    try:
        value = ours(*leaves)
    except ValueError:
        assert min(inputs[0].shape) < 2 or (name, inputs[0].shape[1]) == ("matryoshka", 2)
        return "refused"
    wide = [z.double().requires_grad_() for z in inputs]
    truth = reference(*wide)
    assert value.shape == truth.shape
    if value.numel() == 0:
        return "empty"
    largest = max((z.detach().abs().max().item() for z in wide if z.numel()), default=0.0)
    if (
        name not in UNIT
        and max(largest, truth.abs().max().item()) ** 2 * len(inputs[0]) > LARGEST / 100
    ):
        near = torch.isclose(value.double(), truth, rtol=0.05, atol=1e-3 * largest)
        assert (near | ~value.isfinite()).all(), (value, truth)
        return "beyond"
    assert value.isfinite().all(), (value, truth)
    error = (value.double() - truth).abs().max()
    unit = max(1.0, truth.abs().max().item())
    assert error <= 30 * torch.finfo(inputs[0].dtype).eps * unit, (value, truth)
    if name in LOSSES and name not in BELOW_ZERO:
        assert value >= -1e-5 * unit
    if value.requires_grad:
        found = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        wanted = torch.autograd.grad(truth.sum(), wide, allow_unused=True)
        for grad, want in zip(found, wanted, strict=True):
            if grad is not None and want is not None and want.numel():
                if want.abs().max() < min(1e30, torch.finfo(grad.dtype).max / 4):
                    assert grad.isfinite().all(), (grad, want)
    return "near"


@pytest.mark.parametrize("name", CALLS)
def test_gives_what_float64_gives_or_refuses(name):
    chance = random.Random(name)
    seen = [check(name, draw(chance)) for _ in range(16)]
    assert "near" in seen


def test_rows_of_any_size_get_length_one():
    """The references take `unit` too, so it has an oracle of its own.  (fault 35)"""
    z = torch.tensor([[3.0, 4.0], [-0.6, 0.8]], device=DEVICE)
    want = torch.tensor([[0.6, 0.8], [-0.6, 0.8]], device=DEVICE)
    for size in (1e-30, 1e-13, 1.0, 1e15, 1e25):
        torch.testing.assert_close(unit(size * z), want)
