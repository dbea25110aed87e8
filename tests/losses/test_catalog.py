"""Losses that stand in for lightly's and solo-learn's, beside their formulas."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastssl.kernels.common.chunks import CHUNK_BYTES
from fastssl.losses import (
    CO2Regularizer,
    DeepClusterV2Loss,
    DetConBLoss,
    DetConSLoss,
    DirectCLRLoss,
    EMPSSLLoss,
    FroSSLLoss,
    HypersphereLoss,
    MACLLoss,
    ReSSLLoss,
    SymNegCosineSimilarityLoss,
    VIbCRegLoss,
    Whitening2d,
    WMSELoss,
    _ahead,
    co2,
    ressl,
)
from fastssl.losses.co2 import co2_reference
from fastssl.losses.deepcluster import deepcluster_v2_reference
from fastssl.losses.detcon import detcon_reference
from fastssl.losses.emp_ssl import emp_ssl_reference
from fastssl.losses.frossl import frossl_reference
from fastssl.losses.hypersphere import hypersphere_reference
from fastssl.losses.macl import macl_reference
from fastssl.losses.ntxent import ntxent_reference
from fastssl.losses.ressl import ressl_reference
from fastssl.losses.vibcreg import vibcreg_reference
from fastssl.losses.wmse import norm_mse_loss, whitening_reference
from tests.oracle import DEVICE, assert_no_worse, largest_tensor

B, M, WIDE, NARROW = 8, 3, 40, 5  # more features than images on two ranks, and fewer
MASKS = [torch.arange(B * M).view(B, M) * 7 % k % 4 - 10**12 for k in (5, 3)]
CLUSTERS = torch.tensor([[0, 2, -1, 3, -1, -1, 1, 4], [-1, 1, 1, 0, 4, 2, 3, 3]])


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def views(n, *shape, dtype=torch.float32):
    return [draw(*shape, seed=i, dtype=dtype) for i in range(n)]


KEYS = draw(9, 6)


def masks(x):
    return [m[: len(x)].to(x.device) for m in MASKS]


def banked(loss, reference):
    """With a bank of its own each time, which the reference is given."""

    def ours(*z):
        made = loss()
        made.memory_bank.fit(z[1])
        return made(*z)

    def formula(*z):
        made = loss()
        made.memory_bank.fit(z[1])
        return reference(*z, keys=made.memory_bank.keys.to(z[0]))

    return ours, formula


def regions(*z):
    return z[:2], z[2:], masks(z[0])


def wmse_reference(z):
    """Of three views, a sub-batch each."""
    a, b, c = (whitening_reference(x) for x in z.chunk(3))
    return (norm_mse_loss(a, b) + norm_mse_loss(a, c) + norm_mse_loss(b, c)) / 3


def cosine_reference(z0, p0, z1, p1):
    """Of which the projections have a gradient of zeros."""
    pairs = (p0, z1.detach()), (p1, z0.detach())
    cosines = [F.cosine_similarity(p, z, -1).mean() for p, z in pairs]
    return 0 * (z0 + z1).sum() - sum(cosines) / 2


CASES = {  # name: (ours, the formula, the views)
    "detcon b": (
        lambda *z: DetConBLoss(0.3)(*z, *masks(z[0])),
        lambda *z: detcon_reference(*regions(*z), 0.3),
        (4, B, M, 6),
    ),
    "detcon s": (
        lambda *z: DetConSLoss(0.3)(*z, *masks(z[0])),
        lambda *z: detcon_reference(z, z, masks(z[0]), 0.3),
        (2, B, M, 6),
    ),
    "directclr": (
        lambda *z: DirectCLRLoss(6, 0.3)(*(x.unflatten(1, (2, -1)) for x in z)),
        lambda *z: ntxent_reference(*(x[:, :6] for x in z), 0.3),
        (2, B, 8),
    ),
    **{
        f"emp-ssl {D}": (
            lambda *z: EMPSSLLoss(0.3, 5.0)(z),
            lambda *z: emp_ssl_reference(z, 0.3, 5.0),
            (3, B, D),
        )
        for D in (NARROW, WIDE)
    },
    **{
        f"frossl {D}": (
            lambda *z: FroSSLLoss(0.7)(z),
            lambda *z: frossl_reference(z, 0.7),
            (3, B, D),
        )
        for D in (NARROW, 80)  # by rows, also where `has_few_features` counts no fewer than 64
    },
    **{
        f"hypersphere {t} {alpha}": (
            HypersphereLoss(t, 0.7, alpha),
            partial(hypersphere_reference, t=t, lam=0.7, alpha=alpha),
            (2, B, 6),
        )
        for t, alpha in ((2.0, 2.0), (15.0, 0.5), (1.0, 3.0))
    },
    "macl": (MACLLoss(0.3, 0.6, 0.1), partial(macl_reference, temperature=0.3, alpha=0.6, A_0=0.1)),
    "co2": (CO2Regularizer(0.7, 0.2), partial(co2_reference, alpha=0.7, t=0.2)),
    "co2 bank": banked(
        lambda: CO2Regularizer(0.7, 0.2, 9), partial(co2_reference, alpha=0.7, t=0.2)
    ),
    "ressl": (
        lambda q: ReSSLLoss(0.3, student_temperature=0.2)(q, 2 * q.flip(0), KEYS.to(q)),
        lambda q: ressl_reference(q, 2 * q.flip(0), KEYS.to(q), 0.3, 0.2),
        (1, B, 6),
    ),
    "deepcluster": (
        lambda z: DeepClusterV2Loss(0.3)(z, CLUSTERS[:, : z.shape[2]].to(z.device)),
        lambda z: deepcluster_v2_reference(z, CLUSTERS[:, : z.shape[2]].to(z.device), 0.3),
        (1, 2, 3, B, 5),
    ),
    **{
        f"vibcreg {D}": (
            VIbCRegLoss(3.0, 5.0, 7.0),
            partial(vibcreg_reference, sim=3.0, var=5.0, cov=7.0),
            (2, B, D),
        )
        for D in (NARROW, 80)
    },
    "whitening": (
        Whitening2d(3, eps=0.1, track_running_stats=False),
        partial(whitening_reference, eps=0.1),
        (1, B, 3),
    ),
    "wmse": (
        WMSELoss(3, w_size=B, num_samples=3),
        wmse_reference,
        (1, 3 * B, 3),
    ),
    "cosine": (
        lambda *z: SymNegCosineSimilarityLoss()(z[:2], z[2:]) + 0 * (z[0] + z[2]).sum(),
        cosine_reference,
        (4, B, 6),
    ),
}


def case(name):
    ours, formula, *shape = CASES[name]
    kind = ours.to(DEVICE) if isinstance(ours, torch.nn.Module) else ours
    n, *each = shape[0] if shape else (2, B, 6)
    return kind, formula, (n, *each)


def step(loss, inputs):
    leaves = [z.clone().requires_grad_() for z in inputs]
    value = loss(*leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return value.detach(), grads


@pytest.mark.parametrize("way", ("as it comes", "as across ranks", "in tiles"))
@pytest.mark.parametrize("name", CASES)
def test_has_the_formula(name, way, monkeypatch):
    ours, formula, shape = case(name)
    if way == "as across ranks":
        monkeypatch.setattr(_ahead, "fits", lambda *_, **options: False)
    if way == "in tiles":
        monkeypatch.setitem(CHUNK_BYTES, "cpu", 128)
        monkeypatch.setattr(co2, "_ROWS", 3)
        monkeypatch.setattr(ressl, "_ROWS", 3)
    inputs = views(*shape)
    assert_no_worse(ours, formula, inputs, slack=8.0)


@pytest.mark.parametrize("name", [name for name in CASES if case(name)[2][0] > 1])
def test_a_gradient_may_be_asked_of_the_first_views_alone(name):
    ours, _, shape = case(name)
    whole, half = views(*shape), shape[0] // 2
    _, want = step(ours, whole)
    some = [z.clone().requires_grad_(i < half) for i, z in enumerate(whole)]
    (2 * ours(*some)).backward()
    for z, g in zip(some[:half], want, strict=False):
        if z.requires_grad:
            torch.testing.assert_close(z.grad, 2 * g)
    with torch.no_grad():
        torch.testing.assert_close(ours(*whole), ours(*some).detach())


@pytest.mark.parametrize("name", CASES)
def test_16_bits_are_summed_in_32(name):
    ours, formula, shape = case(name)
    inputs = [z.bfloat16() for z in views(*shape)]
    want = formula(*(z.double() for z in inputs))
    got = ours(*inputs)
    assert got.dtype == (torch.bfloat16 if name in ("cosine", "whitening") else torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


def test_views_that_coincide_have_no_slope():
    for alpha, apart in ((0.5, True), (0.5, False), (1.0, True)):
        z = draw(B, 6, dtype=torch.float64).requires_grad_()
        other = z.detach().clone().requires_grad_()
        loss = HypersphereLoss(lam=0.0, alpha=alpha)
        with pytest.MonkeyPatch.context() as patch:
            if apart:
                patch.setattr(_ahead, "fits", lambda *_, **options: False)
            value = loss(z, other)
        value.backward()
        assert value.item() == 0 and not z.grad.any() and not other.grad.any()
    z = torch.eye(4, device=DEVICE)  # of which every Gaussian is nothing in float32
    torch.testing.assert_close(HypersphereLoss(200.0)(z, z).item(), -400.0)


def test_rows_of_zeros_are_apart_from_the_others_alone():
    a, b = views(2, B, 6)
    a[[1, 4, 5]] = 0
    want = hypersphere_reference(a.double(), b.double(), 2.0, 0.7, 2.0)
    torch.testing.assert_close(HypersphereLoss(2.0, 0.7)(a, b).double(), want)


@pytest.mark.parametrize("way", ("as it comes", "as across ranks"))
def test_a_column_of_zeros_changes_no_other(way, monkeypatch):
    if way == "as across ranks":
        monkeypatch.setattr(_ahead, "fits", lambda *_, **options: False)
    for loss in (lambda *z: FroSSLLoss()(z), VIbCRegLoss()):
        z = views(2, B, 6)
        for x in z:
            x[:, 2] = 0
        value, grads = step(loss, z)
        want, wanted = step(loss, [x[:, [0, 1, 3, 4, 5]] for x in z])
        assert value.isfinite() and all(g.isfinite().all() for g in grads)
        if isinstance(loss, VIbCRegLoss):  # whose means are over all columns
            continue
        torch.testing.assert_close(value, want)
        torch.testing.assert_close([g[:, [0, 1, 3, 4, 5]] for g in grads], list(wanted))


def test_no_pairs_are_held():
    for loss, n in ((DetConSLoss(), 1500), (MACLLoss(), 1500), (HypersphereLoss(), 1500)):
        shape = (n // 2, 2, 4) if isinstance(loss, DetConSLoss) else (n, 4)
        z = [x.requires_grad_() for x in views(2, *shape)]
        ids = [torch.arange(n, device=DEVICE).view(-1, 2)] * 2 * isinstance(loss, DetConSLoss)
        assert largest_tensor(lambda: loss(*z, *ids).backward()) < n * n  # noqa: B023
    q = draw(1000, 4).requires_grad_()
    queue = draw(9000, 4)
    assert largest_tensor(lambda: ReSSLLoss()(q, q, queue).backward()) < 1000 * 9000 / 2
    z = [x.requires_grad_() for x in views(2, 60, 900)]
    for loss in (FroSSLLoss(), EMPSSLLoss()):
        assert largest_tensor(lambda: loss(z).backward()) < 900 * 900  # noqa: B023


def test_a_low_coding_rate_costs():
    spread, single = torch.eye(4), torch.eye(4)[:1].expand(4, 4)
    assert EMPSSLLoss()([spread, spread]) < EMPSSLLoss()([single, single])


def test_the_bank_of_co2_moves_in_training_alone():
    loss = CO2Regularizer(memory_bank_size=9).to(DEVICE)
    x, y = views(2, B, 6)
    loss(x, y)
    before = loss.memory_bank.keys
    loss(x.requires_grad_(), y).backward()
    assert x.grad.any() and torch.equal(loss.memory_bank.keys[8:], before[8:])
    torch.testing.assert_close(loss.memory_bank.keys[:8], F.normalize(y))
    again = CO2Regularizer()
    assert not any(again.load_state_dict(loss.state_dict()))


def test_sub_batches_are_those_of_the_draw_and_in_order():
    """Of 4 sub-batches and a loss that asks for each row's place."""
    places = torch.arange(1.0, 17, device=DEVICE)[:, None]
    loss = WMSELoss(2, w_size=4, w_iter=2, loss_fn=lambda a, b: (a * b * places).sum()).to(DEVICE)
    z = draw(32, 2)
    torch.manual_seed(0)
    got = loss(z)
    torch.manual_seed(0)
    total, mean, covariance = 0, torch.zeros(2, device=DEVICE), torch.eye(2, device=DEVICE)
    for _ in range(2):
        whitened = torch.empty(2, 16, 2, device=DEVICE)
        for part in torch.randperm(16).view(4, 4):
            for v in (0, 1):
                rows = z.view(2, 16, 2)[v, part]
                whitened[v, part] = whitening_reference(rows)
                mean = 0.99 * mean + 0.01 * rows.mean(0)
                covariance = 0.99 * covariance + 0.01 * rows.T.cov()
        total = total + (whitened[0] * whitened[1] * places).sum()
    torch.testing.assert_close(got, total / 2)
    torch.testing.assert_close(loss.whitening.running_mean.flatten(), mean)
    torch.testing.assert_close(loss.whitening.running_variance, covariance)


def test_running_statistics_whiten_in_an_evaluation():
    layer, z = Whitening2d(3, momentum=1.0).to(DEVICE), draw(9, 3)
    y = layer(z)
    torch.testing.assert_close(layer.eval()(z), y)
    torch.testing.assert_close(layer(z[:1]), y[:1])
    without = Whitening2d(3, track_running_stats=False).to(DEVICE).eval()
    torch.testing.assert_close(without(z), y)


def test_a_covariance_without_a_factor_is_nan():
    for broken in (torch.ones(9, 3), draw(3, 3).cpu()):
        assert Whitening2d(3)(broken).isnan().all()
        assert EMPSSLLoss()([broken * torch.nan]).isnan()


COMPILED = ["emp-ssl 5", "co2", "ressl", "whitening"]  # those with a function of their own


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name):
    ours, _, shape = case(name)
    torch._dynamo.reset()
    inputs = [z.requires_grad_() for z in views(*shape)]
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (compiled, ours))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


Z, IDS = torch.zeros(4, 6), torch.zeros(4, 2, dtype=torch.int64)
R = torch.zeros(4, 2, 6)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: DetConSLoss()(R, R[:3], IDS, IDS), r"view0 and view1 must both be \(B, M, D\)"),
        (lambda: DetConBLoss()(R, R, R, R.double(), IDS, IDS), "target_view1 must share dtype"),
        (lambda: DetConSLoss()(R, R, IDS, IDS[:, :1]), r"mask_view1 must be \(4, 2\) integers"),
        (lambda: DetConSLoss()(R, R, IDS.float(), IDS), r"mask_view0 must be \(4, 2\) integers"),
        (lambda: DirectCLRLoss(0), "loss_dim must be at least 1"),
        (lambda: EMPSSLLoss()([]), "z_views must be at least 1, got 0"),
        (lambda: EMPSSLLoss()([Z, Z[:3]]), r"z_views\[1\] must both be \(B, D\)"),
        (lambda: FroSSLLoss()([Z]), "z_views must be at least 2, got 1"),
        (lambda: FroSSLLoss()([Z, Z.long()]), r"z_views\[0\] and z_views\[1\] must be floating"),
        (lambda: HypersphereLoss()(Z[:1], Z[:1]), "at least 2 images, got 1"),
        (lambda: HypersphereLoss(strategy="tree"), "strategy must be one of gather, ring"),
        (lambda: MACLLoss()(Z, Z[:, :2]), r"z0 and z1 must both be \(B, D\)"),
        (lambda: CO2Regularizer(t_consistency=0), "t_consistency must be > 0 and finite, got 0"),
        (lambda: CO2Regularizer(alpha=float("nan")), "alpha must be finite, got nan"),
        (lambda: CO2Regularizer(memory_bank_size=(1, 2, 3)), r"keys or \(keys, D\), got \(1, 2"),
        (lambda: CO2Regularizer()(Z, Z[:3]), r"out0 and out1 must both be \(B, D\)"),
        (lambda: ReSSLLoss()(Z, Z, Z[:, :5]), r"queue must be \(K, 6\) floats on cpu, got \(4, 5"),
        (lambda: ReSSLLoss()(Z, Z, Z[:0]), r"queue must be \(K, 6\) floats on cpu, got \(0, 6"),
        (lambda: ReSSLLoss()(Z, Z[:2], Z), r"q and k must both be \(B, D\)"),
        (lambda: DeepClusterV2Loss()(Z[None, None], IDS[:1, :1]), r"assignments must be \(1, 4\)"),
        (
            lambda: DeepClusterV2Loss()(Z[None, None], torch.tensor([[0, 1, 6, 2]])),
            r"assignments must lie in \[-1, 5\], got 0..6",
        ),
        (lambda: DeepClusterV2Loss()(Z, IDS), r"outputs must be \(H, V, B, K\)"),
        (lambda: VIbCRegLoss()(Z[:1], Z[:1]), "at least 2 images, got 1"),
        (lambda: Whitening2d(0), "num_features must be at least 1"),
        (lambda: Whitening2d(3, momentum=2), r"momentum must lie in \[0, 1\], got 2"),
        (lambda: Whitening2d(3)(Z), r"x must be \(N, 3\) and floating-point, got \(4, 6\)"),
        (lambda: Whitening2d(6)(Z[:1]), "x must have at least 2 rows, got 1"),
        (lambda: WMSELoss(3, w_size=5), "w_size must be at least 6 and an integer, got 5"),
        (lambda: WMSELoss(3, num_samples=1), "num_samples must be at least 2"),
        (lambda: WMSELoss(2, w_size=4)(Z[:, :3]), r"input must be \(N, 2\) and floating-point"),
        (lambda: WMSELoss(2, w_size=4)(Z[:, :2]), "multiple of num_samples x w_size, 2 x 4"),
        (lambda: SymNegCosineSimilarityLoss()((Z, Z), (Z,)), r"out1 must be a pair \(z, p\), got"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
