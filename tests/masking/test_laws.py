"""What every generator promises: exact counts, order, and a mask that is the seed's alone."""

import pytest
import torch

from fastssl.masking import random_masking
from tests.oracle import DEVICE

from .generators import MASKINGS, PLACES, SIZES, shown


def seeds(n, start=0, device=DEVICE):
    return torch.arange(start, start + n, device=device)


FEW = {"grid": 8, "time and frequency": 35}  # so few are the masks of these settings


@pytest.mark.parametrize("name", MASKINGS)
def test_counts_order_and_inverse(name):
    L, keep = SIZES[name]
    mask = MASKINGS[name](seeds(64))
    assert [tuple(x.shape) for x in mask] == [(64, keep), (64, L - keep), (64, L)]
    assert {x.dtype for x in mask} == {torch.int64}
    order = torch.cat([mask.visible, mask.masked], 1)
    places = torch.arange(L, device=DEVICE).expand(64, L)
    assert torch.equal(order.sort(1).values, places)
    assert torch.equal(order.gather(1, mask.restore), places)
    assert (mask.visible.diff(dim=1) > 0).all() and (mask.masked.diff(dim=1) > 0).all()
    assert len({tuple(v) for v in mask.visible.tolist()}) >= FEW.get(name, 55)


@pytest.mark.parametrize("name", PLACES)
def test_places_are_ascending_and_in_range(name):
    make, L, shape = PLACES[name]
    ids = make(seeds(64))
    assert ids.shape == (64, *shape) and ids.dtype == torch.int64
    assert (ids.diff(dim=-1) > 0).all() and ids.min() >= 0 and ids.max() < L


ALL = {**MASKINGS, **{name: made[0] for name, made in PLACES.items()}}


def parts(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_sample_keeps_its_mask_in_any_company(make):
    whole = parts(make(seeds(10)))
    split = [parts(make(s)) for s in (seeds(3), seeds(1, 3), seeds(6, 4))]
    for a, pieces in zip(whole, zip(*split, strict=True), strict=True):
        assert torch.equal(a, torch.cat(pieces))
    state = torch.get_rng_state()
    torch.manual_seed(5)
    again = parts(make(seeds(10).flip(0)))
    assert all(torch.equal(a.flip(0), b) for a, b in zip(whole, again, strict=True))
    torch.set_rng_state(state)


FOR_EVER = {  # a run resumed on another machine or version must hide the same places
    "random": 207831,
    "column": 479567,
    "weighted": 150836,
    "grid": 604370,
    "units": 394427,
    "block": 839464,
    "block, most hidden": 707119,
    "tube": 384640,
    "dual": 384640,
    "span": 744324,
    "time and frequency": 542187,
    "noise, low": 171820,
    "noise, high": 468969,
    "noise, band": 852916,
    "noise, stop": 350150,
    "connected": 392812,
    "connected, clip": 495742,
    "I-JEPA context": 118091,
    "I-JEPA targets": 145296,
    "running cell": 528141,
    "dual, decoded": 704794,
}


@pytest.mark.parametrize("name", ALL)
def test_known_masks(name):
    ids = parts(ALL[name](seeds(16, -8)))[0].flatten()
    weight = torch.arange(1, len(ids) + 1, device=DEVICE)
    assert int((ids * weight * weight).sum() % 1_000_003) == FOR_EVER[name]


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_neighboring_seeds_and_far_ones(make):
    far = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63)], device=DEVICE)
    first = parts(make(far))[0]
    assert len({str(row) for row in first.tolist()}) > 1
    assert parts(make(far[:0]))[0].shape == (0, *first.shape[1:])


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_device_without_values_gives_the_shapes(make):
    """Nothing looks at a value: no wait for the device, and a plan can be made on meta tensors."""
    wanted = parts(make(seeds(3)))
    for x, y in zip(parts(make(seeds(3, device="meta"))), wanted, strict=True):
        assert x.device.type == "meta" and x.shape == y.shape and x.dtype == y.dtype


# Their code is compiled with another's.
ALIKE = {"block", "dual", "tube", "I-JEPA targets", "connected, clip"}
ALIKE |= {"noise, low", "noise, high", "noise, stop"}


@pytest.mark.parametrize("name", sorted(ALL.keys() - ALIKE))
def test_compiles_in_one_graph(name):
    make = ALL[name]
    torch.compiler.reset()
    compiled = torch.compile(make, fullgraph=True, backend="eager")
    for x, y in zip(parts(compiled(seeds(5))), parts(make(seeds(5))), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_seeds_of_another_kind_are_refused(make):
    for wrong in (torch.zeros(2), torch.zeros(1, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"seeds must be \(B,\) int64, got"):
            make(wrong)


EVEN = ["grid", "units", "tube", "span", "noise, low", "noise, high", "noise, band", "noise, stop"]


@pytest.mark.parametrize("name", EVEN)
def test_places_are_equally_likely(name):
    n, (L, keep) = 3000, SIZES[name]
    rate = shown(MASKINGS[name](seeds(n))).double().mean(0)
    p = keep / L
    assert ((rate - p).abs() < 4.5 * (p * (1 - p) / n) ** 0.5).all()


def test_generators_do_not_echo_one_another():
    """Two generators of one seed are as independent as two seeds."""
    a = shown(random_masking(seeds(4000), 48, 24)).double() - 0.5
    for name in ("weighted", "noise, low", "noise, stop", "connected", "block"):
        b = shown(MASKINGS[name](seeds(4000))).double()
        b = b - b.mean(0)
        assert ((a * b).mean(0).abs() < 4.5 * 0.25 / 4000**0.5).all(), name
