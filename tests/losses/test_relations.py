"""Gram anchoring, PaKA, CAPI, DSE, V-JEPA beside their formulas and lightly's; all over ranks."""

from functools import partial

import lightly.loss
import pytest
import torch
import torch.nn.functional as F
from lightly.loss.regularizer import DSERegularizer as LightlyDSE

from fastssl.kernels.common.chunks import CHUNK_BYTES
from fastssl.losses import (
    CAPILoss,
    DSERegularizer,
    GramLoss,
    KoLeoLoss,
    LeJEPALoss,
    PatchKernelAlignmentLoss,
    SIGReg,
    VISRegLoss,
    VJEPALoss,
    roi_resample_to_grid,
)
from fastssl.losses.capi import capi_reference
from fastssl.losses.gram import gram_reference
from fastssl.losses.koleo import koleo_reference
from fastssl.losses.latents import vjepa_reference
from fastssl.losses.patch_kernels import patch_kernel_alignment_reference
from tests.oracle import DEVICE, assert_no_worse, grads, largest_tensor
from tests.ranks import run_ranks

CHUNKS = pytest.mark.parametrize("chunk", [1 << 22, 4096])


def features(B=5, P=12, D=7, seed=0, dtype=torch.float32):
    g = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(B, P, D, generator=g, device=DEVICE).to(dtype)


@pytest.mark.parametrize("grids", [(), ((3, 4), (3, 4)), ((3, 4), (6, 8)), ((3, 4), (4, 3))])
def test_gram_is_its_formula(grids):
    """The teacher's grid is resized where it is another, and nowhere else."""
    teacher = features(P=48 if (6, 8) in grids else 12, D=7, seed=1)
    told = grids if grids and grids[0] != grids[1] else ()
    ours = lambda x: GramLoss()(x, teacher, *grids)  # noqa: E731
    assert_no_worse(ours, lambda x: gram_reference(x, teacher.to(x.dtype), *told), [features()])
    if told:
        image = teacher.mT.reshape(5, 7, *grids[1])
        y = F.interpolate(image, grids[0], mode="bicubic").flatten(2).mT
        torch.testing.assert_close(GramLoss()(features(), y), ours(features()))


def test_gram_of_a_teacher_with_other_features_and_dtype():
    x, teacher = features(), features(D=9, seed=1).bfloat16()
    x.requires_grad_()
    torch.testing.assert_close(GramLoss()(x, teacher), gram_reference(x, teacher.float()))
    torch.testing.assert_close(GramLoss()(teacher, x), gram_reference(teacher.float(), x))
    assert (
        GramLoss()(teacher, x).dtype == torch.float32 and not GramLoss()(teacher, x).requires_grad
    )


@CHUNKS
@pytest.mark.parametrize("kind", ["whole", "masked", "drawn", "short", "long"])
def test_patch_kernels_are_lightlys(kind, chunk, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, DEVICE, chunk)
    teacher = features(seed=1).double()
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.6
    mask[1:3], mask[2, 0] = True, False  # none is left of one, one patch of the other
    size = {"short": 1e-2, "long": 1e3}.get(kind, 1.0)

    def call(m, x):
        torch.manual_seed(2)
        loss = m.PatchKernelAlignmentLoss(7 if kind == "drawn" else None)
        return loss(x, teacher, mask if kind in ("masked", "drawn") else None)

    import fastssl.losses as ours

    x = [size * features().double()]
    got, want = (grads(partial(call, m), x) for m in (ours, lightly.loss))
    largest = want[1].abs().max().item()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * largest, check_dtype=False)


def test_patch_kernels_near_the_teacher_keep_their_digits():
    teacher = features(seed=1)
    x = teacher + 1e-3 * features()
    truth = grads(lambda z: patch_kernel_alignment_reference(z, teacher.double()), [x.double()])
    got = grads(lambda z: PatchKernelAlignmentLoss()(z, teacher), [x])
    assert abs(got[0] - truth[0]) < 1e-3 * truth[0] < 1e-8  # float32 of 1 - CKA has no digit left
    big = 1e12 * x  # whose fourth powers float32 does not have
    torch.testing.assert_close(PatchKernelAlignmentLoss()(big, teacher), got[0], rtol=1e-2, atol=0)


def test_no_patch_at_all_is_zero_with_a_gradient():
    x, mask = features().requires_grad_(), torch.ones(5, 12, dtype=torch.bool, device=DEVICE)
    loss = PatchKernelAlignmentLoss()(x, x, mask)
    assert loss.item() == 0 and torch.autograd.grad(loss, x)[0].abs().max() == 0


def test_a_box_on_a_grid_is_lightlys():
    x = features(4, 9 * 12, 3).mT.reshape(4, 3, 9, 12).double()
    boxes = [[0, 0, 12, 9], [2.3, 1.1, 2.3, 7], [0.2, 3.4, 11.7, 8.9], [5, 0, 12, 0.3]]
    boxes = torch.tensor(boxes, device=DEVICE, dtype=torch.float64)
    for size in ((3, 4), (1, 2), (20, 7)):
        got, want = (
            grads(lambda z: f(z, boxes, *size), [x])  # noqa: B023
            for f in (roi_resample_to_grid, lightly.loss.roi_resample_to_grid)
        )
        torch.testing.assert_close(got, want)


@CHUNKS
def test_capi_is_lightlys_and_its_formula(chunk, monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, DEVICE, chunk)
    teacher, student = 0.2 * features(8, 9, 20), features(8, 4, 20, 1)
    index = torch.stack([torch.randperm(9)[:4] for _ in range(8)]).to(DEVICE)
    loss, theirs = CAPILoss(0.1, 0.2, 2), lightly.loss.CAPILoss(0.1, 0.2, 2)
    got, want = (grads(lambda s: f(teacher, s, index), [student]) for f in (loss, theirs))  # noqa: B023
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    whole = features(8, 9, 20, 2)
    formula = lambda s: capi_reference(teacher.to(s.dtype), s, 0.1, 0.2, 2)  # noqa: E731
    assert_no_worse(lambda s: loss(teacher, s), formula, [whole], slack=8)


def test_capi_compiles_whole():
    teacher, student = features(4, 3, 20), features(4, 3, 20, 1)
    torch._dynamo.reset()
    compiled = torch.compile(CAPILoss(), fullgraph=True, backend="aot_eager")
    got, want = (grads(lambda s: f(teacher, s), [student]) for f in (compiled, CAPILoss()))  # noqa: B023
    torch.testing.assert_close(got, want)


def test_a_patch_far_below_all_others_is_assigned():
    """lightly's epsilon takes its weight: there the assignment is zero, and so is its loss."""
    teacher = torch.zeros(2, 1, 2, device=DEVICE)
    teacher[1] = -9.0  # e^-150 beside the other
    student = torch.zeros_like(teacher)
    assert CAPILoss()(teacher, student).item() == pytest.approx(0.6931, abs=1e-4)
    far = torch.tensor([[300.0, -300.0]], device=DEVICE)
    assert CAPILoss()(far[None], far[None]).isfinite()


@pytest.mark.parametrize("local, whole", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("normalize", [True, False])
def test_dse_of_the_same_clusters_is_lightlys(local, whole, normalize):
    """Two tight clusters, which every draw finds; 5 images, of which the last are fewer."""
    centers = 4 * features(1, 2, 6)[0]
    x = (centers[torch.arange(14) % 2] + 0.1 * features(5, 14, 6, 1)).double()
    given = {"weight": 0.7, "local_clusters": local, "global_clusters": whole}

    def call(kind, x):
        torch.manual_seed(3)
        return kind(normalize=normalize, **given)(x)

    got, want = (grads(partial(call, kind), [x]) for kind in (DSERegularizer, LightlyDSE))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert DSERegularizer(0.0)(x) == 0


def test_dse_of_many_clusters_is_finite_and_seeded():
    x = features(7, 11, 4).requires_grad_()
    values = []
    for _ in range(2):
        torch.manual_seed(0)
        values.append(DSERegularizer(global_clusters=9)(x))
    assert values[0] == values[1] and torch.autograd.grad(values[0], x)[0].isfinite().all()
    assert DSERegularizer()(0 * x + 1).isfinite()  # duplicates


@pytest.mark.parametrize("p", [1.0, 2.0, 1.5])
def test_v_jepa_is_its_formula(p):
    target = features(seed=1)
    ids = torch.stack([torch.randperm(12)[:5] for _ in range(5)]).to(DEVICE)
    chosen = target.gather(1, ids.unsqueeze(2).expand(-1, -1, 7))
    formula = lambda x: vjepa_reference(x, chosen.to(x.dtype), p)  # noqa: E731
    x = features(P=5)
    assert_no_worse(lambda x: VJEPALoss(p)(x, target, ids), formula, [x])
    other = VJEPALoss(p)(x[:, :2], target, ids[:, :2])
    got = VJEPALoss(p)([x, x[:, :2]], target, [ids, ids[:, :2]])
    torch.testing.assert_close(got, (formula(x) + other) / 2)


@pytest.mark.parametrize("topk, size", [(1, 10), (3, 20), (2, None)])
def test_koleo_of_groups_and_of_several_neighbors(topk, size):
    x = torch.randn(40, 7, device=DEVICE)
    formula = partial(koleo_reference, p=2, eps=1e-8, topk=topk, group_size=size)
    loss = KoLeoLoss(loss_group_size=size, topk=topk)
    assert_no_worse(loss, formula, [x], slack=4)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(grads(compiled, [x]), grads(loss, [x]))


def test_patch_kernels_are_those_of_a_few_images(monkeypatch):
    monkeypatch.setitem(CHUNK_BYTES, DEVICE, 4096)
    x, y = (features(3, 60, 4, seed).requires_grad_() for seed in (0, 1))
    assert largest_tensor(lambda: PatchKernelAlignmentLoss()(x, y).backward()) == 60 * 60


def fixed(seed, loss):
    """What is drawn is the first rank's, whatever the others have."""

    def call(x, rank=0):
        torch.manual_seed(seed + rank)
        return loss(x)

    return call


def masked(x):
    """PaKA of patches that are left out where a feature is large: fewer on some ranks."""
    return PatchKernelAlignmentLoss()(x, x.detach().square(), x[..., 0].detach() > -0.3)


def predicted(x):
    index = torch.tensor([[2, 0]], device=x.device).expand(len(x), 2)
    return CAPILoss(0.3, gather_distributed=True)(0.5 * x.detach(), x[:, :2], index)


RANKED = {  # of features (B, P, D), whose B are divided among ranks
    "sigreg": fixed(1, lambda x: SIGReg(num_vectors=20)(x.mT.transpose(0, 1))),
    "lejepa": fixed(1, lambda x: LeJEPALoss(0.4)(
        local_proj=x[:, 2:].transpose(0, 1), global_proj=x[:, :2].transpose(0, 1))),
    "visreg": fixed(1, lambda x: VISRegLoss(0.4, num_slices=7)(
        local_proj=x[:, 2:].transpose(0, 1), global_proj=x[:, :2].transpose(0, 1))),
    "paka": fixed(1, masked),
    "capi": fixed(1, predicted),
    "koleo": fixed(1, lambda x: KoLeoLoss(gather_distributed=True, topk=2)(x[:, 0])),
    "koleo groups": fixed(
        1, lambda x: KoLeoLoss(gather_distributed=True, loss_group_size=6)(x[:, 0])
    ),
}  # fmt: skip


def each_rank(rank, world):
    """Value and gradient of each, of 3 of the batch's 12 images; and what is refused of another."""
    found = {}
    for name, loss in RANKED.items():
        x = features(12)[3 * rank : 3 * rank + 3].clone().requires_grad_()
        value = loss(x, rank)
        (g,) = torch.autograd.grad(value, x)
        found[name] = value.detach(), g
    try:
        RANKED["capi"](features(12)[: 3 + rank])
    except ValueError as error:
        found["uneven"] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(each_rank, 4)


@pytest.mark.parametrize("name", RANKED)
def test_mean_over_ranks_is_the_joined_batch(name, ranks):
    x = features(12).double().cpu().requires_grad_()
    if name in ("sigreg", "lejepa", "visreg"):  # directions are drawn in the dtype of the input
        x = features(12).cpu().requires_grad_()
    want = RANKED[name](x)
    (g,) = torch.autograd.grad(want, x)
    values, found = zip(*(seen[name] for seen in ranks), strict=True)
    torch.testing.assert_close(torch.stack(values).mean().to(want.dtype), want, rtol=1e-5, atol=0)
    got = torch.cat(found).to(g.dtype) / len(ranks)
    torch.testing.assert_close(got, g, rtol=1e-4, atol=2e-6 * g.abs().max().item())


def test_other_shapes_on_other_ranks_are_refused_by_all(ranks):
    assert all("must have the same shape on every rank" in seen["uneven"] for seen in ranks)


X = torch.zeros(2, 6, 3)
MASK = torch.zeros(2, 6, dtype=torch.bool)
IDS = torch.zeros(2, 2, dtype=torch.int64)
BOXES = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: GramLoss()(X[0], X), r"student must be \(B, P, D\)"),
        (lambda: GramLoss()(X, X.int()), r"teacher must be .* floats, got \(2, 6, 3\) torch.int32"),
        (lambda: GramLoss()(X, X[:1]), "teacher must have 2 images on cpu, got 1"),
        (lambda: GramLoss()(X, X[:, :4]), "student_grid must be .* of the 6 patches .* got None"),
        (lambda: GramLoss()(X, X[:, :4], (2, 3)), "teacher_grid must be .* got None"),
        (lambda: GramLoss()(X, X[:, :4], (2, 3), (2, 3)), "teacher_grid must have 4 patches"),
        (lambda: PatchKernelAlignmentLoss()(X, X[:, :4]), "teacher_features must both be"),
        (lambda: PatchKernelAlignmentLoss()(X, X, MASK.int()), r"mask must be \(2, 6\) bool"),
        (lambda: PatchKernelAlignmentLoss()(X, X, MASK[:1]), r"got \(1, 6\) torch.bool"),
        (lambda: PatchKernelAlignmentLoss(1), "max_tokens must be at least 2 .* got 1"),
        (lambda: roi_resample_to_grid(X, BOXES, 1, 1), r"feature_map must be \(B, C, H, W\)"),
        (lambda: roi_resample_to_grid(X[None], BOXES[0], 1, 1), r"boxes must be \(1, 4\)"),
        (lambda: roi_resample_to_grid(X[None], 9 * BOXES, 1, 1), "boxes must be x0 <= x1 in 0..3"),
        (lambda: roi_resample_to_grid(X[None], BOXES, 0, 1), "out_h must be at least 1"),
        (lambda: CAPILoss()(X[0], X), r"teacher_logits must be \(B, P, K\)"),
        (lambda: CAPILoss()(X, X[:, :2]), r"student_logits must be \(2, 6, 3\)"),
        (lambda: CAPILoss()(X, X[:, :2], IDS[:1]), r"teacher_index must be \(2, 2\) int64"),
        (lambda: CAPILoss()(X, X[:, :2], IDS + 6), r"teacher_index must lie in 0..5, got 6..6"),
        (lambda: VJEPALoss()(X, X[:, :2]), r"pred must be \(B, K, D\) as the chosen targets"),
        (lambda: VJEPALoss()([X, X], X, [IDS]), "pred must be as many as ids, got 2 and 1"),
        (lambda: VJEPALoss()(X.int(), X), "pred must be floating-point, got torch.int32"),
        (lambda: VJEPALoss(0.5), "p must be >= 1, got 0.5"),
        (lambda: DSERegularizer()(X[0]), r"representations must be \(B, N, D\)"),
        (lambda: KoLeoLoss(loss_group_size=4)(X[0]), "loss_group_size must divide the 6 rows, got"),
        (lambda: KoLeoLoss(topk=6)(X[0]), "topk must be below the 6 rows of a group, got 6"),
        (lambda: KoLeoLoss(loss_group_size=1), "loss_group_size must be at least 2"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
