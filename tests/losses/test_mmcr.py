import lightly.loss
import pytest
import torch

from fastssl.losses.mmcr import MMCRLoss
from tests.covering import pairwise
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor

SHAPES = [(5, 2, 3), (12, 1, 40), (40, 3, 12), (6, 4, 5), (2, 1, 1)]


def views(B, k, D, dtype=torch.float32):
    """Two networks' embeddings of length one: those of an image alike, not the same."""
    torch.manual_seed(B + k + D)
    z = torch.randn(B, 1, D, device=DEVICE)
    z = [z + 0.5 * torch.randn(B, k, D, device=DEVICE) for _ in range(2)]
    return [torch.nn.functional.normalize(x, dim=-1).to(dtype) for x in z]


@pytest.mark.parametrize(**pairwise({"lmda": [0.0, 0.7], "shape": SHAPES, "reduce": UPSTREAM}))
def test_value_and_gradient_of_lightly(shape, lmda, reduce):
    assert_no_worse(MMCRLoss(lmda), lightly.loss.MMCRLoss(lmda), views(*shape), reduce)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float64(shape):
    inputs = [z.double() for z in views(*shape)]
    ours = grads(MMCRLoss(0.3), inputs)
    torch.testing.assert_close(ours, grads(lightly.loss.MMCRLoss(0.3), inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_in_float32_out(dtype):
    inputs = views(12, 2, 40, dtype)
    ours, truth = grads(MMCRLoss(), inputs), grads(MMCRLoss(), [z.double() for z in inputs])
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=0)
    for got, want in zip(ours[1:], truth[1:], strict=True):
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=1e-6)


def nuclear(x, rank):
    """|x|_* of a matrix of known rank by its singular values, and U V^T of those alone."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    return s[..., :rank].sum(-1), u[..., :rank] @ vt[..., :rank, :]


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("B, D, rank", [(6, 20, 2), (20, 6, 2), (9, 9, 1)])
def test_deficient_ranks_have_the_least_subgradient(B, D, rank, scale):
    """Views that coincide, centroids in few directions: what is rounding gets no gradient."""
    torch.manual_seed(B)
    c = torch.randn(B, rank, device=DEVICE) @ torch.randn(rank, D, device=DEVICE) * scale
    z = c[:, None].expand(B, 2, D)
    value, d_online, d_momentum = grads(MMCRLoss(0.5), [z, z], torch.sum)
    spread, d_spread = nuclear(c, rank)
    size, d_size = nuclear(c[:, None].expand(B, 4, D), 1)
    assert value.item() == pytest.approx((0.5 * size.mean() - spread).item(), rel=1e-5)
    want = 0.5 * d_size / B - d_spread[:, None] / 4
    for got in (d_online, d_momentum):
        torch.testing.assert_close(got.double(), want[:, :2], rtol=0, atol=2e-6)


def test_known_values():
    """Orthogonal images: each adds 1 to the first norm and sqrt(2k) of one direction to its own."""
    z = torch.eye(4, device=DEVICE)[:, None].expand(4, 3, 4)
    assert MMCRLoss(0.0)(z, z).item() == pytest.approx(-4)
    assert MMCRLoss(0.5)(z, z).item() == pytest.approx(0.5 * 6**0.5 - 4)
    assert MMCRLoss(0.0)(z, -z).item() == pytest.approx(0, abs=1e-6)
    same = torch.ones(4, 1, 1, device=DEVICE)  # one direction for all: sqrt(B)
    assert MMCRLoss(0.0)(same, same).item() == pytest.approx(-2)


def test_laws():
    a, b = views(12, 2, 9)
    loss, value = MMCRLoss(0.1), MMCRLoss(0.1)(a, b)
    order = torch.randperm(12, device=DEVICE)
    rotation = torch.linalg.qr(torch.randn(9, 9, device=DEVICE)).Q
    torch.testing.assert_close(loss(b, a), value)
    torch.testing.assert_close(loss(a[order], b[order]), value)
    torch.testing.assert_close(loss(a @ rotation, b @ rotation), value)
    torch.testing.assert_close(loss(3 * a, 3 * b), 3 * value)
    assert loss(a, b[order]) > value


def test_collapse_is_finite_and_not_a_number_is_handed_on():
    zeros = torch.zeros(5, 2, 3, device=DEVICE)
    value, d_online, _ = grads(MMCRLoss(), [zeros, zeros])
    assert value == 0 and (d_online == 0).all()
    for bad in (torch.nan, torch.inf):
        for shape in ((5, 2, 3), (3, 2, 20)):
            a, b = views(*shape)
            a[1, 0, 1] = bad
            value, d_online, _ = grads(MMCRLoss(), [a, b])
            assert value.isnan() and d_online.isnan().all()


def test_makes_no_matrix_of_features_when_the_batch_is_smaller():
    a, b = (z.requires_grad_() for z in views(8, 2, 256))
    assert largest_tensor(lambda: MMCRLoss()(a, b).backward()) == 2 * a.numel()


@pytest.mark.parametrize(
    "shapes, words",
    [
        (((4, 2, 3), (4, 1, 3)), r"both be \(B, k, D\), none of them empty, got \(4, 2, 3\) and"),
        (((4, 3), (4, 3)), r"got \(4, 3\) and \(4, 3\)"),
        (((1, 2, 3), (1, 2, 3)), "the joined batch must have at least 2 images, got 1"),
    ],
)
def test_refuses_shapes(shapes, words):
    with pytest.raises(ValueError, match=words):
        MMCRLoss()(*(torch.zeros(s) for s in shapes))


def test_prints_its_arguments():
    assert repr(MMCRLoss()) == "MMCRLoss(lmda=0.005, gather_distributed=True)"
