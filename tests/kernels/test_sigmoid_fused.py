"""The Triton kernels at blocks of 16, so that small odd shapes cross several and divide none."""

import math

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it where a function is

from fastssl.kernels import PairMask, same_group
from fastssl.kernels.common import rows
from fastssl.kernels.common import tuning as _tuning
from fastssl.kernels.pairwise import sigmoid_ops
from fastssl.kernels.pairwise import sigmoid_triton as sigmoid_fused
from fastssl.kernels.pairwise.classes import shape_class
from fastssl.kernels.pairwise.sigmoid import (
    pairwise_sigmoid,
    pairwise_sigmoid_grads,
    pairwise_sigmoid_reference,
)
from fastssl.kernels.pairwise.sigmoid_torch import Logits
from fastssl.kernels.pairwise.sigmoid_triton import TILES, WEIGH, choose, one_side, results, weigh
from tests.covering import crossed
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor, saved_elements

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = (True, True, True, True)
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16}


@triton.jit
def below(rows, cols):
    return rows > cols


LOWER = PairMask("fused-lower", lambda rows, cols: rows > cols, triton=below)  # from one side only
EAGER = PairMask("fused-eager", lambda rows, cols: rows > cols)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, five_places, uneven):
    monkeypatch.setattr(sigmoid_fused, "BLOCK_BYTES", 2048)  # 16 rows by 32 columns
    with (
        _tuning.forced(TILES.name, _tuning.Config({**SMALL, "BLOCK_D": 16, "BLOCK_O": 16})),
        _tuning.forced(WEIGH.name, _tuning.Config({"BLOCK_M": 8, "BLOCK_N": 16})),
    ):
        yield


@pytest.fixture(params=["tiles", "products"])
def schedule(request, monkeypatch):
    monkeypatch.setattr(sigmoid_fused, "schedule", lambda x, step: request.param)
    return request.param


def embeddings(dtype, *shapes):
    """Rows of length 1."""
    torch.manual_seed(sum(map(sum, shapes)))
    rows = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in shapes]
    return [torch.nn.functional.normalize(x).to(dtype) for x in rows]


def number(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def ids(n, shift=0):
    return torch.arange(shift, n + shift, device=DEVICE)


def fused(q, k, scale=5.0, bias=-2.0, positive=same_group):
    return pairwise_sigmoid(q, k, scale, bias, positive=positive, impl="triton")


def reference(q, k, scale=5.0, bias=-2.0, positive=same_group):
    return pairwise_sigmoid_reference(q, k, scale, bias, positive)


@pytest.mark.usefixtures("schedule")
@crossed(dtype={str(x): x for x in DTYPES}, reduce=UPSTREAM)
@pytest.mark.parametrize("M, N, D", [(1, 1, 1), (3, 37, 5), (35, 19, 17)])
def test_no_worse_than_eager(M, N, D, dtype, reduce):
    q, k = embeddings(dtype, (M, D), (N, D))
    assert_no_worse(fused, reference, (q, k, number(5.0, dtype), number(-2.0, dtype)), reduce)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize(
    "positive",
    [
        same_group(ids(23, 30), ids(37)),
        same_group(ids(46)[::2] % 5, ids(37) % 7),
        LOWER(ids(23, 5), ids(37)),
        LOWER & same_group(ids(23) % 3, ids(37) % 3),
    ],
    ids=["shifted", "groups", "lower", "two rules"],
)
def test_positive_pairs_are_those_the_rules_keep(positive):
    q, k = embeddings(torch.float32, (23, 5), (37, 5))
    assert_no_worse(
        lambda q, k: fused(q, k, positive=positive),
        lambda q, k: reference(q, k, positive=positive),
        (q, k),
    )


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("scale, bias", [(100.0, 0.0), (-3.0, 1.0), (0.0, -10.0), (10.0, -10.0)])
def test_any_scale_and_bias(scale, bias):
    q, k = embeddings(torch.float32, (20, 8), (35, 8))
    assert_no_worse(fused, reference, (q, k, number(scale), number(bias)), slack=4.0)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_of_a_thousand_are_finite(sign, dtype):
    x = torch.ones(20, 1, device=DEVICE, dtype=dtype)
    inputs = x, x.clone(), number(sign * 1000.0), number(0.0)
    value, *made = grads(fused, inputs, UPSTREAM["expanded"])
    assert value.item() == pytest.approx(1000 * (20 if sign < 0 else 20 * 19), rel=1e-6)
    assert all(g.isfinite().all() for g in made)
    assert made[3].item() == (-20 if sign < 0 else 20 * 19)


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("bias", [-60.0, -30.0, -12.0, -3.0, 0.0, 3.0, 30.0])
def test_terms_of_any_size_have_their_digits(bias):
    q, k = torch.zeros(20, 2, device=DEVICE), torch.zeros(35, 2, device=DEVICE)
    far = same_group(ids(20, 100), ids(35))
    value, slope = grads(lambda b: fused(q, k, 1.0, b, positive=far), [number(bias)], lambda x: x)
    assert value.item() == pytest.approx(700 * math.log1p(math.exp(bias)), rel=4e-6)
    assert slope.item() == pytest.approx(700 / (1 + math.exp(-bias)), rel=4e-6)


@pytest.mark.usefixtures("schedule")
def test_zero_vectors_give_ln_2_a_pair():
    q, k = torch.zeros(20, 3, device=DEVICE), torch.zeros(35, 3, device=DEVICE)
    value, dq, dk = grads(lambda q, k: fused(q, k, 10.0, 0.0), [q, k])
    assert value.item() == pytest.approx(700 * math.log(2), rel=1e-6)
    assert (dq == 0).all() and (dk == 0).all()


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("which", range(4), ids=["q", "k", "scale", "bias"])
def test_a_nan_is_never_hidden(which):
    q, k = embeddings(torch.bfloat16, (19, 3), (21, 3))
    inputs = [q, k, number(1.0), number(0.0)]
    inputs[which].view(-1)[-1] = torch.nan
    value, *made = grads(fused, inputs)
    assert value.isnan() and all(g.isnan().any() for g in made)


@pytest.mark.usefixtures("schedule")
def test_a_nan_in_one_row_stays_out_of_the_others():
    q, k = embeddings(torch.float32, (19, 3), (21, 3))
    q[17, 1] = torch.nan
    _, dq, dk = grads(lambda q, k: fused(q, k), [q, k])
    assert dq[17].isnan().all() and dq.isnan().sum() == 3 and dk.isnan().all()


@pytest.mark.usefixtures("schedule")
def test_gradients_only_where_wanted():
    q, k = embeddings(torch.float32, (19, 3), (21, 3))
    inputs = [q, k, number(5.0), number(-2.0)]
    every = grads(fused, inputs)[1:]
    for i in range(4):
        alone = grads(lambda x, i=i: fused(*inputs[:i], x, *inputs[i + 1 :]), [inputs[i]])[1]
        assert torch.equal(alone, every[i])


@pytest.mark.usefixtures("schedule")
def test_float16_gradients_keep_small_weights():
    """Without their unit the weights, 1e-8 of the largest, would be half of float16's least."""
    q, k = embeddings(torch.float16, (40, 5), (30, 5))
    far = same_group(ids(40, 100), ids(30))
    loss = lambda f: lambda q, k: 1e3 * f(q, k, 1.0, -18.0, positive=far)  # noqa: E731
    wide = grads(loss(reference), [q.double(), k.double()])
    for found, truth in zip(grads(loss(fused), [q, k]), wide, strict=True):
        assert (found - truth).abs().max() < 3e-3 * truth.abs().max()


@pytest.mark.usefixtures("schedule")
def test_float16_gradients_survive_a_small_upstream():
    q, k = embeddings(torch.float16, (40, 5), (30, 5))
    loss = lambda f: lambda q, k: 1e-6 * f(q, k, 1000.0, -10.0)  # noqa: E731
    wide = grads(loss(reference), [q.double(), k.double()])
    for found, truth in zip(grads(loss(fused), [q, k])[1:], wide[1:], strict=True):
        assert (found - truth).abs().max() < 1e-2 * truth.abs().max()


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: torch.stack([x, x + torch.nan], 1).flatten(0, 1)[::2],
    "a slice of columns": lambda x: torch.nn.functional.pad(x, (3, 2), value=torch.nan)[:, 3:-2],
    "one row expanded": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout):
    plain = [layout(x).contiguous() for x in embeddings(torch.float32, (19, 5), (21, 5))]
    given = [layout(x) for x in plain]
    assert all(x.stride() != y.stride() for x, y in zip(given, plain, strict=True))
    leaves = [x.detach().requires_grad_() for x in given]
    found = torch.autograd.grad(fused(*leaves), leaves)
    torch.testing.assert_close(list(found), grads(fused, plain, UPSTREAM["expanded"])[1:])


@pytest.mark.usefixtures("schedule")
def test_rows_beyond_two_to_the_31_elements(tmp_path):
    D, gap = 4, 2**30
    size = 2 * gap + D
    if DEVICE == "cpu":  # a file without content takes no space
        far = torch.from_file(str(tmp_path / "far"), shared=True, size=size, dtype=torch.float16)
    else:
        far = torch.empty(size, dtype=torch.float16, device=DEVICE)
    far = far.as_strided((3, D), (gap, 1))
    (near,) = embeddings(torch.float16, (3, D))
    far.copy_(near)
    expected = grads(fused, [near, near.clone()])
    q, k = far.detach().requires_grad_(), far.detach().requires_grad_()
    value = fused(q, k)
    UPSTREAM["contiguous"](value).backward()
    assert all(torch.equal(a, b) for a, b in zip([value, q.grad, k.grad], expected, strict=True))


@pytest.mark.usefixtures("schedule")
def test_rows_that_no_wide_load_divides_are_padded(monkeypatch):
    monkeypatch.setattr(rows, "EVEN", 16)
    q, k = embeddings(torch.float32, (19, 21), (37, 21))
    assert_no_worse(fused, reference, (q, k, number(5.0), number(-2.0)))


@pytest.mark.usefixtures("schedule")
def test_the_same_bits_each_time():
    q, k = embeddings(torch.bfloat16, (19, 17), (37, 17))
    first, second = (grads(fused, [q, k, number(3.0), number(-1.0)]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_schedules_go_by_the_features(monkeypatch):
    ran = []
    for name in ("_by_tiles", "_by_products"):
        monkeypatch.setattr(
            sigmoid_fused, name, lambda *_, n=name: ran.append(n) or [torch.ones(3)] * 3
        )
    for D in (256, 257):
        q = torch.zeros(2, D, dtype=torch.bfloat16, device=DEVICE)
        results(Logits(q, q, number(1.0), number(0.0), None, None, "same_group@-1"), ALL)
    assert ran == ["_by_tiles", "_by_products"]


def test_passes_are_those_that_the_gradients_need(monkeypatch):
    ran, call = [], one_side
    monkeypatch.setattr(sigmoid_fused, "one_side", lambda *a: ran.append(a[1]) or call(*a))
    q, k = embeddings(torch.float32, (19, 3), (21, 3))
    for need, passes in (
        ((False,) * 4, ["loss"]),
        (ALL, ["rows", "cols"]),
        ((False, True, False, False), ["loss", "cols"]),
        ((False, False, True, False), ["rows"]),
    ):
        ran.clear()
        results(Logits(q, k, number(1.0), number(0.0), None, None, "same_group@-1"), need)
        assert ran == passes


@pytest.mark.usefixtures("schedule")
def test_keeps_and_makes_nothing_of_all_pairs():
    q, k = (torch.randn(60, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    assert saved_elements(lambda: fused(q, k)) <= 2 * 240 + 2
    logits = Logits(q.detach(), k.detach(), number(1.0), number(0.0), None, None, "same_group@-1")
    # An operand or a block of 512 in bytes, as the interpreter views it; all pairs are 3600.
    assert largest_tensor(lambda: results(logits, ALL)) <= 2048


@pytest.mark.parametrize("precision, name", [("highest", "float32"), ("high", "tf32")])
def test_float32_products_are_ieee_unless_torch_allows_tf32(precision, name, monkeypatch):
    launched = []
    before = torch.get_float32_matmul_precision()
    q, k = embeddings(torch.float32, (19, 3), (21, 3))
    look = lambda *a: launched.append(choose(*a)) or launched[-1]  # noqa: E731
    monkeypatch.setattr(sigmoid_fused, "choose", look)
    torch.set_float32_matmul_precision(precision)
    try:
        torch.testing.assert_close(fused(q, k), reference(q, k), rtol=1e-3, atol=1e-3)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [choice[0] for choice in launched] == [f"{name}-loss"]
    constants = TILES.variants[f"{name}-loss"].constexprs
    assert constants["PRECISION"] == ("tf32" if name == "tf32" else "ieee")


@pytest.mark.parametrize("D, width", [(1, "D64"), (64, "D64"), (65, "D128"), (257, "long")])
def test_classes_go_by_dtype_and_width(D, width):
    assert shape_class(torch.empty(3, D, dtype=torch.float16), "rows") == f"float16-{width}-rows"


@pytest.mark.parametrize("name", ["float16-D64-rows", "bfloat16-D128-cols", "float32-loss"])
def test_the_tuners_trial_of_the_tiles_runs(name, monkeypatch):
    monkeypatch.setattr("fastssl.kernels.pairwise.sigmoid_configs.TRIAL_ROWS", 20)
    variant = TILES.variants[name]
    first, second = (variant.trial(c, torch.device(DEVICE))() for c in variant.candidates[:2])
    assert len(first) == (2 if name.endswith("rows") else 1)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["float16-grad", "float32-grad", "bfloat16-loss"])
def test_the_tuners_trial_of_the_weights_runs_again_and_again(name, monkeypatch):
    monkeypatch.setattr("fastssl.kernels.pairwise.sigmoid_configs.TRIAL_ROWS", 20)
    monkeypatch.setattr("fastssl.kernels.pairwise.sigmoid_configs.TRIAL_BLOCK", (17, 19))
    variant = WEIGH.variants[name]
    run = variant.trial(variant.safe, torch.device(DEVICE))
    first, second = run(), run()
    assert len(first) == (2 if name.endswith("grad") else 1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_weights_of_a_block_are_those_of_its_place():
    q, k = embeddings(torch.float32, (20, 3), (35, 3))
    logits = Logits(q, k, number(5.0), number(-2.0), None, None, "same_group@-1")
    i, j = slice(3, 14), slice(6, 35)
    _, w = weigh(q[i] @ k[j].T, logits, i, j, "grad")
    s = 5 * q @ k.T - 2
    y = 2 * torch.eye(20, 35, device=DEVICE) - 1
    torch.testing.assert_close(w, (-y * (-y * s).sigmoid())[i, j])


@pytest.mark.usefixtures("schedule")
def test_autocast_does_not_reach_inside():
    q, k = embeddings(torch.float32, (9, 16), (8, 16))
    plain = grads(fused, [q, k])
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = grads(fused, [q, k])
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_second_derivative_is_refused():
    z = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(fused(z, z), z, create_graph=True)


@pytest.mark.usefixtures("schedule")
def test_compiles_without_a_graph_break():
    def loss(q, k, scale, bias):
        some = fused(q, k, scale, bias, positive=LOWER(ids(9, 5), ids(20)))
        return some + fused(q, k.detach(), scale)

    inputs = [*embeddings(torch.float32, (9, 3), (20, 3)), number(2.0), number(-1.0)]
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = grads(compiled, inputs), grads(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("schedule")
@pytest.mark.parametrize("need", [ALL, (False, True, False, False)], ids=["all", "k"])
def test_operator_is_declared_as_it_behaves(need):
    q, k = embeddings(torch.bfloat16, (3, 3), (4, 3))
    given = (
        [q, k, number(1.0), number(0.0), ids(3)[None], ids(4)[None]],
        "fused-lower@0",
        list(need),
    )
    torch.library.opcheck(torch.ops.fastssl.pairwise_sigmoid.default, (*given, "triton"))


def test_auto_leaves_to_torch_what_triton_has_not(monkeypatch):
    asked, op = [], sigmoid_ops.sigmoid
    monkeypatch.setattr(sigmoid_ops, "sigmoid", lambda *a: asked.append(a[-1]) or op(*a))
    monkeypatch.setattr(
        "fastssl.kernels.common.dispatch.Primitive.choose", lambda s, impl, d: _gpu(impl)
    )
    (q,) = embeddings(torch.float32, (3, 3))
    for x, positive in ((q.double(), same_group), (q, EAGER), (q, LOWER)):
        pairwise_sigmoid(x, x, 1.0, 0.0, positive=positive)
        pairwise_sigmoid_grads(x, x, 1.0, 0.0, positive=positive, need=ALL)
    assert asked == ["torch"] * 4 + ["triton"] * 2


def _gpu(impl):
    return "triton" if impl == "auto" else impl


Q = torch.zeros(4, 3, device=DEVICE)


@pytest.mark.parametrize(
    "q, positive, words",
    [
        (Q.double(), same_group, "float32, bfloat16 and float16, got q in torch.float64"),
        (Q, EAGER, "mask 'fused-eager' has no Triton twin"),
    ],
)
def test_triton_refuses(q, positive, words):
    with pytest.raises(ValueError, match=words):
        fused(q, q, positive=positive)
