"""T-JEPA: context and targets without a common column, a teacher without gradient."""

import pytest
import torch
import torch.nn.functional as F

from tests.methods.test_other_kinds import made


def test_the_loss_is_the_error_of_predicted_latents(tmp_path):
    method, batch = made("tjepa", tmp_path)
    with torch.no_grad():  # a teacher that has fallen behind
        for p in method.student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    (rows,) = batch["views"]
    context, targets = method.mask(batch["seeds"])
    h = method.teacher.model(rows)[:, 1:]
    h = F.layer_norm(h, h.shape[-1:])
    wanted = torch.stack([h[b, targets[b]] for b in range(6)])
    predicted = method.predictor(method.student(rows, context), context, targets)
    assert predicted.shape == (6, 4, 3, 32)
    out = method(batch)
    torch.testing.assert_close(out["loss"], (predicted - wanted).square().mean())
    spread = wanted.flatten(1, 2).mean(1).std(0, correction=0).mean()
    torch.testing.assert_close(out["target_std"], spread)


def test_context_and_targets_have_no_column_in_common(tmp_path):
    method, batch = made("tjepa", tmp_path)
    context, targets = method.mask(torch.arange(200))
    assert context.shape == (200, 5) and targets.shape == (200, 4, 3)
    for own, sets in zip(context.tolist(), targets.tolist(), strict=True):
        assert len(set(own)) == 5
        for one in sets:
            assert len(set(one)) == 3 and not set(one) & set(own)
    counts = torch.bincount(targets.flatten(), minlength=13)
    assert (counts / counts.double().mean() - 1).abs().max() < 0.25
    together = (targets[:, 0] == targets[:, 1]).all(1).double().mean()
    assert together < 0.06  # of C(8, 3) = 56 sets: drawn apart


def test_hidden_columns_are_not_read(tmp_path):
    method, batch = made("tjepa", tmp_path)
    (rows,) = batch["views"]
    context, _ = method.mask(batch["seeds"])
    hidden = torch.ones(6, 13, dtype=torch.bool).scatter_(1, context, False)
    changed = torch.where(hidden, torch.randn_like(rows), rows)
    assert torch.equal(method.student(changed, context), method.student(rows, context))


def test_the_teacher_moves_and_has_no_gradient(tmp_path):
    method, batch = made("tjepa", tmp_path, method__momentum=0.8)
    method(batch)["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    before = {n: p.clone() for n, p in method.teacher.model.named_parameters()}
    with torch.no_grad():
        for p in method.student.parameters():
            p.add_(1.0)
    method.on_step(None, 0.5)
    for name, p in method.teacher.model.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.1, rtol=0, atol=1e-6)


def test_targets_may_stay_as_they_are(tmp_path):
    method, batch = made("tjepa", tmp_path, method__norm_targets=False)
    (rows,) = batch["views"]
    _, targets = method.mask(batch["seeds"])
    h = method.teacher.model(rows)[:, 1:]
    torch.testing.assert_close(method.teach(rows, targets)[2, 1], h[2, targets[2, 1]])


def test_impossible_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="12 and 3 of 13 columns"):
        made("tjepa", tmp_path, method__context=0.9)
    with pytest.raises(ValueError, match="trains a table_transformer, got VisionTransformer"):
        image = {"model__name": "vit_tiny_patch16_224", "data__source": {"name": "digits"}}
        image |= {"data__augment": "mae", "data__image_size": 16}
        kwargs = {"patch_size": 4, "embed_dim": 32, "num_heads": 2}
        made("tjepa", tmp_path, model__kwargs=kwargs, **image)
