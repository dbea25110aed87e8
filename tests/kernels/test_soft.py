"""The soft cross-entropy by softmax and log_softmax; Sinkhorn beside the authors' steps."""

import math
from functools import partial

import pytest
import torch

from fastssl.kernels import sinkhorn, soft_cross_entropy
from fastssl.kernels.distillation import soft_cross_entropy_ahead, soft_triton
from fastssl.kernels.distillation.sinkhorn import sinkhorn_reference
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, largest_tensor, saved_elements
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IMPLS = ["torch", "triton"]
LAYOUTS = [(torch.float32, r) for r in UPSTREAM.values()]  # and each dtype once
LAYOUTS += [(dtype, UPSTREAM["sliced"]) for dtype in DTYPES[1:]]
pytestmark = pytest.mark.usefixtures("small_blocks")


def logits(*shape, dtype=torch.float32, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g, device=DEVICE).to(dtype)


def formula(student, teacher, center, pairs, a=0.1, b=0.04):
    """Every pair's cross-entropy by itself, weighed and summed: (V, R)."""
    wide = torch.promote_types(student.dtype, torch.float32)
    q = ((teacher.to(student.dtype) - center.to(student.dtype)) / b).softmax(-1)
    log_p = (student / a).log_softmax(-1)
    rows = []
    for v, weights in enumerate(pairs):
        terms = [m * -(q[t] * log_p[v]).sum(-1).to(wide) for t, m in enumerate(weights)]
        rows.append(sum(terms))
    return torch.stack(rows)


VIEWS = {  # V, T, R, K: none is a block's multiple
    "one": (1, 1, 5, 37),
    "two": (2, 2, 3, 21),
    "crops": (5, 2, 3, 19),
    "few rows": (2, 1, 1, 300),
    "many rows": (2, 2, 17, 19),  # none of which is split
}


def pairs_of(V, T):
    return [[0.0 if v == t and V > 1 else 1 + v / 2 for t in range(T)] for v in range(V)]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype, reduce", LAYOUTS)
@pytest.mark.parametrize("views", VIEWS)
def test_views(views, dtype, reduce, impl):
    V, T, R, K = VIEWS[views]
    teacher, center = logits(T, R, K, seed=1), logits(1, K, seed=2)
    rest = {"center": center, "pairs": pairs_of(V, T), "impl": impl}
    ours = lambda s: soft_cross_entropy(s, teacher, **rest)  # noqa: E731
    eager = lambda s: formula(s, teacher, center, pairs_of(V, T))  # noqa: E731
    assert_no_worse(ours, eager, [logits(V, R, K, dtype=dtype)], reduce)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_rows_a_weight_and_a_center_for_each_view(impl):
    s, t, w = logits(4, 23), logits(4, 23, seed=1).half(), torch.rand(4, device=DEVICE)
    got = soft_cross_entropy(s, t, weight=w, student_temp=0.5, teacher_temp=0.2, impl=impl)
    none = torch.zeros(23, device=DEVICE)
    want = formula(s[None], t[None].float(), none, [[1.0]], 0.5, 0.2)[0] * w
    torch.testing.assert_close(got, want, rtol=1e-2 if impl == "reference" else 1e-5, atol=1e-5)
    s, t, c = logits(3, 4, 23), logits(2, 4, 23, seed=1), logits(2, 23, seed=2)
    got = soft_cross_entropy(s, t, center=c, pairs=pairs_of(3, 2), impl=impl)
    torch.testing.assert_close(got, formula(s, t, c[:, None], pairs_of(3, 2)))


@pytest.mark.parametrize("impl", IMPLS)
def test_far_logits_are_finite_and_a_match_keeps_its_digits(impl):
    t = torch.zeros(2, 40, device=DEVICE)
    t[:, 3] = 400.0  # / 0.04: far above what exp can take
    s = t.clone().requires_grad_()
    loss = soft_cross_entropy(s, t, impl=impl)
    loss.sum().backward()
    assert (loss.abs() < 1e-6).all() and (s.grad.abs() < 1e-6).all()
    s = (t / 4000).requires_grad_()  # 1 of 40 is 0.1 / 0.1 above the others
    want = math.log(1 + 39 * math.exp(-1))
    torch.testing.assert_close(
        soft_cross_entropy(s, t, impl=impl), torch.full((2,), want, device=DEVICE)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_logits(impl):
    s, t = logits(7, 2, 46)[::2, :, ::2].transpose(0, 1), logits(23, 4, 2).permute(2, 1, 0)
    c = logits(46)[::2]
    rest = {"pairs": pairs_of(2, 2), "impl": impl}
    got = soft_cross_entropy(s, t, center=c, **rest)
    whole = soft_cross_entropy(s.contiguous(), t.contiguous(), center=c.contiguous(), **rest)
    assert torch.equal(got, whole)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_held(impl):
    """Beside its inputs a number a row at most; no copy of the logits but the gradient."""
    s, t = logits(2, 16, 60).requires_grad_(), logits(2, 16, 60, seed=1)
    call = partial(soft_cross_entropy, s, t, pairs=pairs_of(2, 2), impl=impl)
    assert saved_elements(call) <= 4 * 16 * 60 + 8 * 16
    assert largest_tensor(lambda: call().sum()) <= 512  # a chunk; each side has 1920


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_stays_in_its_row(impl):
    s, t = logits(5, 33), logits(5, 33, seed=1)
    clean = soft_cross_entropy(s, t, impl=impl)
    s[1, 4], t[3, 30] = math.nan, math.nan
    loss = soft_cross_entropy(s, t, impl=impl)
    assert loss[[1, 3]].isnan().all() and torch.equal(loss[[0, 2, 4]], clean[[0, 2, 4]])


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles_whole_and_once(impl):
    s, t = logits(2, 3, 9).requires_grad_(), logits(2, 3, 9, seed=1)
    run = lambda s: soft_cross_entropy(s, t, pairs=pairs_of(2, 2), impl=impl).sum()  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(run(s), s)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(s), s)[0], want)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(run(s), s, create_graph=True)


def test_operators():
    s, t, c = logits(2, 3, 9, dtype=torch.float16), logits(2, 3, 9), logits(1, 9)
    found = torch.ops.fastssl.soft_cross_entropies, torch.ops.fastssl.soft_gradients
    tests = "test_schema", "test_faketensor", "test_aot_dispatch_dynamic"
    for center in (c, None):
        rest = [0.0, 1.0, 1.0, 0.0], 10.0, 25.0
        torch.library.opcheck(found[0].default, (s, t, center, *rest), test_utils=tests)
        loss, stats = found[0](s, t, center, *rest)
        torch.library.opcheck(
            found[1].default, (loss, s, t, center, stats, *rest), test_utils=tests
        )


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_ahead_is_the_same_in_one_pass(dtype):
    views = [logits(6, 33, dtype=dtype, seed=v).requires_grad_() for v in range(3)]
    frozen = logits(6, 33, dtype=dtype, seed=9)
    teachers, c = [logits(6, 33, seed=v + 5) for v in range(2)], logits(2, 33)
    w = torch.rand(6, device=DEVICE)
    pairs = pairs_of(4, 2)
    got = soft_cross_entropy_ahead([*views, frozen], teachers, c, pairs, (0.1, 0.04), w)
    both = torch.stack([*views, frozen]), torch.stack(teachers)
    want = soft_cross_entropy(*both, center=c, weight=w, pairs=pairs).sum()
    torch.testing.assert_close(got, want)
    for g, h in zip(
        torch.autograd.grad(3 * got, views), torch.autograd.grad(3 * want, views), strict=True
    ):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize(
    "kernel", [soft_triton.FORWARD, soft_triton.BACKWARD], ids=lambda kernel: kernel.name
)
def test_trials_launch_what_they_time(kernel, monkeypatch):
    monkeypatch.setattr(soft_triton, "PROTOTYPES", 70)
    monkeypatch.setattr(soft_triton, "TRIAL", {n: (*v, 3) for n, v in soft_triton.VIEWS.items()})
    for name, variant in kernel.variants.items():
        named = {*variant.signature, *variant.constexprs, *variant.safe.blocks}
        assert named == set(kernel.fn.arg_names)
        if name.startswith("float16"):
            made = variant.trial(variant.safe, torch.device(DEVICE))()
            assert all(x.isfinite().all() for x in made)


@pytest.mark.parametrize("R, K", [(50, 7), (9, 300)])
def test_sinkhorn_is_the_authors(R, K):
    scores = logits(R, K)
    for iterations in (1, 3):
        center = sinkhorn(scores, 0.05, iterations=iterations)
        want = sinkhorn_reference(scores.double(), 0.05, iterations)
        got = ((scores - center) / 0.05).softmax(1)
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-7)


def test_sinkhorn_of_several_is_that_of_each():
    scores = logits(3, 50, 7).transpose(0, 1).contiguous().transpose(0, 1)
    want = torch.stack([sinkhorn(x, 0.05) for x in scores])
    torch.testing.assert_close(sinkhorn(scores, 0.05), want)


def test_sinkhorn_of_far_scores_is_finite_and_even():
    scores = logits(64, 8) * 50  # / 0.05: 88 is the most that exp can take
    center = sinkhorn(scores, 0.05, iterations=200)
    used = ((scores - center) / 0.05).softmax(1).sum(0)
    assert center.isfinite().all() and used.sum().item() == pytest.approx(64)
    assert (used > 0).all() and sinkhorn(scores.half(), 0.05).isfinite().all()


def unlike_ranks(rank, world):
    """Ranks with 5 and 9 rows have the center of all 14."""
    whole = logits(14, 11)
    mine = whole[:5] if rank == 0 else whole[5:]
    torch.testing.assert_close(sinkhorn(mine, 0.1, process_group=None), sinkhorn(whole, 0.1))
    none = whole if rank == 0 else whole[:0]
    torch.testing.assert_close(sinkhorn(none, 0.1, process_group=None), sinkhorn(whole, 0.1))


def test_sinkhorn_counts_rows_by_their_weight():
    torch.manual_seed(3)
    scores, weight = torch.randn(7, 5), torch.tensor([1.0, 0, 2, 1, 0, 1, 1])
    twice = torch.cat([scores[weight > 0], scores[2:3]])
    torch.testing.assert_close(sinkhorn(scores, 0.2, weight=weight), sinkhorn(twice, 0.2))
    assert sinkhorn(scores, 0.2, weight=torch.zeros(7)).isfinite().all()


def test_sinkhorn_joins_ranks():
    run_ranks(unlike_ranks, 2)


S, C = torch.zeros(2, 5), torch.zeros(5)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: soft_cross_entropy(S, S[None]), r"got \(2, 5\) and \(1, 2, 5\)"),
        (lambda: soft_cross_entropy(S.int(), S), "student must be a floating-point tensor"),
        (lambda: soft_cross_entropy(S, S[:, :4]), r"share rows, prototypes and device, got .*2, 4"),
        (lambda: soft_cross_entropy(S, S, student_temp=0), "student_temp must be > 0, got 0"),
        (
            lambda: soft_cross_entropy(S, S, teacher_temp=math.nan),
            "teacher_temp must be > 0, got n",
        ),
        (lambda: soft_cross_entropy(S, S, center=C[:3]), r"center must be 5 numbers.* got \(3,\)"),
        (lambda: soft_cross_entropy(S, S, pairs=[[1]]), r"pairs is for student \(V, R, K\)"),
        (lambda: soft_cross_entropy(S[None], S[None]), "pairs must be 1 rows of 1 numbers, got N"),
        (lambda: soft_cross_entropy(S, S, impl="c"), "impl must be one of auto, torch, triton"),
        (lambda: sinkhorn(C, 1.0), r"scores must be \(R, K\) or .*, got \(5,\)"),
        (lambda: sinkhorn(S[:0], 1.0), "at least 1 row"),
        (lambda: sinkhorn(S, 1.0, weight=C), r"weight must be \(\d+,\) on cpu, got \(5,\)"),
        (lambda: sinkhorn(S, 0.0), "temp must be > 0, got 0.0"),
        (lambda: sinkhorn(S, 1.0, iterations=0), "iterations must be >= 1, got 0"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_more_views_than_a_kernel_takes_are_torchs():
    s, t = logits(17, 2, 9), logits(1, 2, 9)
    with pytest.raises(ValueError, match="at most 16 views of the student and 2 of the teacher"):
        soft_cross_entropy(s, t, pairs=[[1.0]] * 17, impl="triton")
    assert soft_cross_entropy(s, t, pairs=[[1.0]] * 17).shape == (17, 2)
