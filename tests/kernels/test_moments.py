import pytest
import torch

from fastssl.kernels import column_moments, cross_diagonal, standardize
from fastssl.kernels.correlation import moments
from tests.covering import crossed
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 1), (37, 5), (10, 97), (70, 19)]  # a chunk has 512 elements


def rows(dtype, *shapes):
    torch.manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


@pytest.fixture(params=["graph", "function", "triton"])
def route(request, monkeypatch, small_blocks):
    """By torch's own graph, by our Function, which ranks have, and by the kernels."""
    if request.param == "graph":
        return
    impl = "triton" if request.param == "triton" else "torch"
    one_process = moments._standardize if impl == "triton" else moments.Standardize.call
    by = {
        moments._STANDARDIZE: lambda *args: one_process(*args, impl),
        moments._MOMENTS: lambda *args: moments.ColumnMoments.apply(*args, impl),
        moments._DIAGONAL: lambda *args: moments.CrossDiagonal.apply(*args, impl),
    }
    for primitive, run in by.items():
        monkeypatch.setitem(primitive.implementations, "torch", run)


@crossed(dtype={str(x): x for x in DTYPES}, reduce=UPSTREAM)
@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_standardise(route, shape, unbiased, dtype, reduce):
    z = rows(dtype, shape)
    options = {"eps": 1e-3, "unbiased": unbiased}
    assert_no_worse(
        lambda z: standardize(z, **options),
        lambda z: standardize(z, **options, impl="reference"),
        z,
        lambda out: reduce(out * out.detach().cos()),  # a plain sum has gradient zero
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_column_moments(route, shape, unbiased, dtype):
    ours = lambda z: torch.stack(column_moments(z, unbiased=unbiased))  # noqa: E731
    eager = lambda z: torch.stack([z.mean(0), z.var(0, correction=int(unbiased))])  # noqa: E731
    assert_no_worse(ours, eager, rows(dtype, shape))


@pytest.mark.parametrize("mean, std", [(1e4, 1.0), (1e6, 1.0), (-3e5, 0.1), (0.0, 1e-3)])
def test_a_far_mean_costs_no_accuracy(route, mean, std):
    torch.manual_seed(0)
    z = mean + std * torch.randn(350, 3, device=DEVICE)
    wide = z.double()
    true_mean, true_var = wide.mean(0), wide.var(0, correction=0)
    found = column_moments(z)
    torch.testing.assert_close(found.mean.double(), true_mean, rtol=1e-7, atol=std * 1e-6)
    torch.testing.assert_close(found.var.double(), true_var, rtol=1e-6, atol=0)
    truth = grads(lambda z: (z - z.mean(0)) / z.var(0, correction=0).sqrt(), [wide])
    ours = grads(lambda z: standardize(z, eps=0.0), [z])
    torch.testing.assert_close(ours[0].double(), truth[0], atol=1e-5, rtol=0)
    largest = truth[1].abs().max().item()
    torch.testing.assert_close(ours[1].double(), truth[1], atol=1e-5 * largest, rtol=0)


def test_the_gradient_of_a_far_variance(route):
    torch.manual_seed(0)
    z = 1e6 + torch.randn(350, 3, device=DEVICE)
    truth = grads(lambda z: z.var(0), [z.double()])[1]
    ours = grads(lambda z: column_moments(z, unbiased=True).var, [z])[1]
    torch.testing.assert_close(
        ours.double(), truth, rtol=1e-5, atol=1e-6 * truth.abs().max().item()
    )


@pytest.mark.parametrize("value", [3.3, 1e6, 0.0])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_a_constant_column_is_zero(route, eps, value):
    torch.manual_seed(0)
    z = torch.full((50, 2), value, device=DEVICE)
    z[:, 1] = torch.randn(50)
    out, grad = grads(lambda z: standardize(z, eps=eps), [z])
    torch.testing.assert_close(out[:, 0], torch.zeros(50), atol=1e-6, rtol=0)
    assert grad.isfinite().all()
    if eps == 0.0:
        assert (grad[:, 0] == 0).all()


def test_nan_stays_in_its_column(route):
    z = torch.randn(40, 3, device=DEVICE)
    z[7, 1] = torch.nan
    out = standardize(z, eps=1e-5)
    assert out[:, 1].isnan().all() and out[:, [0, 2]].isfinite().all()
    assert column_moments(z).var.isnan().tolist() == [False, True, False]


def test_a_column_does_not_care_for_its_place_and_scale():
    (z,) = rows(torch.float64, (50, 4))
    moved = z * torch.tensor([1.0, 3.0, 0.5, 7.0]) + torch.tensor([0.0, 9.0, -40.0, 1.0])
    torch.testing.assert_close(standardize(moved, eps=0), standardize(z, eps=0))


def test_compiles_whole():
    (z,) = rows(torch.float32, (30, 6))
    step = lambda z: standardize(z, eps=1e-3).sin() + column_moments(z).var  # noqa: E731
    whole = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(grads(whole, [z]), grads(step, [z]), strict=True):
        torch.testing.assert_close(ours, eager)


def test_standardise_matches_batch_norm():
    (z,) = rows(torch.float32, (64, 33))
    want = torch.nn.functional.batch_norm(z, None, None, training=True)
    torch.testing.assert_close(standardize(z, eps=1e-5), want, atol=2e-6, rtol=1e-5)


@crossed(dtype={str(x): x for x in DTYPES}, reduce=UPSTREAM)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_diagonal(route, shape, dtype, reduce):
    eager = lambda a, b: (a * b).sum(0)  # noqa: E731
    assert_no_worse(cross_diagonal, eager, rows(dtype, shape, shape), reduce)


def test_cross_diagonal_of_one_tensor(route):
    eager = lambda a: a.square().sum(0)  # noqa: E731
    assert_no_worse(lambda a: cross_diagonal(a, a), eager, rows(torch.float32, (70, 19)))


def test_autocast_does_not_reach_inside():
    a, b = rows(torch.float32, (9, 16), (9, 16))

    def run():
        return [
            *grads(cross_diagonal, [a, b]),
            *grads(lambda z: standardize(z, eps=0.1), [a]),
            *grads(lambda z: column_moments(z).var, [a]),
        ]

    plain = run()
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = run()
    assert all(torch.equal(x, y) for x, y in zip(plain, inside, strict=True))


Z = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: standardize(Z[0], eps=0.1), r"z must be \(N, D\), got \(3,\)"),
        (lambda: standardize(Z, eps=-1.0), "eps must be >= 0, got -1.0"),
        (lambda: standardize(Z[:1], eps=0.1), "z must have at least 2 rows in all, got 1"),
        (lambda: standardize(Z.long(), eps=0.1), "z must be a floating-point tensor"),
        (lambda: standardize(Z, eps=0.1, impl="fast"), "for standardize, got 'fast'"),
        (lambda: standardize(Z.double(), eps=0.1, impl="triton"), "got z in torch.float64"),
        (lambda: column_moments(Z[:1]), "z must have at least 2 rows in all, got 1"),
        (lambda: column_moments(Z, impl="fast"), "for column_moments, got 'fast'"),
        (lambda: cross_diagonal(Z, Z[:, :2]), r"a and b must .* \(4, 3\) and \(4, 2\)"),
        (lambda: cross_diagonal(Z, Z.double()), "share dtype and device, got torch.float32 on cpu"),
        (lambda: cross_diagonal(Z, Z.to("meta")), "share dtype .* torch.float32 on meta"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
