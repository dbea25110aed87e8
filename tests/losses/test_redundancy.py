import lightly.loss
import pytest
import torch

from fastssl.losses import BarlowTwinsLoss
from tests.oracle import DEVICE, UPSTREAM, as_accurate_as_eager, grads, largest_tensor


def views(B, D, dtype=torch.float32):
    torch.manual_seed(B + D)
    z = torch.randn(B, D, device=DEVICE)
    return [(z + 0.5 * torch.randn_like(z)).to(dtype) for _ in range(2)]


def barlow(z_a, z_b, weight):
    """Zbontar et al., algorithm 1, with the batch norm it stands for: C entry by entry."""
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z_a, z_b))
    total = z_a.new_zeros(())
    for i in range(z_a.shape[1]):
        for j in range(z_a.shape[1]):
            c = (a[:, i] * b[:, j]).mean()
            total = total + ((1 - c) ** 2 if i == j else weight * c**2)
    return total


@pytest.mark.parametrize("weight", [5e-3, 0.7, 0.0])
@pytest.mark.parametrize("B, D", [(3, 1), (6, 4), (4, 9)])
def test_the_papers_formula(B, D, weight):
    inputs = [z.double() for z in views(B, D)]
    ours = grads(BarlowTwinsLoss(weight), inputs)
    torch.testing.assert_close(ours, grads(lambda a, b: barlow(a, b, weight), inputs))


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("B, D", [(5, 3), (33, 100), (200, 64)], ids=str)
def test_value_and_gradient_of_lightly(B, D, reduce):
    rival = lightly.loss.BarlowTwinsLoss(0.02)
    truth = grads(rival, [z.double() for z in views(B, D)], reduce)
    eager = grads(rival, views(B, D), reduce)
    ours = grads(BarlowTwinsLoss(0.02), views(B, D), reduce)
    for a, e, t in zip(ours, eager, truth, strict=True):
        as_accurate_as_eager(a, e, t)


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
    assert largest_tensor(lambda: BarlowTwinsLoss()(a, b).backward()) == 16 * 512


@pytest.mark.parametrize("weight", [-0.1, float("nan")])
def test_refuses_lambda(weight):
    with pytest.raises(ValueError, match=f"lambda_param must be >= 0, got {weight}"):
        BarlowTwinsLoss(weight)


@pytest.mark.parametrize(
    "shapes, words",
    [
        (((4, 3), (4, 2)), r"z_a and z_b must both be \(B, D\), got \(4, 3\) and \(4, 2\)"),
        (((4,), (4,)), r"got \(4,\) and \(4,\)"),
        (((1, 3), (1, 3)), "the joined batch must have at least 2 rows, got 1"),
    ],
)
def test_refuses_shapes(shapes, words):
    with pytest.raises(ValueError, match=words):
        BarlowTwinsLoss()(*(torch.zeros(s) for s in shapes))


def test_prints_its_arguments():
    assert repr(BarlowTwinsLoss()) == "BarlowTwinsLoss(lambda_param=0.005, gather_distributed=True)"
