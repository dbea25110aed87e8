import math

import lightly.loss
import pytest
import torch

from fastssl.losses import NTXentLoss
from tests.oracle import DEVICE, UPSTREAM, as_accurate_as_eager, grads


def views(B, D, dtype=torch.float32):
    torch.manual_seed(B)
    z = torch.randn(B, D, device=DEVICE)
    return [(z + 0.5 * torch.randn_like(z)).to(dtype) for _ in range(2)]


def simclr(z0, z1, temperature):
    """Chen et al., eq. 1, term by term."""
    z = torch.cat([z0, z1])
    z = z / z.norm(dim=1, keepdim=True)
    B, terms = len(z0), []
    for i in range(2 * B):
        s = torch.stack([z[i] @ z[j] / temperature for j in range(2 * B)])
        others = [j for j in range(2 * B) if j != i]
        terms.append(s[others].exp().sum().log() - s[(i + B) % (2 * B)])
    return torch.stack(terms).mean()


@pytest.mark.parametrize("temperature", [0.5, 0.07])
@pytest.mark.parametrize("B, D", [(1, 3), (7, 5), (33, 16)])
def test_the_papers_formula(B, D, temperature):
    inputs = [z.double() for z in views(B, D)]
    ours = grads(NTXentLoss(temperature), inputs)
    want = grads(lambda a, b: simclr(a, b, temperature), inputs)
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("temperature", [0.5, 0.1, 0.02])
@pytest.mark.parametrize("B, D", [(2, 3), (65, 16), (400, 32)])
def test_value_and_gradient_of_lightly(B, D, temperature, reduce):
    rival = lightly.loss.NTXentLoss(temperature)
    truth = grads(rival, [z.double() for z in views(B, D)], reduce)
    eager = grads(rival, views(B, D), reduce)
    ours = grads(NTXentLoss(temperature), views(B, D), reduce)
    for a, e, t in zip(ours, eager, truth, strict=True):
        as_accurate_as_eager(a, e, t)


def test_a_negative_temperature_is_lightlys_too():
    ours = grads(NTXentLoss(-0.5), [z.double() for z in views(9, 4)])
    theirs = grads(lightly.loss.NTXentLoss(-0.5), [z.double() for z in views(9, 4)])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_in_float32_out(dtype):
    inputs = views(65, 16, dtype)
    ours = grads(NTXentLoss(0.1), inputs)
    truth = grads(NTXentLoss(0.1), [z.double() for z in inputs])
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=1e-6)
    for got, want in zip(ours[1:], truth[1:], strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=2 * eps * 1e-2)


def test_known_values():
    same = torch.ones(50, 4, device=DEVICE)
    assert math.isclose(NTXentLoss()(same, same).item(), math.log(99), rel_tol=1e-6)
    one = torch.randn(1, 4, device=DEVICE)
    assert NTXentLoss()(one, one + 1).item() == pytest.approx(0.0, abs=1e-6)


def test_laws():
    a, b = views(40, 8)
    loss, value = NTXentLoss(0.2), NTXentLoss(0.2)(a, b)
    order = torch.randperm(40, device=DEVICE)
    torch.testing.assert_close(loss(b, a), value)
    torch.testing.assert_close(loss(a[order], b[order]), value)
    torch.testing.assert_close(loss(3 * a, 0.1 * b), value)
    assert loss(a, b[order]) > value > 0


def test_zero_embedding_gives_a_finite_loss_and_nan_a_nan():
    a, b = views(5, 4)
    a[2] = 0
    assert all(x.isfinite().all() for x in grads(NTXentLoss(), [a, b]))
    a[2] = torch.nan
    assert NTXentLoss()(a, b).isnan()


def test_autocast_does_not_reach_inside():
    plain = grads(NTXentLoss(0.1), views(33, 16))
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = grads(NTXentLoss(0.1), views(33, 16))
    torch.testing.assert_close(inside, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [0, 1e-9, -1e-9, float("nan")])
def test_refuses_temperature(temperature):
    with pytest.raises(ValueError, match=f"at least 1e-8 in magnitude, got {temperature}"):
        NTXentLoss(temperature)


@pytest.mark.parametrize(
    "shapes", [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((4,), (4,)), ((0, 3), (0, 3))]
)
def test_refuses_shapes(shapes):
    with pytest.raises(ValueError, match="z0 and z1 must both be .*, got "):
        NTXentLoss()(*(torch.zeros(s) for s in shapes))


def test_prints_its_arguments():
    assert repr(NTXentLoss(0.1)) == "NTXentLoss(temperature=0.1, gather_distributed=True)"
