"""Distillation: a frozen teacher, known by its weights, and the loss of each method as written."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from fastssl.config import ConfigError
from fastssl.engine.checkpoint import CheckpointError
from fastssl.export import load_encoder
from fastssl.run.build import build
from fastssl.run.train import pretrain
from tests.runs import DISTILL, VIT, final, saved_state, tiny


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run whose encoder is the teacher."""
    cfg = tiny("simclr", tmp_path_factory.mktemp("taught"), name="taught", epochs=1)
    pretrain(cfg)
    return cfg.directory


def small(name, taught, output, **changes):
    kwargs = {**VIT, "embed_dim": 16, "depth": 1}
    keys = {"model__kwargs": kwargs, "teacher": {"weights": str(taught)}, **changes}
    return tiny(name, output, **keys)


def batch(views=1, n=6):
    torch.manual_seed(1)
    each = torch.arange(n)
    images = [torch.randn(n, 1, 16, 16) for _ in range(views)]
    return {"views": images, "index": each, "seeds": each + 11, "label": each}


@pytest.mark.parametrize("name", DISTILL)
def test_a_run_leaves_its_teacher_as_it_is_and_resumes_with_it_alone(name, taught, tmp_path):
    cfg = small(name, taught, tmp_path)
    notes = []
    method = build(cfg, 1, notes)
    assert any(n.startswith("teacher.weights=") and "tensors loaded" in n for n in notes), notes
    wanted = load_encoder(taught, device="cpu")[0].backbone.state_dict()
    torch.testing.assert_close(method.networks()["teacher"].state_dict(), wanted, rtol=0, atol=0)
    method.train()(batch(2 if name == "seed" else 1))["loss"].backward()
    wrong = [n for n, p in method.named_parameters() if (p.grad is None) == p.requires_grad]
    assert not wrong and not any(m.training for m in method.networks()["teacher"].modules())
    pretrain(cfg)
    checkpoint = cfg.directory / "checkpoints/step-00000010"
    assert not [key for key in saved_state(checkpoint) if "embed_dim" in key or "teacher" in key]
    before = final(cfg)
    shutil.rmtree(checkpoint)
    again = cfg.model_copy(update={"resume": "auto"})
    pretrain(again)
    assert final(cfg) == before
    mine = load_encoder(cfg.directory, "teacher", device="cpu")[0].backbone.state_dict()
    torch.testing.assert_close(mine, wanted, rtol=0, atol=0)
    assert load_encoder(cfg.directory, device="cpu")[0].backbone.embed_dim == 16


def test_another_teacher_is_refused(taught, tmp_path):
    shutil.copytree(taught, tmp_path / "other")
    cfg = small("distill", tmp_path / "other", tmp_path, epochs=1)
    pretrain(cfg)
    shutil.rmtree(tmp_path / "other")
    pretrain(tiny("simclr", tmp_path, name="other", epochs=1, seed=8))
    with pytest.raises(CheckpointError, match="other frozen weights of teacher"):
        pretrain(cfg.model_copy(update={"resume": "auto"}))


@pytest.mark.parametrize("error", ["smooth_l1", "l2", "cosine"])
def test_features_are_compared_layer_normed_over_all_views(error, taught, tmp_path):
    ours = build(small("distill", taught, tmp_path, method__error=error), 1, [])
    data, rho = batch(2), {"smooth_l1": F.smooth_l1_loss, "l2": F.mse_loss}
    losses = []
    for view in data["views"]:
        t = ours.teacher(view)
        t = (t - t.mean(1, keepdim=True)) / (t.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        p = ours.head(ours.encoder(view))
        if error == "cosine":
            losses.append(1 - (F.normalize(p) * F.normalize(t)).sum(1).mean())
        else:
            losses.append(rho[error](p, t))
    torch.testing.assert_close(ours(data)["loss"], sum(losses) / 2)


def test_seeds_labels_are_the_queue_and_the_image_itself(taught, tmp_path):
    ours = build(small("seed", taught, tmp_path), 1, [])
    data, keys = batch(2), ours.queue.keys
    losses, firsts = [], []
    for view in data["views"]:
        t = F.normalize(ours.teacher(view))
        s = F.normalize(ours.head(ours.encoder(view)))
        for s_i, t_i in zip(s, t, strict=True):
            all_keys = torch.cat([t_i[None], keys])
            q = (all_keys @ t_i / ours.cfg.teacher_temperature).softmax(0)
            losses.append(-(q * (all_keys @ s_i / ours.cfg.temperature).log_softmax(0)).sum())
        firsts.append(t)
    out = ours(data)
    torch.testing.assert_close(out["loss"], torch.stack(losses).mean())
    ours.on_step(out["keep"], 0.5)
    torch.testing.assert_close(ours.queue.keys[:6], firsts[0])


def test_hidden_places_are_what_the_last_blocks_make_of_the_whole_image(taught, tmp_path):
    ours = build(small("mask_distill", taught, tmp_path), 1, [])
    data = batch()
    (images,), vit = data["views"], ours.networks()["teacher"]
    masking = ours.places(data["seeds"], ours.schedule.keep)
    x, blocks = vit._pos_embed(vit.patch_embed(images)), []
    for block in vit.blocks:
        x = block(x)
        blocks.append(F.layer_norm(x[:, 1:], x.shape[-1:]))
    whole = torch.stack(blocks[-ours.cfg.layers :]).mean(0)
    masked = masking.masked[..., None].expand(-1, -1, 32)
    wanted = whole.repeat_interleave(2, 0).gather(1, masked)  # of both masks of an image
    loss = F.smooth_l1_loss(ours.predict(images, masking), wanted)
    torch.testing.assert_close(ours(data)["loss"], loss)


def test_what_is_no_teacher_is_refused(taught, tmp_path):
    with pytest.raises(ConfigError, match="learns from a frozen teacher: give teacher.weights"):
        tiny("distill", tmp_path, teacher={})
    with pytest.raises(ConfigError, match="simclr learns from no frozen teacher"):
        tiny("simclr", tmp_path, teacher={"weights": "x"})
    with pytest.raises(ConfigError, match="are of a model: give teacher.name"):
        tiny("distill", tmp_path, teacher={"weights": "timm"})
    with pytest.raises(ConfigError, match="teacher.name=auto of teacher.weights=gone"):
        build(tiny("distill", tmp_path, teacher={"weights": "gone"}), 1, [])
    wrong = {"name": "vit_tiny_patch16_224", "kwargs": VIT | {"depth": 1}, "weights": str(taught)}
    with pytest.raises(ConfigError, match="teacher.weights=.*are not the model's"):
        build(tiny("distill", tmp_path, teacher=wrong), 1, [])
    with pytest.raises(
        ConfigError, match=r"teacher's grid \(4, 4\) must be the student's \(2, 2\)"
    ):
        kwargs = {**VIT, "patch_size": 8}
        build(small("mask_distill", taught, tmp_path, model__kwargs=kwargs), 1, [])
