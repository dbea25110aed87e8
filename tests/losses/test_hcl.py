import math

import pytest
import torch

from fastssl.losses import HCLLoss, NTXentLoss
from fastssl.losses.hcl import hcl_reference
from tests.covering import pairwise
from tests.losses.views import assert_as_good, views
from tests.oracle import DEVICE, UPSTREAM, grads


@pytest.mark.parametrize(
    **pairwise(
        {
            "B, D": [(2, 3), (65, 16)],
            "temperature": [0.5, 0.1],
            "tau_plus, beta": [(0, 0), (0.1, 1.0), (0.1, 0), (0, 2.5)],
            "reduce": UPSTREAM,
        }
    )
)
def test_the_authors_formula(B, D, temperature, tau_plus, beta, reduce):
    assert_as_good(
        HCLLoss(temperature, tau_plus, beta),
        lambda a, b: hcl_reference(a, b, temperature, tau_plus, beta),
        views(B, D),
        reduce,
        score=(1 + beta) / temperature,
        slack=16,  # the two log-sum-exps round apart, where eager's exponentials round once
    )


@pytest.mark.parametrize("tau_plus, beta", [(0.2, 0.5), (0.4, 0.5), (0.7, 0)])
@pytest.mark.parametrize("temperature", [0.5, 0.1])
def test_strong_correction(temperature, tau_plus, beta):
    """In float64: a small difference of large numbers is nobody's to have in float32."""
    inputs = [z.double() for z in views(65, 16)]
    ours = grads(HCLLoss(temperature, tau_plus, beta), inputs)
    want = grads(lambda a, b: hcl_reference(a, b, temperature, tau_plus, beta), inputs)
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("beta", [0, 1])
def test_the_least_negative_mass_is_kept(beta):
    """Matches so good that the correction takes more than there is: rows on either side of it."""
    z0, z1 = (z.double() for z in views(40, 16))
    z1 = z0 + 0.4 * z1
    ours = grads(HCLLoss(0.3, 0.3, beta), [z0, z1])
    torch.testing.assert_close(
        ours, grads(lambda a, b: hcl_reference(a, b, 0.3, 0.3, beta), [z0, z1])
    )
    near = grads(HCLLoss(0.1, 0.3, beta), [z0, z0 + 1e-3])
    want = math.log1p(78 * math.exp(-20))
    assert near[0].item() == pytest.approx(want, rel=1e-3)
    assert all(x.isfinite().all() for x in near)


@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_without_hardness_or_correction_it_is_simclr(temperature):
    inputs = [z.double() for z in views(33, 8)]
    ours = grads(HCLLoss(temperature, tau_plus=0, beta=0), inputs)
    torch.testing.assert_close(ours, grads(NTXentLoss(temperature), inputs))


def test_harder_negatives_cost_more():
    inputs = views(33, 8)
    losses = [HCLLoss(0.5, 0, beta)(*inputs).item() for beta in (0, 0.5, 1, 4)]
    assert losses == sorted(losses) and losses[0] < losses[-1]


def test_cosines_of_16_bits_keep_their_digits():
    z0, z1 = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = HCLLoss(temperature=0.1, tau_plus=0.1, beta=1.0)
    torch.testing.assert_close(loss(z0, z1), loss(z0.float(), z1.float()), rtol=1e-5, atol=0)


def test_known_value():
    same = torch.ones(50, 4, device=DEVICE)
    assert HCLLoss(tau_plus=0.3)(same, same).item() == pytest.approx(math.log(99), rel=1e-6)


def test_small_temperature_overflows_nothing():
    inputs = views(40, 8)
    truth = grads(HCLLoss(0.005, 0.1, 3), [z.double() for z in inputs])
    ours = grads(HCLLoss(0.005, 0.1, 3), inputs)
    assert all(x.isfinite().all() for x in ours)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=0)
    apart = torch.eye(8, device=DEVICE)  # where the correction is e^200 times what there is
    assert all(x.isfinite().all() for x in grads(HCLLoss(0.005, 0.1, 3), [apart, apart]))


def test_refuses_one_image():
    with pytest.raises(ValueError, match="joined batch must have at least 2 images, got 1"):
        HCLLoss()(torch.ones(1, 3), torch.ones(1, 3))
