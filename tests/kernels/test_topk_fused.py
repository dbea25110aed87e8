"""The Triton kernel at blocks of 16, so that small odd shapes cross several and divide none."""

import math

import pytest
import torch
import triton
import triton.language as tl  # noqa: F401  the interpreter looks for it where a function is

from fastssl.kernels import PairMask, exclude_self, pairwise_topk, same_group
from fastssl.kernels.common import rows
from fastssl.kernels.common import tuning as _tuning
from fastssl.kernels.pairwise import scores_triton
from fastssl.kernels.pairwise.masks import as_masks
from fastssl.kernels.pairwise.topk_configs import shape_class
from tests.oracle import DEVICE

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = _tuning.Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 16})
HELD = _tuning.Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_D": 128})


@triton.jit
def three_columns(rows, cols):
    return (cols % 20 == 5) & (rows >= 0)


THREE = PairMask("three", lambda rows, cols: (cols % 20 == 5) & (rows >= 0), triton=three_columns)
EAGER = PairMask("eager", lambda rows, cols: rows > cols)


@pytest.fixture(autouse=True, params=[1, 7], ids=["one share", "shares"])
def small_blocks(monkeypatch, request):
    """Blocks of 16, and as many programs as a device of one or of seven places would have.

    Those of seven keep their rows, where they are in 16 bits.
    """
    monkeypatch.setattr(scores_triton, "programs", lambda device, each: request.param)
    monkeypatch.setattr(scores_triton, "LEAST_SHARE", 16)
    monkeypatch.setattr(rows, "EVEN", 16 if request.param == 1 else 1)
    with _tuning.forced("pairwise_topk", SMALL if request.param == 1 else HELD):
        yield


def normal(dtype, *shapes):
    torch.manual_seed(sum(map(sum, shapes)))
    return [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def fused(*args, **kwargs):
    return pairwise_topk(*args, impl="triton", **kwargs)


def check(q, k, n, mask=None):
    """Values are the sorted scores in float64; indices are where they stand, none twice."""
    values, indices = fused(q, k, n, mask=mask)
    s = q.double() @ k.double().T
    if mask is not None:
        s = s.masked_fill(~as_masks(mask).keep(*s.shape, s.device), -math.inf)
    want = s.sort(1, descending=True).values[:, :n]
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    torch.testing.assert_close(values.double(), want, rtol=1e-5, atol=1e-5)
    left = want.isfinite()
    assert ((indices == -1) == ~left).all() and (indices < len(k)).all()
    picked = s.gather(1, indices.clamp_min(0))
    torch.testing.assert_close(values.double()[left], picked[left], rtol=1e-5, atol=1e-5)
    for row, kept in zip(indices.tolist(), left.sum(1).tolist(), strict=True):
        assert len(set(row[:kept])) == kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "M, N, D, n", [(1, 1, 1, 1), (3, 21, 5, 1), (19, 37, 17, 5), (5, 83, 3, 83), (2, 70, 4, 17)]
)
def test_matches_the_sorted_scores(M, N, D, n, dtype):
    check(*normal(dtype, (M, D), (N, D)), n)


@pytest.mark.parametrize("make", ["self", "groups", "both", "positions and groups"])
def test_masks(make):
    q, k = normal(torch.float32, (19, 7), (53, 7))
    rows, cols = (torch.arange(n, device=DEVICE) for n in (19, 53))
    mask = {
        "self": exclude_self,
        "groups": same_group(rows % 4, cols % 4),
        "both": same_group(rows // 9, cols // 9) & exclude_self(rows + 3, cols),
        "positions and groups": exclude_self & same_group(rows % 3, cols % 3),
    }[make]
    check(q, k, 6, mask)


def test_rows_with_too_few_pairs_are_filled_up():
    q, k = torch.eye(3, device=DEVICE), torch.ones(50, 3, device=DEVICE)
    values, indices = fused(q, k, 4, mask=THREE)
    assert values.tolist() == [[1.0, 1.0, 1.0, -math.inf]] * 3
    assert indices.tolist() == [[5, 25, 45, -1]] * 3
    none = same_group(
        torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.ones(50).long().to(DEVICE)
    )
    values, indices = fused(q, k, 4, mask=none)
    assert (values == -math.inf).all() and (indices == -1).all()


@pytest.mark.parametrize("n", [1, 5, 40])
def test_of_equals_the_first_come_first_and_none_twice(n):
    q = torch.ones(17, 3, device=DEVICE)
    values, indices = fused(q, torch.ones(70, 3, device=DEVICE), n)
    assert (values == 3).all()
    assert (indices == torch.arange(n, device=DEVICE)).all()


def test_values_of_either_sign_and_of_any_size():
    k = torch.tensor([[-1e-40], [1e38], [-1e38], [2.0], [-2.0], [0.0], [1e-40], [-3.0]])
    values, indices = fused(torch.ones(1, 1, device=DEVICE), k.to(DEVICE), 8)
    assert indices.tolist() == [[1, 3, 6, 5, 0, 4, 7, 2]]
    assert values.tolist() == [k[indices[0].cpu(), 0].tolist()]


def test_infinities():
    k = torch.tensor([[math.inf], [0.0], [-math.inf], [1.0]], device=DEVICE)
    values, indices = fused(torch.ones(2, 1, device=DEVICE), k, 4)
    assert values.tolist() == [[math.inf, 1.0, 0.0, -math.inf]] * 2
    assert indices.tolist() == [[0, 3, 1, -1]] * 2


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_a_nan_shows_and_stays_in_its_row_or_column(nan):
    q, k = normal(torch.float32, (20, 3), (60, 3))
    q[4] = nan
    values, _ = fused(q, k, 3)
    assert values[4].isnan().all() and values.isnan().sum() == 3
    k[[7, 30]] = nan
    values, indices = fused(q, k, 3)
    assert (
        values[:, :2].isnan().all()
        and (indices[:, :2].sort(1).values[5] == torch.tensor([7, 30], device=DEVICE)).all()
    )
    assert values.isnan().sum() == 20 * 2 + 1


def test_strided_inputs():
    q, k = normal(torch.float32, (2 * 20, 6), (6, 53))
    check(q[::2, ::2], k.T[:, :3], 4)
    check(q[::2, :3], k.T[::3, 3:], 4)
    check(q[:1].expand(20, 6), k.T, 4)


def test_float16_scores_past_its_range():
    q, k = (100 * x for x in normal(torch.float16, (5, 40), (40, 40)))
    check(q, k, 3)


def test_has_no_gradient():
    q, k = normal(torch.float32, (5, 3), (40, 3))
    assert not fused(q.requires_grad_(), k, 3)[0].requires_grad


def test_compiles_whole():
    q, k = normal(torch.float32, (20, 3), (40, 3))
    ids = torch.arange(20, device=DEVICE), torch.arange(40, device=DEVICE)

    def search(q, k):
        return pairwise_topk(2 * q, k, 3, mask=exclude_self(*ids), impl="triton")

    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(q, k), search(q, k), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_operator(impl):
    q, k = normal(torch.bfloat16, (5, 3), (40, 3))
    given = q, k, 3, None, None, as_masks(exclude_self).key, impl
    torch.library.opcheck(torch.ops.fastssl.pairwise_topk.default, given)


def test_refuses_what_it_is_not_made_for():
    q, k = normal(torch.float32, (2, 3), (300, 3))
    with pytest.raises(ValueError, match="impl='triton' is for n up to 256, got 257"):
        fused(q, k, 257)
    with pytest.raises(ValueError, match="mask 'eager' has no Triton twin"):
        fused(q, k, 3, mask=EAGER)
    with pytest.raises(ValueError, match="got q in torch.float64"):
        fused(q.double(), k.double(), 3)
    assert pairwise_topk(q, k, 257)[0].shape == (2, 257)


def test_shape_classes():
    assert shape_class(torch.empty(1, 1), 16) == "float32-n16"
    half = torch.empty(1, 257, dtype=torch.float16)
    assert shape_class(half, 17) == "float16-n64"
    assert shape_class(half[:, :256], 17) == "float16-D256-n64"
    assert shape_class(half[:, :128], 17) == "float16-D128-n64"
    assert shape_class(torch.empty(1, 1), 256) == "float32-n256"


def test_programs_fill_the_device():
    """Few rows are met by many programs, each of them with enough columns; many rows by one."""
    share = lambda *a: scores_triton.column_share(*a[:2], 16, torch.device("cpu"), 4, *a[2:])  # noqa: E731
    places = scores_triton.programs(torch.device("cpu"), 4)
    assert share(1, 1000) == (1008 if places == 1 else 144)
    assert share(8, 1000) == 1008
    assert share(1, 1000, 240) == (1008 if places == 1 else 240)
