"""The attention bias of visible tokens beside the formula."""

from functools import partial

import pytest
import torch

from fastssl.kernels import gather_bias
from fastssl.kernels.tokens import bias_triton as ops
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["torch", "triton"]
LAYOUTS = [(torch.float32, r) for r in UPSTREAM.values()]  # and each dtype once
LAYOUTS += [(dtype, UPSTREAM["sliced"]) for dtype in DTYPES[1:]]
pytestmark = pytest.mark.usefixtures("small_blocks")


def problem(B, K, L, H, dtype=torch.float32):
    torch.manual_seed(L)
    bias = torch.randn(H, L, L, device=DEVICE).to(dtype)
    return bias, torch.rand(B, L, device=DEVICE).argsort(1)[:, :K]


def formula(bias, ids):
    return torch.stack([bias[:, row][:, :, row] for row in ids])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("dtype, reduce", LAYOUTS)
@pytest.mark.parametrize("B, K, L, H", [(3, 5, 6, 2), (1, 1, 1, 1)])
def test_gather_bias(B, K, L, H, dtype, reduce, impl):
    bias, ids = problem(B, K, L, H, dtype)
    upstream = lambda x: reduce(x.float() if x.dtype != torch.float64 else x)  # noqa: E731
    call = partial(gather_bias, ids=ids, impl=impl)
    assert_no_worse(call, partial(formula, ids=ids), [bias], upstream)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("places", [1, 3])
def test_sums_over_many_sequences(places, impl, monkeypatch):
    monkeypatch.setattr(ops, "sm_count", lambda device: places)
    bias, ids = problem(43, 3, 5, 1)
    call = partial(gather_bias, ids=ids, impl=impl)
    assert_no_worse(call, partial(formula, ids=ids), [bias])


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_bias(impl):
    bias, ids = problem(2, 3, 6, 4)
    for strided in (bias.mT, bias[::2], bias[:1].expand(4, 6, 6), bias[:, ::2, 1:4]):
        some = ids % strided.shape[1] if strided.shape[1] == 6 else torch.arange(3).expand(2, 3)
        out = gather_bias(strided, some.to(DEVICE), impl=impl)
        assert torch.equal(out, formula(strided, some.to(DEVICE))) and out.is_contiguous()


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_and_once(impl):
    bias, ids = problem(2, 3, 5, 2)
    bias.requires_grad_()
    run = lambda b: gather_bias(b, ids, impl=impl).square().sum()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(run(bias), bias)
    assert torch.equal(torch.autograd.grad(compiled(bias), bias)[0], want)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(run(bias), bias, create_graph=True)


def test_operators():
    bias, ids = problem(2, 3, 5, 2, torch.float16)
    grad = torch.randn(2, 2, 3, 3, device=DEVICE)
    for found, arguments in [
        (torch.ops.fastssl.bias_pick.default, (bias.mT, ids)),
        (torch.ops.fastssl.bias_unpick.default, (grad.mT, ids, 5)),
    ]:
        tests = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
        torch.library.opcheck(found, arguments, test_utils=tests)


@pytest.mark.parametrize("kernel", [ops.PICK, ops.UNPICK], ids=lambda kernel: kernel.name)
def test_trials_launch_what_they_time(kernel, monkeypatch):
    monkeypatch.setattr(ops, "TRIAL", (3, 2, 9))
    for name, variant in kernel.variants.items():
        named = {*variant.signature, *variant.constexprs, *variant.safe.blocks}
        assert named == set(kernel.fn.arg_names)
        if name == "float16":
            assert variant.trial(variant.safe, torch.device(DEVICE))().isfinite().all()


B, R = torch.zeros(2, 5, 5), torch.arange(3).expand(2, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gather_bias(B[:, :4], R), r"bias must be \(H, L, L\), got \(2, 4, 5\)"),
        (lambda: gather_bias(B.int(), R), "bias must be a floating-point tensor"),
        (lambda: gather_bias(B, R.int()), r"ids must be \(B, K\) int64, got \(2, 3\) torch.int32"),
        (lambda: gather_bias(B, R.to("meta")), "ids must be on cpu with the bias, got meta"),
        (lambda: gather_bias(B, R + 3), r"ids must lie in 0\.\.4, got 3\.\.5"),
        (lambda: gather_bias(B, R // 2), "ids must not repeat within a row, got 0 twice in row 0"),
        (lambda: gather_bias(B, R, impl="c"), "impl must be one of auto, torch, triton, reference"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
