"""The Triton Gram matrices, covariances and their gradients, by both schedules.

The oracle is the formula with the D x E matrix, differentiated by torch, in the inputs' dtype and
in float64.  Tiles are of 32 rows with corners of 16, so that small odd shapes cross several and
divide none; strips of products and of gradients are of a few rows.
"""

from contextlib import ExitStack

import pytest
import torch

from fastssl.kernels.common import tuning as _tuning
from fastssl.kernels.correlation import correlation_ops as correlation_fused
from fastssl.kernels.correlation import gradient_triton
from fastssl.kernels.correlation import gram_triton as correlation_tiles
from fastssl.kernels.correlation.configs import shape_class
from fastssl.kernels.correlation.gram_torch import Matrix, Terms
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads

FORCED = {
    "correlation_tiles": {"BLOCK": 32, "BLOCK_K": 16, "CORNER": 16},
    "correlation_settle": {"BLOCK_M": 16, "BLOCK_N": 32},
    "correlation_finish": {"BLOCK_M": 4, "BLOCK_N": 16},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF = [torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both = pytest.mark.parametrize("schedule", ["tiles", "products"], indirect=True)
each = pytest.mark.parametrize(
    "schedule, dtype",
    [(by, dtype) for by in ("tiles", "products") for dtype in (HALF if by == "tiles" else DTYPES)],
    indirect=["schedule"],
    ids=str,
)
upstream = pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """New memory is nan; strips are of a few rows."""
    for name, value in (("STRIP_BYTES", 4 * 600), ("LEAST_ROWS", 8), ("TILE", 4)):
        monkeypatch.setattr(correlation_tiles, name, value)
    torch.use_deterministic_algorithms(True)
    with ExitStack() as stack:
        for kernel, blocks in FORCED.items():
            stack.enter_context(_tuning.forced(kernel, _tuning.Config(blocks)))
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def schedule(request, monkeypatch):
    """The schedule of what is symmetric, whatever its size."""
    forced = lambda x, M, mirror: request.param if mirror and x.dtype in HALF else "products"  # noqa: E731
    monkeypatch.setattr(correlation_tiles, "schedule", forced)
    return request.param


def normal(dtype, *shapes):
    """Entries such that |a^T b|^2 is in float16's range."""
    torch.manual_seed(sum(map(sum, shapes)))
    return [(torch.randn(s, device=DEVICE) / s[0] ** 0.5).to(dtype) for s in shapes]


class ByGram(torch.autograd.Function):
    """(total, diagonal of a^T b) by the engine's Grams, as correlation_plans has it."""

    @staticmethod
    def forward(ctx, a, b, start, n):
        mine = [x if x is None else x[start : start + n] for x in (a, b)]
        total, gram_a, gram_b = correlation_fused.grams(mine[0], mine[1], a, b, start)
        ctx.save_for_backward(a, b)
        ctx.found, ctx.rows = (gram_a, gram_b or gram_a), slice(start, start + n)
        return total

    @staticmethod
    def backward(ctx, g):
        """Of these rows alone, as a rank has it."""
        (a, b), (gram_a, gram_b) = ctx.saved_tensors, ctx.found
        factor = 2 * g * (2 if b is None else 1)

        def whole(gram, x):
            out = torch.zeros_like(x)
            out[ctx.rows] = correlation_fused.gradient(
                gram, x, Terms(x[ctx.rows], None, None, factor)
            )
            return out

        return whole(gram_b, a), None if b is None else whole(gram_a, b), None, None


class ByCovariance(torch.autograd.Function):
    """(diagonal, rest) with split, or total."""

    @staticmethod
    def forward(ctx, a, b, split):
        diagonal, total, ctx.matrix = correlation_fused.covariance(a, b, split)
        ctx.save_for_backward(a, b)
        ctx.split = split
        return (diagonal, total) if split else total

    @staticmethod
    def backward(ctx, *upstream):
        a, b = ctx.saved_tensors
        twice = 2 if b is None else 1
        coef, factor = upstream[0] * twice if ctx.split else None, 2 * upstream[-1] * twice
        across = lambda y, t: correlation_fused.gradient_across(ctx.matrix, y, coef, factor, t)  # noqa: E731
        return across(a if b is None else b, True), None if b is None else across(a, False), None


def squares(a, b):
    return (a.T @ b).square().sum()


def parts(a, b):
    """The diagonal of a^T b, and the sum of its other squares, in one tensor."""
    c = a.T @ b
    diagonal = c.diagonal()
    return torch.cat([diagonal, (c - diagonal.diag()).square().sum()[None]])


def wide(fn):
    """fn's result as float32, as ours is."""
    return lambda *x: fn(*x) if x[0].dtype == torch.float64 else fn(*x).float()


@each
@pytest.mark.parametrize("N, D, E", [(1, 1, 1), (37, 20, 17), (70, 5, 3)])
def test_grams_of_two(N, D, E, dtype, schedule):
    a, b = normal(dtype, (N, D), (N, E))
    assert_no_worse(lambda a, b: ByGram.apply(a, b, 0, N), wide(squares), (a, b))


@each
@pytest.mark.parametrize("N, D", [(1, 3), (70, 20)])
def test_grams_of_one(N, D, dtype, schedule):
    (a,) = normal(dtype, (N, D))
    assert_no_worse(lambda a: ByGram.apply(a, None, 0, N), wide(lambda a: squares(a, a)), (a,))


@dtypes
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
def test_grams_of_some_rows_add_up(two, dtype):
    """Ranks with rows of their own: their totals add up, and each has its rows' gradient."""
    a, b = normal(dtype, (51, 30), (51, 30 if two else 1))
    b = b if two else None
    inputs = [x for x in (a, b) if x is not None]

    def ranks(a, b=None):
        return torch.stack([ByGram.apply(a, b, start, 17) for start in (0, 17, 34)]).sum()

    assert_no_worse(ranks, wide(lambda a, b=None: squares(a, a if b is None else b)), inputs)


def check_covariance(inputs, split, reduce=UPSTREAM["contiguous"]):
    def ours(a, b=None):
        found = ByCovariance.apply(a, b, split)
        return torch.cat([found[0], found[1][None]]) if split else found

    eager = lambda a, b=None: (parts if split else squares)(a, a if b is None else b)  # noqa: E731
    assert_no_worse(ours, wide(eager), inputs, reduce)


@each
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_covariance_of_one(split, dtype, schedule):
    check_covariance(normal(dtype, (21, 70)), split)


@dtypes
@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
def test_covariance_of_two(split, dtype):
    check_covariance(normal(dtype, (21, 40), (21, 40)), split)


@upstream
@pytest.mark.parametrize("two", [True, False], ids=["two", "one"])
def test_upstream_gradients_of_any_layout(two, reduce):
    a, b = normal(torch.float32, (5, 20), (5, 20))
    check_covariance((a, b) if two else (a,), True, reduce)


@dtypes
@pytest.mark.parametrize("N, D, E", [(1, 1, 1), (1, 2, 1), (9, 33, 70), (50, 17, 4)])
def test_covariance_of_other_features(N, D, E, dtype):
    a, b = normal(dtype, (N, D), (N, E))
    assert_no_worse(lambda a, b: ByCovariance.apply(a, b, False), wide(squares), (a, b))


def barlow(total, diagonal, weight, N):
    """Zbontar et al. 2021, eq. 1, of the diagonal of a^T b and the sum of its other squares."""
    return (1 - diagonal / N).square().sum() + weight * total / N**2


@both
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("N, D", [(48, 100), (100, 33)])
def test_near_convergence_the_signal_is_kept(N, D, dtype, schedule):
    """Almost equal views, almost decorrelated: the large diagonals must not drown the rest."""
    torch.manual_seed(N)
    z = torch.linalg.qr(torch.randn(max(N, D), min(N, D)))[0]
    z = (z if N > D else z.T)[:N] * max(N, D) ** 0.5 * (1 if N > D else (N / D) ** 0.5)
    a, b = ((z + 0.05 * torch.randn_like(z)).to(DEVICE, dtype) for _ in range(2))

    def ours(a, b):
        if N > D:
            diagonal, rest = ByCovariance.apply(a, b, True)
            return barlow(rest, diagonal, 5e-3, N)
        total, diagonal = ByGram.apply(a, b, 0, N), (a.float() * b.float()).sum(0)
        return barlow(total - diagonal.square().sum(), diagonal, 5e-3, N)

    def eager(a, b):
        c = a.T @ b
        diagonal = c.diagonal()
        rest = (c - diagonal.diag()).to(torch.promote_types(c.dtype, torch.float32))
        return barlow(rest.square().sum(), diagonal.to(rest.dtype), 5e-3, N)

    truth = grads(eager, [a.double(), b.double()])
    mine, par = grads(ours, [a, b]), grads(eager, [a, b])
    distance = lambda found: [(x.double() - t).norm() for x, t in zip(found, truth, strict=True)]  # noqa: E731
    for x, y, t in zip(distance(mine), distance(par), truth, strict=True):
        assert x <= y + 1e-5 * t.norm()


@both
def test_gradients_join_all_their_terms(schedule):
    """factor (W z + diagonal z) + y coef, on a slice of rows, against the formula."""
    z, y = normal(torch.bfloat16, (37, 20), (37, 20))
    w = torch.randn(5, 37, device=DEVICE).bfloat16()
    diagonal, coef = torch.randn(5, device=DEVICE), torch.randn(20, device=DEVICE)
    factor, mine = torch.tensor(0.7, device=DEVICE), slice(30, 35)
    terms = Terms(z[mine], y[mine], coef, factor)
    found = correlation_fused.gradient(Matrix(w, diagonal), z, terms)
    W = w.double().index_add(1, torch.arange(30, 35, device=DEVICE), diagonal.diag().double())
    want = 0.7 * W @ z.double() + y[mine].double() * coef.double()
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), want, rtol=1e-2, atol=1e-2)


@both
@pytest.mark.parametrize("columns", [False, True], ids=["gram", "covariance"])
def test_float16_entries_past_its_range(columns, schedule):
    """Rows of norm 300 and one of 3000: products of 9e6; the gradient's scale is upstream's."""
    z, y = (30 * x for x in normal(torch.float16, (40, 100), (40, 100)))
    z, y = ((x.T.contiguous() if columns else x) * 40 for x in (z, y))
    z[3] *= 10
    scale = 1e-13

    def ours(a, b):
        if columns:
            return ByCovariance.apply(a, b, False) * scale
        return ByGram.apply(a, b, 0, len(a)) * scale

    found = grads(ours, [z, y], UPSTREAM["expanded"])
    truth = grads(lambda a, b: squares(a, b) * scale, [z.double(), y.double()])
    want = grads(lambda a, b: squares(a, b) * scale, [z.double(), y.double()], UPSTREAM["expanded"])
    assert truth[0] == pytest.approx(want[0].item())
    for x, t in zip(found, want, strict=True):
        assert (x.double() - t).abs().max() <= 3e-3 * t.abs().max()


@both
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_same_bits_each_run_and_a_symmetric_matrix(dtype, schedule):
    a, b = normal(dtype, (37, 20), (37, 17))
    first, again = correlation_fused.grams(a, b, a, b, 0), correlation_fused.grams(a, b, a, b, 0)
    assert torch.equal(first[0], again[0])
    for x, y in zip(first[1:], again[1:], strict=True):
        assert torch.equal(x.values, y.values) and torch.equal(x.values, x.values.T)
        assert (x.values.diagonal() == 0).all() and torch.equal(x.diagonal, y.diagonal)


def test_one_is_two_equal_ones():
    (a,) = normal(torch.bfloat16, (70, 33))
    one, two = (correlation_fused.grams(a, b, a, b, 0) for b in (None, a.clone()))
    torch.testing.assert_close(one[0], two[0])
    assert torch.equal(one[1].values, two[1].values)
    diagonal, total, matrix = correlation_fused.covariance(a, None, True)
    other = correlation_fused.covariance(a, a.clone(), True)
    torch.testing.assert_close((diagonal, total), other[:2])
    assert torch.equal(matrix.values, other[2].values)


@both
def test_a_known_value(schedule):
    """Orthogonal rows of length 2: |a^T a|^2 = 16 a row, and off C's diagonal nothing is left."""
    a = 2 * torch.eye(40, device=DEVICE).bfloat16()
    total, gram, _ = correlation_fused.grams(a, None, a, None, 0)
    assert total == 640 and (gram.values == 0).all() and (gram.diagonal == 4).all()
    diagonal, total, matrix = correlation_fused.covariance(a, None, True)
    assert total == 0 and (diagonal == 4).all() and (matrix.values == 0).all()
    ones = torch.ones(40, 3, device=DEVICE).bfloat16()
    assert correlation_fused.grams(ones, None, ones, None, 0)[0] == 9 * 1600


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("schedule", ["tiles"], indirect=True)
def test_strided_inputs(dtype, schedule):
    a, b = normal(dtype, (74, 20), (20, 37))
    for x, y in [(a[::2, ::2], b.T), (a[37:, 3:], a[:1].expand(37, 20))]:
        assert_no_worse(lambda a, b: ByGram.apply(a, b, 0, 37), wide(squares), (x, y))
        assert_no_worse(lambda a, b: ByCovariance.apply(a, b, False), wide(squares), (x, y))


@both
def test_a_nan_shows_where_it_should(schedule):
    (a,) = normal(torch.bfloat16, (70, 20))
    a[41, 3] = torch.nan
    total, gram, _ = correlation_fused.grams(a, None, a, None, 0)
    assert total.isnan() and gram.diagonal.isnan().nonzero().tolist() == [[41]]
    assert gram.values.isnan().sum() == 2 * 69


@both
def test_rows_beyond_two_to_the_31_elements(schedule, tmp_path):
    rows, D, gap = 18, 4, 2**27  # two chunks of a column, 16 rows apart
    size = (rows - 1) * gap + D
    if DEVICE == "cpu":  # a file without content takes no space
        far = torch.from_file(str(tmp_path / "far"), shared=True, size=size, dtype=torch.bfloat16)
    else:
        far = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
    far = far.as_strided((rows, D), (gap, 1))
    (near,) = normal(torch.bfloat16, (rows, D))
    far.copy_(near)
    for x in (near, far):
        total, gram, _ = correlation_fused.grams(x, None, x, None, 0)
        diagonal, rest, matrix = correlation_fused.covariance(x, None, True)
        one = torch.ones((), device=DEVICE)
        dx = correlation_fused.gradient(gram, x, Terms(x, x, diagonal, one))
        found = [total, gram.values, diagonal, rest, matrix.values, dx]
        if x is near:
            expected = found
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_of_a_symmetric_strip_the_upper_part_alone_is_used():
    """Entries below the diagonal may differ in their last bit; two programs would store both."""
    s = torch.full((40, 70), torch.nan, device=DEVICE).tril(-1) + torch.ones(40, 70, device=DEVICE)
    found = Matrix(torch.zeros(70, 70, device=DEVICE), torch.zeros(70, device=DEVICE))
    parts = correlation_tiles.settle([s], [found], (0, 0), 0, True)
    assert parts.sum() == 2 * (39 * 40 / 2 + 40 * 30)
    assert found.values.sum() == parts.sum() and found.diagonal.tolist() == [1] * 40 + [0] * 30


@pytest.mark.parametrize(
    "dtype, M, mirror, expected",
    [
        (torch.bfloat16, 1280, True, "tiles"),
        (torch.bfloat16, 1279, True, "products"),
        (torch.float16, 2048, False, "products"),
        (torch.float32, 2048, True, "products"),
    ],
)
def test_the_schedule(dtype, M, mirror, expected):
    assert correlation_tiles.schedule(torch.empty(1, dtype=dtype), M, mirror) == expected


def test_products_of_a_symmetric_float32_matrix_are_half(monkeypatch):
    sizes, product = [], correlation_tiles.product
    seen = lambda a, b: sizes.append((len(a), b.shape[1])) or product(a, b)  # noqa: E731
    monkeypatch.setattr(correlation_tiles, "product", seen)
    monkeypatch.setattr(correlation_tiles, "STRIP_BYTES", 1 << 20)
    (a,) = normal(torch.float32, (80, 5))
    correlation_fused.grams(a, None, a, None, 0)
    assert sizes == [(20, 80), (20, 60), (20, 40), (20, 20)]


def test_holds_a_strip_of_products(monkeypatch):
    sizes = {}
    for module in (correlation_tiles, gradient_triton):
        seen = lambda a, b, m=module, f=module.product: (  # noqa: E731
            sizes.setdefault(m, []).append(len(a) * b.shape[1]) or f(a, b)
        )
        monkeypatch.setattr(module, "product", seen)
    a, b = normal(torch.bfloat16, (50, 90), (50, 90))
    matrix = correlation_fused.covariance(a, b, True)[2]
    correlation_fused.gradient_across(matrix, a, None, torch.ones((), device=DEVICE), False)
    assert sizes[correlation_tiles] == [8 * 90] * 11 + [2 * 90]
    assert sizes[gradient_triton] == [8 * 90] * 6 + [2 * 90]
    assert correlation_tiles.strip_rows(7) == 84  # of 85


@pytest.mark.parametrize(
    "two, dtype", [(False, torch.float32), (True, torch.float16)], ids=["one", "two"]
)
def test_operators_are_declared_as_they_behave(two, dtype):
    a, b = normal(dtype, (5, 7), (5, 7 if two else 1))
    ops, sides = torch.ops.fastssl, [a, b] if two else [a]
    torch.library.opcheck(ops.correlation_grams.default, (sides, [], 0))
    torch.library.opcheck(ops.correlation_grams.default, ([x[2:4] for x in sides], sides, 2))
    torch.library.opcheck(ops.correlation_covariance.default, (a, b if two else None))
    torch.library.opcheck(ops.correlation_covariance.default, (a, a[:, :3]))
    one = torch.ones((), device=DEVICE)
    unit = one if dtype == torch.float16 else one.new_empty(0)
    w, coef = torch.ones(5, 5, device=DEVICE, dtype=dtype), torch.ones(7, device=DEVICE)
    given = [w, torch.ones(5, device=DEVICE), unit], a, [a, a.clone(), coef, one], False
    torch.library.opcheck(ops.correlation_gradient.default, given)
    w = torch.ones(3, 7, device=DEVICE, dtype=dtype)
    for transposed in (True, False):
        other = torch.ones(5, 7 if transposed else 3, device=DEVICE, dtype=dtype)
        given = [w, one.new_empty(0), unit], None, [None, other, None, one], transposed
        torch.library.opcheck(ops.correlation_gradient.default, given)


def test_compiles_whole():
    a, b = normal(torch.bfloat16, (5, 20), (5, 20))

    def run(a, b):
        total, gram_a, gram_b = correlation_fused.grams(a, b, a, b, 0)
        diagonal, rest, matrix = correlation_fused.covariance(a, b, False)
        da = correlation_fused.gradient(gram_b, a, Terms(a, None, None, total))
        return total + rest, da, correlation_fused.gradient_across(matrix, b, None, rest, True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(a, b), run(a, b), strict=True):
        assert torch.equal(x, y)


def test_shape_classes():
    assert shape_class(torch.empty(1, 1), "one") == "float32-one"
    assert set(correlation_tiles.TILES.variants) == {
        f"{t}-{part}" for t in ("bfloat16", "float16") for part in ("pair", "one", "columns")
    }
