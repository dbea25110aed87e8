"""The Triton kernels at blocks of 16, so that small odd shapes cross several and divide none."""

import copy
import math
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it where a function is

from fastssl.kernels import PairMask, _tuning, exclude_self, pairwise, pairwise_lse, pairwise_ops
from fastssl.kernels.pairwise import pairwise_lse_reference
from fastssl.kernels.pairwise_configs import shape_class
from fastssl.kernels.pairwise_fused import BWD, FWD, backward, choose, different, forward
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor, saved_elements

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 16}


@triton.jit
def below(rows, cols):
    return rows > cols


@triton.jit
def not_seven(rows, cols):
    return (rows != 7) & (cols == cols)


LOWER = PairMask("lower", lambda rows, cols: rows > cols, triton=below)  # from one side only
ONLY = PairMask("only", lambda rows, cols: (rows != 7) & (cols == cols), triton=not_seven)
EAGER = PairMask("eager", lambda rows, cols: rows > cols)


@pytest.fixture(autouse=True)
def small_blocks():
    with (
        _tuning.forced("pairwise_lse_fwd", _tuning.Config(SMALL)),
        _tuning.forced("pairwise_lse_bwd", _tuning.Config({**SMALL, "BLOCK_O": 16})),
    ):
        yield


def unit_rows(dtype, *shapes):
    """Rows of length 2: at the scales below no pair outweighs all others."""
    torch.manual_seed(sum(map(sum, shapes)))
    rows = [torch.randn(shape, device=DEVICE) for shape in shapes]
    return [(2 * torch.nn.functional.normalize(x)).to(dtype) for x in rows]


def ids(n, shift=0):
    return torch.arange(shift, n + shift, device=DEVICE)


def fused(*args, **kwargs):
    return pairwise_lse(*args, impl="triton", **kwargs)


def reference(q, k, scale, mask=None, shift=0):
    return pairwise_lse_reference(q, k, scale, mask, ids(len(q), shift), ids(len(k)))


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N, D", [(1, 1, 1), (3, 21, 5), (35, 19, 37)])
def test_rows_against_keys(M, N, D, dtype, reduce):
    q, k = unit_rows(dtype, (M, D), (N, D))
    scale = torch.tensor(1.5, dtype=dtype, device=DEVICE)
    assert_no_worse(fused, reference, (q, k, scale), reduce)


@pytest.mark.parametrize("reduce", UPSTREAM.values(), ids=UPSTREAM)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [None, exclude_self], ids=["all", "exclude_self"])
@pytest.mark.parametrize("N, D", [(2, 3), (37, 21)])
def test_rows_against_themselves(N, D, mask, dtype, reduce):
    (z,) = unit_rows(dtype, (N, D))
    scale = torch.tensor(1.5, dtype=dtype, device=DEVICE)
    assert_no_worse(
        lambda z, s: fused(z, z, s, mask=mask),
        lambda z, s: reference(z, z, s, mask),
        (z, scale),
        reduce,
    )


@pytest.mark.parametrize("mask", [exclude_self, LOWER], ids=lambda m: m.name)
def test_mask_reads_the_ids_it_is_given(mask):
    q, k = unit_rows(torch.float32, (23, 5), (37, 5))
    rows, cols = ids(46, 8)[::2], ids(74, 3)[::2]  # strided
    assert_no_worse(
        lambda q, k: fused(q, k, 2.0, mask=mask, row_ids=rows, col_ids=cols),
        lambda q, k: pairwise_lse_reference(q, k, 2.0, mask, rows, cols),
        (q, k),
    )


@pytest.mark.parametrize(
    "mask, cols", [(exclude_self, ids(37, 20)), (LOWER, None)], ids=["other ids", "one-sided mask"]
)
def test_one_tensor_is_not_mirrored_when_its_sides_differ(mask, cols):
    (z,) = unit_rows(torch.float32, (37, 4))
    rows = ids(37, 1)
    run = [
        lambda z: fused(z, z, 2.0, mask=mask, row_ids=rows, col_ids=cols),
        lambda z: pairwise_lse_reference(z, z, 2.0, mask, rows, ids(37) if cols is None else cols),
    ]
    assert_no_worse(*run, [z])


def test_one_tensor_costs_one_pass_backward(monkeypatch):
    passes = []
    seen = lambda *args: passes.append(args[-2]) or backward(*args)  # noqa: E731
    monkeypatch.setattr(pairwise_ops, "backward", seen)
    (z,) = unit_rows(torch.float32, (20, 3))
    grads(lambda z: fused(z, z, 1.0, mask=exclude_self), [z])
    assert len(passes) == 1
    grads(lambda z: fused(z, z.clone(), 1.0, mask=exclude_self), [z])
    assert len(passes) == 3


def test_row_with_no_pair_left_is_minus_infinity_with_zero_gradient():
    q, k = unit_rows(torch.float32, (20, 3), (35, 3))
    rows = torch.where(ids(20) == 4, 7, ids(20, 100))
    q.requires_grad_(), k.requires_grad_()
    lse = fused(q, k, 1.0, mask=ONLY, row_ids=rows)
    assert lse[4] == -math.inf and lse.isfinite().sum() == 19
    lse.sum().backward()
    assert (q.grad[4] == 0).all() and q.grad.isfinite().all() and k.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_row_without_itself_is_minus_infinity(dtype):
    z = torch.ones(1, 3, device=DEVICE, dtype=dtype, requires_grad=True)
    lse = fused(z, z, 1.0, mask=exclude_self)
    assert lse.item() == -math.inf
    lse.sum().backward()
    assert (z.grad == 0).all()


# The interpreter's maximum is NumPy's, which remarks on a row of nan.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_is_never_hidden(dtype):
    q, k = unit_rows(dtype, (19, 3), (21, 3))
    q[17, 1] = torch.nan
    lse, dq, dk = grads(lambda q, k: fused(q, k, 1.0), [q, k])
    assert lse[17].isnan() and lse.isnan().sum() == 1
    assert dq[17].isnan().all() and dq.isnan().sum() == 3 and dk.isnan().all()
    assert fused(k, q, 1.0).isnan().all() and fused(q, q, 1.0).isnan().all()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_nan_scale_is_never_hidden():
    q, k = unit_rows(torch.float32, (3, 3), (4, 3))
    assert fused(q, k, torch.tensor(torch.nan, device=DEVICE)).isnan().all()


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second row": lambda x: torch.stack([x, x + torch.nan], 1).flatten(0, 1)[::2],
    "a slice of columns": lambda x: torch.nn.functional.pad(x, (3, 2), value=torch.nan)[:, 3:-2],
    "one row expanded": lambda x: x[:1].expand(len(x), -1),
}


@pytest.mark.parametrize("which", [0, 1], ids=["q", "k"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout, which):
    plain = unit_rows(torch.float32, (19, 5), (21, 5))
    plain[which] = layout(plain[which]).contiguous()
    expected = grads(lambda q, k: fused(q, k, 2.0), plain)
    given = [x.clone().requires_grad_() for x in plain]
    given[which] = layout(plain[which]).detach().requires_grad_()
    assert given[which].stride() != plain[which].stride()
    lse = fused(*given, 2.0)
    UPSTREAM["contiguous"](lse).backward()
    found = [lse.detach(), *(x.grad for x in given)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_rows_beyond_two_to_the_31_elements(tmp_path):
    D, gap = 4, 2**30
    size = 2 * gap + D
    if DEVICE == "cpu":  # a file without content takes no space
        far = torch.from_file(str(tmp_path / "far"), shared=True, size=size, dtype=torch.float16)
    else:
        far = torch.empty(size, dtype=torch.float16, device=DEVICE)
    far = far.as_strided((3, D), (gap, 1))
    (near,) = unit_rows(torch.float16, (3, D))
    far.copy_(near)
    expected = grads(lambda q, k: fused(q, k, 2.0), [near, near.clone()])
    q, k = far.detach().requires_grad_(), far.detach().requires_grad_()
    lse = fused(q, k, 2.0)
    UPSTREAM["contiguous"](lse).backward()
    found = [lse.detach(), q.grad, k.grad]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("scale", [100.0, -1.5, 0.0, 0.01])
def test_any_scale(scale):
    q, k = unit_rows(torch.float32, (20, 8), (35, 8))
    scale = torch.tensor(scale, device=DEVICE)
    assert_no_worse(fused, reference, (q, k, scale))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scale_of_another_dtype_gets_its_gradient(dtype):
    q, k = unit_rows(torch.float32, (3, 3), (4, 3))
    expected = grads(fused, [q, k, torch.tensor(1.5, device=DEVICE)])
    found = grads(fused, [q, k, torch.tensor(1.5, device=DEVICE, dtype=dtype)])
    assert found[3].dtype == dtype
    torch.testing.assert_close(found[3].float(), expected[3], rtol=1e-2, atol=0)
    assert torch.equal(found[1], expected[1])


def test_scores_far_below_zero_do_not_vanish():
    q, k = torch.ones(3, 2, device=DEVICE), -torch.ones(20, 2, device=DEVICE)
    lse = fused(q, k, 1e4)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(20) - 2e4), rtol=1e-6, atol=0)


def test_float16_gradients_survive_a_small_upstream():
    q, k = unit_rows(torch.float16, (40, 5), (3, 5))
    k /= 256
    loss = lambda q, k: 1e-6 * fused(q, k, 1000.0)  # noqa: E731
    found = grads(loss, [q, k])[2]
    truth = grads(lambda q, k: 1e-6 * reference(q, k, 1000.0), [q.double(), k.double()])[2]
    assert (found - truth).abs().max() < 1e-2 * truth.abs().max()


def test_uniform_scores_give_the_log_of_their_number():
    z = torch.zeros(37, 3, device=DEVICE)
    every, others = (fused(z, z, 9.0, mask=m) for m in (None, exclude_self))
    torch.testing.assert_close(every, torch.full_like(every, math.log(37)))
    torch.testing.assert_close(others, torch.full_like(others, math.log(36)))


def test_gradients_only_where_wanted():
    inputs = [*unit_rows(torch.float32, (19, 3), (21, 3)), torch.tensor(2.0, device=DEVICE)]
    every = grads(fused, inputs)[1:]
    for i in range(3):
        fixed = [x.detach() for x in inputs]
        alone = grads(lambda x, i=i, f=fixed: fused(*f[:i], x, *f[i + 1 :]), [inputs[i]])[1]
        assert torch.equal(alone, every[i])
    _, dk, dscale = grads(lambda k, s: fused(inputs[0], k, s), inputs[1:])
    assert torch.equal(dk, every[1])
    torch.testing.assert_close(dscale, every[2])


def test_the_same_bits_each_time():
    q, k = unit_rows(torch.bfloat16, (35, 20), (37, 20))
    first, second = (grads(lambda q, k: fused(q, k, 3.0), [q, k]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("same", [True, False], ids=["self", "rows"])
def test_keeps_and_makes_nothing_of_all_pairs(same):
    z = torch.randn(60, 4, device=DEVICE, requires_grad=True)
    k = z if same else torch.randn(60, 4, device=DEVICE, requires_grad=True)
    run = lambda: fused(z, k, 1.0, mask=exclude_self).mean()  # noqa: E731
    assert saved_elements(run) <= 2 * 240 + 2 * 60 + 2 * 60 + 8
    assert largest_tensor(lambda: run().backward()) <= 240
    scale = torch.ones((), device=DEVICE)

    def launches():  # what an operator makes inside is seen from here alone
        _, stats = forward(z, k, scale, [], different)
        pair = [z.detach(), k.detach()]
        grad = torch.ones(60, device=DEVICE)
        choice = choose(BWD, z, "both" if same else "cols")
        return backward(pair, scale, stats, grad, different, True, choice)

    assert largest_tensor(launches) <= 960  # an operand in bytes, as the interpreter views it


@pytest.mark.parametrize("precision, name", [("highest", "float32"), ("high", "tf32")])
def test_float32_products_are_ieee_unless_torch_allows_tf32(precision, name, monkeypatch):
    launched = []
    before = torch.get_float32_matmul_precision()
    q, k = unit_rows(torch.float32, (19, 3), (21, 3))
    look = lambda kernel, x, part: launched.append(choose(kernel, x, part)) or launched[-1]  # noqa: E731
    monkeypatch.setattr("fastssl.kernels.pairwise_fused.choose", look)
    torch.set_float32_matmul_precision(precision)
    try:
        torch.testing.assert_close(fused(q, k, 2.0), reference(q, k, 2.0), rtol=1e-3, atol=1e-3)
    finally:
        torch.set_float32_matmul_precision(before)
    assert [choice[0] for choice in launched] == [f"{name}-all"]
    constants = FWD.variants[f"{name}-all"].constexprs
    assert constants["PRECISION"] == ("tf32" if name == "tf32" else "ieee")


@pytest.mark.parametrize("D, width", [(1, "D64"), (64, "D64"), (65, "D128"), (257, "long")])
def test_classes_go_by_dtype_and_width(D, width):
    assert shape_class(torch.empty(3, D, dtype=torch.float16), "rows") == f"float16-{width}-rows"


def test_autocast_does_not_reach_inside():
    q, k = unit_rows(torch.float32, (9, 16), (8, 16))
    plain = grads(lambda q, k: fused(q, k, 3.0), [q, k])
    with torch.autocast(DEVICE, torch.bfloat16):
        inside = grads(lambda q, k: fused(q, k, 3.0), [q, k])
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_second_derivative_is_refused():
    z = torch.randn(4, 3, device=DEVICE, requires_grad=True)
    (g,) = torch.autograd.grad(fused(z, z, 1.0).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        g.sum().backward()


def test_compiles_without_a_graph_break():
    def loss(q, k, scale):
        return fused(q, k, scale, mask=LOWER, row_ids=ids(9, 5)) + fused(q, q, scale)

    inputs = [*unit_rows(torch.float32, (9, 3), (20, 3)), torch.tensor(2.0, device=DEVICE)]
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found, expected = grads(compiled, inputs), grads(loss, inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# The check itself reads .grad of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("same", [True, False], ids=["self", "rows"])
def test_operators_are_declared_as_they_behave(same):
    q, k = (x.requires_grad_() for x in unit_rows(torch.float32, (3, 3), (4, 3)))
    scale = torch.ones((), device=DEVICE, requires_grad=True)
    k, given = (q, []) if same else (k, [ids(3), ids(4)])
    ops = torch.ops.fastssl
    torch.library.opcheck(
        ops.pairwise_lse.default, (q, k, scale, *(given or (None, None)), "exclude_self", same)
    )
    pair = [q.detach(), k.detach(), *given]
    stats, grad = torch.ones(2, 3, device=DEVICE), torch.ones(3, device=DEVICE)
    side = "both" if same else "rows"
    torch.library.opcheck(
        ops.pairwise_lse_grad.default, (pair, scale.detach(), stats, grad, "lower", side, True)
    )


def test_masks_of_one_name_are_kept_apart():
    other = PairMask("lower", lambda rows, cols: rows != cols, triton=different)
    (z,) = unit_rows(torch.float32, (5, 3))
    for mask in (other, LOWER):
        torch.testing.assert_close(fused(z, z, 1.0, mask=mask), reference(z, z, 1.0, mask))


def test_a_mask_can_be_copied():
    assert copy.deepcopy({"mask": exclude_self})["mask"] is exclude_self


def test_auto_leaves_to_torch_what_triton_has_not(monkeypatch):
    asked = []
    monkeypatch.setattr(pairwise, "_LSE", lambda impl, device, q, *rest: asked.append(impl) or q)
    (q,) = unit_rows(torch.float32, (3, 3))
    pairwise_lse(q.double(), q.double(), 1.0)
    pairwise_lse(q, q, 1.0, mask=EAGER)
    pairwise_lse(q, q, 1.0, mask=LOWER)
    pairwise_lse(q, q, 1.0)
    assert asked == ["torch", "torch", "auto", "auto"]


Q = torch.zeros(4, 3, device=DEVICE)


@pytest.mark.parametrize(
    "q, mask, words",
    [
        (Q.double(), None, "float32, bfloat16 and float16, got q in torch.float64"),
        (Q, EAGER, "mask 'eager' has no Triton twin"),
    ],
)
def test_triton_refuses(q, mask, words):
    with pytest.raises(ValueError, match=words):
        fused(q, q, 1.0, mask=mask)


def test_off_cuda_triton_must_interpret(monkeypatch):
    monkeypatch.setattr(pairwise_ops, "INTERPRETED", False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got q on cpu; TRITON_INTERPRET=1"):
        fused(Q.cpu(), Q.cpu(), 1.0)


def test_without_triton_the_rest_works():
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from fastssl.kernels import exclude_self, implementations, pairwise_lse
x = torch.eye(2)
print(pairwise_lse(x, x, 3.0, mask=exclude_self).tolist(), implementations("cuda")["pairwise_lse"])
try:
    pairwise_lse(x, x, 3.0, impl="triton")
except ValueError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = run.stdout.splitlines()
    assert first == "[0.0, 0.0] torch"
    assert "one of auto, torch, reference for pairwise_lse, got 'triton'" in second


def test_a_twin_must_be_a_triton_function():
    with pytest.raises(ValueError, match=r"@triton.jit function .* in mask 'x', got <function"):
        PairMask("x", torch.ne, triton=lambda rows, cols: rows != cols)
