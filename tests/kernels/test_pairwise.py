"""The log-sum-exps of pairs, whichever implementation runs."""

import math

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it where a function is

from fastssl.kernels import (
    PairMask,
    different_group,
    exclude_self,
    exclude_self_and_pair,
    pairwise_lse,
    same_group,
)
from fastssl.kernels.pairwise.lse import pairwise_lse_reference
from tests.covering import crossed
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@triton.jit
def below(rows, cols):
    return rows > cols


LOWER = PairMask("lower", lambda rows, cols: rows > cols, triton=below)  # from one side only


def rows_of(dtype, *shapes):
    """Rows of length 2: at the scales below no pair outweighs all others."""
    torch.manual_seed(sum(map(sum, shapes)))
    found = [torch.randn(shape, device=DEVICE) for shape in shapes]
    return [(2 * torch.nn.functional.normalize(x)).to(dtype) for x in found]


def number(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def ids(n, shift=0):
    return torch.arange(shift, n + shift, device=DEVICE)


def joined(fn, **options):
    """fn with both=True, its rows and columns as one tensor."""
    return lambda *args: torch.cat(fn(*args, both=True, **options))


@crossed(dtype={str(x): x for x in DTYPES}, reduce=UPSTREAM)
@pytest.mark.parametrize("M, N, D", [(1, 1, 1), (3, 21, 5), (21, 45, 18)])
def test_rows_against_keys(lse, M, N, D, dtype, reduce):
    inputs = [*rows_of(dtype, (M, D), (N, D)), number(1.5, dtype)]
    assert_no_worse(lse, pairwise_lse_reference, inputs, reduce)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N, D", [(1, 1, 1), (23, 45, 17)])
def test_rows_and_columns_of_one_pass(lse, M, N, D, dtype, reduce):
    inputs = [*rows_of(dtype, (M, D), (N, D)), number(2.0, dtype)]
    assert_no_worse(joined(lse), joined(pairwise_lse_reference), inputs, reduce)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, exclude_self], ids=["all", "exclude_self"])
@pytest.mark.parametrize("N, D", [(2, 3), (41, 17)])
def test_rows_against_themselves(lse, N, D, mask, dtype, reduce):
    assert_no_worse(
        lambda z, s: lse(z, z, s, mask=mask),
        lambda z, s: pairwise_lse_reference(z, z, s, mask),
        [*rows_of(dtype, (N, D)), number(1.5, dtype)],
        reduce,
    )


@pytest.mark.parametrize("both", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N, D", [(1, 3, 2), (35, 21, 17)])
def test_a_scale_for_each_row_and_a_bias_for_each_column(lse, M, N, D, dtype, both):
    inputs = rows_of(dtype, (M, D), (N, D))
    inputs += [torch.linspace(0.5, 3, M, device=DEVICE), torch.linspace(-3, 2, N, device=DEVICE)]
    inputs = [x.to(dtype) for x in inputs]
    eager = lambda q, k, s, b: pairwise_lse_reference(q, k, s, None, b, both)  # noqa: E731
    ours = lambda q, k, s, b: lse(q, k, s, bias=b, both=both)  # noqa: E731
    pack = torch.cat if both else torch.as_tensor
    assert_no_worse(lambda *x: pack(ours(*x)), lambda *x: pack(eager(*x)), inputs)


MASKS = {
    "self": lambda rows, cols: exclude_self(rows + 20, cols),
    "pair": lambda rows, cols: exclude_self_and_pair(rows + 5, cols),
    "same": lambda rows, cols: same_group(rows % 5, cols % 5),
    "different": lambda rows, cols: different_group(rows % 3, cols % 3),
    "groups in order": lambda rows, cols: same_group(rows // 9, cols // 11),
    "far ids": lambda rows, cols: different_group(rows // 4 * 2**59, cols // 4 * 2**59 - 2**60),
    "self and groups in order": lambda rows, cols: (
        exclude_self(rows + 20, cols) & same_group(rows // 9, cols // 11)
    ),
    "one-sided": lambda rows, cols: LOWER(rows + 20, cols),
    "positions and groups": lambda rows, cols: exclude_self & same_group(rows % 4, cols % 4),
    "two groups": lambda rows, cols: (
        same_group(rows % 3, cols % 3) & different_group(rows % 7, cols % 7)
    ),
    "three": lambda rows, cols: (
        exclude_self & LOWER(rows + 30, cols) & same_group(rows % 2, cols % 2)
    ),
}


@pytest.mark.parametrize("both", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_masks(lse, make, both):
    mask = make(ids(37), ids(45))
    inputs = [*rows_of(torch.float32, (37, 6), (45, 6)), number(2.0)]
    pack = torch.cat if both else torch.as_tensor
    assert_no_worse(
        lambda *x: pack(lse(*x, mask=mask, both=both)),
        lambda *x: pack(pairwise_lse_reference(*x, mask, None, both)),
        inputs,
    )


@pytest.mark.parametrize(
    "mask",
    [
        exclude_self_and_pair,
        exclude_self & same_group(ids(37) % 7),
        exclude_self(ids(37), ids(37, 20)),
        LOWER(ids(37, 1), ids(37)),
    ],
    ids=["pairs", "groups", "two sets of ids", "one-sided"],
)
@pytest.mark.parametrize("both", [False, True], ids=["rows", "both"])
def test_masks_of_one_tensor(lse, mask, both):
    pack = torch.cat if both else torch.as_tensor
    assert_no_worse(
        lambda z, s: pack(lse(z, z, s, mask=mask, both=both)),
        lambda z, s: pack(pairwise_lse_reference(z, z, s, mask, None, both)),
        [*rows_of(torch.float32, (37, 5)), number(2.0)],
    )


def test_a_row_and_a_column_with_no_pair_left(lse):
    q, k = (x.requires_grad_() for x in rows_of(torch.float32, (30, 3), (50, 3)))
    rows, cols = ids(30) * 0, ids(50) * 0
    rows[4], cols[7] = 1, 2
    by_row, by_col = lse(q, k, 1.0, mask=same_group(rows, cols), both=True)
    assert by_row[4] == -math.inf and by_row.isfinite().sum() == 29
    assert by_col[7] == -math.inf and by_col.isfinite().sum() == 49
    (by_row.sum() + by_col.sum()).backward()
    assert (q.grad[4] == 0).all() and (k.grad[7] == 0).all()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_row_without_itself(lse, dtype):
    z = torch.ones(1, 3, device=DEVICE, dtype=dtype, requires_grad=True)
    found = lse(z, z, 1.0, mask=exclude_self)
    assert found.item() == -math.inf
    found.sum().backward()
    assert (z.grad == 0).all()


def test_uniform_scores_give_the_log_of_their_number(lse):
    z = torch.zeros(37, 3, device=DEVICE)
    every, others = (lse(z, z, 9.0, mask=m) for m in (None, exclude_self))
    torch.testing.assert_close(every, torch.full_like(every, math.log(37)))
    torch.testing.assert_close(others, torch.full_like(others, math.log(36)))


def test_a_common_shift_adds_itself(lse):
    q, k = rows_of(torch.float32, (23, 6), (31, 6))
    shift = torch.full((31,), 3.5, device=DEVICE)
    torch.testing.assert_close(lse(q, k, 2.0, bias=shift), lse(q, k, 2.0) + 3.5)


def test_the_order_of_keys_does_not_matter(lse):
    q, k = rows_of(torch.float32, (23, 6), (45, 6))
    order = torch.randperm(45, device=DEVICE)
    torch.testing.assert_close(lse(q, k[order], 2.0), lse(q, k, 2.0))
    torch.testing.assert_close(lse(q, k[order], 2.0, both=True)[1], lse(k, q, 2.0)[order])


def test_splitting_the_keys_joins_by_logaddexp(lse):
    q, k = rows_of(torch.float32, (21, 6), (50, 6))
    parts = [lse(q, part, 0.7) for part in (k[:13], k[13:])]
    torch.testing.assert_close(lse(q, k, 0.7), torch.logaddexp(*parts))


@pytest.mark.parametrize(
    "scale, same",
    [(100.0, False), (100.0, True), (-1.5, True), (0.0, False), (0.0, True), (0.01, False)],
)
def test_any_scale(lse, scale, same):
    q, k = rows_of(torch.float32, (21, 8), (37, 8))
    if same:
        either = lse, pairwise_lse_reference
        ours, eager = (lambda z, f=f: f(z, z, scale, mask=exclude_self) for f in either)
        assert_no_worse(ours, eager, [q])
    else:
        assert_no_worse(joined(lse), joined(pairwise_lse_reference), (q, k, number(scale)))


@pytest.mark.parametrize("same", [False, True], ids=["rows", "self"])
@pytest.mark.parametrize("most", [3.0, 5.0, 12.0])
def test_rows_of_very_different_lengths(lse, most, same):
    """Of 5 the highest scores lie as far apart as one exponential allows, of 12 farther."""
    q, k = (x / 2 for x in rows_of(torch.float32, (37, 8), (45, 8)))
    q, k = (torch.linspace(most, 0.1, len(x), device=DEVICE)[:, None] * x for x in (q, k))
    ours, eager = joined(lse), joined(pairwise_lse_reference)
    if same:
        assert_no_worse(lambda z: ours(z, z, 1.0), lambda z: eager(z, z, 1.0), [q])
    else:
        assert_no_worse(ours, eager, [q, k, number(1.0)])


def test_scores_far_below_zero_do_not_vanish(lse):
    q, k = torch.ones(3, 2, device=DEVICE), -torch.ones(40, 2, device=DEVICE)
    rows, cols = lse(q, k, 1e4, both=True)
    torch.testing.assert_close(rows, torch.full_like(rows, math.log(40) - 2e4), rtol=1e-6, atol=0)
    torch.testing.assert_close(cols, torch.full_like(cols, math.log(3) - 2e4), rtol=1e-6, atol=0)


# The interpreter's maximum is NumPy's, which remarks on a row of nan.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_is_never_hidden(lse, dtype):
    q, k = rows_of(dtype, (19, 3), (21, 3))
    q[17, 1] = torch.nan
    found, dq, dk = grads(lambda q, k: lse(q, k, 1.0), [q, k])
    assert found[17].isnan() and found.isnan().sum() == 1
    assert dq[17].isnan().all() and dq.isnan().sum() == 3 and dk.isnan().all()
    assert lse(k, q, 1.0).isnan().all() and lse(q, q, 1.0).isnan().all()
    assert lse(q, k, 1.0, both=True)[1].isnan().all()
    assert all(x.isnan().all() for x in grads(lambda q, k: lse(k, q, 1.0), [q, k])[1:])


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_a_nan_scale_or_bias_is_never_hidden(lse):
    q, k = rows_of(torch.float32, (3, 3), (4, 3))
    assert lse(q, k, number(torch.nan)).isnan().all()
    assert lse(q, k, 1.0, bias=torch.full((4,), torch.nan, device=DEVICE)).isnan().all()


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: torch.stack([x, x + torch.nan], 1).flatten(0, 1)[::2],
    "a slice of columns": lambda x: torch.nn.functional.pad(x, (3, 2), value=torch.nan)[:, 3:-2],
    "one row expanded": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.parametrize("which", [0, 1], ids=["q", "k"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(lse, layout, which):
    plain = rows_of(torch.float32, (19, 5), (21, 5))
    plain[which] = layout(plain[which]).contiguous()
    expected = grads(lambda q, k: lse(q, k, 2.0), plain)
    given = [x.clone().requires_grad_() for x in plain]
    given[which] = layout(plain[which]).detach().requires_grad_()
    assert given[which].stride() != plain[which].stride()
    found = lse(*given, 2.0)
    UPSTREAM["contiguous"](found).backward()
    torch.testing.assert_close([found.detach(), *(x.grad for x in given)], expected)


def test_strided_scale_bias_and_ids(lse):
    q, k = rows_of(torch.float32, (19, 5), (21, 5))
    scale, bias = torch.rand(19, 2, device=DEVICE)[:, 0], torch.rand(21, 3, device=DEVICE)[:, 1]
    mask = exclude_self(ids(38)[::2], ids(42)[::2])
    assert_no_worse(
        lambda q, k: lse(q, k, scale, bias=bias, mask=mask),
        lambda q, k: pairwise_lse_reference(q, k, scale, mask, bias),
        (q, k),
    )


def test_gradients_only_where_wanted(lse):
    inputs = [*rows_of(torch.float32, (19, 3), (21, 3)), number(2.0), torch.rand(21, device=DEVICE)]
    call = lambda q, k, s, b: torch.cat(lse(q, k, s, bias=b, both=True))  # noqa: E731
    every = grads(call, inputs)[1:]
    for i in range(4):
        fixed = [x.detach() for x in inputs]
        alone = grads(lambda x, i=i, f=fixed: call(*f[:i], x, *f[i + 1 :]), [inputs[i]])[1]
        torch.testing.assert_close(alone, every[i])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_scale_of_another_dtype_gets_its_gradient(lse, dtype):
    q, k = rows_of(torch.float32, (3, 3), (4, 3))
    expected = grads(lse, [q, k, number(1.5)])
    found = grads(lse, [q, k, number(1.5, dtype)])
    assert found[3].dtype == dtype
    torch.testing.assert_close(found[3].float(), expected[3], rtol=1e-2, atol=0)
    torch.testing.assert_close(found[1], expected[1])


def test_float16_gradients_survive_a_small_upstream(lse):
    q, k = rows_of(torch.float16, (40, 5), (3, 5))
    k /= 256
    loss = lambda q, k: 1e-6 * torch.cat(lse(q, k, 1000.0, both=True))  # noqa: E731
    truth = lambda q, k: 1e-6 * joined(pairwise_lse_reference)(q, k, 1000.0)  # noqa: E731
    found, want = grads(loss, [q, k])[2], grads(truth, [q.double(), k.double()])[2]
    assert (found - want).abs().max() < 1e-2 * want.abs().max()


def test_the_same_bits_each_time(lse):
    q, k = rows_of(torch.bfloat16, (35, 20), (37, 20))
    first, second = (grads(lambda q, k: lse(q, k, 3.0), [q, k]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_does_not_reach_inside(lse):
    q, k = rows_of(torch.float32, (9, 16), (8, 16))
    plain = grads(lambda q, k: lse(q, k, 3.0), [q, k])
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = grads(lambda q, k: lse(q, k, 3.0), [q, k])
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_second_derivative_is_refused(lse):
    z = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(lse(z, z, 1.0).sum(), z, create_graph=True)


def test_compiles_without_a_graph_break(lse):
    mask = exclude_self & LOWER(ids(9, 25), ids(20))

    def loss(q, k, scale):
        rows, cols = lse(q, k, scale, mask=mask, both=True)
        return rows.sum() + cols.sin().sum() + lse(q, q, scale.mean(), mask=exclude_self).sum()

    inputs = [*rows_of(torch.float32, (9, 3), (20, 3)), torch.rand(9, device=DEVICE)]
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = grads(compiled, inputs), grads(loss, inputs)
    torch.testing.assert_close(found, expected)


Q = torch.zeros(4, 3, device=DEVICE)


@pytest.mark.parametrize(
    "args, kwargs, words",
    [
        ((Q, Q[:, :2], 1.0), {}, r"q and k .* \(4, 3\) and \(4, 2\)"),
        ((Q[:0], Q, 1.0), {}, r"none of them empty, got \(0, 3\)"),
        ((Q[:, :0], Q[:, :0], 1.0), {}, r"none of them empty, got \(4, 0\)"),
        ((Q[0], Q, 1.0), {}, r"q and k must be \(M, D\) and \(N, D\).* got \(3,\)"),
        ((Q.tolist(), Q, 1.0), {}, "q must be a tensor, got list"),
        ((Q, Q.double(), 1.0), {}, "float32 on .* and torch.float64"),
        ((Q.long(), Q.long(), 1.0), {}, "q must be a floating-point tensor, got torch.int64"),
        ((Q, Q, torch.ones(2)), {}, r"scale must be .* 0-d or \(4,\) float .* got \(2,\)"),
        ((Q, Q, Q[0, 0].long()), {}, r"scale must .* got \(\) torch.int64"),
        ((Q, Q, 1.0), {"bias": Q[0]}, r"bias must be a \(4,\) float tensor by k, got \(3,\)"),
        (
            (Q, Q, 1.0),
            {"mask": exclude_self(ids(3))},
            r"row_ids of mask 'exclude_self' must be \(4,\) on .*, got \(3,\)",
        ),
        (
            (Q, Q, 1.0),
            {"mask": same_group(ids(4), ids(5))},
            r"col_ids of mask 'same_group' must be \(4,\) on .*, got \(5,\)",
        ),
        ((Q, Q, 1.0), {"mask": Q > 0}, "mask must be a PairMask, one given ids, or None, got"),
        (
            (Q, Q, 1.0),
            {"impl": "fused"},
            "one of auto, torch, triton, reference for pairwise_lse, got 'fused'",
        ),
    ],
)
def test_refuses(args, kwargs, words):
    with pytest.raises(ValueError, match=words):
        pairwise_lse(*args, **kwargs)
