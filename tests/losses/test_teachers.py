"""DINO, iBOT, SwAV and KoLeo beside their formulas; what moves, what is refused, and ranks."""

from functools import partial

import pytest
import torch

from fastssl.kernels.distillation.sinkhorn import sinkhorn_reference
from fastssl.losses import (
    DINOLoss,
    IBOTPatchLoss,
    IBOTPlusPlusPatchLoss,
    KoLeoLoss,
    LinearIBOTPatchLoss,
    MSNLoss,
    SwaVLoss,
)
from fastssl.losses.dino import dino_reference
from fastssl.losses.ibot import by_image
from fastssl.losses.koleo import koleo_reference
from tests.oracle import DEVICE, assert_no_worse, largest_tensor
from tests.ranks import run_ranks

K = 21


def views(n, B=6, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(B, K, generator=g, device=DEVICE) for _ in range(n)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dino_is_its_formula(dtype):
    teacher, center = views(2, seed=1), 0.1 * torch.randn(1, 1, K, device=DEVICE)
    loss = DINOLoss(K, student_temp=0.2).to(DEVICE)
    loss.center = center

    def eager(*student):
        return dino_reference(
            torch.stack(teacher).to(dtype), torch.stack(student), center, 0.07, 0.2
        )

    ours = lambda *student: loss.eval()(teacher, student, teacher_temp=0.07)  # noqa: E731
    truth = lambda *student: dino_reference(  # noqa: E731
        torch.stack(teacher).double(), torch.stack(student).double(), center.double(), 0.07, 0.2
    )
    student = [x.to(dtype) for x in views(4)]
    if dtype == torch.bfloat16:  # eager's softmax in 16 bits is another formula
        got, want = (
            torch.autograd.grad(f(*(leaves := [x.requires_grad_() for x in student])), leaves)
            for f in (ours, truth)
        )
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-2, atol=1e-3)
    else:
        assert_no_worse(ours, eager, student)
    assert torch.equal(loss.center, center)  # in eval mode


def test_the_center_follows_the_teacher_and_the_temperature_the_epoch():
    loss, teacher = DINOLoss(K, 0.02, 0.05, 4, center_momentum=0.7).to(DEVICE), views(2, seed=1)
    first = loss(teacher, views(3), epoch=1)
    mean = torch.stack(teacher).mean((0, 1))
    torch.testing.assert_close(loss.center, (0.3 * mean).view(1, 1, K))
    loss.eval().center = torch.zeros(1, 1, K, device=DEVICE)
    torch.testing.assert_close(first, loss(teacher, views(3), teacher_temp=0.03))
    torch.testing.assert_close(loss(teacher, views(3), epoch=4), loss(teacher, views(3)))


def test_ibot_averages_each_image_by_itself():
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], device=DEVICE).bool()
    weight = by_image(mask, 4)
    assert weight.tolist() == pytest.approx([1 / 9, 1 / 9, 1 / 9, 1 / 3])
    teacher, student = (x[0] for x in (views(1, 4), views(1, 4, 1)))
    q, log_p = (teacher / 0.04).softmax(1), (student / 0.1).log_softmax(1)
    each = -(q * log_p).sum(1)
    loss = IBOTPatchLoss(K).to(DEVICE)
    torch.testing.assert_close(loss(teacher, student, mask[:, None]), (weight * each).sum())
    torch.testing.assert_close(loss.center.center, 0.1 * teacher.mean(0, keepdim=True))


@pytest.mark.parametrize("train", [True, False])
def test_linear_ibot_is_ibot_of_its_logits(train):
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], device=DEVICE).bool()
    sides = [torch.randn(n, 5, device=DEVICE).requires_grad_() for n in (4, K, 4, K)]
    y, u, x, w = sides
    linear, stored = (kind(K).to(DEVICE) for kind in (LinearIBOTPatchLoss, IBOTPatchLoss))
    for loss in (linear.train(train), stored.train(train)):
        loss.center.center = torch.linspace(-1, 1, K, device=DEVICE)[None]
    got, want = linear(y, u, x, w, mask, 0.3), stored(y @ u.T, x @ w.T, mask, 0.3)
    torch.testing.assert_close(got, want)
    for g, h in zip(*(torch.autograd.grad(v, [x, w]) for v in (got, want)), strict=True):
        torch.testing.assert_close(g, h)
    torch.testing.assert_close(linear.center.center, stored.center.center)


def test_ibot_plus_plus_is_ibot_where_visible_patches_do_not_count():
    mask = torch.rand(3, 8, device=DEVICE) < 0.5
    teacher, student = (torch.stack(views(3, 8, s)) for s in (0, 1))
    all_patches, masked = (kind(K).to(DEVICE) for kind in (IBOTPlusPlusPatchLoss, IBOTPatchLoss))
    got = all_patches(teacher, student, mask, visible_loss_weight=0)
    torch.testing.assert_close(got, masked(teacher[mask], student[mask], mask))
    flat = teacher.flatten(0, 1), student.flatten(0, 1)
    one, other = (
        IBOTPatchLoss(K).to(DEVICE)(teacher[part], student[part], part) for part in (mask, ~mask)
    )
    both = IBOTPlusPlusPatchLoss(K).to(DEVICE)
    torch.testing.assert_close(both(*flat, mask, visible_loss_weight=0.5), one + 0.5 * other)


def test_swav_counts_a_queue_in_the_assignment_alone():
    crops, queue = views(3), views(2, 9, 1)
    loss = SwaVLoss(0.2, 2, 0.3)
    q = [
        sinkhorn_reference(torch.cat([x, y]), 0.3, 2)[:6]
        for x, y in zip(crops[:2], queue, strict=True)
    ]
    log_p = [(x / 0.2).log_softmax(1) for x in crops]
    terms = [-(q[t] * log_p[v]).sum(1).mean() for t in range(2) for v in range(3) if v != t]
    torch.testing.assert_close(loss(crops[:2], crops[2:], queue), torch.stack(terms).mean())


@pytest.mark.parametrize("p", [2, 3.0, 1])
def test_koleo_is_its_formula_without_the_cosines(p):
    x = torch.randn(40, 7, device=DEVICE)
    formula = partial(koleo_reference, p=p, eps=1e-8)
    assert_no_worse(KoLeoLoss(p), formula, [x], slack=4)
    x[4] = 1e-9  # shorter than eps: the others' gradients are nothing beside its own
    assert_no_worse(KoLeoLoss(p), formula, [x], slack=4)
    x = torch.randn(300, 4, device=DEVICE, requires_grad=True)
    assert largest_tensor(lambda: KoLeoLoss()(x).backward()) < 300 * 300


def test_koleo_of_duplicates_is_finite():
    x = torch.ones(5, 3, device=DEVICE, requires_grad=True)
    loss = KoLeoLoss()(x)
    loss.backward()
    assert loss.item() == pytest.approx(17.6, abs=0.4) and x.grad.isfinite().all()


COMPILED = {  # a loss, and its arguments of three views that learn
    "DINO": (DINOLoss(K), lambda s: (views(2, seed=1), s)),
    "iBOT": (IBOTPatchLoss(K), lambda s: (views(1, seed=1)[0], s[0], torch.ones(2, 3) > 0)),
    "linear iBOT": (
        LinearIBOTPatchLoss(6),
        lambda s: (views(1, seed=1)[0], s[2], s[0], s[1], torch.ones(2, 3) > 0),
    ),
    "SwAV": (SwaVLoss(), lambda s: (s[:2], s[2:])),
    "MSN": (MSNLoss(), lambda s: (s[0], s[1], s[2])),
    "KoLeo": (KoLeoLoss(), lambda s: (s[0],)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name):
    loss, arguments = COMPILED[name]
    student = [x.requires_grad_() for x in views(3)]
    compiled = torch.compile(loss.eval(), fullgraph=True, backend="aot_eager")
    got, want = (
        torch.autograd.grad(f(*arguments(student)), student, allow_unused=True)
        for f in (compiled, loss)
    )
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if g is not None:
            torch.testing.assert_close(g, w)


def each_rank(rank, world):
    """Ranks with 4 and 2 images: the center is that of all 6, the mean value that of all."""
    teacher, student = views(2, seed=1), views(3)
    mine = slice(0, 4) if rank == 0 else slice(4, 6)
    loss = DINOLoss(K)
    loss([x[mine] for x in teacher], [x[mine] for x in student])
    mean = torch.stack(teacher).mean((0, 1))
    torch.testing.assert_close(loss.center, (0.1 * mean).view(1, 1, K))
    patches = IBOTPatchLoss(K)
    mask = torch.ones(1, len(teacher[0][mine]), dtype=torch.bool)
    patches(teacher[0][mine], student[0][mine], mask)
    torch.testing.assert_close(patches.center.center, 0.1 * teacher[0].mean(0, keepdim=True))
    linear, w = LinearIBOTPatchLoss(K), torch.eye(K)
    linear(teacher[0][mine], w, student[0][mine], w, mask)
    torch.testing.assert_close(linear.center.center, patches.center.center)
    joined, alone = SwaVLoss(sinkhorn_gather_distributed=True), SwaVLoss()
    crops = [x[:3] if rank == 0 else x[3:] for x in student]
    values = [torch.zeros(()) for _ in range(world)]
    torch.distributed.all_gather(values, joined(crops[:2], crops[2:]))
    pairs = [(torch.stack(values).mean(), alone(student[:2], student[2:]))]
    own = slice(0, 3) if rank == 0 else slice(3, 6)
    for kind, anchors in (("joined", student[0][own]), ("alone", student[0])):
        joint, targets = kind == "joined", student[1][own] if kind == "joined" else student[1]
        c = teacher[0].clone().requires_grad_()
        value = MSNLoss(gather_distributed=joint)(anchors, targets, c)
        (g,) = torch.autograd.grad(value, c)
        if joint:
            both = torch.cat([value.detach()[None], g.flatten()])
            torch.distributed.all_reduce(both)
            got = both / world
        else:
            pairs.append((got, torch.cat([value.detach()[None], g.flatten()])))
    return pairs


def test_ranks_join():
    for pairs in run_ranks(each_rank, 2):
        for got, want in pairs:
            torch.testing.assert_close(got, want)


V, M = torch.zeros(2, K), torch.ones(1, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: DINOLoss(K)([V], [V]), "must have two different views, got 1 and 1"),
        (lambda: DINOLoss(K)([V, V], [V, V[:1]]), r"student_out must all be \(2, 21\)"),
        (lambda: DINOLoss(K)([V.int()], [V, V]), r"teacher_out must have \(B, K\) floating-point"),
        (lambda: DINOLoss(5)([V], [V, V]), "center must be 5|center must be 21 numbers"),
        (lambda: DINOLoss(K)([V], [V, V], teacher_temp=0.0), "teacher_temp must be > 0, got 0.0"),
        (lambda: DINOLoss(K)([V[:0]], [V[:0]] * 2), "at least 1 row"),
        (lambda: DINOLoss(K, center_mode="max"), "center_mode must be 'mean', got 'max'"),
        (lambda: IBOTPatchLoss(K)(V, V, M[:, :1]), "once for each row of student_out, got 1 of 2"),
        (lambda: IBOTPatchLoss(K)(V, V, M.int()), r"mask must be \(B, H, W\) or \(B, L\) bool"),
        (
            lambda: IBOTPlusPlusPatchLoss(K)(V, V),
            r"mask must be given for student_out \(B \* N, K\)",
        ),
        (lambda: IBOTPlusPlusPatchLoss(K)(V[None], V[None], M[:, :1]), "an entry for each patch"),
        (lambda: SwaVLoss()([V], []), "must have another crop, got 1 of 1"),
        (lambda: SwaVLoss()([V, V], [], [V]), "queue_outputs must be 2 tensors, got 1"),
        (lambda: MSNLoss()(V[:1], V, V), "anchors must be as many as targets, or .*, got 1 for 2"),
        (lambda: MSNLoss()(V, V, V[:, :3]), r"prototypes must be of 21 features, .* got \(2, 3\)"),
        (lambda: MSNLoss()(V, V, V, 0.0), "target_sharpen_temperature must be > 0"),
        (lambda: KoLeoLoss()(V[:1]), r"at least 2 rows, got \(1, 21\)"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
