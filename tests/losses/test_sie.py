"""SIELoss: its published terms written anew, lightly's VICReg terms, and ranks as one process."""

import lightly.loss.vicreg_loss as lightly
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.losses.sie import SIELoss, sie_reference
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads
from tests.ranks import run_ranks

WEIGHTS = (3.0, 2.0, 5.0, 0.5)
B, INPUT, D, E = 5, 7, 6, 2


def embeddings(n, d, e, dtype=torch.float32):
    """Two views and a prediction; some columns vary less than 1, some more."""
    torch.manual_seed(n + d + e)
    spread = torch.linspace(0.3, 1.6, d)
    z = torch.randn(n, d)
    views = [((z + 0.5 * torch.randn(n, d)) * spread).to(DEVICE, dtype) for _ in range(2)]
    return [*views, (0.7 * torch.randn(n, e)).to(DEVICE, dtype)]


@pytest.mark.parametrize("weights", [WEIGHTS, (10.0, 4.5, 10.0, 1.0)], ids=["mixed", "default"])
@pytest.mark.parametrize("n, d, e", [(2, 3, 1), (9, 4, 4), (40, 12, 5), (6, 40, 20)])
def test_the_papers_formula(n, d, e, weights):
    inputs = [x.double() for x in embeddings(n, d, e)]
    ours = grads(SIELoss(*weights), inputs)
    torch.testing.assert_close(
        ours, grads(lambda *z: sie_reference(*z, weights), inputs), rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("n, d, e", [(33, 100, 30), (200, 64, 32)])
def test_no_worse_than_eager(n, d, e, reduce):
    assert_no_worse(
        SIELoss(*WEIGHTS), lambda *z: sie_reference(*z, WEIGHTS), embeddings(n, d, e), reduce
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_in_float32_out(dtype):
    inputs = embeddings(33, 100, 30, dtype)
    ours = grads(SIELoss(), inputs)
    truth = grads(SIELoss(), [x.double() for x in inputs])
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype, dtype]
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=5e-3, atol=0)
    for got, want in zip(ours[1:], truth[1:], strict=True):
        cosine = torch.cosine_similarity(got.double().flatten(), want.flatten(), dim=0)
        assert cosine > 0.9999


def test_regularizers_are_lightlys():
    z_a, z_b, p = (x.double() for x in embeddings(20, 8, 3))
    terms = SIELoss().terms(z_a, z_b, p)
    spread = sum(lightly.variance_loss(x) for x in (z_a, z_b, p)) / 2
    torch.testing.assert_close(terms.variance, spread)
    cov = lightly.covariance_loss(z_a) + lightly.covariance_loss(z_b)
    torch.testing.assert_close(terms.covariance, cov)


def test_known_values():
    """Orthogonal columns of variance 4/3: what is left is the two errors."""
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], device=DEVICE)
    cases = {(1, 1): 0.0, (-1, 1): 4 * 3.0, (1, -1): 4 * 2.0, (-1, -1): 4 * 5.0}
    for (first, second), want in cases.items():
        moved = z * torch.tensor([first, second], device=DEVICE)
        assert SIELoss(*WEIGHTS)(z, moved, z[:, 1:]).item() == pytest.approx(want, abs=1e-5)
    flat = 0 * z
    assert SIELoss(0, 0, 1, 0)(flat, flat, flat[:, 1:]).item() == pytest.approx(1.5 * 0.99)


def test_each_part_answers_to_its_own_term():
    inputs = embeddings(12, 7, 3)
    _, d_a, d_b, d_p = grads(SIELoss(1, 0, 0, 0), inputs)
    assert d_a[:, :4].all() and not d_a[:, 4:].any() and not d_b[:, 4:].any() and not d_p.any()
    _, d_a, d_b, d_p = grads(SIELoss(0, 1, 0, 0), inputs)
    assert d_p.all() and d_b[:, 4:].all() and not d_b[:, :4].any() and not d_a.any()
    _, d_a, d_b, d_p = grads(SIELoss(0, 0, 0, 1), inputs)
    assert d_a.all() and d_b.all() and not d_p.any()


def test_terms_weighed_are_the_loss():
    inputs = embeddings(12, 7, 3)
    loss = SIELoss(*WEIGHTS)
    terms = loss.terms(*inputs)
    want = sum(w * term for w, term in zip(WEIGHTS, terms, strict=True))
    torch.testing.assert_close(loss(*inputs), want)
    assert terms._fields == ("invariance", "equivariance", "variance", "covariance")


@pytest.mark.parametrize(
    "shapes, words",
    [
        (((4, 3), (4, 2), (4, 1)), r"must both be \(B, D\), .* got \(4, 3\) and \(4, 2\)"),
        (((4, 3), (4, 3), (5, 1)), r"predicted must be \(4, E\) .* got \(5, 1\)"),
        (((4,), (4,), (4,)), r"got \(4,\) and \(4,\)"),
        (((4, 3), (4, 3), (4, 0)), r"predicted must be \(B, D\), none of them empty, got \(4, 0\)"),
        (((4, 3), (4, 3), (4, 4)), r"predicted must be \(4, E\) with E of at most 3, got \(4, 4\)"),
        (((1, 3), (1, 3), (1, 1)), "the joined batch must have at least 2 images, got 1"),
    ],
)
def test_refuses_shapes(shapes, words):
    with pytest.raises(ValueError, match=words):
        SIELoss()(*(torch.zeros(s) for s in shapes))


def test_refuses_dtypes():
    z = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="predicted must share dtype .* torch.float64 on cpu"):
        SIELoss()(z, z, z.double())
    with pytest.raises(ValueError, match="got torch.int64 on cpu"):
        SIELoss()(*[z.long()] * 3)


def test_nan_propagates():
    z_a, z_b, p = embeddings(6, 4, 2)
    z_a[0, 0] = float("nan")
    assert SIELoss()(z_a, z_b, p).isnan()


def test_prints_its_arguments():
    words = "SIELoss(lambda_inv=10.0, lambda_equi=4.5, lambda_var=10.0, lambda_cov=1.0, eps=0.0001"
    assert repr(SIELoss()) == words + ", gather_distributed=True)"


def data(rank):
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, B, INPUT, generator=generator) + 0.5 * rank


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUT, 9), nn.Tanh(), nn.Linear(9, D + E))


def step(model, x, **options):
    """The prediction comes from the same model; DDP wants one forward."""
    z = model(x.flatten(0, 1)).unflatten(0, (2, -1))
    value = SIELoss(*WEIGHTS, **options)(z[0, :, :D], z[1, :, :D], z[0, :, D:])
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters())]


def each_rank(rank, world):
    uneven = torch.zeros(B - rank, D)
    try:
        refused = str(SIELoss()(torch.zeros(B, D), torch.zeros(B, D), uneven[:, :E]))
    except ValueError as error:
        refused = str(error)
    one = torch.tensor([[1.0, 2.0]]) * rank
    return {
        "plain": step(network(), data(rank)),
        "double": step(network().double(), data(rank).double()),
        "ddp": step(DistributedDataParallel(network()), data(rank)),
        "local": step(network().double(), data(rank).double(), gather_distributed=False),
        "one row": SIELoss()(one, one, one),
        "refused": refused,
    }


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(each_rank, 2)


def joined(ranks, name):
    return [torch.stack(parts).mean(0) for parts in zip(*(r[name] for r in ranks), strict=True)]


def test_mean_over_ranks_is_the_joined_batch(ranks):
    whole = torch.cat([data(r) for r in range(len(ranks))], dim=1).double()
    want = step(network().double(), whole)
    for name, close in (("double", 1e-12), ("plain", 2e-5)):
        for got, truth in zip(joined(ranks, name), want, strict=True):
            torch.testing.assert_close(got.double(), truth, rtol=close, atol=close)
    for seen in ranks:
        for got, truth in zip(seen["ddp"][1:], want[1:], strict=True):
            torch.testing.assert_close(got.double(), truth, rtol=2e-5, atol=2e-5)


def test_local_statistics_are_each_ranks_own(ranks):
    for r, seen in enumerate(ranks):
        want = step(network().double(), data(r).double())
        torch.testing.assert_close(seen["local"], want, rtol=1e-12, atol=1e-12)


def test_ranks_that_differ_are_refused_together_and_one_row_each_is_enough(ranks):
    for seen in ranks:
        assert "predicted must have the same shape on every rank" in seen["refused"]
        assert seen["one row"].isfinite()
