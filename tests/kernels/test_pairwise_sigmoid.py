import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastssl.kernels import PairMask, same_group
from fastssl.kernels.pairwise import sigmoid_ops, sigmoid_torch
from fastssl.kernels.pairwise.sigmoid import (
    pairwise_sigmoid,
    pairwise_sigmoid_grads,
    pairwise_sigmoid_reference,
)
from fastssl.kernels.pairwise.sigmoid_torch import Logits
from tests.covering import crossed
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor, saved_elements

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOWER = PairMask("sigmoid-lower", lambda rows, cols: rows > cols)  # from one side only
ALL = (True, True, True, True)


def _in_place(out, a, b, out_shape=None, **_):
    return 2 * out[0] * out[1] * a[1]


IN_PLACE: dict = {torch.ops.aten.addmm_: _in_place}


def embeddings(dtype, *shapes):
    """Rows of length 1."""
    torch.manual_seed(sum(map(sum, shapes)))
    rows = [torch.randn(shape, dtype=torch.float64, device=DEVICE) for shape in shapes]
    return [torch.nn.functional.normalize(x).to(dtype) for x in rows]


def number(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def ids(n, shift=0):
    return torch.arange(shift, n + shift, device=DEVICE)


def ours(q, k, scale=5.0, bias=-2.0, positive=same_group):
    return pairwise_sigmoid(q, k, scale, bias, positive=positive, impl="torch")


def reference(q, k, scale=5.0, bias=-2.0, positive=same_group):
    return pairwise_sigmoid_reference(q, k, scale, bias, positive)


@crossed(dtype={str(x): x for x in DTYPES}, reduce=UPSTREAM)
@pytest.mark.parametrize("M, N, D", [(1, 1, 1), (3, 5, 2), (67, 131, 7), (600, 3, 5), (2, 1100, 4)])
def test_no_worse_than_eager(M, N, D, dtype, reduce):
    q, k = embeddings(dtype, (M, D), (N, D))
    assert_no_worse(ours, reference, (q, k, number(5.0, dtype), number(-2.0, dtype)), reduce)


@pytest.mark.parametrize(
    "positive",
    [
        same_group(ids(29, 40), ids(83)),
        same_group(ids(29) % 5, ids(83) % 7),
        LOWER(ids(29, 5), ids(83)),
        LOWER & same_group(ids(29) % 3, ids(83) % 3),
    ],
    ids=["shifted", "groups", "lower", "two rules"],
)
def test_positive_pairs_are_those_the_rules_keep(positive):
    q, k = embeddings(torch.float32, (29, 5), (83, 5))
    assert_no_worse(
        lambda q, k: ours(q, k, positive=positive),
        lambda q, k: reference(q, k, positive=positive),
        (q, k),
    )


def test_float64_is_kept():
    q, k = embeddings(torch.float64, (40, 6), (61, 6))
    inputs = q, k, number(3.0, torch.float64), number(-1.0, torch.float64)
    for found, truth in zip(grads(ours, inputs), grads(reference, inputs), strict=True):
        assert found.dtype == torch.float64
        assert (found - truth).abs().max() <= 1e-14 * truth.abs().max()


def test_float64_is_kept_where_a_term_is_large():
    """A softplus that is linear from 20 on would be off by 2e-9."""
    x = torch.ones(1, 1, dtype=torch.float64, device=DEVICE)
    value = ours(x, x, -21.0, 0.0)
    assert value.item() == pytest.approx(21 + math.log1p(math.exp(-21)), rel=1e-15)


@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_of_a_thousand_are_finite(sign):
    x = torch.ones(30, 1, device=DEVICE)
    inputs = x, x.clone(), number(sign * 1000.0), number(0.0)
    value, *made = grads(ours, inputs, UPSTREAM["expanded"])
    assert value.item() == pytest.approx(1000 * (30 if sign < 0 else 30 * 29), rel=1e-6)
    assert all(g.isfinite().all() for g in made)
    assert made[3].item() == pytest.approx(-30 if sign < 0 else 30 * 29)


@pytest.mark.parametrize("scale, bias", [(100.0, 0.0), (-3.0, 1.0), (0.0, -10.0), (10.0, -10.0)])
def test_any_scale_and_bias(scale, bias):
    q, k = embeddings(torch.float32, (45, 8), (70, 8))
    assert_no_worse(ours, reference, (q, k, number(scale), number(bias)))


def test_small_terms_are_not_lost():
    q, k = torch.zeros(40, 2, device=DEVICE), torch.zeros(60, 2, device=DEVICE)
    far = same_group(ids(40, 100), ids(60))
    value = ours(q, k, 1.0, -30.0, positive=far)
    assert value.item() == pytest.approx(2400 * math.exp(-30), rel=1e-6)


def test_zero_vectors_give_ln_2_a_pair():
    q, k = torch.zeros(37, 3, device=DEVICE), torch.zeros(50, 3, device=DEVICE)
    value, dq, dk = grads(lambda q, k: ours(q, k, 10.0, 0.0), [q, k])
    assert value.item() == pytest.approx(37 * 50 * math.log(2), rel=1e-6)
    assert (dq == 0).all() and (dk == 0).all()


@pytest.mark.parametrize("which", range(4), ids=["q", "k", "scale", "bias"])
def test_a_nan_is_never_hidden(which):
    q, k = embeddings(torch.float32, (30, 3), (40, 3))
    inputs = [q, k, number(1.0), number(0.0)]
    inputs[which].view(-1)[-1] = torch.nan
    value, *made = grads(ours, inputs)
    assert value.isnan() and all(g.isnan().any() for g in made)


def test_gradients_only_where_wanted():
    q, k = embeddings(torch.float32, (35, 3), (44, 3))
    inputs = [q, k, number(5.0), number(-2.0)]
    every = grads(ours, inputs)[1:]
    for i in range(4):
        alone = grads(lambda x, i=i: ours(*inputs[:i], x, *inputs[i + 1 :]), [inputs[i]])[1]
        assert torch.equal(alone, every[i])


def test_gradients_take_three_products_and_the_value_one():
    q, k = embeddings(torch.float32, (60, 4), (70, 4))
    logits = Logits(q, k, number(5.0), number(-2.0), None, None, "same_group@-1")
    product = 2 * 60 * 70 * 4
    for need, products in (((False,) * 4, 1), (ALL, 3), ((True, False, True, True), 2)):
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            sigmoid_torch.results(logits, need)
        assert counter.get_total_flops() == products * product


def test_forward_asks_for_the_gradients_that_backward_will_want(monkeypatch):
    asked, op = [], sigmoid_ops.sigmoid
    monkeypatch.setattr(sigmoid_ops, "sigmoid", lambda *a: asked.append(a[-2]) or op(*a))
    q, k = embeddings(torch.float32, (3, 3), (4, 3))
    ours(q, k)
    q.requires_grad_()
    with torch.no_grad():
        ours(q, k)
    ours(q, k, number(1.0).requires_grad_()).backward()
    assert asked == [[False] * 4, [False] * 4, [True, False, True, False]]


def test_holds_tiles_and_never_all_pairs():
    q = torch.randn(300, 4, device=DEVICE, requires_grad=True)
    k = torch.randn(300, 4, device=DEVICE, requires_grad=True)
    assert saved_elements(lambda: ours(q, k)) <= 2 * 1200 + 2
    logits = Logits(q.detach(), k.detach(), number(1.0), number(0.0), None, None, "same_group@-1")
    assert largest_tensor(lambda: sigmoid_torch.results(logits, ALL)) <= 1200  # a tile has 512


def test_backward_may_run_twice():
    q, k = embeddings(torch.float32, (9, 3), (8, 3))
    q.requires_grad_()
    value = ours(q, k)
    first, second = (torch.autograd.grad(f * value, q, retain_graph=True)[0] for f in (1.0, 3.0))
    torch.testing.assert_close(second, 3 * first)


def test_gradients_as_tensors_are_those_of_autograd():
    q, k = embeddings(torch.bfloat16, (35, 3), (44, 3))
    inputs = [q, k, number(5.0), number(-2.0)]
    value, *made = grads(lambda *x: ours(*x), inputs, UPSTREAM["expanded"])
    with torch.autocast(DEVICE, torch.bfloat16):
        found = pairwise_sigmoid_grads(*inputs, positive=same_group, need=ALL)
    assert torch.equal(found.total, value)
    assert all(g.dtype == torch.float32 for g in found)
    assert all(torch.equal(g.to(m.dtype), m) for g, m in zip(found[1:], made, strict=True))
    some = pairwise_sigmoid_grads(*inputs, positive=same_group, need=(False, True, False, True))
    assert some.q.numel() == 0 and some.scale.numel() == 0 and torch.equal(some.k, found.k)


def test_float16_gradients_survive_a_small_upstream():
    q, k = embeddings(torch.float16, (40, 5), (30, 5))
    loss = lambda f: lambda q, k: 1e-6 * f(q, k, 1000.0, -10.0)  # noqa: E731
    for found, truth in zip(
        grads(loss(ours), [q, k])[1:], grads(loss(reference), [q.double(), k.double()])[1:],
        strict=True,
    ):  # fmt: skip
        assert (found - truth).abs().max() < 1e-2 * truth.abs().max()


def test_autocast_does_not_reach_inside():
    q, k = embeddings(torch.float32, (9, 16), (8, 16))
    plain = grads(ours, [q, k])
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = grads(ours, [q, k])
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: torch.stack([x, x + torch.nan], 1).flatten(0, 1)[::2],
    "a slice of columns": lambda x: torch.nn.functional.pad(x, (3, 2), value=torch.nan)[:, 3:-2],
    "one row expanded": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout):
    plain = [layout(x).contiguous() for x in embeddings(torch.float32, (19, 5), (21, 5))]
    given = [layout(x) for x in plain]
    assert all(x.stride() != y.stride() for x, y in zip(given, plain, strict=True))
    leaves = [x.detach().requires_grad_() for x in given]
    found = torch.autograd.grad(ours(*leaves), leaves)
    torch.testing.assert_close(list(found), grads(ours, plain, UPSTREAM["expanded"])[1:])


def test_scale_of_another_dtype_gets_its_gradient():
    q, k = embeddings(torch.float32, (30, 3), (40, 3))
    expected = grads(ours, [q, k, number(1.5), number(-1.0)])
    found = grads(ours, [q, k, number(1.5, torch.float64), number(-1.0, torch.bfloat16)])
    assert [g.dtype for g in found[3:]] == [torch.float64, torch.bfloat16]
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[3].float(), expected[3])
    torch.testing.assert_close(found[4].float(), expected[4], rtol=1e-2, atol=0)


def test_second_derivative_is_refused():
    z = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(ours(z, z), z, create_graph=True)


def test_compiles_without_a_graph_break():
    def loss(q, k, scale, bias):
        some = ours(q, k, scale, bias, positive=LOWER(ids(9, 5), ids(20)))
        return some + ours(q, k.detach(), scale)

    inputs = [*embeddings(torch.float32, (9, 3), (20, 3)), number(2.0), number(-1.0)]
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = grads(compiled, inputs), grads(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("need", [ALL, (False, True, False, False)], ids=["all", "k"])
def test_operator_is_declared_as_it_behaves(need):
    q, k = embeddings(torch.bfloat16, (3, 3), (4, 3))
    given = [q, k, number(1.0), number(0.0), None, None], "same_group@-1", list(need), "torch"
    torch.library.opcheck(torch.ops.fastssl.pairwise_sigmoid.default, given)


Q = torch.zeros(4, 3)


@pytest.mark.parametrize(
    "args, kwargs, words",
    [
        ((Q, Q[:, :2], 1.0, 0.0), {}, r"q and k .* \(4, 3\) and \(4, 2\)"),
        ((Q, Q[:0], 1.0, 0.0), {}, r"none of them empty, got \(4, 3\) and \(0, 3\)"),
        ((Q[:, :0], Q[:, :0], 1.0, 0.0), {}, r"none of them empty, got \(4, 0\)"),
        ((Q, Q.double(), 1.0, 0.0), {}, "float32 on cpu and torch.float64"),
        ((Q, Q.to("meta"), 1.0, 0.0), {}, "on cpu and torch.float32 on meta"),
        ((Q.long(), Q.long(), 1.0, 0.0), {}, "q must be a floating-point tensor, got torch.int64"),
        (([1.0], Q, 1.0, 0.0), {}, "q must be a tensor, got list"),
        ((Q, Q, torch.ones(4), 0.0), {}, r"scale must .* got \(4,\)"),
        ((Q, Q, 1.0, torch.ones(1)), {}, r"bias must .* got \(1,\)"),
        ((Q, Q, 1.0, torch.tensor(1)), {}, r"bias must .* got \(\) torch.int64"),
        ((Q, Q, 1.0, 0.0), {"positive": None}, "positive must be a PairMask, .* got a NoneType"),
        ((Q, Q, 1.0, 0.0), {"positive": same_group(ids(3))}, r"must be \(4,\) on .*, got \(3,\)"),
        (
            (Q, Q, 1.0, 0.0),
            {"impl": "fused"},
            "torch, triton, reference for pairwise_sigmoid, got 'fused'",
        ),
    ],
)
def test_refuses(args, kwargs, words):
    for call in (pairwise_sigmoid, pairwise_sigmoid_grads):
        more = {"need": ALL} if call is pairwise_sigmoid_grads else {}
        if more and "impl" in kwargs:
            continue
        with pytest.raises(ValueError, match=words):
            call(*args, **{"positive": same_group, **kwargs, **more})
