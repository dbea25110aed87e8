"""Methods made of parts of others: each computes its paper's loss, written out in float64."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.methods import SiT
from fastssl.methods.configs import SLAConfig
from fastssl.methods.paint import paint
from fastssl.methods.turns import quarter_turns
from fastssl.models import build_backbone
from tests.methods.test_masked_images import chosen
from tests.methods.test_methods import assert_gradients_reach, batch, method
from tests.runs import VIT, tiny


def exact(name, tmp_path, views, **changes):
    """A method, and a batch for it, in float64."""
    ours, cfg = method(name, tmp_path, **changes)
    data = batch(views)
    data["views"] = [view.double() for view in data["views"]]
    return ours.double(), cfg.method, data


@pytest.mark.parametrize("distill", [False, True])
def test_sla_learns_classes_and_turns_jointly(distill, tmp_path):
    ours, _, data = exact("sla", tmp_path, 1, method__distill=distill, method__beta=0.7)
    (x,), label = data["views"], data["label"]
    joint, aggregate = 0, 0
    for j in range(4):
        logits = ours.joint(ours.encoder(torch.rot90(x, j, (2, 3))))
        p = logits.softmax(1)
        joint = joint - p[torch.arange(6), 4 * label + j].log().mean() / 4
        aggregate = aggregate + logits[:, j::4] / 4
    out = ours(data)
    want = joint
    if distill:
        p, q = aggregate.detach().softmax(1), ours.single(ours.encoder(x)).softmax(1)
        kl = (p * (p / q).log()).sum(1).mean()
        want = want + kl - 0.7 * q[torch.arange(6), label].log().mean()
        torch.testing.assert_close(ours.classify(x), ours.single(ours.encoder(x)).float())
    else:
        torch.testing.assert_close(ours.classify(x), aggregate.float())
    torch.testing.assert_close(out["loss"].double(), want, rtol=1e-6, atol=0)
    assert out["accuracy"] == (aggregate.argmax(1) == label).double().mean()
    assert_gradients_reach(ours, out["loss"])
    # Nothing flows into the aggregate that is distilled.
    wanted = torch.autograd.grad(want, ours.joint.weight)[0]
    torch.testing.assert_close(ours.joint.weight.grad, wanted, rtol=1e-5, atol=1e-7)


def test_sla_asks_for_labels_and_a_place_for_every_class():
    assert SLAConfig(classes=10).fitted(1, 10).classes == 10
    with pytest.raises(ValueError, match="method.name=sla .* no labels"):
        SLAConfig().fitted(1, None)
    with pytest.raises(ValueError, match=r"method.classes=10 .* 11 classes"):
        SLAConfig(classes=10).fitted(1, 11)
    with pytest.raises(ValueError, match=r"must be square, got \(2, 3\)"):
        quarter_turns(torch.zeros(1, 1, 2, 3))


def sit(tmp_path, **changes):
    """With a token for each task, and weights that differ."""
    cfg = tiny("sit", tmp_path, **changes).method
    torch.manual_seed(0)
    options = {**VIT, "reg_tokens": 1, "global_pool": "token"}
    ours = SiT(build_backbone("vit_tiny_patch16_224", shape=(1, 16, 16), kwargs=options), cfg)
    with torch.no_grad():
        ours.log_variances.copy_(torch.tensor([-0.5, 0.2, 0.7]))
    return ours.double(), cfg


@pytest.mark.parametrize("everywhere", [True, False])
def test_sit_weighs_three_tasks(everywhere, tmp_path):
    ours, cfg = sit(tmp_path, method__everywhere=everywhere)
    data = ours.prepare({**batch(2), "views": [view.double() for view in batch(2)["views"]]})
    clean, corrupted, turns = (data[key] for key in ("clean", "corrupted", "turns"))
    assert len(turns.unique()) > 2 and not torch.equal(turns[:, 0], turns[:, 1])
    assert not torch.equal(*data["hidden"].sort(2).values.unbind(1)) or everywhere
    parts = []
    for v, view in enumerate(data["views"]):
        for b in range(6):
            assert torch.equal(clean[b, v], torch.rot90(view[b], int(turns[b, v]), (1, 2)))
        changed = (patches(clean[:, v]) != patches(corrupted[:, v])).any(-1)
        assert (changed.sum(1) == 11).all()  # 0.7 of 16
        h = ours.encoder.forward_features(corrupted[:, v])
        error = (ours.head(h[:, 2:]) - patches(clean[:, v])).abs().mean(-1)
        p = ours.turn(h[:, 1]).softmax(1)[torch.arange(6), turns[:, v]]
        z = F.normalize(ours.project(h[:, 0]), dim=1)
        parts.append((error.mean() if everywhere else error[changed].mean(), -p.log().mean(), z))
    (r_0, t_0, z_0), (r_1, t_1, z_1) = parts
    scores = (torch.cat([z_0, z_1]) @ torch.cat([z_0, z_1]).T / cfg.temperature).exp()
    own = scores[torch.arange(12), torch.arange(12).roll(6)]
    contrast = -(own / (scores.sum(1) - scores.diagonal())).log().mean()
    tasks = (r_0 + r_1) / 2, (t_0 + t_1) / 2, contrast
    r, t, c = ours.log_variances
    want = tasks[0] / (2 * r.exp()) + tasks[1] / t.exp() + tasks[2] / c.exp() + (r + t + c) / 2
    out = ours(data, "prepared")
    torch.testing.assert_close(out["loss"].double(), want, rtol=1e-6, atol=0)
    for name, task in zip(("restoration", "turn", "contrast"), tasks, strict=True):
        torch.testing.assert_close(out[name].double(), task.detach(), rtol=1e-6, atol=0)
    assert_gradients_reach(ours, out["loss"])


def patches(images):
    """All patches (B, 16, 16) of 16 x 16 images of one channel."""
    return chosen(images, torch.arange(16).expand(len(images), 16))


def test_sits_patches_come_from_other_images(tmp_path):
    ours, _ = sit(tmp_path, method__corruption="swap")
    data = ours.prepare(batch(2))
    clean, corrupted = (data[key].transpose(0, 1).flatten(0, 1) for key in ("clean", "corrupted"))
    kept = patches(clean) == patches(corrupted)
    assert torch.equal(patches(corrupted)[~kept], patches(clean.roll(-1, 0))[~kept])


def test_sit_asks_for_a_class_token(tmp_path):
    cfg = tiny("sit", tmp_path).method
    options = {**VIT, "class_token": False}
    encoder = build_backbone("vit_tiny_patch16_224", shape=(1, 16, 16), kwargs=options)
    with pytest.raises(ValueError, match="method.name=sit tells turns by a class token"):
        SiT(encoder, cfg)


def test_cae_aligns_predicted_latents_and_decodes_them_alone(tmp_path):
    ours, _, data = exact("cae", tmp_path, 1, method__alignment=1.5)
    (x,) = data["views"]
    masking = ours.mask(data["seeds"], 8)
    z = ours.regressor(ours.masked(x, masking.visible), masking)
    z_hidden = ours.masked(x, masking.masked)[:, 1:].detach()
    y = ours.decoder(z, masking.masked)
    truth = chosen(x, masking.masked)
    truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    want = (y - truth).square().mean() + 1.5 * (z - z_hidden).square().mean()
    out = ours(data)
    torch.testing.assert_close(out["loss"].double(), want, rtol=1e-6, atol=0)
    assert_gradients_reach(ours, out["loss"])
    for p, g in zip(ours.parameters(), torch.autograd.grad(want, ours.parameters()), strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)
    nan = torch.full_like(truth, torch.nan)
    latents, painted, _ = ours.encode({**data, "views": [paint(x, nan, masking.masked, (4, 4))]})
    torch.testing.assert_close(latents, z, rtol=0, atol=0)
    torch.testing.assert_close(painted, y, rtol=0, atol=0)
    assert torch.equal(ours.predict(x, data["seeds"])[0], y)


def test_selfie_finds_the_patch_that_was_there(tmp_path):
    ours, _, data = exact("selfie", tmp_path, 1)
    (x,) = data["views"]
    hidden = ours.mask(data["seeds"], 12)
    u = ours.masked(x, hidden.visible)[:, 1:].mean(1)
    v = ours.place(u[:, None] + ours.pos_embed[hidden.masked])
    embed = ours.encoder.patch_embed(x)
    c = ours.candidate(embed.gather(1, hidden.masked[..., None].expand(-1, -1, 32)))
    p = torch.einsum("ble,bme->blm", v, c).softmax(2)
    out = ours(data)
    want = -p.diagonal(dim1=1, dim2=2).log().mean()
    torch.testing.assert_close(out["loss"].double(), want, rtol=1e-6, atol=0)
    right = p.argmax(2) == torch.arange(4)
    assert 0 < out["accuracy"] < 1 and out["accuracy"] == right.float().mean()
    assert_gradients_reach(ours, out["loss"])
    # Places know nothing of the hidden pixels, and patches nothing of their places.
    rows = chosen(x, hidden.masked)
    v_moved, c_moved = ours.encode(
        {**data, "views": [paint(x, rows.roll(1, 1), hidden.masked, (4, 4))]}
    )
    torch.testing.assert_close(v_moved, v, rtol=0, atol=1e-12)
    torch.testing.assert_close(c_moved, c.roll(1, 1), rtol=0, atol=1e-12)
