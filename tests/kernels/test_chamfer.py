"""The Chamfer distance beside all distances at once, by torch.cdist in float64."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.kernels import chamfer
from fastssl.kernels.regression import chamfer_triton as ops
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, largest_tensor, saved_elements

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["torch", "triton"]
SHAPES = [(2, 11, 9, 3), (1, 1, 1, 1), (1, 5, 17, 8)]
LAYOUTS = [(torch.float32, r) for r in UPSTREAM.values()]  # and each dtype once
LAYOUTS += [(dtype, UPSTREAM["sliced"]) for dtype in DTYPES[1:]]
pytestmark = pytest.mark.usefixtures("small_blocks")


def clouds(G, N, M, D, dtype=torch.float32):
    torch.manual_seed(N)
    return [torch.randn(G, n, D, device=DEVICE).to(dtype) for n in (N, M)]


def formula(x, y, kind="l2"):
    """All differences; a mean over the points of each cloud."""
    far = (x[:, :, None] - y[:, None]).square().sum(-1)
    if kind == "l1":
        far = far.sqrt() / 2
    return far.min(2).values.mean(1) + far.min(1).values.mean(1)


def wide(call):
    return lambda *x: call(*x).to(torch.promote_types(x[0].dtype, torch.float32))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("kind", ["l2", "l1"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, kind, impl):
    call = partial(chamfer, kind=kind, impl=impl)
    assert_no_worse(call, partial(formula, kind=kind), clouds(*shape))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["l2", "l1"])
@pytest.mark.parametrize("dtype, reduce", LAYOUTS)
def test_dtypes_and_upstream_layouts(dtype, reduce, kind, impl):
    call = partial(chamfer, kind=kind, impl=impl)
    eager = wide(partial(formula, kind=kind))
    x, y = clouds(1, 9, 5, 3, dtype)
    assert_no_worse(call, eager, [x.float(), y.float()], reduce)
    exact = call(x.float(), y.float())  # a 16-bit point is a float32 one: only gradients round
    torch.testing.assert_close(call(x, y), exact, rtol=0, atol=0)
    leaves = [z.requires_grad_() for z in (x, y)]
    want = [z.detach().float().requires_grad_() for z in leaves]
    found = torch.autograd.grad(reduce(call(*leaves)), leaves)
    true = torch.autograd.grad(reduce(call(*want)), want)
    for f, t in zip(found, true, strict=True):
        assert f.dtype == dtype
        ulp = torch.finfo(dtype).eps
        torch.testing.assert_close(f.float(), t, rtol=ulp, atol=ulp * 1e-3)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_the_distances_of_torch_cdist(kind, impl):
    x, y = clouds(1, 17, 13, 3)
    far = torch.cdist(x.double(), y.double())
    far = far.square() if kind == "l2" else far / 2
    want = far.min(2).values.mean(1) + far.min(1).values.mean(1)
    found = chamfer(x, y, kind=kind, impl=impl).double()
    torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_far_from_the_origin_nothing_cancels(impl):
    """Points on a grid of 1/64 about 1000: every difference is exact in float32."""
    torch.manual_seed(0)
    x, y = (torch.randint(-64, 64, (1, n, 3), device=DEVICE) / 64 + 1000 for n in (17, 9))
    near = chamfer(x - 1000, y - 1000, impl=impl)
    assert torch.equal(chamfer(x, y, impl=impl), near)
    wrong = torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist").square()
    expanded = wrong.min(2).values.mean(1) + wrong.min(1).values.mean(1)
    assert ((expanded - near).abs() > 1e-3 * near).any()  # what the product expansion would give


@pytest.mark.parametrize("impl", IMPLS)
def test_of_equally_near_points_the_first_is_pulled(impl):
    """Copies far enough apart in the cloud to lie in different blocks and chunks."""
    point = torch.tensor([1.0, 0.0, 0.0], device=DEVICE)
    x = torch.zeros(1, 1, 3, device=DEVICE)
    y = (3 * point).repeat(1, 30, 1)
    y[0, [2, 7, 25]] = point
    leaves = [x.requires_grad_(), y.requires_grad_()]
    dx, dy = torch.autograd.grad(chamfer(*leaves, impl=impl).sum(), leaves)
    own = torch.zeros(30, device=DEVICE)
    own[2] = 2
    expected = own + 2 * y.detach()[0, :, 0] / 30
    torch.testing.assert_close(dy[0, :, 0], expected)
    torch.testing.assert_close(dx[0, 0, 0], -expected.sum())
    y_first = y.detach().clone()[:, :1].requires_grad_()
    many = x.detach().repeat(1, 30, 1).requires_grad_()
    d_many, _ = torch.autograd.grad(chamfer(many, y_first, impl=impl).sum(), (many, y_first))
    expected = torch.full((30,), -6 / 30, device=DEVICE)
    expected[0] -= 6
    torch.testing.assert_close(d_many[0, :, 0], expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_equal_clouds_have_no_distance_and_no_gradient(kind, impl):
    x = clouds(1, 13, 1, 3)[0]
    leaves = [x.clone().requires_grad_(), x.flip(1).requires_grad_()]
    loss = chamfer(*leaves, kind=kind, impl=impl)
    assert (loss == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(loss.sum(), leaves))


@settings(max_examples=6)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from(["l1", "l2"]))
@pytest.mark.parametrize("impl", IMPLS)
def test_laws(impl, N, M, D, kind):
    """Symmetric in its clouds, blind to their order and to moving both, scaled by its unit."""
    x, y = (4 * z.round(decimals=1) for z in clouds(2, N, M, D))
    call = partial(chamfer, kind=kind, impl=impl)
    loss = call(x, y)
    same = partial(torch.testing.assert_close, rtol=2e-6, atol=1e-6)
    same(call(y, x), loss)
    same(call(x.flip(1), y.roll(1, 1)), loss)
    same(call(2 * x, 2 * y), loss * (4 if kind == "l2" else 2))
    same(call(x - 8, y - 8), loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_points_and_frozen_sides(impl):
    wide = torch.randn(2, 10, 12, device=DEVICE)
    for x in (wide[:, :3].mT, wide[:, ::3, 1:7:2], wide[:1, :, :3].expand(2, 10, 3)):
        y = torch.randn(2, 6, 3, device=DEVICE).mT.contiguous().mT
        assert torch.equal(chamfer(x, y, impl=impl), chamfer(x.contiguous(), y, impl=impl))
        leaf = x.detach().requires_grad_()
        chamfer(leaf, y, impl=impl).sum().backward()
        assert y.grad is None
        (want,) = torch.autograd.grad(formula(leaf, y).sum(), leaf)
        torch.testing.assert_close(leaf.grad, want)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's nan < nan
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "side, at, bad", [(0, 0, float("nan")), (0, 8, float("inf")), (1, 4, float("nan"))]
)
def test_what_is_not_finite_is_seen_and_stays_in_its_pair(side, at, bad, impl):
    pair = clouds(3, 9, 5, 3)
    clean = chamfer(*pair, impl=impl)
    pair[side][1, at, 2] = bad
    leaves = [x.requires_grad_() for x in pair]
    loss = chamfer(*leaves, impl=impl)
    assert not loss[1].isfinite() and torch.equal(loss[[0, 2]], clean[[0, 2]])
    assert all(g[[0, 2]].isfinite().all() for g in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("impl", IMPLS)
def test_no_matrix_of_distances_is_held(impl):
    x, y = (z.requires_grad_() for z in clouds(1, 30, 26, 3))
    assert saved_elements(lambda: chamfer(x, y, impl=impl)) <= 56 * 3 + 56
    run = lambda: chamfer(x, y, impl=impl).sum().backward()  # noqa: E731
    assert largest_tensor(run) <= 512  # a chunk; all distances are 780


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_and_once(impl):
    x, y = (z.requires_grad_() for z in clouds(2, 9, 5, 3))
    run = lambda x, y: chamfer(x, y, kind="l1", impl=impl).sum()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(run(x, y), (x, y))
    assert all(map(torch.equal, torch.autograd.grad(compiled(x, y), (x, y)), want))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(run(x, y), x, create_graph=True)


def test_operators():
    x, y = clouds(2, 9, 5, 3, torch.float16)
    found = torch.ops.fastssl.chamfer_nearest, torch.ops.fastssl.chamfer_pull
    _, places, _, back = found[0](x, y)
    tests = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(found[0].default, (x, y.float()), test_utils=tests)
    arguments = (torch.ones(2, device=DEVICE), x, y, places, back, [0.5, 0.25], True)
    torch.library.opcheck(found[1].default, arguments, test_utils=tests)


@pytest.mark.parametrize("kernel", [ops.NEAREST, ops.PULL], ids=lambda kernel: kernel.name)
def test_trials_launch_what_they_time(kernel, monkeypatch):
    monkeypatch.setattr(ops, "TRIAL", (2, 7, 3))
    for name, variant in kernel.variants.items():
        named = {*variant.signature, *variant.constexprs, *variant.safe.blocks}
        assert named == set(kernel.fn.arg_names)
        if name == "float16":
            found = variant.trial(variant.safe, torch.device(DEVICE))()
            found = [found] if isinstance(found, torch.Tensor) else found
            assert all(x.isfinite().all() for x in found)


P = torch.zeros(2, 5, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: chamfer(P, P[:1]),
            r"\(G, N, D\) and \(G, M, D\), got \(2, 5, 3\) and \(1, 5, 3\)",
        ),
        (lambda: chamfer(P, P[..., :2]), r"got \(2, 5, 3\) and \(2, 5, 2\)"),
        (lambda: chamfer(P[0], P[0]), r"got \(5, 3\) and \(5, 3\)"),
        (lambda: chamfer(P.int(), P), "pred must be a floating-point tensor"),
        (lambda: chamfer(P.repeat(1, 1, 3), P.repeat(1, 1, 3)), "1 to 8 coordinates, got 9"),
        (lambda: chamfer(P[:, :0], P), r"must have points, got \(2, 0, 3\) and \(2, 5, 3\)"),
        (lambda: chamfer(P, P, kind="l3"), "kind must be 'l2' or 'l1', got 'l3'"),
        (lambda: chamfer(P, P, impl="c"), "impl must be one of auto, torch, triton, reference"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
