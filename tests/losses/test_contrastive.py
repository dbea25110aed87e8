"""What every contrastive loss keeps, whatever its formula."""

import pytest
import torch

import fastssl.losses.dense
from fastssl.kernels.common.chunks import CHUNK_BYTES
from fastssl.losses import (
    DCLLoss,
    DCLWLoss,
    DenseInfoNCELoss,
    GroupedNTXentLoss,
    HCLLoss,
    ISogCLRLoss,
    MatryoshkaLoss,
    MoCoLoss,
    MoCoV3Loss,
    NTXentLoss,
    SupConLoss,
)
from tests.losses.views import views
from tests.oracle import DEVICE, grads, largest_tensor, saved_elements


def pair(loss):
    return loss


def stacked(loss):
    return lambda z0, z1, *ids: loss(torch.stack([z0, z1], 1), *ids)


def positions(loss):
    """Two images of B // 2 positions each."""

    def call(z0, z1):
        z0, z1 = (z[: len(z) // 2 * 2].unflatten(0, (2, -1)) for z in (z0, z1))
        return loss(z0, z1)

    return call


def detached(loss):
    """The key too gets a gradient, of another term, so that all cases are asked alike."""
    return lambda z0, z1: loss(z0, z1) + loss(z1, z0)


CASES = {  # name: (a new loss at a temperature, for D features; how it takes two views; its ids)
    "ntxent": (lambda t, D: NTXentLoss(t), pair, 0),
    "ntxent bank": (lambda t, D: NTXentLoss(t, (50, D)).to(DEVICE), pair, 0),
    "dcl": (lambda t, D: DCLLoss(t), pair, 0),
    "dclw": (lambda t, D: DCLWLoss(t), pair, 0),
    "supcon": (lambda t, D: SupConLoss(t), stacked, 0),
    "supcon labels": (lambda t, D: SupConLoss(t), stacked, 7),
    "moco": (lambda t, D: MoCoLoss(D, t, 50).to(DEVICE).eval(), detached, 0),
    "moco v3": (lambda t, D: MoCoV3Loss(t), detached, 0),
    "hcl": (lambda t, D: HCLLoss(t), pair, 0),
    "isogclr": (lambda t, D: ISogCLRLoss(4000, t, (0.005, 1)).to(DEVICE), pair, 4000),
    "grouped same": (lambda t, D: GroupedNTXentLoss(t), pair, 3),
    "grouped different": (lambda t, D: GroupedNTXentLoss(t, "different"), pair, 3),
    "dense image": (lambda t, D: DenseInfoNCELoss(t), positions, 0),
    "dense batch": (lambda t, D: DenseInfoNCELoss(t, "batch"), positions, 0),
    "matryoshka": (lambda t, D: MatryoshkaLoss(NTXentLoss(t), (D // 2, D)), pair, 0),
}
EVERY = pytest.mark.parametrize("name", CASES)
ORDERED = {"dense image", "dense batch"}  # of positions, not of a batch
PLAIN = [name for name in CASES if name not in ORDERED and not name.startswith("supcon")]


def subject(name, B, D, temperature=0.1):
    """A function of two views (B, D): the loss with its ids, its state new at each call."""
    make, take, kinds = CASES[name]
    ids = (torch.arange(B, device=DEVICE) % kinds,) if kinds else ()
    return lambda z0, z1: take(make(temperature, D))(z0, z1, *ids)


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_in_float32_out(name, dtype):
    inputs, loss = views(64, 16, dtype), subject(name, 64, 16)
    ours, truth = grads(loss, inputs), grads(loss, [z.double() for z in inputs])
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    eps = torch.finfo(dtype).eps  # rows of length one are rounded: logits by eps / 0.1 at the most
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=0, atol=eps / 4)
    for got, want in zip(ours[1:], truth[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=eps * 5e-2)


@EVERY
def test_float64_stays(name):
    assert {x.dtype for x in grads(subject(name, 8, 4), [z.double() for z in views(8, 4)])} == {
        torch.float64
    }


@EVERY
def test_autocast_does_not_reach_inside(name):
    inputs, loss = views(32, 16), subject(name, 32, 16)
    plain = grads(loss, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = grads(loss, inputs)
    torch.testing.assert_close(inside, plain, rtol=1e-6, atol=1e-7)


@EVERY
def test_a_zero_embedding_is_finite_and_a_nan_is_not_hidden(name):
    a, b = views(6, 4)
    a[2] = 0
    assert all(x.isfinite().all() for x in grads(subject(name, 6, 4), [a, b]))
    a[2] = torch.nan
    assert subject(name, 6, 4)(a, b).isnan()


@EVERY
@pytest.mark.parametrize("temperature", [0.01, 0.005])
def test_a_small_temperature_overflows_nothing(name, temperature):
    for a, b in (views(32, 8), [views(32, 8)[0]] * 2, [views(32, 8)[0], -views(32, 8)[0]]):
        assert all(x.isfinite().all() for x in grads(subject(name, 32, 8, temperature), [a, b]))


@EVERY
def test_nothing_of_all_pairs_is_made_or_kept(name, monkeypatch):
    monkeypatch.setattr(fastssl.losses.dense, "SCORES", 1)
    monkeypatch.setitem(CHUNK_BYTES, torch.device(DEVICE).type, 1 << 14)
    B, D = 600, 2
    loss = subject(name, B, D)
    a, b = (z.requires_grad_() for z in views(B, D))
    pairs = (B // 2) ** 2 * 4 if name != "dense image" else 4 * (B // 2) ** 2
    assert largest_tensor(lambda: loss(a, b).backward()) < pairs / 2
    assert saved_elements(lambda: loss(a, b)) < pairs / 8


@pytest.mark.parametrize("name", [n for n in CASES if n not in ORDERED])
def test_the_order_of_the_batch_is_nothing(name):
    make, take, kinds = CASES[name]
    a, b = views(30, 8)
    ids = torch.arange(30, device=DEVICE) % max(kinds, 1)
    order = torch.randperm(30, device=DEVICE)
    values = []
    for pick in (slice(None), order):
        given = (ids[pick],) if kinds else ()
        values.append(take(make(0.2, 8))(a[pick], b[pick], *given))
    torch.testing.assert_close(*values)


# Compiled with another case: the plain losses with those that hold them or have labels besides.
HELD = {"ntxent", "dcl", "supcon", "grouped same", "dense image"}


@pytest.mark.parametrize("name", sorted(CASES.keys() - HELD - {"isogclr"}))
def test_compiles_whole(name):
    make, take, kinds = CASES[name]
    ids = (torch.arange(8, device=DEVICE) % kinds,) if kinds else ()
    given, (a, b) = make(0.2, 4), views(8, 4)
    loss = take(given)
    torch.compiler.reset()
    compiled = torch.compile(lambda a, b: loss(a, b, *ids), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(a, b), loss(a, b, *ids))


@EVERY
def test_only_directions_count(name):
    a, b = views(30, 8)
    loss = subject(name, 30, 8)
    torch.testing.assert_close(loss(3 * a, 0.1 * b), loss(a, b))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    "shapes", [((4, 8), (4, 6)), ((4, 8), (5, 8)), ((8,), (8,)), ((0, 8), (0, 8)), ((4, 0),) * 2]
)
def test_refuses_shapes(name, shapes):
    words = r"must both be \(B, D\), none of them empty, got|want embeddings \(..., D\)"
    with pytest.raises(ValueError, match=words):
        subject(name, 4, 8)(*(torch.zeros(s, device=DEVICE) for s in shapes))


@EVERY
def test_refuses_dtypes(name):
    loss, z = subject(name, 4, 8), torch.ones(4, 8, device=DEVICE)
    with pytest.raises(ValueError, match="must be floating-point, got|want embeddings"):
        loss(z.long(), z.long())
    if not name.startswith("supcon"):  # takes one tensor
        with pytest.raises(ValueError, match="must share dtype and device, got"):
            loss(z, z.double())
        with pytest.raises(ValueError, match="must share dtype and device, got"):
            loss(z, z.to("meta"))


@pytest.mark.parametrize(
    "make",
    [NTXentLoss, DCLLoss, DCLWLoss, SupConLoss, MoCoV3Loss, HCLLoss, GroupedNTXentLoss,
     DenseInfoNCELoss, lambda strategy: ISogCLRLoss(5, strategy=strategy)],
)  # fmt: skip
def test_refuses_strategy(make):
    with pytest.raises(ValueError, match="strategy must be one of gather, ring, got 'all'"):
        make(strategy="all")
