"""What is particular to the Triton log-sum-exps: schedules, classes, operators, what they hold."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from fastssl.kernels import PairMask, exclude_self, pairwise_lse
from fastssl.kernels.common import rows
from fastssl.kernels.common import tuning as _tuning
from fastssl.kernels.common.gpu import Gpu, pretend
from fastssl.kernels.pairwise import classes
from fastssl.kernels.pairwise import lse_gemm as pairwise_products
from fastssl.kernels.pairwise import lse_ops as pairwise_ops
from fastssl.kernels.pairwise import lse_triton as pairwise_tiles
from fastssl.kernels.pairwise.classes import shape_class
from fastssl.kernels.pairwise.lse import pairwise_lse_reference
from fastssl.kernels.pairwise.lse_torch import Pairs
from fastssl.kernels.pairwise.masks import as_masks
from fastssl.kernels.pairwise.scores_triton import leveled
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, largest_tensor, saved_elements

from .conftest import SCHEDULES

EAGER = PairMask("eager", lambda rows, cols: rows > cols)
pytestmark = pytest.mark.usefixtures("small_blocks")
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def rows_of(dtype, *shapes):
    torch.manual_seed(sum(map(sum, shapes)))
    found = [torch.randn(shape, device=DEVICE) for shape in shapes]
    return [(2 * torch.nn.functional.normalize(x)).to(dtype) for x in found]


def fused(*args, **kwargs):
    return pairwise_lse(*args, impl="triton", **kwargs)


def pairs_of(q, k, mask=None, bias=None):
    masks = as_masks(mask)
    scale = torch.ones((), device=DEVICE)
    return Pairs(q, k, scale, bias, *masks.ids(), masks.key, q is k and masks.symmetric)


H200, B200 = Gpu("sm_90", 132), Gpu("sm_100", 148)
T, P = "tiles", "products"


@pytest.mark.parametrize(
    "gpu, dtype, D, expected",  # of rows, of both sides, and of the gradients
    [
        (None, torch.bfloat16, 256, (T, T, T)),
        (None, torch.bfloat16, 257, (P, P, P)),
        (None, torch.float32, 31, (T, T, T)),
        (None, torch.float32, 32, (P, P, P)),
        (H200, torch.float16, 512, (T, P, P)),
        (H200, torch.float16, 513, (P, P, P)),
        (H200, torch.float32, 257, (P, P, P)),
        (B200, torch.float16, 257, (P, P, P)),
    ],
)
def test_the_schedule_goes_by_step_width_and_gpu(gpu, dtype, D, expected, monkeypatch):
    monkeypatch.setattr(classes, "allows_tf32", lambda: gpu is not None)
    x = torch.empty(3, D, dtype=dtype)
    with pretend(gpu) if gpu else nullcontext():
        found = [classes.schedule(x, step) for step in ("rows", "sides", "grads")]
    assert tuple(found) == expected


@pytest.mark.parametrize("backward", SCHEDULES)
@pytest.mark.parametrize("forward", SCHEDULES)
def test_one_schedule_goes_on_with_what_the_other_made(forward, backward, monkeypatch):
    """And a forward is of rows alone where nothing asks for more."""
    asked = []

    def schedule(x, step):
        asked.append(step)
        return backward if step == "grads" else forward

    monkeypatch.setattr(pairwise_ops, "schedule", schedule)
    q, k = rows_of(torch.float32, (37, 5), (45, 5))
    for mask, both in ((exclude_self, True), (None, False)):
        assert_no_worse(
            lambda q, k, m=mask, b=both: _joined(fused(q, k, 5.0, mask=m, both=b)),
            lambda q, k, m=mask, b=both: _joined(pairwise_lse_reference(q, k, 5.0, m, None, b)),
            [q, k],
        )
    assert dict.fromkeys(asked) == dict.fromkeys(("sides", "grads", "rows"))
    asked.clear()
    fused(q, q, 5.0), fused(q, k, 5.0, bias=k[:, 0]), fused(q, k, q[:, 0])
    assert asked == ["sides"] * 3


def _joined(made):
    return torch.cat(made) if isinstance(made, tuple) else made


def test_one_tensor_costs_one_pass_of_tiles_backward(monkeypatch):
    passes, backward = [], pairwise_tiles.backward
    seen = lambda *args, **kw: passes.append(args) or backward(*args, **kw)  # noqa: E731
    monkeypatch.setattr(pairwise_tiles, "backward", seen)
    (z,) = rows_of(torch.float32, (20, 3))
    grads(lambda z: fused(z, z, 1.0, mask=exclude_self), [z])
    assert len(passes) == 1
    grads(lambda z: fused(z, z.clone(), 1.0, mask=exclude_self), [z])
    assert len(passes) == 3


def test_the_columns_of_a_wide_tile_may_meet_the_rows_at_its_end():
    q, k = rows_of(torch.float32, (40, 5), (40, 5))
    wide = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 16}
    pairs = pairs_of(q, k, exclude_self)
    name = shape_class(q, "masked")
    m, total = pairwise_tiles.forward(pairs, choice=(name, _tuning.Config(wide)))
    lse = (m + total.log2()) * math.log(2)
    torch.testing.assert_close(lse, pairwise_lse_reference(q, k, 1.0, exclude_self))


def test_maxima_of_both_sides_tell_whether_one_exponential_serves():
    near, far = (torch.stack([torch.full((3,), m), torch.ones(3)]) for m in (5.0, -90.0))
    for sides in ((near, far), (far, near)):
        _, low, high = leveled(*sides)
        assert (low, high) == (-90, 5)


@pytest.mark.parametrize("both", [False, True], ids=["rows", "both"])
@pytest.mark.parametrize("same", [False, True], ids=["two", "one"])
def test_products_meet_each_pair_of_blocks_once(same, both, monkeypatch):
    sizes, product = [], pairwise_products.product
    seen = lambda a, b: sizes.append((len(a), b.shape[1])) or product(a, b)  # noqa: E731
    monkeypatch.setattr(pairwise_products, "product", seen)
    q, k = rows_of(torch.bfloat16, (70, 5), (90, 5))
    pairwise_products.statistics(pairs_of(q, q if same else k), both)
    if not same:
        assert sum(m * n for m, n in sizes) == 70 * 90
    else:  # blocks of 20 rows: the four on the diagonal, and those above it
        diagonal = 3 * 20**2 + 10**2
        assert sum(m * n for m, n in sizes) == diagonal + (70**2 - diagonal) // 2


@pytest.mark.parametrize("impl", ["torch", "tiles", "products"])
def test_the_most_features(impl):
    q, k = rows_of(torch.float32, (3, 4096), (21, 4096))
    chunks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": 256}
    with (
        _tuning.forced("pairwise_lse_fwd", _tuning.Config(chunks)),
        _tuning.forced("pairwise_lse_bwd", _tuning.Config({**chunks, "BLOCK_O": 512})),
    ):
        assert_no_worse(
            lambda q, k: torch.cat(pairwise_ops.lse(pairs_of(q, k), True, impl)),
            lambda q, k: torch.cat(pairwise_lse_reference(q, k, 1.0, None, None, True)),
            (q, k),
        )


def test_rows_that_a_wide_load_divides_are_not_copied(monkeypatch):
    monkeypatch.setattr(rows, "EVEN", 16)
    wide = torch.zeros(3, 64, device=DEVICE)
    assert all(rows.evened(x) is x for x in (wide, wide[:, :32]))
    assert rows.evened(wide.as_strided((3, 32), (33, 1))).stride() == (32, 1)


@schedules
@pytest.mark.parametrize("same", [True, False], ids=["self", "rows"])
def test_rows_that_no_wide_load_divides_are_padded(schedule, same, monkeypatch):
    monkeypatch.setattr(pairwise_ops, "schedule", lambda x, step: schedule)
    monkeypatch.setattr(rows, "EVEN", 16)
    module = pairwise_ops.backend(schedule, torch.empty(1, 1), "grads")
    widths, gradients = [], module.gradients
    seen = lambda pairs, *a: widths.append(pairs.k.shape[1]) or gradients(pairs, *a)  # noqa: E731
    monkeypatch.setattr(module, "gradients", seen)
    q, k = rows_of(torch.float32, (19, 21), (37, 21))
    reference = lambda q, k: pairwise_lse_reference(q, k, 2.0, None, None, False)  # noqa: E731
    if same:
        assert_no_worse(lambda q: fused(q, q, 2.0), lambda q: reference(q, q), [q])
    else:
        assert_no_worse(lambda q, k: fused(q, k, 2.0), reference, [q, k])
    assert set(widths) == {32}


@schedules
@pytest.mark.parametrize("same", [True, False], ids=["self", "rows"])
def test_keeps_and_makes_nothing_of_all_pairs(schedule, same, monkeypatch):
    monkeypatch.setattr(pairwise_ops, "schedule", lambda x, step: schedule)
    z = torch.randn(64, 4, device=DEVICE, requires_grad=True)
    k = z if same else torch.randn(64, 4, device=DEVICE, requires_grad=True)
    run = lambda: torch.cat(fused(z, k, 1.0, mask=exclude_self, both=True)).mean()  # noqa: E731
    assert saved_elements(run) <= 2 * 256 + 4 * 64 + 4 * 64 + 8
    # What an operator makes inside is seen from here alone; operands are viewed in bytes.
    pairs = pairs_of(z.detach(), k.detach(), exclude_self)
    side = torch.ones(2, 64, device=DEVICE)
    module = pairwise_ops.backend(schedule, z, "rows")
    assert largest_tensor(lambda: module.statistics(pairs, True)) <= 4 * 800
    assert largest_tensor(lambda: module.gradients(pairs, side, side, (True,) * 4)) <= 4 * 800


@schedules
def test_rows_beyond_two_to_the_31_elements(schedule, tmp_path, monkeypatch):
    monkeypatch.setattr(pairwise_ops, "schedule", lambda x, step: schedule)
    D, gap = 4, 2**30
    size = 2 * gap + D
    if DEVICE == "cpu":  # a file without content takes no space
        far = torch.from_file(str(tmp_path / "far"), shared=True, size=size, dtype=torch.float16)
    else:
        far = torch.empty(size, dtype=torch.float16, device=DEVICE)
    far = far.as_strided((3, D), (gap, 1))
    (near,) = rows_of(torch.float16, (3, D))
    far.copy_(near)
    expected = grads(lambda q, k: fused(q, k, 2.0), [near, near.clone()])
    q, k = far.detach().requires_grad_(), far.detach().requires_grad_()
    lse = fused(q, k, 2.0)
    UPSTREAM["contiguous"](lse).backward()
    found = [lse.detach(), q.grad, k.grad]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def by_the_old_switch(allowed):
    torch.set_float32_matmul_precision("high" if allowed else "highest")


def by_the_new_switch(allowed):
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "none"


def by_the_switch_of_all_backends(allowed):
    torch.backends.fp32_precision = "tf32" if allowed else "none"


@pytest.mark.parametrize(
    "switch, name",
    [
        (by_the_old_switch, "float32"),
        (by_the_old_switch, "tf32"),
        (by_the_new_switch, "tf32"),  # torch.get_float32_matmul_precision raises then
        (by_the_switch_of_all_backends, "tf32"),
    ],
)
def test_float32_products_are_ieee_unless_torch_allows_tf32(switch, name, monkeypatch):
    launched, choose = [], pairwise_tiles.choose
    q, k = rows_of(torch.float32, (19, 3), (21, 3))
    look = lambda kernel, x, part: launched.append(choose(kernel, x, part)) or launched[-1]  # noqa: E731
    monkeypatch.setattr(pairwise_tiles, "choose", look)
    switch(name == "tf32")
    try:
        found, expected = fused(q, k, 2.0), pairwise_lse_reference(q, k, 2.0)
    finally:
        switch(False)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert [choice[0] for choice in launched] == [f"{name}-all"]
    constants = pairwise_tiles.FWD.variants[f"{name}-all"].constexprs
    assert constants["PRECISION"] == ("tf32" if name == "tf32" else "ieee")


@pytest.mark.parametrize("D, width", [(1, "D64"), (64, "D64"), (65, "D128"), (257, "long")])
def test_classes_go_by_dtype_and_width(D, width):
    assert shape_class(torch.empty(3, D, dtype=torch.float16), "rows") == f"float16-{width}-rows"


@pytest.mark.parametrize("D", [3, 20])
def test_wide_tiles_and_chunks_of_them_agree(D, monkeypatch):
    """Blocks of 16 hold 3 features whole (FITS_BLOCK), and 20 in two chunks."""
    q, k = rows_of(torch.bfloat16, (19, D), (21, D))
    wholes, fits = [], pairwise_tiles._fits_block
    look = lambda *args: wholes.append(fits(*args)) or wholes[-1]  # noqa: E731
    monkeypatch.setattr(pairwise_tiles, "_fits_block", look)
    found, want = fused(q, k, 2.0), pairwise_lse_reference(q.float(), k.float(), 2.0)
    torch.testing.assert_close(found, want)
    assert wholes == [D == 3]


# The check itself reads .grad of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("same", [True, False], ids=["self", "rows"])
def test_operators_are_declared_as_they_behave(same, impl):
    q, k = rows_of(torch.float32, (3, 3), (4, 3))
    pairs = pairs_of(q, q if same else k, exclude_self, None if same else torch.ones(4))
    ops, tensors = torch.ops.fastssl, list(pairs[:6])
    # One fake stands for all: once it is tried at sizes that are open, which takes longest.
    full = not same and impl == "triton"
    tests = "test_schema", "test_faketensor", *(["test_aot_dispatch_dynamic"] if full else [])
    check = partial(torch.library.opcheck, test_utils=tests)
    for both in (True, False):
        check(ops.pairwise_stats.default, (tensors, *pairs[6:], both, impl))
    rows, cols = torch.ones(2, 3, device=DEVICE), torch.ones(2, len(pairs.k), device=DEVICE)
    needs = [[True] * 4, [False, True, False, False], [True, False, False, False]]
    for need, other in zip(needs, (cols, cols, None), strict=True):
        need = [*need[:3], need[3] and not same]
        given = (tensors, rows, other, *pairs[6:], need, impl)
        check(ops.pairwise_grads.default, given)


def test_auto_leaves_to_torch_what_triton_has_not(monkeypatch):
    asked = []
    seen = lambda self, impl, device: asked.append(impl) or "torch"  # noqa: E731
    monkeypatch.setattr("fastssl.kernels.common.dispatch.Primitive.choose", seen)
    (q,) = rows_of(torch.float32, (3, 3))
    pairwise_lse(q.double(), q.double(), 1.0)
    pairwise_lse(q, q, 1.0, mask=EAGER)
    pairwise_lse(q, q, 1.0, mask=exclude_self)
    pairwise_lse(q, q, 1.0)
    assert asked == ["torch", "torch", "auto", "auto"]


Q = torch.zeros(4, 3, device=DEVICE)


def test_triton_refuses_float64():
    with pytest.raises(ValueError, match="float32, bfloat16 and float16, got q in torch.float64"):
        fused(Q.double(), Q.double(), 1.0)


def test_off_cuda_triton_must_interpret(monkeypatch):
    monkeypatch.setattr("fastssl.kernels.common.dispatch.INTERPRETED", False)
    with pytest.raises(ValueError, match="needs CUDA tensors, got q on cpu; TRITON_INTERPRET=1"):
        fused(Q.cpu(), Q.cpu(), 1.0)
