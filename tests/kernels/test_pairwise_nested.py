"""Log-sum-exps of nested prefixes: the kernels at blocks of 16, of prefixes that divide nothing."""

from contextlib import ExitStack

import pytest
import torch

from fastssl.kernels import PairMask, exclude_self
from fastssl.kernels.common import rows as common_rows
from fastssl.kernels.common import tuning
from fastssl.kernels.pairwise import nested_matches, nested_triton, pairwise_lse_nested
from fastssl.kernels.pairwise.masks import as_masks
from fastssl.kernels.pairwise.nested import pairwise_lse_nested_reference
from fastssl.kernels.pairwise.nested_rows import Nested, Rows
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor

DIMS, M, N, D = (5, 16, 37), 29, 47, 40
IDS = torch.arange(N, device=DEVICE) // 2
EAGER = PairMask("eager-nested", lambda rows, cols: rows > cols)
TILE = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 16}
FORCED = {
    nested_triton.SUMMARIZE.name: {**TILE, "BLOCK_N": 32},
    nested_triton.WEIGH.name: TILE,
    nested_triton.GATHER.name: {"BLOCK_M": 8, "BLOCK_N": 16},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch, nan_filled, uneven):
    """Blocks of 20 by 40 pairs of three prefixes of float32, or more."""
    monkeypatch.setattr(nested_triton, "BLOCK_BYTES", 3 * 4 * 800)
    with ExitStack() as stack:
        for kernel, blocks in FORCED.items():
            stack.enter_context(tuning.forced(kernel, tuning.Config(blocks)))
        yield


def rows_of(dtype, *sizes):
    torch.manual_seed(sum(sizes))
    return [torch.randn(n, D, device=DEVICE).to(dtype) for n in sizes]


def sides_of(q, k, scale, normalize, both, impl):
    """Log-sum-exps as one tensor; k may be q."""
    mask = exclude_self(IDS[: len(q)]) if q is k else exclude_self(IDS[: len(q)], IDS[: len(k)])
    if impl == "reference":
        sides = pairwise_lse_nested_reference(q, k, scale, DIMS, normalize, mask)
    else:
        options = {"normalize": normalize, "mask": mask, "both": both, "impl": impl}
        sides = pairwise_lse_nested(q, k, scale, DIMS, **options)
    return torch.cat(sides[: 2 if both else 1], 1)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("layout", UPSTREAM)
@pytest.mark.parametrize("both", [True, False], ids=["both", "rows"])
@pytest.mark.parametrize("kind", ["self", "two"])
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_worse_than_one_prefix_after_another(dtype, normalize, kind, both, layout, impl):
    q, k = rows_of(dtype, M, N)
    options, same = (normalize, both), kind == "self"
    scale = torch.tensor(1.7 if normalize else 0.05, device=DEVICE)

    def call(impl):
        if same:
            return lambda q, s: sides_of(q, q, s, *options, impl)
        return lambda q, k, s: sides_of(q, k, s, *options, impl)

    inputs = (q, scale) if same else (q, k, scale)
    assert_no_worse(call(impl), call("reference"), inputs, UPSTREAM[layout])


def tf32(allowed):
    torch.set_float32_matmul_precision("high" if allowed else "highest")


@pytest.mark.parametrize("same", [True, False], ids=["self", "two"])
def test_tf32_multiplies_in_the_kernel(same, monkeypatch):
    monkeypatch.setattr(nested_triton, "_products", None)
    q, k = rows_of(torch.float32, M, N)
    inputs = [q] if same else [q, k]

    def run(impl):
        both = lambda q, k: sides_of(q, k, 2.0, True, True, impl)  # noqa: E731
        return grads(lambda q, k=None: both(q, q if same else k), inputs)

    tf32(True)
    try:
        found = run("triton")
    finally:
        tf32(False)
    torch.testing.assert_close(found, run("reference"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_scores_far_apart_take_an_exponential_each(impl):
    """Maxima of rows and columns that no one number is near to."""
    q, k = rows_of(torch.float32, M, N)
    q[::3], k[1::4] = 100 * q[::3], 0.01 * k[1::4]
    call = lambda impl: lambda q, k: sides_of(q, k, 1.0, False, True, impl)  # noqa: E731
    assert_no_worse(call(impl), call("reference"), (q, k))


def formula(q, k):
    """The same in float64, of prefixes divided by their lengths, but for those of zeros."""
    mask, sides = exclude_self(IDS[: len(q)], IDS[: len(k)]).keep(len(q), len(k), q.device), []
    for m in DIMS:
        lengths = [x[:, :m].norm(dim=1, keepdim=True) for x in (q, k)]
        a, b = (x[:, :m] / n.where(n > 0, 1) for x, n in zip((q, k), lengths, strict=True))
        a, b = (x * (n > 0) for x, n in zip((a, b), lengths, strict=True))
        s = (3.0 * a @ b.T).masked_fill(~mask, -torch.inf)
        sides.append(torch.cat([s.logsumexp(1), s.logsumexp(0)]))
    return torch.stack(sides)


SIZES = [(torch.float32, 1e25, 1e-30), (torch.bfloat16, 1e30, 1e-30), (torch.float16, 300.0, 0.02)]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype, large, small", SIZES, ids=str)
def test_rows_and_prefixes_of_any_size(dtype, large, small, impl):
    """Rows whose squares no dtype could add, first features far below the others, and zeros."""
    q, k = rows_of(torch.float64, 21, 34)
    size = torch.tensor([large, 1.0, small], device=DEVICE).double()
    q, k = (x * size[torch.arange(len(x), device=DEVICE) % 3, None] for x in (q, k))
    q[:, :5] *= 2.0**-8
    q[3, :5], q[7], k[2, :16] = 0, 0, 0
    q, k = q.to(dtype), k.to(dtype)
    found = grads(lambda q, k: sides_of(q, k, 3.0, True, True, impl), (q, k))
    want = grads(formula, [x.double() for x in (q, k)])
    assert not found[1][7].any() and found[1][3, 5:].any() and found[2][2, 16:].any()
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-5, atol=1e-5)
    for x, a, b in zip((q, k), found[1:], want[1:], strict=True):
        across = x.double().norm(dim=1, keepdim=True)  # gradients are as small as rows are large
        a, b = a.double() * across, b * across
        near = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(a, b, rtol=near, atol=near * float(b.abs().max()))


@pytest.mark.parametrize("same", [True, False], ids=["self", "two"])
def test_prefixes_that_no_wide_load_divides_are_padded(same, monkeypatch):
    monkeypatch.setattr(common_rows, "EVEN", 16)
    q, k = rows_of(torch.bfloat16, M, N)
    padded = Rows(q, DIMS, True, 16)
    assert padded.ends == (0, 16, 32, 64) and not padded.x[:, 5:16].any()
    inputs = [q] if same else [q, k]
    call = lambda impl: lambda q, k=None: sides_of(q, q if same else k, 2.0, True, True, impl)  # noqa: E731
    assert_no_worse(call("triton"), call("reference"), inputs)


def test_rows_that_a_wide_load_divides_are_not_copied():
    wide = torch.zeros(3, 64, device=DEVICE)
    assert Rows(wide, (16, 48), False, 16).x.data_ptr() == wide.data_ptr()
    assert Rows(torch.zeros(3, 65)[:, 1:], (16, 48), False, 16).x.stride() == (48, 1)


def nested_of(q, k, mask):
    masks = as_masks(mask)
    rows = Rows(q, DIMS, True)
    scale = torch.ones((), device=DEVICE)
    return Nested(
        rows, rows if k is q else Rows(k, DIMS, True), scale, *masks.ids(), masks.key, k is q
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("same", [True, False], ids=["self", "two"])
def test_makes_nothing_of_all_pairs(same, dtype):
    q, k = rows_of(dtype, 100, 100)
    nested = nested_of(q, q if same else k, exclude_self)
    side = torch.ones(2, 3, 100, device=DEVICE)
    need = [True, True, True]
    most = 3 * 4 * 800  # bytes, in which operands are viewed; rows themselves have 100 * 40 numbers
    room = max(most, 4 * 100 * D)
    assert largest_tensor(lambda: nested_triton.statistics(nested, True)) <= room < 3 * 100 * 100
    assert largest_tensor(lambda: nested_triton.gradients(nested, side, side, need)) <= room


def test_symmetric_scores_are_made_once(monkeypatch):
    """Of the forward's one block the tiles on and above the diagonal, in squares of 32."""
    monkeypatch.setattr(nested_triton, "BLOCK_BYTES", 1 << 20)
    (q,) = rows_of(torch.bfloat16, 100)
    seen, dot = [], nested_triton.dot
    monkeypatch.setattr(nested_triton, "dot", lambda *a: seen.append(a) or dot(*a))
    nested_triton.statistics(nested_of(q, q, exclude_self), True)
    tiles = 2 * 4 + 2 * 3 + 2 * 2 + 1  # of 16 rows: two to a square, and 4 left for the last one
    assert len(seen) == 4 * tiles  # blocks of 16 features: 1, 1 and 2


# The check itself reads .grad of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("same", [True, False], ids=["self", "two"])
def test_operators_are_declared_as_they_behave(same):
    q, k = rows_of(torch.float32, 3, 4)
    mask = as_masks(exclude_self)
    tensors = [q, q if same else k, torch.ones((), device=DEVICE), *mask.ids()]
    ops, given = torch.ops.fastssl, (list(DIMS), True, mask.key, same)
    for both in (True, False):
        torch.library.opcheck(ops.pairwise_nested_stats.default, (tensors, *given, both))
    rows, cols = (torch.ones(2, 3, len(x), device=DEVICE) for x in tensors[:2])
    needs = [[True] * 3, [False, True, False], [True, False, False]]
    for need, other in zip(needs, (cols, cols, None), strict=True):
        args = (tensors, rows, other, *given, need)
        torch.library.opcheck(ops.pairwise_nested_grads.default, args)


def test_matches_are_the_scores_of_rows_in_one_place():
    q, k = (x.double() for x in rows_of(torch.float32, 9, 9))
    unit = torch.nn.functional.normalize
    spelt = lambda q, k: torch.stack([(unit(q[:, :m]) * unit(k[:, :m])).sum(1) for m in DIMS])  # noqa: E731
    want = grads(spelt, (q, k))
    found = grads(lambda q, k: nested_matches(q, k, DIMS, True), (q, k))
    torch.testing.assert_close(found, want)
    found = grads(lambda q, k: nested_matches(q, k, DIMS, True), (q.float(), k.float()))
    torch.testing.assert_close([x.double() for x in found], want, rtol=1e-5, atol=1e-6)


Q = torch.zeros(4, 8, device=DEVICE)


@pytest.mark.parametrize("dims", [(), (0, 4), (4, 4), (8, 4), (9,), (1.5, 4)])
def test_refuses_dims(dims):
    with pytest.raises(ValueError, match="dims must be integers that rise from 1 to 8, got"):
        pairwise_lse_nested(Q, Q, 1.0, dims)


def test_refuses_what_a_log_sum_exp_refuses():
    with pytest.raises(ValueError, match="has no Triton twin"):
        pairwise_lse_nested(Q, Q, 1.0, (4, 8), mask=EAGER, impl="triton")
    with pytest.raises(ValueError, match=r"scale must be a number or a 0-d float tensor by q"):
        pairwise_lse_nested(Q, Q, torch.ones(4, device=DEVICE), (4, 8))
