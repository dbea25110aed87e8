"""Tokens in and out of a sequence: each implementation beside the formula, in float64 too."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.kernels import gather_packed, gather_tokens, restore_tokens, scatter_tokens
from fastssl.kernels.tokens import tokens_configs as configs
from fastssl.kernels.tokens import tokens_triton as ops
from fastssl.masking import random_masking
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, largest_tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["torch", "triton"]
LAYOUTS = [(torch.float32, r) for r in UPSTREAM.values()]  # and each dtype once
LAYOUTS += [(dtype, UPSTREAM["sliced"]) for dtype in DTYPES[1:]]
KERNELS = [ops.GATHER, ops.RESTORE, ops.SCATTER]
pytestmark = pytest.mark.usefixtures("small_blocks")


def problem(B, K, L, D, dtype=torch.float32):
    torch.manual_seed(L)
    ids = random_masking(torch.arange(B, device=DEVICE), L, K)
    shapes = ((B, K, D), (D,), (L, D))
    return ids, [torch.randn(shape, device=DEVICE).to(dtype) for shape in shapes]


def tokens_and_ids(B, K, L, D, dtype=torch.float32):
    """Tokens, and ids that repeat."""
    torch.manual_seed(L)
    tokens = torch.randn(B, L, D, device=DEVICE).to(dtype)
    return tokens, torch.randint(L, (B, K), device=DEVICE)


@pytest.fixture(params=[1, 3])
def places(request, monkeypatch):
    """As many sequences' shares as one or three multiprocessors take."""
    monkeypatch.setattr(ops, "sm_count", lambda device: request.param)
    return request.param


def in_float32(call, reduce):
    """The upstream's sum has no part in what is judged."""
    return call, lambda x: reduce(x.float() if x.dtype != torch.float64 else x)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, reduce", LAYOUTS)
@pytest.mark.parametrize("with_pos", [True, False], ids=["pos", "no_pos"])
@pytest.mark.parametrize("B, K, L, D", [(1, 1, 1, 1), (3, 3, 9, 6), (2, 6, 6, 2)])
def test_restore_tokens(B, K, L, D, with_pos, dtype, reduce, impl):
    ids, (visible, token, pos) = problem(B, K, L, D, dtype)
    inputs = [visible, token, pos] if with_pos else [visible, token]

    def call(impl):
        return lambda v, t, p=None: restore_tokens(v, ids.restore, t, p, impl=impl)

    assert_no_worse(call(impl), call("reference"), inputs, lambda x: reduce(x.float()))


@pytest.mark.parametrize("impl", IMPLS)
def test_sums_over_many_sequences(impl, places):
    """Shares of a batch that do not divide it, and a reduction over each."""
    ids, inputs = problem(41, 2, 9, 6)
    call = lambda impl: lambda v, t, p: restore_tokens(v, ids.restore, t, p, impl=impl)  # noqa: E731
    assert_no_worse(call(impl), call("reference"), inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_token_goes_back_to_its_place(impl):
    ids, (_, token, pos) = problem(6, 4, 9, 5)
    tokens = torch.randn(6, 9, 5, device=DEVICE)
    visible = gather_tokens(tokens, ids.visible, impl=impl)
    out = restore_tokens(visible, ids.restore, token, pos, impl=impl)
    want = (token + pos).expand(6, 9, 5).clone()
    for b in range(6):
        for place in ids.visible[b].tolist():
            want[b, place] = tokens[b, place] + pos[place]
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("impl", IMPLS)
def test_mixed_dtypes_give_visibles_dtype_and_each_its_own_gradient(impl):
    ids, (visible, token, pos) = problem(2, 3, 5, 4)
    leaves = [visible.bfloat16().requires_grad_(), token.requires_grad_(), pos.requires_grad_()]
    out = restore_tokens(leaves[0], ids.restore, *leaves[1:], impl=impl)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]
    assert (leaves[1].grad == 4).all() and (leaves[2].grad == 2).all()  # 2 images x 2 hidden


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_inputs_get_no_gradient(impl):
    ids, (visible, token, pos) = problem(2, 3, 5, 4)
    run = partial(restore_tokens, visible, ids.restore, impl=impl)
    token.requires_grad_()
    run(token, pos).sum().backward()
    assert visible.grad is None and pos.grad is None and (token.grad == 4).all()
    pos.requires_grad_()
    run(token.detach(), pos).sum().backward()
    assert visible.grad is None and (token.grad == 4).all() and (pos.grad == 2).all()
    visible.requires_grad_()
    run(token.detach(), pos.detach()).sum().backward()
    assert (visible.grad == 1).all() and (pos.grad == 2).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_mask_token_is_not_written_to(impl):
    """One sequence of one place: the token, expanded over it, is the parameter itself."""
    token = torch.zeros(4, device=DEVICE)
    ones, ids = torch.ones(1, 1, 4, device=DEVICE), torch.zeros(1, 1, dtype=torch.int64)
    out = restore_tokens(ones, ids.to(DEVICE), token, impl=impl)
    assert (token == 0).all() and (out == 1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_holds_nothing_larger_than_the_result(impl):
    ids, (visible, token, pos) = problem(9, 5, 7, 4)
    leaves = [x.requires_grad_() for x in (visible, token, pos)]
    run = partial(restore_tokens, leaves[0], ids.restore, *leaves[1:], impl=impl)
    assert largest_tensor(lambda: run().sum().backward()) == 9 * 7 * 4


def gather_formula(tokens, ids):
    if tokens.ndim == 2:
        return torch.stack([tokens[row] for row in ids])
    return torch.stack([x[row] for x, row in zip(tokens, ids, strict=True)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, reduce", LAYOUTS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("B, K, L, D", [(3, 9, 6, 6), (1, 3, 6, 2)])
def test_gather_tokens(B, K, L, D, shared, dtype, reduce, impl):
    tokens, ids = tokens_and_ids(B, K, L, D, dtype)
    call, reduce = in_float32(partial(gather_tokens, ids=ids, impl=impl), reduce)
    formula = partial(gather_formula, ids=ids)
    assert_no_worse(call, formula, [tokens[0] if shared else tokens], reduce)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_shared_tables_gradient_sums_over_many_sequences(impl, places):
    tokens, ids = tokens_and_ids(43, 6, 5, 6)
    formula = partial(gather_formula, ids=ids)
    assert_no_worse(partial(gather_tokens, ids=ids, impl=impl), formula, [tokens[0]])


def scatter_formula(tokens, ids, length):
    """One row after another."""
    rows = [[tokens.new_zeros(tokens.shape[2])] * length for _ in ids]
    for b, row in enumerate(ids.tolist()):
        for k, place in enumerate(row):
            rows[b][place] = rows[b][place] + tokens[b, k]
    return torch.stack([torch.stack(x) for x in rows])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("dtype, reduce", LAYOUTS)
def test_scatter_tokens(dtype, reduce, impl):
    tokens, ids = tokens_and_ids(3, 9, 11, 7, dtype)
    call, reduce = in_float32(partial(scatter_tokens, ids=ids % 6, length=7, impl=impl), reduce)
    formula = partial(scatter_formula, ids=ids % 6, length=7)
    assert_no_worse(call, formula, [tokens[:, :9]], reduce)


ENDS = [0, 3, 3, 11, 12]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, reduce", LAYOUTS)
def test_gather_packed(dtype, reduce, impl):
    """Sequences of 3, 0, 8 and 1 rows."""
    tokens, ids = tokens_and_ids(4, 3, 9, 7, dtype)
    ids, cu = ids.flatten(), torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)

    def formula(tokens):
        spans = zip(ENDS[:-1], ENDS[1:], strict=True)
        return torch.cat([x[ids[i:j]] for x, (i, j) in zip(tokens, spans, strict=True)])

    call, reduce = in_float32(partial(gather_packed, ids=ids, cu_seqlens=cu, impl=impl), reduce)
    assert_no_worse(call, formula, [tokens], reduce)


def test_rows_past_the_last_sequence_read_no_foreign_memory(monkeypatch):
    monkeypatch.setattr("fastssl.kernels.tokens.tokens.can_read_values", lambda x: False)
    tokens, ids = tokens_and_ids(2, 3, 5, 4)
    cu = torch.tensor([0, 2, 4], dtype=torch.int32, device=DEVICE)
    for impl in IMPLS:
        out = gather_packed(tokens, ids.flatten(), cu, impl=impl)
        assert torch.equal(out[2:], tokens[1, ids.flatten()[2:]])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("make", ["transposed", "columns", "expanded"])
def test_strided_tokens(make, impl):
    wide = torch.randn(3, 14, 12, device=DEVICE)
    tokens = {
        "transposed": wide[:, :6, :9].mT,
        "columns": wide[:, ::2, 1:7:2],
        "expanded": wide[:1, :9].expand(3, 9, 12),
    }[make]
    _, ids = tokens_and_ids(3, 5, tokens.shape[1], 1)
    whole, cu = tokens.contiguous(), torch.tensor([0, 1, 1, 5], dtype=torch.int32, device=DEVICE)
    order = random_masking(torch.arange(3, device=DEVICE), 12, tokens.shape[1]).restore
    for call in (
        lambda x: gather_tokens(x, ids, impl=impl),
        lambda x: gather_tokens(x[0], ids, impl=impl),
        lambda x: scatter_tokens(x[:, :5], ids, 9, impl=impl),
        lambda x: gather_packed(x, ids[0], cu, impl=impl),
        lambda x: restore_tokens(x, order, x[0, 0], x[0, :1].expand(12, -1), impl=impl),
    ):
        assert torch.equal(call(tokens), call(whole)) and call(tokens).is_contiguous()


@settings(max_examples=6)
@given(st.integers(1, 4), st.integers(0, 7), st.integers(1, 9), st.integers(1, 6), st.data())
@pytest.mark.parametrize("impl", IMPLS)
def test_gather_and_scatter_are_adjoint(impl, B, K, L, D, data):
    """<gather(x), y> = <x, scatter(y)>, in integers: exact."""
    ids = data.draw(st.lists(st.integers(0, L - 1), min_size=B * K, max_size=B * K))
    ids = torch.tensor(ids, dtype=torch.int64, device=DEVICE).view(B, K)
    x = torch.arange(B * L * D, device=DEVICE).view(B, L, D).float() % 7
    y = torch.arange(B * K * D, device=DEVICE).view(B, K, D).float() % 5
    there = (gather_tokens(x, ids, impl=impl) * y).sum()
    assert there == (x * scatter_tokens(y, ids, L, impl=impl)).sum()
    cu = torch.arange(B + 1, dtype=torch.int32, device=DEVICE) * K
    packed = gather_packed(x, ids.flatten(), cu, impl=impl)
    assert torch.equal(packed, gather_tokens(x, ids, impl=impl).flatten(0, 1))


@pytest.mark.parametrize("impl", IMPLS)
def test_integers_are_gathered_by_torch(impl):
    labels, ids = torch.arange(12, device=DEVICE).view(2, 3, 2), torch.tensor([[2], [0]])
    if impl == "torch":
        assert gather_tokens(labels, ids.to(DEVICE)).flatten().tolist() == [4, 5, 6, 7]
    else:
        with pytest.raises(ValueError, match="is for float32, bfloat16 and float16"):
            gather_tokens(labels, ids.to(DEVICE), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_second_derivative(impl):
    ids, (visible, token, pos) = problem(2, 3, 5, 4)
    visible.requires_grad_()
    cu = torch.tensor([0, 3, 6], dtype=torch.int32, device=DEVICE)
    for out in (
        restore_tokens(visible, ids.restore, token, pos, impl=impl),
        gather_tokens(visible, ids.visible % 3, impl=impl),
        scatter_tokens(visible, ids.visible, 5, impl=impl),
        gather_packed(visible, ids.visible.flatten() % 3, cu, impl=impl),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(out.square().sum(), visible, create_graph=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole(impl):
    ids, leaves = problem(2, 3, 5, 4)
    cu = torch.tensor([0, 4, 6], dtype=torch.int32, device=DEVICE)
    [x.requires_grad_() for x in leaves]

    def run(visible, token, pos):
        full = restore_tokens(visible, ids.restore, token, pos, impl=impl)
        part = gather_tokens(full, ids.masked, impl=impl) + gather_tokens(pos, ids.masked)
        back = scatter_tokens(part, ids.masked, 5, impl=impl) * full
        return gather_packed(back, ids.visible.flatten(), cu, impl=impl).square().sum()

    out, compiled = run(*leaves), torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    want = torch.autograd.grad(out, leaves)
    assert torch.equal(out, compiled)
    assert all(map(torch.equal, torch.autograd.grad(compiled, leaves), want))


def test_operators():
    ids, (visible, token, pos) = problem(2, 3, 5, 4, torch.float16)
    chosen, owners = ids.visible, torch.tensor([0, 1, 1], dtype=torch.int32, device=DEVICE)
    for operator, arguments in [
        ("gather", (pos[None], chosen)),
        ("restore", (visible, ids.restore, token, None)),
        ("restore", (visible, ids.restore, token, pos)),
        ("pack", (visible, chosen[0] % 3, owners)),
        ("restore_grads", (pos.expand(2, 5, 4), ids.restore, 3, True, False, True)),
        ("scatter", (visible, chosen, 5)),
        ("scatter_table", (visible, chosen, 5)),
        ("unpack", (visible[0], chosen[0], owners, 2, 5)),
    ]:
        found = getattr(torch.ops.fastssl, f"tokens_{operator}").default
        tests = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
        torch.library.opcheck(found, arguments, test_utils=tests)


def test_the_same_bits_each_time():
    ids, leaves = problem(7, 3, 5, 4, torch.float16)
    for x in leaves:
        x.requires_grad_()
    runs = []
    for _ in range(2):
        full = restore_tokens(leaves[0], ids.restore, *leaves[1:], impl="triton")
        out = gather_tokens(full, ids.visible % 2, impl="triton")
        runs.append(torch.autograd.grad(out.square().sum(), leaves))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_trials_launch_what_they_time(kernel, monkeypatch):
    """Each part once, as the tuner would."""
    monkeypatch.setattr(configs, "TRIAL", (3, 9, 10))
    for name, variant in kernel.variants.items():
        assert set(variant.signature) | set(variant.constexprs) | set(variant.safe.blocks) == set(
            kernel.fn.arg_names
        )
        if name.startswith("float16"):
            found = variant.trial(variant.safe, torch.device(DEVICE))()
            found = [found] if isinstance(found, torch.Tensor) else found
            assert all(x.isfinite().all() and x.shape[-1] == 10 for x in found)


V, T, R = torch.zeros(2, 3, 4), torch.zeros(4), torch.arange(5).expand(2, 5)
CU = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: restore_tokens(V, R, T[:3]),
            r"\(B, K, D\) and \(D,\), got \(2, 3, 4\) and \(3,\)",
        ),
        (lambda: restore_tokens(V, R[:, :2], T), r"ids_restore must be \(2, L\) with L >= 3"),
        (lambda: restore_tokens(V, R[:1], T), r"ids_restore must be \(2, L\) .* got \(1, 5\)"),
        (lambda: restore_tokens(V, R.int(), T), r"ids_restore must be \(2, L\) int64, got .*int32"),
        (lambda: restore_tokens(V, R, T, V[0]), r"pos must be \(5, 4\), got \(3, 4\)"),
        (lambda: restore_tokens(V.long(), R, T), "visible must be a floating-point tensor"),
        (lambda: restore_tokens(V, R, T, impl="c"), "triton, reference for restore_tokens"),
        (lambda: restore_tokens(V, R + 1, T), r"ids_restore must lie in 0\.\.4, got 1\.\.5"),
        (lambda: restore_tokens(V, R // 2, T), "ids_restore must not repeat .* got 0 twice"),
        (lambda: gather_tokens(V, R.float()), r"ids must be \(B, K\) int64, got .* torch.float32"),
        (
            lambda: gather_tokens(V[:1], R),
            r"tokens must be \(2, L, D\) or \(L, D\), got \(1, 3, 4\)",
        ),
        (lambda: gather_tokens(V, R), r"ids must lie in 0\.\.2, got 0\.\.4"),
        (lambda: gather_tokens(V, R.to("meta")), "ids must be on cpu with the tokens, got meta"),
        (lambda: scatter_tokens(V, R, 5), r"tokens must be \(2, 5, D\) as ids, got \(2, 3, 4\)"),
        (lambda: scatter_tokens(V, R[:, :3], 2), r"ids must lie in 0\.\.1, got 0\.\.2"),
        (lambda: scatter_tokens(V.int(), R, 5), "tokens must be a floating-point tensor"),
        (lambda: gather_packed(V, R, CU), r"ids must be \(T,\) int64, got \(2, 5\) torch.int64"),
        (lambda: gather_packed(T, R[0], CU), r"tokens must be \(B, L, D\), got \(4,\)"),
        (lambda: gather_packed(V, R[0], CU), r"ids must lie in 0\.\.2, got 0\.\.4"),
        (lambda: gather_packed(V, R[0], CU.long()), r"cu_seqlens must be \(3,\) int32, got \(3,\)"),
        (
            lambda: gather_packed(V, R[0, :4], CU),
            r"cu_seqlens must ascend from 0 to 4, got \[0, 2, 5\]",
        ),
        (lambda: gather_packed(V, R[0], CU.flip(0)), r"from 0 to 5, got \[5, 2, 0\]"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
