"""SIGReg, LeJEPA, LeWM and VISReg beside lightly's and their formulas, along like directions."""

import lightly.loss
import pytest
import torch

from fastssl import losses
from fastssl.kernels.common.chunks import CHUNK_BYTES
from fastssl.losses import LeJEPALoss, SIGReg, VISRegLoss
from fastssl.losses._slices import _rank, _slopes, _sums, draw_directions
from fastssl.losses.lejepa import sigreg_reference
from fastssl.losses.visreg import visreg_reference
from tests.oracle import DEVICE, assert_no_worse, grads, largest_tensor, saved_elements


def seeded(loss):
    def call(*z):
        torch.manual_seed(3)
        return loss(*z)

    return call


def sets(V=3, N=37, D=6, dtype=torch.float32):
    torch.manual_seed(N)
    return (1.5 * torch.randn(V, N, D, device=DEVICE) + 0.2).to(dtype)


CASES = {  # ours or lightly's, of two (V, N, D)
    "sigreg": lambda m: lambda a, b: m.SIGReg(num_vectors=33, knots=9, t_max=2.5)(a + b),
    "lejepa": lambda m: (
        lambda a, b: m.LeJEPALoss(0.3, sigreg_num_vectors=33)(local_proj=a, global_proj=b[:2])
    ),
    "lewm": lambda m: (
        lambda a, b: m.LeWMLoss(0.3, sigreg_num_vectors=33)(
            predicted=a[:, 1:], target=b[:, 1:], embeddings=a * b
        )
    ),
    "lewm normed": lambda m: (
        lambda a, b: m.LeWMLoss(0.3, True, sigreg_num_vectors=33)(
            predicted=a[:, 1:], target=b[:, 1:], embeddings=a * b
        )
    ),
    "visreg": lambda m: (
        lambda a, b: m.VISRegLoss(0.4, 33, 0.5, 2.0, 0.7)(local_proj=a, global_proj=b[:2])
    ),
}


@pytest.mark.parametrize("chunk", [1 << 22, 4096])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_of_lightly(name, chunk, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, DEVICE, chunk)
    ours, theirs = (seeded(CASES[name](m)) for m in (losses, lightly.loss))
    inputs = [z.double() for z in (sets(), sets(N=38)[:, 1:])]
    torch.testing.assert_close(grads(ours, inputs), grads(theirs, inputs), rtol=1e-6, atol=1e-8)


def directions_of(dtype):
    z = sets(dtype=dtype)
    torch.manual_seed(3)
    return draw_directions(z, 33, None)


@pytest.mark.parametrize("size", [1.0, 1e-2, 50.0])
def test_sigreg_is_its_formula(size):
    a = directions_of(torch.float32)
    ours = seeded(SIGReg(num_vectors=33))
    assert_no_worse(ours, lambda z: sigreg_reference(z, a.to(z.dtype)), [size * sets()], slack=4)


def test_visreg_is_its_formula():
    a = directions_of(torch.float32)
    ours = VISRegLoss(num_slices=33, lambda_param=0.5)

    def twice(local_proj, global_proj):
        return 2 * ours(local_proj=local_proj, global_proj=global_proj)

    inputs = [sets(), sets(V=2, N=38)[:, 1:]]
    eager = lambda *z: visreg_reference(*z, a.to(z[0].dtype)).total  # noqa: E731
    assert_no_worse(seeded(twice), eager, inputs, slack=4)
    terms = seeded(lambda x, y: ours.forward_components(local_proj=x, global_proj=y))(*inputs)
    torch.testing.assert_close(terms[1:], visreg_reference(*inputs, a)[1:])


@pytest.mark.parametrize("name", CASES)
def test_16_bits_in_float32_out_and_a_second_backward(name):
    loss = CASES[name](losses)
    other = torch.zeros_like if name == "sigreg" else torch.ones_like
    ours, z = seeded(lambda a: loss(a, other(a))), sets(dtype=torch.bfloat16)
    got, want = grads(ours, [z]), grads(ours, [z.float()])
    assert [x.dtype for x in got] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[1].float(), want[1], rtol=2e-2, atol=1e-3)
    z = z.float().requires_grad_()
    value = ours(z)
    first = torch.autograd.grad(3 * value, z, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(value, z)[0] * 3, first)


def test_nothing_has_all_angles():
    z, a = sets(2, 300, 5), torch.ones(5, 1024, device=DEVICE)
    angles = 2 * 300 * 1024 * 17
    sums = _sums(z, a, 0.2, 16)
    for call in (
        lambda: _sums(z, a, 0.2, 16),
        lambda: _slopes(sums, z, a, 0.2),
        lambda: _rank(z, a, torch.zeros(300, device=DEVICE), True),
    ):
        assert largest_tensor(call) < angles / 60
    z.requires_grad_()
    for loss in (SIGReg(), lambda z: VISRegLoss(num_slices=1024)(local_proj=z, global_proj=z)):
        assert saved_elements(lambda: loss(z)) < angles / 60  # noqa: B023


def test_collapsed_embeddings_have_a_value_and_a_finite_gradient():
    z = torch.ones(2, 5, 3, device=DEVICE)
    for name in ("lejepa", "visreg"):
        ours, theirs = (seeded(CASES[name](m)) for m in (losses, lightly.loss))
        torch.testing.assert_close(grads(ours, [z, z]), grads(theirs, [z, z]))


def test_a_state_of_lightlys_is_taken():
    ours = LeJEPALoss()
    ours.load_state_dict(lightly.loss.LeJEPALoss().state_dict())
    assert not ours.load_state_dict(LeJEPALoss().state_dict()).missing_keys


@pytest.mark.parametrize("name", ["sigreg", "visreg", "lewm"])
def test_compiles_whole(name):
    ours = CASES[name](losses)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    inputs = [sets(), sets(N=38)[:, 1:]]
    torch.testing.assert_close(grads(seeded(compiled), inputs), grads(seeded(ours), inputs))


Z = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: SIGReg()(Z[0, 0]), r"proj must be \(..., N, D\).* got \(3,\)"),
        (lambda: SIGReg()(Z.int()), "proj must be floating-point"),
        (lambda: LeJEPALoss()(local_proj=Z[0], global_proj=Z), r"local_proj must be \(V, N, D\)"),
        (lambda: LeJEPALoss()(local_proj=Z[:0], global_proj=Z), "none of them empty"),
        (
            lambda: VISRegLoss()(local_proj=Z[:, :2], global_proj=Z),
            r"must share images.* got \(2, 3\) torch.float32 on cpu and \(4, 3\)",
        ),
        (
            lambda: VISRegLoss()(local_proj=Z[:, :1], global_proj=Z[:, :1]),
            "global_proj must have at least 2 images in all ranks, got 1",
        ),
        (
            lambda: losses.LeWMLoss()(predicted=Z, target=Z, embeddings=Z[:1]),
            "embeddings must have 2 clips of 3 features as predicted",
        ),
        (lambda: losses.LeWMLoss()(predicted=Z, target=Z[:1], embeddings=Z), "must both be"),
        (lambda: LeJEPALoss(1.5), r"lambda_param must lie in \[0, 1\], got 1.5"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
