"""The Triton kernels at blocks of 16 rows and 8 columns, so that small odd shapes cross several."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.kernels.common import tuning as _tuning
from fastssl.kernels.common.tuning import Config
from fastssl.kernels.correlation import moments_configs
from fastssl.kernels.correlation import moments_triton as ops
from fastssl.kernels.correlation.moments_ops import fused
from tests.covering import examples
from tests.oracle import DEVICE, UPSTREAM, as_accurate_as_eager, assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 1), (37, 5), (70, 11)]
KERNELS = (ops.FORWARD, ops.BACKWARD)
ROUTES = {  # rows of a block, multiprocessors: few columns do not fill 60
    "whole": (16, 1),
    "held": (256, 1),
    "split": (16, 60),
}


@pytest.fixture(autouse=True, params=ROUTES)
def route(request, monkeypatch, nan_filled):
    """One of the three ways through the kernels, and what the launches of it must be."""
    step, places = ROUTES[request.param]
    monkeypatch.setattr(ops, "sm_count", lambda device: places)
    monkeypatch.setattr(ops, "FEW_ROWS", 0)
    blocks = {"BLOCK_N": step, "BLOCK_D": 8, "STAGES": 2}
    with (
        _tuning.forced(ops.FORWARD.name, Config(blocks)),
        _tuning.forced(ops.BACKWARD.name, Config(blocks)),
        _tuning.forced(ops.JOIN.name, Config({"BLOCK_P": 2, "BLOCK_D": 8})),
    ):
        yield request.param


once = pytest.mark.parametrize("route", ["split"], indirect=True)  # nothing here goes by it


class Whole(torch.autograd.Function):
    """One process: `standardize` and `gradient_whole`."""

    @staticmethod
    def forward(ctx, z, eps, unbiased):
        out, inv_std = ops.standardize(z, eps, unbiased)
        ctx.save_for_backward(out, inv_std)
        ctx.divisor = len(z) - int(unbiased)
        return out

    @staticmethod
    def backward(ctx, grad):
        return ops.gradient_whole(grad, *ctx.saved_tensors, ctx.divisor), None, None


class Ranks(torch.autograd.Function):
    """Two ranks, each with every second row: the statistics of each, joined, then applied."""

    @staticmethod
    def forward(ctx, z, eps, unbiased):
        parts = torch.stack([ops.moments(z[i::2]) for i in (0, 1)])
        shift, rest, m2 = ops.join(parts, len(z) // 2)
        ctx.divisor = len(z) - int(unbiased)
        inv_std = (m2 / ctx.divisor + eps).rsqrt()
        out = torch.empty_like(z)
        for i in (0, 1):
            out[i::2] = ops.apply(z[i::2], shift, rest, inv_std)
        ctx.save_for_backward(out, inv_std)
        return out

    @staticmethod
    def backward(ctx, grad):
        out, inv_std = ctx.saved_tensors
        sums = ops.sums(grad[::2], out[::2]) + ops.sums(grad[1::2], out[1::2])
        means = sums[0] / len(out), sums[1] / ctx.divisor
        dz = torch.empty_like(out)
        for i in (0, 1):
            dz[i::2] = ops.gradient(grad[i::2], out[i::2], inv_std, *means)
        return dz, None, None


def rows(dtype, *shapes):
    torch.manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def formula(z, eps, unbiased):
    return (z - z.mean(0)) / (z.var(0, correction=int(unbiased)) + eps).sqrt()


def bent(reduce):
    """A plain sum's gradient would be zero."""
    return lambda out: reduce(out * out.detach().cos())


BENT = bent(UPSTREAM["contiguous"])


def check(function: Any, z, unbiased, reduce=BENT):
    assert_no_worse(
        lambda z: function.apply(z, 1e-3, unbiased),
        lambda z: formula(z, 1e-3, unbiased),
        [z],
        reduce,
    )


@pytest.mark.parametrize(
    "dtype, unbiased", [(DTYPES[0], False), *((dtype, True) for dtype in DTYPES)], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_standardised(shape, unbiased, dtype):
    check(Whole, rows(dtype, shape)[0], unbiased)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_layouts(dtype, reduce):
    plain = reduce is not UPSTREAM["expanded"]  # whose gradient is zero
    check(Whole, rows(dtype, (37, 5))[0], False, reduce if plain else bent(reduce))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1), (50, 9)], ids=str)
def test_two_ranks(shape, dtype):
    check(Ranks, rows(dtype, shape)[0], True)


@pytest.mark.parametrize("make", ["transposed", "columns", "rows", "expanded"])
def test_strided_rows(make):
    (wide,) = rows(torch.float32, (50, 50))
    z = {
        "transposed": wide[:9, :21].T,
        "columns": wide[:21, 1:19:2],
        "rows": wide[:42:2, 3:12],
        "expanded": wide[:1, :9].expand(21, 9),
    }[make]
    out, inv_std = ops.standardize(z, 1e-3, False)
    want, want_inv = ops.standardize(z.contiguous(), 1e-3, False)
    assert torch.equal(out, want) and torch.equal(inv_std, want_inv) and out.is_contiguous()
    as_accurate_as_eager(out, formula(z, 1e-3, False), formula(z.double(), 1e-3, False))
    assert torch.equal(ops.sums(z, wide[:21, :9]), ops.sums(z.contiguous(), wide[:21, :9]))


def test_strided_upstream():
    (wide,) = rows(torch.float32, (50, 50))
    out, inv_std = ops.standardize(wide[:21, :9].contiguous(), 1e-3, False)
    grad = torch.full((21,), 2.0, device=DEVICE)[:, None].expand(21, 9)  # of either stride
    for g in (grad, wide[:9, :21].T, wide[3:24, :18:2]):
        dz = ops.gradient_whole(g, out, inv_std, 21)
        assert torch.equal(dz, ops.gradient_whole(g.contiguous(), out, inv_std, 21))


def test_known_values():
    z = torch.tensor([[1.0, 5.0], [3.0, 5.0]], device=DEVICE)
    out, inv_std = ops.standardize(z, 3.0, False)
    assert out.tolist() == [[-0.5, 0.0], [0.5, 0.0]]
    assert inv_std.tolist() == [0.5, pytest.approx(3**-0.5)]
    assert ops.standardize(z, 2.0, True)[1].tolist() == [0.5, pytest.approx(2**-0.5)]
    assert (ops.moments(z).unbind()[0] + ops.moments(z)[1]).tolist() == [2.0, 5.0]
    assert ops.moments(z)[2].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("mean", [1e6, -3e5])
def test_a_far_mean_costs_no_accuracy(mean):
    torch.manual_seed(0)
    z = mean + torch.randn(99, 5, device=DEVICE)
    wide = z.double()
    shift, rest, m2 = ops.moments(z)
    error = (shift.double() + rest.double() - wide.mean(0)).abs().max()
    assert error < 1e-7 and (rest.abs() <= 0.04).all()
    true_var = wide.var(0, correction=0)
    torch.testing.assert_close(m2.double() / 99, true_var, rtol=5e-7, atol=0)
    truth = formula(wide, 0.0, False)
    out, inv_std = ops.standardize(z, 0.0, False)
    torch.testing.assert_close(out.double(), truth, rtol=5e-7, atol=2e-7)
    applied = ops.apply(z, shift, rest, inv_std)
    torch.testing.assert_close(applied.double(), truth, rtol=5e-7, atol=2e-7)


def test_a_first_row_far_from_the_others():
    (z,) = rows(torch.float32, (200, 4))
    z[0] += 1e5
    out = ops.standardize(z, 0.0, False)[0]
    as_accurate_as_eager(out, formula(z, 0.0, False), formula(z.double(), 0.0, False))


@pytest.mark.parametrize("value, dtype", [(3.3, DTYPES[0]), (6e-8, DTYPES[2]), (-1e4, DTYPES[1])])
def test_a_constant_column_is_zero(value, dtype):
    z = torch.full((37, 6), value, device=DEVICE).to(dtype)
    z[:, 3:] = rows(dtype, (37, 3))[0]
    assert (ops.moments(z)[1:, :3] == 0).all()
    out, inv_std = ops.standardize(z, 0.0, False)
    assert (out[:, :3] == 0).all() and (inv_std[:3] == 0).all()
    dz = ops.gradient_whole(*rows(dtype, (37, 6)), out, inv_std, 37)
    assert (dz[:, :3] == 0).all() and dz.isfinite().all() and (dz[:, 3:] != 0).any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's inf - inf
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 36])
def test_a_nan_stays_in_its_column(at, bad):
    z, grad = rows(torch.float32, (37, 7), (37, 7))
    clean, clean_inv = ops.standardize(z, 1e-3, False)
    z[at, 2] = bad
    out, inv_std = ops.standardize(z, 1e-3, False)
    dz = ops.gradient_whole(grad, out, inv_std, 37)
    others = [0, 1, 3, 4, 5, 6]
    assert out[:, 2].isnan().all() and inv_std[2].isnan() and dz[:, 2].isnan().all()
    assert torch.equal(out[:, others], clean[:, others])
    assert torch.equal(inv_std[others], clean_inv[others]) and dz[:, others].isfinite().all()
    moments = ops.join(ops.moments(z)[None], 37)
    assert moments[:, 2].isnan().any() and moments[:, others].isfinite().all()


def test_an_affine_map_of_the_columns_changes_nothing():
    (z,) = rows(torch.float32, (61, 7))
    out = ops.standardize(z, 0.0, True)[0]
    turned = ops.standardize(-4 * z, 0.0, True)[0]  # powers of two: exact
    assert torch.equal(turned, -out)
    moved = ops.standardize(3 * z + 20, 0.0, True)[0]
    torch.testing.assert_close(moved, out, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_applied_with_an_offset(dtype):
    z, columns = rows(dtype, (37, 9))[0], rows(torch.float32, (8, 9))[0]
    shift, rest, scale, offset = columns[::2]
    eager = lambda z, a, b, c, d: (z - a - b) * c + d  # noqa: E731
    ours = ops.apply(z, shift, rest, scale, offset)
    truth = eager(*(x.double() for x in (z, shift, rest, scale, offset)))
    as_accurate_as_eager(ours, eager(z, shift, rest, scale, offset).to(dtype), truth)
    assert torch.equal(ops.apply(z, shift, rest, scale, 0 * offset), ops.apply(z, *columns[:6:2]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape, dtype):
    a, b = rows(dtype, shape, shape)
    eager = torch.stack([a.sum(0), (a * b).sum(0)]).float()
    truth = torch.stack([a.double().sum(0), (a.double() * b).sum(0)])
    as_accurate_as_eager(ops.sums(a, b), eager, truth)
    as_accurate_as_eager(ops.column_dot(a, b), eager[1], truth[1])
    mixed = ops.sums(a.float(), b)
    torch.testing.assert_close(mixed, ops.sums(a, b))
    assert mixed.dtype == torch.float32


@once
@settings(max_examples=examples(10))
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 6), st.sampled_from([0.0, 1e5]))
def test_parts_join_to_the_whole(parts, share, D, mean):
    torch.manual_seed(parts * share * D)
    z = mean + torch.randn(parts * share, D, device=DEVICE)
    each = torch.stack([ops.moments(part) for part in z.chunk(parts)])
    shift, rest, m2 = ops.join(each, share).double()
    wide = z.double()
    torch.testing.assert_close(shift + rest, wide.mean(0), rtol=1e-11, atol=1e-6)
    want = wide.var(0, correction=0) * len(z)
    torch.testing.assert_close(m2, want, rtol=2e-6, atol=1e-6)


def test_the_routes_are_taken(route):
    (z,) = rows(torch.float32, (130, 19))
    assert all(ops._splits(kernel, z) == (route == "split") for kernel in KERNELS)
    whole = ops._Launch(ops.FORWARD, z, "whole")
    assert whole.shares == 1 and whole.phases["HELD"] == (route == "held")
    alone = ops._Launch(ops.BACKWARD, z, "sums")
    assert not alone.phases["HELD"]
    assert (alone.shares, alone.share) == ((9, 16) if route == "split" else (1, whole.share))


def test_the_same_bits_each_time():
    z, grad = rows(torch.bfloat16, (37, 9), (37, 9))
    runs = [ops.standardize(z, 1e-3, False) for _ in range(2)]
    assert all(map(torch.equal, *runs))
    dz = [ops.gradient_whole(grad, *runs[0], 37) for _ in range(2)]
    assert torch.equal(*dz) and torch.equal(ops.moments(z), ops.moments(z))


@once
def test_operators():
    z, grad = rows(torch.bfloat16, (20, 5), (20, 5))
    column = torch.ones(5, device=DEVICE)
    for operator, arguments in [
        ("moments", (z,)),
        ("join", (torch.ones(2, 3, 5, device=DEVICE), 4)),
        ("standardize", (z, 0.1, True)),
        ("apply", (z.T.contiguous().T, column, column, column)),
        ("apply", (z, column, column, column, column)),
        ("sums", (grad, z)),
        ("gradient", (grad, z, column, column, column)),
        ("gradient_whole", (grad, z, column, 20)),
    ]:
        found = getattr(torch.ops.fastssl, f"moments_{operator}").default
        tests = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
        torch.library.opcheck(found, arguments, test_utils=tests)


@once
def test_compiles_whole():
    (z,) = rows(torch.float32, (20, 5))

    def both(z):
        out, inv_std = fused.standardize(2 * z, 0.1, False)
        return out, fused.gradient_whole(out.cos(), out, inv_std, 20), fused.column_dot(out, z)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(z), both(z)))


@once
def test_shape_classes():
    name = lambda N, kernel: moments_configs.shape_class(  # noqa: E731
        kernel.variants, torch.empty(N, 16, dtype=torch.bfloat16), "whole"
    )
    odd = torch.empty(257, 17, dtype=torch.bfloat16)
    assert moments_configs.shape_class(ops.FORWARD.variants, odd, "whole") == "bfloat16-whole"
    assert name(256, ops.FORWARD) == "bfloat16-N256" and name(257, ops.BACKWARD) == "bfloat16-N512"
    assert (
        name(2048, ops.FORWARD) == "bfloat16-N2048" and name(2049, ops.FORWARD) == "bfloat16-whole"
    )
    assert name(1025, ops.BACKWARD) == "bfloat16-whole"
    for variant in [v for kernel in KERNELS for v in kernel.variants.values()]:
        dtype, part = variant.name.split("-")
        held = part.removeprefix("N") if part in moments_configs.HELD else ""
        assert variant.constexprs["HELD"] == bool(held) and hasattr(torch, dtype)
        blocks = {config.blocks["BLOCK_N"] for config in variant.candidates}
        assert not held or blocks == {int(held)}


@once
@pytest.mark.parametrize("kernel", [*KERNELS, ops.JOIN], ids=lambda kernel: kernel.name)
def test_trials_launch_what_they_time(kernel, monkeypatch):
    """Each part once, as the tuner would."""
    monkeypatch.setattr(moments_configs, "TRIAL", (40, 10))
    for name, variant in kernel.variants.items():
        if name.startswith("bfloat16") or name == "join":
            found = variant.trial(variant.safe, torch.device(DEVICE))()
            found = [found] if isinstance(found, torch.Tensor) else found
            assert all(x.isfinite().all() and x.shape[-1] == 10 for x in found)
