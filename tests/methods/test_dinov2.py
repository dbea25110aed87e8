"""DINO's kin: a whole step against its formulas in float64, on 1 and 2 ranks; masks and packing."""

import pytest
import torch
import torch.distributed as dist

from fastssl.masking import some_blocks
from fastssl.methods import build_method
from fastssl.methods.configs import DINOv2Config, DINOv3Config
from fastssl.methods.teachers import packed
from fastssl.models import build_backbone
from fastssl.random import hashes
from tests.methods import dinov2_reference as reference
from tests.ranks import run_ranks
from tests.runs import VIT

B, G, MOMENTUM, RATE = 3, 2, 0.7, 0.3
FORMS = {
    "center": {"teacher_temp": 0.06, "koleo_weight": 0.0},
    "sinkhorn": {"assignment": "sinkhorn", "patch_prototypes": 11, "patch_bottleneck_dim": 5},
}


def method_of(form):
    torch.manual_seed(0)
    kwargs = {**VIT, "global_pool": "token"}
    vit = build_backbone(
        "vit_tiny_patch16_224", shape=(1, 16, 16), others=[(1, 8, 8)], kwargs=kwargs
    )
    small = {"prototypes": 13, "hidden_dim": 12, "bottleneck_dim": 6, "layers": 3}
    cfg = DINOv2Config(**small, momentum=MOMENTUM, dino_weight=0.8, ibot_weight=1.3, **FORMS[form])
    method = build_method(vit, cfg.model_copy(update={"momentum": MOMENTUM})).double()
    with torch.no_grad():  # a mask token that shows, and a teacher that has fallen behind
        for p in method.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return method


def batch_of(rank, step):
    generator = torch.Generator().manual_seed(10 + rank + 7 * step)
    sides = (16, 16, 8, 8)
    views = [torch.randn(B, 1, s, s, generator=generator).double() for s in sides]
    return {"views": views, "seeds": torch.arange(B) + 5 * rank + 17 * step}


def ours(rank, world, form):
    """What two steps of the method make: losses, gradients and all that is remembered."""
    method, seen = method_of(form), []
    for step in range(2):
        method.zero_grad()
        out = method(method.prepare(batch_of(rank, step)), "prepared")
        out["loss"].backward()
        trained = {n: p for n, p in method.named_parameters() if p.requires_grad}
        for p in trained.values():
            if world > 1:
                dist.all_reduce(p.grad)
                p.grad /= world
        grads = {n: p.grad.clone() for n, p in trained.items()}
        with torch.no_grad():
            for p in trained.values():
                p -= RATE * p.grad
        method.on_step(out["keep"], 0.0)
        terms = {k: out[k].detach() for k in ("loss", "dino_loss", "ibot_loss", "koleo_loss")}
        seen.append((terms, grads))
    return seen, method.state_dict()


def by_reference(world, form):
    method = method_of(form)
    student, teacher = parts(method, method.student), parts(method, method.teacher.model)
    names = {id(p): n for n, p in method.named_parameters()}
    cfg, centers, seen = method.cfg, [None, None], []
    if form == "center":
        centers = [torch.zeros(13).double(), torch.zeros(13).double()]
    for step in range(2):
        batches = [method.prepare(batch_of(rank, step)) for rank in range(world)]
        temps = 0.1, 0.06 if form == "center" else 0.04
        terms, means = reference.losses(student, teacher, batches, centers, temps, G)
        for own in terms:
            own["loss"] = 0.8 * own["dino"] + 1.3 * own["ibot"] + cfg.koleo_weight * own["koleo"]
        method.zero_grad()
        torch.stack([own["loss"] for own in terms]).mean().backward()
        trained = [p for p in method.parameters() if p.requires_grad]
        grads = {names[id(p)]: p.grad.clone() for p in trained}
        with torch.no_grad():
            for p in trained:
                p -= RATE * p.grad
            pairs = zip(method.teacher.model.parameters(), method.student.parameters(), strict=True)
            for t, s in pairs:
                t.copy_(MOMENTUM * t + (1 - MOMENTUM) * s)
        if form == "center":
            centers = [0.9 * c + 0.1 * m for c, m in zip(centers, means, strict=True)]
        seen.append(([{k: x.detach() for k, x in own.items()} for own in terms], grads))
    return seen, method.state_dict(), centers


def parts(method, network):
    """What the reference takes, of the method's own parameters."""

    def head(name):
        own = network[name] if name in network else network["head"]
        return dict(own.mlp.named_parameters()) | dict(own.last.named_parameters())

    found = {"vit": network["masked"].vit, "head": head("head"), "patch_head": head("patch_head")}
    return found | {"mask_token": method.mask_token}


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_a_whole_step_is_that_of_the_formulas(form, world):
    ranks = [ours(0, 1, form)] if world == 1 else run_ranks(ours, 2, form)
    seen, state, centers = by_reference(world, form)
    close = {"rtol": 1e-5, "atol": 1e-7}
    for rank, (mine, after) in enumerate(ranks):
        for (terms, grads), (wanted, by_name) in zip(mine, seen, strict=True):
            for name, value in terms.items():
                want = wanted[rank][name if name == "loss" else name.removesuffix("_loss")]
                if name != "koleo_loss" or form == "sinkhorn":
                    torch.testing.assert_close(value.double(), want, **close)
            assert grads.keys() == by_name.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(grad, by_name[name], **close, msg=name)
        for name, tensor in after.items():
            if isinstance(tensor, torch.Tensor) and "assign" not in name and "extra" not in name:
                torch.testing.assert_close(tensor, state[name], **close)
        if form == "center":
            for name, center in zip(("assign", "assign_patches"), centers, strict=True):
                torch.testing.assert_close(after[f"{name}.center"].double(), center, **close)


def test_masks_are_of_the_sample_and_of_the_sizes_asked():
    method = method_of("center")
    seeds = torch.arange(400)
    hidden = method.mask(seeds, G)
    assert torch.equal(hidden[37:90], method.mask(seeds[37:90], G))
    count = hidden.sum(2)
    assert ((count > 0).sum(1) == 1).all()  # half of two views, in every sample
    assert abs((count[:, 0] > 0).float().mean() - 0.5) < 0.1
    drawn, first = hashes(seeds, 2 * G + 2), count[:, 0] > 0
    alone = some_blocks(drawn[:, G], (4, 4), count[:, 0])
    assert torch.equal(hidden[:, 0], alone)  # places of draws that choose nothing
    mean = [count[chosen].sum() / chosen.sum() for chosen in (first, ~first)]
    assert abs(mean[0] - mean[1]) < 0.5  # nor do they tell the size
    sizes = count[count > 0]
    assert sizes.min() >= 1 and sizes.max() <= 8  # 0.1 to 0.5 of 16
    assert (torch.bincount(sizes, minlength=8)[1:8] > 20).all()
    assert hidden.sum() < method.bound(count) < 1.4 * hidden.sum()
    few = [method.mask(torch.arange(4) + 4 * n, G).sum(2) for n in range(200)]
    assert max(int(one.sum()) for one in few) <= method.bound(few[0])


def test_rows_beyond_the_bound_leave_the_mean_of_their_view():
    count = torch.tensor([[3, 0], [2, 4]])
    rows, weight = packed(count, 4, None)
    assert rows.tolist() == [0, 1, 2, 8, 9, 12, 13, 14, 15]
    want = [1 / 12] * 3 + [1 / 8] * 2 + [1 / 16] * 4
    torch.testing.assert_close(weight, torch.tensor(want))
    spare, of = packed(count, 4, 12)
    assert torch.equal(spare[:9], rows) and of.tolist()[9:] == [0, 0, 0]
    torch.testing.assert_close(of[:9], torch.tensor(want))
    fewer, of = packed(count, 4, 6)
    assert torch.equal(fewer, rows[:6])
    torch.testing.assert_close(of, torch.tensor([1 / 12] * 3 + [1 / 8] * 2 + [1 / 4]))


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_hidden_patches_counts_as_nothing(form):
    method, batch = method_of(form), batch_of(0, 0)
    prepared = method.prepare(batch)
    prepared["count"].zero_()
    out = method(prepared, "prepared")
    assert out["ibot_loss"] == 0 and torch.isfinite(out["loss"])
    out["loss"].backward()
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)
    method.on_step(out["keep"], 0.0)
    if form == "center":
        assert not method.assign_patches.center.any() and method.assign.center.any()


def dinov3(**options):
    torch.manual_seed(0)
    small = {"prototypes": 13, "hidden_dim": 12, "bottleneck_dim": 6, "patch_prototypes": 11}
    others, kwargs = [(1, 8, 8), (1, 32, 32)], {**VIT, "global_pool": "token"}
    vit = build_backbone("vit_tiny_patch16_224", shape=(1, 16, 16), others=others, kwargs=kwargs)
    return build_method(vit, DINOv3Config(**small, **options))


def with_gram_views(batch):
    large = [torch.nn.functional.interpolate(view, 32) for view in batch["views"][:2]]
    return {
        **batch,
        "views": [v.float() for v in (*batch["views"][:2], *large, *batch["views"][2:])],
    }


def test_dinov3_anchors_similarities_among_patches():
    plain, ours = dinov3(local_weight=0.5), dinov3(local_weight=0.5, gram_weight=2.0)
    with torch.no_grad():
        for p in ours.gram.parameters():
            p.add_(0.05 * torch.randn_like(p))
    batch = ours.prepare(with_gram_views(batch_of(0, 0)))
    out = ours(batch, "prepared")
    without = {**batch, "views": [*batch["views"][:2], *batch["views"][4:]]}
    small = plain(without, "prepared")
    torch.testing.assert_close(out["dino_loss"], small["dino_loss"])
    distances = []
    for g in range(2):
        token, vit = ours.mask_token, ours.encoder
        _, x = reference.tokens(vit, batch["views"][g], token, batch["hidden"][:, g])
        _, y = reference.tokens(ours.gram.model.vit, batch["views"][2 + g])
        y = y.mT.unflatten(2, (8, 8))
        y = torch.nn.functional.interpolate(y, (4, 4), mode="bicubic").flatten(2).mT
        x, y = (z / z.norm(dim=-1, keepdim=True) for z in (x, y))
        distances.append((x @ x.mT - y @ y.mT).square().mean())
    torch.testing.assert_close(out["gram_loss"], torch.stack(distances).mean())
    torch.testing.assert_close(out["loss"], small["loss"] + 2 * out["gram_loss"])
    out["loss"].backward()
    assert all(p.grad is None for p in ours.gram.parameters())


def test_dinov3s_local_views_have_a_weight_of_their_own():
    made = {w: dinov3(local_weight=w) for w in (0.0, 0.5, 1.0)}
    batch = with_gram_views(batch_of(0, 0))
    batch["views"] = [*batch["views"][:2], *batch["views"][4:]]
    dino = {w: m(m.prepare(batch), "prepared")["dino_loss"].item() for w, m in made.items()}
    assert dino[0.0] < dino[0.5] < dino[1.0]
    assert dino[0.5] == pytest.approx((dino[0.0] + dino[1.0]) / 2)
    apart = made[0.0].pairs(batch["views"])
    assert apart == [[0, 1], [1, 0], [0, 0], [0, 0]]


def test_the_gram_teacher_is_what_the_teacher_was():
    ours = dinov3(gram_weight={"name": "linear", "start": 0.0, "end": 1.0}, gram_updates=[0.4])
    batch = ours.prepare(with_gram_views(batch_of(0, 0)))
    assert "gram_loss" not in ours(batch, "prepared")  # its weight is 0
    weight = ours.gram.model.vit.blocks[0].mlp.fc1.weight
    for progress, updated in ((0.2, False), (0.4, True), (0.4, False), (0.6, False)):
        with torch.no_grad():
            ours.encoder.blocks[0].mlp.fc1.weight.add_(1.0)
        ours.on_step([[], []], progress)
        now = ours.teacher.model["masked"].vit.blocks[0].mlp.fc1.weight
        assert torch.equal(weight, now) == updated
    assert "gram_loss" in ours(batch, "prepared")


def test_bad_input_is_refused():
    few = dinov3(gram_weight=1.0)
    batch = batch_of(0, 0)
    with pytest.raises(ValueError, match="reads 4 views or more.* got 2.*dinov3_gram"):
        few.prepare({**batch, "views": batch["views"][:2]})
    with pytest.raises(ValueError, match="there is no Gram teacher"):
        DINOv3Config(gram_updates=(0.5,))
    with pytest.raises(ValueError, match=r"mask_range=\(0.5, 0.1\) must be"):
        DINOv2Config(mask_range=(0.5, 0.1))
    with pytest.raises(ValueError, match="give patch_prototypes"):
        DINOv2Config(patch_bottleneck_dim=8)
    vit = build_backbone("vit_tiny_patch16_224", shape=(1, 16, 16), kwargs=VIT)
    with pytest.raises(ValueError, match="trains class tokens.*'avg'.*global_pool=token"):
        build_method(vit, DINOv2Config())
