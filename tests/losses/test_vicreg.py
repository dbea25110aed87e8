import lightly.loss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.losses.vicreg import VICRegLoss, vicreg_reference
from tests.covering import examples
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor

SHAPES = [(5, 3), (33, 100), (200, 64), (2, 1), (12, 5, 30), (40, 3, 2, 7), (3, 2, 1)]


def views(*shape, dtype=torch.float32):
    torch.manual_seed(sum(shape))
    z = 0.6 * torch.randn(shape, device=DEVICE)
    return [(z + 0.3 * torch.randn_like(z) + 0.2).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("weights", [(25, 25, 1), (0, 0, 3), (0, 2, 0), (1, 0, 0)], ids=str)
@pytest.mark.parametrize("B, D", [(3, 1), (6, 4), (4, 9)])
def test_the_papers_formula(B, D, weights):
    inputs = [z.double() for z in views(B, D)]
    ours = grads(VICRegLoss(*weights, eps=1e-2), inputs)
    want = grads(lambda a, b: vicreg_reference(a, b, *weights, 1e-2), inputs)
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradient_of_lightly(shape, reduce):
    assert_no_worse(VICRegLoss(), lightly.loss.VICRegLoss(), views(*shape), reduce)


@settings(max_examples=examples(25))
@given(st.integers(2, 9), st.lists(st.integers(1, 4), max_size=2), st.integers(1, 12))
def test_any_leading_axes(B, middle, D):
    inputs = [z.double() for z in views(B, *middle, D)]
    torch.testing.assert_close(
        grads(VICRegLoss(), inputs), grads(lightly.loss.VICRegLoss(), inputs)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(33, 100), (64, 20), (16, 3, 40)], ids=str)
def test_16_bits_in_float32_out(shape, dtype):
    inputs = views(*shape, dtype=dtype)
    ours = grads(VICRegLoss(), inputs)
    truth = grads(VICRegLoss(), [z.double() for z in inputs])
    assert [x.dtype for x in ours] == [torch.float32, dtype, dtype]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=eps, atol=0)
    for got, want in zip(ours[1:], truth[1:], strict=True):
        atol = 2 * eps * want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=2 * eps, atol=atol)


def test_known_values():
    """Columns of variance 4/3 without correlation; the same column twice; a column that is 0."""
    z = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], device=DEVICE)
    copies, half = z[:, [0, 0]], z * torch.tensor([1.0, 0.0], device=DEVICE)
    loss = VICRegLoss(0, 2, 3)
    for given_, want in ((z, 0.0), (copies, 3 * 2 * (4 / 3) ** 2), (half, 2 * 0.5 * 0.99)):
        assert loss(given_, given_).item() == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert VICRegLoss(7, 0, 0)(z, z + 3).item() == pytest.approx(63)


def test_laws():
    a, b = views(20, 30)
    loss, value = VICRegLoss(), VICRegLoss()(a, b)
    order = torch.randperm(20, device=DEVICE)
    features = torch.randperm(30, device=DEVICE)
    torch.testing.assert_close(loss(b, a), value)
    torch.testing.assert_close(loss(a[order], b[order]), value)
    torch.testing.assert_close(loss(a[:, features], -b[:, features]), loss(a, -b))
    torch.testing.assert_close(loss(a + 5, b + 5), value, rtol=1e-5, atol=0)
    apart = torch.stack([a, b], 1), torch.stack([b, a], 1)
    torch.testing.assert_close(loss(*apart), value)  # the mean over two positions
    assert loss(a, b[order]) > value


def test_a_far_mean_costs_no_digits():
    """At 1e6 float32 has steps of 1/16: inputs on those steps are exact, and so is the answer."""
    a, b = ((16 * z).round() / 16 for z in views(64, 40))
    near, far = grads(VICRegLoss(), [a, b]), grads(VICRegLoss(), [a + 1e6, b + 1e6])
    torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-6)


def test_large_embeddings_stay_finite():
    inputs = [1e9 * z for z in views(64, 40)]
    want = grads(VICRegLoss(), [z.double() for z in inputs])
    for got, truth in zip(grads(VICRegLoss(), inputs), want, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-4 * truth.abs().max())


def test_small_embeddings_keep_their_digits_in_float16():
    """Numbers near 1e-4, which divided by sqrt(2000) would have 5 bits left; the loss is scaled."""
    inputs = [(2e-4 * z).half() for z in views(2000, 4)]
    loss, reduce = VICRegLoss(0, 25, 1), lambda x: 1024 * x
    truth = grads(loss, [z.double() for z in inputs], reduce)
    for got, want in zip(grads(loss, inputs, reduce), truth, strict=True):
        atol = 1e-3 * want.abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=atol)


@pytest.mark.parametrize("shape", [(6, 4), (6, 9), (6, 2, 9), (9, 2, 4)], ids=str)
def test_constant_columns_are_finite_and_nan_is_handed_on(shape):
    a, b = views(*shape)
    a[..., 0], b[..., 0] = 1.0, 1.0
    assert all(x.isfinite().all() for x in grads(VICRegLoss(), [a, b]))
    a[2, ..., 1] = torch.nan
    value, d_a, _ = grads(VICRegLoss(), [a, b])
    assert value.isnan() and d_a.isnan().any()


@pytest.mark.parametrize("shape", [(16, 512), (16, 2, 512)], ids=str)
def test_makes_no_matrix_of_features_when_the_batch_is_smaller(shape):
    a, b = (z.requires_grad_() for z in views(*shape))
    assert largest_tensor(lambda: VICRegLoss()(a, b).backward()) == a.numel()


@pytest.mark.parametrize(
    "shapes, words",
    [
        (
            ((4, 3), (4, 2)),
            r"must both be \(B, ..., D\), none .* got \(4, 3\) and \(4, 2\)",
        ),
        (((4,), (4,)), r"got \(4,\) and \(4,\)"),
        (((4, 0, 2), (4, 0, 2)), r"got \(4, 0, 2\) and"),
        (((1, 3), (1, 3)), "the joined batch must have at least 2 images, got 1"),
    ],
)
def test_refuses_shapes(shapes, words):
    with pytest.raises(ValueError, match=words):
        VICRegLoss()(*(torch.zeros(s) for s in shapes))


def test_refuses_dtypes():
    z = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="must share dtype and device, got torch.float"):
        VICRegLoss()(z.double(), z)
    with pytest.raises(ValueError, match="must be floating-point, got torch.int64"):
        VICRegLoss()(z.long(), z.long())


def test_prints_its_arguments():
    want = "lambda_param=25.0, mu_param=25.0, nu_param=1.0, eps=0.0001, gather_distributed=True"
    assert repr(VICRegLoss()) == f"VICRegLoss({want})"
