import lightly.loss
import pytest
import torch

from fastssl.losses import BarlowTwinsLoss, MixedBarlowTwinsLoss
from fastssl.losses import barlow_twins as module
from fastssl.losses.barlow_twins import barlow_twins_reference
from tests.oracle import (
    DEVICE,
    UPSTREAM,
    as_accurate_as_eager,
    assert_no_worse,
    grads,
    largest_tensor,
)


def views(B, D, dtype=torch.float32):
    torch.manual_seed(B + D)
    z = torch.randn(B, D, device=DEVICE)
    return [(z + 0.5 * torch.randn_like(z)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("weight", [5e-3, 0.7, 0.0])
@pytest.mark.parametrize("B, D", [(3, 1), (6, 4), (4, 9)])
def test_the_papers_formula(B, D, weight):
    inputs = [z.double() for z in views(B, D)]
    ours = grads(BarlowTwinsLoss(weight), inputs)
    torch.testing.assert_close(
        ours, grads(lambda a, b: barlow_twins_reference(a, b, weight), inputs)
    )


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("B, D", [(5, 3), (33, 100), (200, 64)], ids=str)
def test_value_and_gradient_of_lightly(B, D, reduce):
    rival = lightly.loss.BarlowTwinsLoss(0.02)
    truth = grads(rival, [z.double() for z in views(B, D)], reduce)
    eager = grads(rival, views(B, D), reduce)
    ours = grads(BarlowTwinsLoss(0.02), views(B, D), reduce)
    for a, e, t in zip(ours, eager, truth, strict=True):
        as_accurate_as_eager(a, e, t)


def authors(z_a, z_b, lambd, scale=1.0):
    """facebookresearch/barlowtwins' and, with its scale, solo-learn's."""
    norm = torch.nn.BatchNorm1d(z_a.shape[1], affine=False).to(z_a)
    c = (norm(z_a).T @ norm(z_b)) / len(z_a)
    on_diagonal = (torch.diagonal(c) - 1).square().sum()
    off = c[~torch.eye(len(c), dtype=torch.bool)]
    return scale * (on_diagonal + lambd * off.square().sum())


@pytest.mark.parametrize("scale", [1.0, 0.025])
@pytest.mark.parametrize("B, D", [(5, 3), (33, 100)], ids=str)
def test_the_authors_code_and_solo_learns_scale(B, D, scale):
    inputs = [z.double() for z in views(B, D)]
    ours = grads(BarlowTwinsLoss(0.0051, scale=scale), inputs)
    torch.testing.assert_close(ours, grads(lambda a, b: authors(a, b, 0.0051, scale), inputs))


def mix_bt(z_a, z_b, z_m, perm, alpha, lambd=0.02, s=5.0):
    """The authors' seven products: unbiased deviations, correlations and what mixing makes them."""
    a, b, m = ((z - z.mean(0)) / (z.var(0) + 1e-5).sqrt() for z in (z_a, z_b, z_m))
    n = len(a)
    c = a.T @ b / n
    off = c - c.diagonal().diag()
    loss = (c.diagonal() - 1).square().sum() + lambd * off.square().sum()
    for side in (a, b):
        target = alpha * (a.T @ side) / n + (1 - alpha) * (b[perm].T @ side) / n
        loss = loss + s * lambd * (m.T @ side / n - target).square().sum()
    return loss


def mixture(B, D, dtype=torch.float32):
    a, b = views(B, D, dtype)
    perm = torch.randperm(B)
    m = 0.3 * a + 0.7 * b[perm] + 0.4 * torch.randn(B, D).to(dtype)
    return [a, b, m], perm


@pytest.mark.parametrize("B, D", [(6, 4), (33, 100), (60, 40)], ids=str)
@pytest.mark.parametrize("alpha", [0.3, 1.0, torch.tensor(0.6)], ids=str)
def test_mixed_by_the_authors_seven_products(B, D, alpha):
    loss = MixedBarlowTwinsLoss(0.02, unbiased=True)
    inputs, perm = mixture(B, D)
    ours = lambda a, b, m: loss(a, b, m, perm, alpha)  # noqa: E731
    assert_no_worse(ours, lambda a, b, m: mix_bt(a, b, m, perm, alpha), inputs)


def test_an_alpha_for_each_image():
    (a, b, m), perm = mixture(9, 20, torch.float64)
    alpha = torch.rand(9, 1, dtype=torch.float64)
    loss = MixedBarlowTwinsLoss(0.02)
    x, y, z = (torch.nn.functional.batch_norm(v, None, None, training=True) for v in (a, b, m))
    r = z - alpha * x - (1 - alpha) * y[perm]
    extra = ((r.T @ x).square().sum() + (r.T @ y).square().sum()) / 81
    want = BarlowTwinsLoss(0.02)(a, b) + 5 * 0.02 * extra
    torch.testing.assert_close(loss(a, b, m, perm, alpha), want)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"z_m": torch.zeros(4, 2)}, r"z_a and z_b and z_m must all be .* \(4, 2\)"),
        ({"perm": torch.zeros(4)}, r"perm must be \(4,\) int64, got \(4,\) torch.float32"),
        ({"perm": torch.arange(3)}, r"perm must be \(4,\) int64, got \(3,\) torch.int64"),
        ({"alpha": 1.5}, r"alpha must be within \[0, 1\], got 1.5"),
    ],
)
def test_mixed_refuses(change, words):
    given = {name: torch.zeros(4, 3) for name in ("z_a", "z_b", "z_m")}
    given |= {"perm": torch.arange(4), "alpha": 0.5}
    with pytest.raises(ValueError, match=words):
        MixedBarlowTwinsLoss()(**(given | change))


@pytest.mark.parametrize("kind", ["random", "rank-deficient", "alike"])
def test_16_bit_rows_harm_the_gradient_less_than_autocast(monkeypatch, kind):
    """What a GPU multiplies: the rows rounded to bfloat16, sums in float32."""
    monkeypatch.setattr(module, "widen", lambda z: z)
    torch.manual_seed(0)
    x = torch.randn(64, 4) @ torch.randn(4, 96) if kind == "rank-deficient" else torch.randn(64, 96)
    noise = 0.03 if kind == "alike" else 0.5
    inputs = [(x + noise * torch.randn_like(x)).bfloat16() for _ in range(2)]
    truth = grads(BarlowTwinsLoss(), [z.double() for z in inputs])
    ours = grads(BarlowTwinsLoss(), inputs)
    eager = grads(_in_autocast, [z.float() for z in inputs])

    def error(found):
        pairs = zip(found[1:], truth[1:], strict=True)
        return sum((f.double() - t).square().sum() for f, t in pairs).sqrt()

    assert error(ours) <= error(eager)
    assert abs(ours[0] - truth[0]) <= 0.5 * abs(eager[0] - truth[0])


def _in_autocast(z_a, z_b):
    with torch.autocast(DEVICE, torch.bfloat16):
        return authors(z_a, z_b, 5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_in_float32_out(dtype):
    inputs = views(33, 100, dtype)
    ours = grads(BarlowTwinsLoss(), inputs)
    truth = grads(BarlowTwinsLoss(), [z.double() for z in inputs])
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=0)
    for got, want in zip(ours[1:], truth[1:], strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=2 * eps * 1e-2)


def test_known_values():
    """Orthogonal columns: C is the identity, minus it, or a permutation."""
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], device=DEVICE)
    loss = BarlowTwinsLoss(0.25)
    for other, want in ((z, 0.0), (-z, 8.0), (z.flip(1), 2.5)):
        assert loss(z, other).item() == pytest.approx(want, abs=2e-4)


def test_laws():
    a, b = views(20, 30)
    loss, value = BarlowTwinsLoss(), BarlowTwinsLoss()(a, b)
    order = torch.randperm(20, device=DEVICE)
    torch.testing.assert_close(loss(b, a), value)
    torch.testing.assert_close(loss(a[order], b[order]), value)
    torch.testing.assert_close(loss(a + 5, 10 * b - 1), value, rtol=1e-4, atol=0)
    assert loss(a, b[order]) > value


def test_makes_no_matrix_of_features_when_the_batch_is_smaller():
    a, b = (z.requires_grad_() for z in views(16, 512))
    assert largest_tensor(lambda: BarlowTwinsLoss()(a, b).backward()) <= 2 * 16 * 512


@pytest.mark.parametrize(
    "shapes, words",
    [
        (
            ((4, 3), (4, 2)),
            r"must both be \(B, D\), none of them empty, got \(4, 3\) and \(4, 2\)",
        ),
        (((4,), (4,)), r"got \(4,\) and \(4,\)"),
        (((1, 3), (1, 3)), "the joined batch must have at least 2 images, got 1"),
    ],
)
def test_refuses_shapes(shapes, words):
    with pytest.raises(ValueError, match=words):
        BarlowTwinsLoss()(*(torch.zeros(s) for s in shapes))


def test_refuses_dtypes_and_devices_that_differ():
    z = torch.zeros(4, 3)
    for other, words in ((z.double(), "torch.float64 on cpu"), (z.to("meta"), "on meta")):
        with pytest.raises(ValueError, match=f"z_a and z_b must share dtype .*{words}"):
            BarlowTwinsLoss()(z, other)


def test_prints_its_arguments():
    assert repr(BarlowTwinsLoss()) == "BarlowTwinsLoss(lambda_param=0.005, gather_distributed=True)"
