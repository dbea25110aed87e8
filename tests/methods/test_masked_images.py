"""The methods of masked images: each computes its paper's loss, and hides what it says it hides."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastssl.kernels import gather_patches
from fastssl.masking import unit_masking
from fastssl.methods.gmml import GMMLConfig
from fastssl.methods.paint import paint
from tests.methods.test_methods import assert_gradients_reach, batch, method

NAMES = ("mae", "simmim", "gmml", "cropmae", "ijepa", "data2vec")
ALONE = {"gmml": {"method__corruption": "noise"}}  # a swap takes from the rank's other images


def chosen(images, ids):
    """Patches (B, K, 16) of 16 x 16 images of one channel, cut without the package."""
    cut = images.reshape(-1, 4, 4, 4, 4).permute(0, 1, 3, 2, 4).reshape(-1, 16, 16)
    return cut.gather(1, ids[..., None].expand(-1, -1, 16))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_what_is_trained_and_nothing_else(name, tmp_path):
    ours, _ = method(name, tmp_path)
    loss = ours(batch(ours.views))["loss"]
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert_gradients_reach(ours, loss)


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_over_two_ranks_is_the_joined_batch(name, tmp_path):
    ours, _ = method(name, tmp_path, **ALONE.get(name, {}))
    data = batch(ours.views)
    halves = [
        {"views": [view[part] for view in data["views"]], "seeds": data["seeds"][part]}
        for part in (slice(0, 3), slice(3, 6))
    ]
    trained = [p for p in ours.parameters() if p.requires_grad]
    whole = torch.autograd.grad(ours(data)["loss"], trained)
    parts = [torch.autograd.grad(ours(half)["loss"], trained) for half in halves]
    for joined, first, second in zip(whole, *parts, strict=True):
        torch.testing.assert_close((first + second) / 2, joined, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_masks_follow_the_seeds_alone(name, tmp_path):
    ours, _ = method(name, tmp_path)
    data = batch(ours.views)
    torch.manual_seed(5)
    first = ours(data)["loss"]
    torch.manual_seed(6)
    assert torch.equal(first, ours(data)["loss"])
    assert ours({**data, "seeds": data["seeds"] + 1})["loss"] != first


@pytest.mark.parametrize("name", NAMES)
def test_a_bfloat16_model_gives_a_float32_loss(name, tmp_path):
    ours, _ = method(name, tmp_path)
    data = batch(ours.views)
    full = ours(data)["loss"]
    half = ours.to(torch.bfloat16)(data)["loss"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.02)


def hidden_and_prediction(ours, images):
    """Where `images` hide, and a function that predicts there from any images."""
    seeds = torch.arange(6) + 11
    keep = ours.schedule.keep if hasattr(ours, "schedule") else 0
    match type(ours).__name__:
        case "IJEPA":
            places = ours.mask(seeds)
            shown = torch.zeros(6, 16).scatter_(1, places.context, 1.0)
            hidden = shown.argsort(dim=1, stable=True)[:, : 16 - places.context.shape[1]]
            return hidden, lambda x: ours.student(x, places.context)
        case "Data2Vec":
            masking = ours.mask(seeds, keep)
            return masking.masked, lambda x: ours.predict(x, masking)
        case "CropMAE":
            _, masking = ours.predict(images, images, seeds)
            return masking.masked, lambda x: ours.predict(images, x, seeds)[0]
        case "GMML":
            masking = ours.mask(seeds, keep)
            return masking.masked, lambda x: ours.predict(
                ours.corrupted(x, seeds, masking), masking.masked
            )
    _, masking = ours.predict(images, seeds)
    return masking.masked, lambda x: ours.predict(x, seeds)[0]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_hidden_is_read(name, tmp_path):
    changes = {"data2vec": {"method__masks": 1}}.get(name, ALONE.get(name, {}))
    ours, _ = method(name, tmp_path, **changes)
    (images,) = batch(1)["views"]
    hidden, predict = hidden_and_prediction(ours, images)
    before = predict(images)
    nan = torch.full((*hidden.shape, 16), torch.nan)
    torch.testing.assert_close(predict(paint(images, nan, hidden, (4, 4))), before, rtol=0, atol=0)
    others = torch.arange(16)[:, None].ne(hidden.flatten()[:5]).all(1).nonzero()[0]
    seen = paint(images, torch.ones(6, 1, 16), others.expand(6, 1), (4, 4))
    assert not torch.equal(predict(seen), before)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ijepa"])
def test_a_resumed_schedule_goes_on_where_it_was(name, tmp_path):
    ours, _ = method(name, tmp_path, method__mask_ratio=[0.5, 0.75])
    easy = ours.schedule.keep
    ours.on_step(None, 1.0)
    assert ours.schedule.keep == easy / 2
    fresh, _ = method(name, tmp_path, method__mask_ratio=[0.5, 0.75])
    fresh.load_state_dict(ours.state_dict())
    assert fresh.schedule.keep == easy / 2
    data = batch(ours.views)
    torch.testing.assert_close(fresh(data)["loss"], ours(data)["loss"], rtol=0, atol=0)


def test_blocks_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"context=0.9, target=0.2, blocks=3 of 16 patches"):
        method("ijepa", tmp_path, method__context=0.9)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ijepa"])
def test_impossible_masks_are_refused(name, tmp_path):
    for ratio in (0.99, [0.5, 0.99]):
        with pytest.raises(ValueError, match=r"method.mask_ratio=0.99 leaves 0 of \d+"):
            method(name, tmp_path, method__mask_ratio=ratio)


@pytest.mark.parametrize("name", ["mae", "data2vec"])
def test_masks_of_every_sort(name, tmp_path):
    seen = {}
    for kind in ("random", "block", "grid", "noise"):
        ours, _ = method(name, tmp_path, method__masking=kind, method__mask_ratio=0.75)
        masking = ours.mask(torch.arange(6), ours.schedule.keep)
        rows = 6 * getattr(ours.cfg, "masks", 1)
        assert masking.visible.shape == (rows, 4) and masking.masked.shape == (rows, 12)
        seen[kind] = masking.visible
        assert ours(batch(1))["loss"].isfinite()
    steps = seen["grid"] % 4
    assert ((steps[:, 1] - steps[:, 0]) == 2).all()
    assert not any(torch.equal(seen["random"], seen[kind]) for kind in ("block", "grid", "noise"))
    with pytest.raises(ValueError, match="leaves 8 of 16; with n = 2 it is 0.75"):
        method(name, tmp_path, method__masking="grid", method__mask_ratio=0.5)


def test_simmim_puts_mask_tokens_in_place_of_hidden_patches(tmp_path):
    ours, _ = method("simmim", tmp_path)
    data = batch(1)
    (images,) = data["views"]
    masking = unit_masking(data["seeds"], (4, 4), 2, 2)
    hidden = torch.zeros(6, 16, 1, dtype=torch.bool).scatter_(1, masking.masked[..., None], True)
    vit = ours.encoder
    x = torch.where(hidden, ours.mask_token, vit.patch_embed(images))
    h = ours.head(vit.norm(vit.blocks(vit._pos_embed(x)))[:, 1:])
    error = (h - chosen(images, torch.arange(16).expand(6, 16))).abs()
    want = (error * hidden).sum() / (hidden.sum() * 16)
    torch.testing.assert_close(ours(data)["loss"], want)


def test_units_are_whole_and_equally_likely():
    masking = unit_masking(torch.arange(4000), (3, 9), 3, keep=1)
    assert masking.visible.shape == (4000, 9) and masking.masked.shape == (4000, 18)
    shown = torch.zeros(4000, 27).scatter_(1, masking.visible, 1.0).view(4000, 3, 3, 3)
    assert torch.equal(shown, shown[:, :1, :, :1].expand_as(shown))
    rates = shown[:, 0, :, 0].mean(0)
    assert (rates - 1 / 3).abs().max() < 4 * (2 / 9 / 4000) ** 0.5
    clip = unit_masking(torch.tensor([7]), (2, 4, 2), 2, keep=1)
    assert clip.visible.shape == (1, 8) and clip.visible[0, -1] - clip.visible[0, 0] == 11


def test_a_unit_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"method.unit=3 does not divide the patch grid \(4, 4\)"):
        method("simmim", tmp_path, method__unit=3)


@pytest.mark.parametrize("everywhere", [False, True])
def test_gmml_recovers_what_was_corrupted(everywhere, tmp_path):
    ours, _ = method("gmml", tmp_path, method__everywhere=everywhere)
    data = batch(1)
    (images,) = data["views"]
    masking = ours.mask(data["seeds"], ours.schedule.keep)
    corrupted = ours.corrupted(images, data["seeds"], masking)
    changed = (chosen(corrupted - images, torch.arange(16).expand(6, 16)) != 0).any(-1)
    hidden = torch.zeros(6, 16, dtype=torch.bool).scatter_(1, masking.masked, True)
    assert torch.equal(changed, hidden) and hidden.sum() == 6 * 11
    y = ours.head(ours.encoder.forward_features(corrupted)[:, 1:])
    error = (y - chosen(images, torch.arange(16).expand(6, 16))).abs().mean(-1)
    want = error.mean() if everywhere else error[hidden].mean()
    torch.testing.assert_close(ours(data)["loss"], want)


def test_gmml_asks_for_groups_that_fit(tmp_path):
    with pytest.raises(ValueError, match="method.groups=12"):
        method("gmml", tmp_path, method__groups=12)
    with pytest.raises(ValueError, match="corruption"):
        GMMLConfig.model_validate({"corruption": "blur"})


@pytest.mark.parametrize("error, rho", [("smooth_l1", F.smooth_l1_loss), ("l2", F.mse_loss)])
def test_ijepa_predicts_each_block_of_the_teachers_features(error, rho, tmp_path):
    ours, _ = method("ijepa", tmp_path, method__error=error)
    fall_behind(ours.teacher)
    data = batch(1)
    (images,) = data["views"]
    places = ours.mask(data["seeds"])
    assert places.context.shape == (6, 5) and places.targets.shape == (6, 3, 3)
    teacher = ours.teacher.model.vit.eval()
    whole = F.layer_norm(teacher.forward_features(images)[:, 1:], (32,))
    context = ours.student(images, places.context)
    losses = []
    for m in range(3):
        block = places.targets[:, m : m + 1]
        wanted = whole.gather(1, block[:, 0, :, None].expand(-1, -1, 32))
        losses.append(rho(ours.predictor(context, places.context, block)[:, 0], wanted))
    out = ours(data)
    torch.testing.assert_close(out["loss"], torch.stack(losses).mean())
    assert 0 < out["target_std"] < 1 and not out["target_std"].requires_grad


def fall_behind(teacher):
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(0.05 * torch.randn_like(p))


@pytest.mark.parametrize("layers", [1, 2])
def test_data2vec_averages_the_teachers_layers(layers, tmp_path):
    ours, _ = method("data2vec", tmp_path, method__layers=layers, method__masks=1)
    fall_behind(ours.teacher)
    data = batch(1)
    (images,) = data["views"]
    vit = ours.teacher.model.masked.vit.eval()
    seen = vit.forward_intermediates(
        images, indices=layers, output_fmt="NLC", intermediates_only=True
    )
    whole = sum(F.layer_norm(h, (32,)) for h in seen) / layers
    masking = ours.mask(data["seeds"], ours.schedule.keep)
    wanted = whole.gather(1, masking.masked[..., None].expand(-1, -1, 32))
    tokens = ours.student(images, masking.visible)
    want = F.mse_loss(ours.decoder(tokens, masking), wanted)
    torch.testing.assert_close(ours(data)["loss"], want)


def test_data2vecs_masks_share_a_teacher_pass(tmp_path):
    ours, _ = method("data2vec", tmp_path, method__masks=3)
    passes = []
    ours.teacher.register_forward_hook(lambda *_: passes.append(1))
    data = batch(1)
    (images,) = data["views"]
    loss = ours(data)["loss"]
    assert len(passes) == 1
    masking = ours.mask(data["seeds"], ours.schedule.keep)
    assert len(torch.unique(masking.visible.view(6, 3, -1)[0], dim=0)) > 1
    single = copy.deepcopy(ours)
    single.cfg = ours.cfg.model_copy(update={"masks": 1})
    losses = []
    for m in range(3):
        part = type(masking)(*(t.view(6, 3, -1)[:, m] for t in masking))
        wanted = ours.teach(images, part.masked)
        losses.append(F.mse_loss(single.predict(images, part), wanted))
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_data2vec_refuses_layers_it_has_not_and_a_falling_momentum(tmp_path):
    with pytest.raises(ValueError, match="method.layers=3 is more than the encoder's 2"):
        method("data2vec", tmp_path, method__layers=3)
    with pytest.raises(ValueError, match="may not fall, got method.momentum from 0.95 to 0.9"):
        method("data2vec", tmp_path, method__momentum=(0.95, 0.9))


MOMENTA = [
    ("ijepa", {"method__momentum": 0.8}, {0.0: 0.8, 0.5: 0.9, 1.0: 1.0}),
    (
        "data2vec",
        {"method__momentum": {"start": 0.8, "end": 0.9, "until": 0.5}},
        {0.0: 0.8, 0.25: 0.85, 0.5: 0.9, 1.0: 0.9},
    ),
]


@pytest.mark.parametrize("name, changes, momenta", MOMENTA)
def test_teachers_follow_their_students(name, changes, momenta, tmp_path):
    ours, _ = method(name, tmp_path, **changes)
    assert not any(p.requires_grad for p in ours.teacher.parameters())
    for progress, momentum in momenta.items():
        before = [p.clone() for p in ours.teacher.parameters()]
        with torch.no_grad():
            for p, q in zip(ours.student.parameters(), before, strict=True):
                p.copy_(q + 1)
        ours.on_step(None, progress)
        for p, q in zip(ours.teacher.parameters(), before, strict=True):
            torch.testing.assert_close(p, q + (1 - momentum), rtol=0, atol=1e-6)


def test_cropmae_looks_the_crop_up_in_the_whole(tmp_path):
    ours, _ = method("cropmae", tmp_path, method__norm_pix=False)
    data = batch(2)
    whole, crop = data["views"]
    prediction, masking = ours.predict(whole, crop, data["seeds"])
    assert masking.visible.shape == (6, 2) and prediction.shape == (6, 14, 16)
    want = (prediction - chosen(crop, masking.masked)).square().mean()
    torch.testing.assert_close(ours(data)["loss"], want)
    other, _ = ours.predict(whole.flip(-1), crop, data["seeds"])
    assert (other - prediction).abs().max() > 1e-3
    reference = ours.encoder.forward_features(whole)
    tokens = ours.masked(crop, masking.visible)
    torch.testing.assert_close(prediction, ours.decoder(tokens, masking, reference))


@pytest.mark.parametrize("name", ["simmim", "gmml"])
def test_reconstructions_change_hidden_patches_only(name, tmp_path):
    ours, _ = method(name, tmp_path)
    data = batch(1)
    (images,) = data["views"]
    hidden, predict = hidden_and_prediction(ours, images)
    masked, painted = ours.reconstruct(images, data["seeds"])
    for made in (masked, painted):
        changed = (chosen(made - images, torch.arange(16).expand(6, 16)) != 0).any(-1)
        assert torch.equal(changed.nonzero()[:, 1], hidden.flatten())
    torch.testing.assert_close(chosen(painted, hidden), predict(images))
    assert name == "gmml" or (chosen(masked, hidden) == 0).all()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_cropmae_paints_the_middle_magnified(norm_pix, tmp_path):
    ours, _ = method("cropmae", tmp_path, method__norm_pix=norm_pix)
    data = batch(1)
    (images,) = data["views"]
    masked, painted = ours.reconstruct(images, data["seeds"])
    crop = F.interpolate(images[:, :, 4:12, 4:12], (16, 16), mode="bilinear", antialias=True)
    prediction, masking = ours.predict(images, crop, data["seeds"])
    assert torch.equal(chosen(masked, masking.visible), chosen(crop, masking.visible))
    assert torch.equal(chosen(painted, masking.visible), chosen(crop, masking.visible))
    assert (chosen(masked, masking.masked) == 0).all()
    row, truth = chosen(painted, masking.masked), chosen(crop, masking.masked)
    if norm_pix:
        row = (row - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(row, prediction, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch, shape", [((3,), (7, 12)), ((2, 3), (3, 4, 6)), ((2, 2, 1), None)])
def test_painting_is_the_inverse_of_gathering(patch, shape):
    images = torch.randn(2, *(shape or (3, 4, 2, 5)))
    count = images[0, 0].numel() // torch.tensor(patch).prod().item()
    ids = torch.stack([torch.randperm(count)[: count // 2 + 1] for _ in range(2)])
    fresh = torch.randn_like(images)
    painted = paint(images, gather_patches(fresh, ids, patch), ids, patch)
    assert torch.equal(gather_patches(painted, ids, patch), gather_patches(fresh, ids, patch))
    rest = [sorted(set(range(count)) - set(row.tolist())) for row in ids]
    rest = torch.tensor(rest)
    assert torch.equal(gather_patches(painted, rest, patch), gather_patches(images, rest, patch))
