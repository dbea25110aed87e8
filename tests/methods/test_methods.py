"""Each method computes its paper's loss on what its own parts produce."""

import lightly.loss
import pytest
import torch

from fastssl.methods import METHODS, build_method
from fastssl.models import build_backbone
from tests.runs import METHODS as OPTIONS
from tests.runs import VIT, tiny


def method(name, tmp_path, **changes):
    cfg = tiny(name, tmp_path, **changes)
    torch.manual_seed(0)
    encoder = build_backbone(cfg.model.name, channels=1, image_size=16, kwargs=VIT)
    return build_method(encoder, cfg.method), cfg


def batch(views, n=6):
    torch.manual_seed(1)
    images = [torch.randn(n, 1, 16, 16) for _ in range(views)]
    return {"views": images, "index": torch.arange(n), "seeds": torch.arange(n) + 11}


def test_every_method_has_options_here():
    assert set(METHODS) == set(OPTIONS)


@pytest.mark.parametrize(
    "name, rival",
    [
        ("simclr", lightly.loss.NTXentLoss(temperature=0.1)),
        ("barlow_twins", lightly.loss.BarlowTwinsLoss(lambda_param=5e-3)),
    ],
)
def test_joint_methods(name, rival, tmp_path):
    ours, _ = method(name, tmp_path)
    data = batch(2)
    loss = ours(data)["loss"]
    z_0, z_1 = (ours.head(ours.encoder(view)) for view in data["views"])
    torch.testing.assert_close(loss, rival(z_0, z_1), rtol=1e-5, atol=1e-5)
    loss.backward()
    unused = [n for n, p in ours.named_parameters() if p.grad is None]
    assert not unused, f"no gradient reaches {unused}"


def test_mae_is_the_mean_error_over_hidden_patches(tmp_path):
    ours, _ = method("mae", tmp_path, method__norm_pix=True)
    data = batch(1)
    loss = ours(data)["loss"]
    (images,) = data["views"]
    prediction, masking = ours.predict(images, data["seeds"])
    assert masking.visible.shape == (6, 4) and prediction.shape == (6, 12, 16)
    grid = images.reshape(6, 1, 4, 4, 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(6, 16, 16)
    truth = grid.gather(1, masking.masked[..., None].expand(-1, -1, 16))
    truth = (truth - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(loss, (prediction - truth).square().mean())
    loss.backward()
    assert not [n for n, p in ours.named_parameters() if p.grad is None]


def test_mae_hides_the_same_patches_whatever_the_batch(tmp_path):
    ours, _ = method("mae", tmp_path)
    data = batch(1)
    _, whole = ours.predict(data["views"][0], data["seeds"])
    _, part = ours.predict(data["views"][0][2:4], data["seeds"][2:4])
    assert torch.equal(part.visible, whole.visible[2:4])


@pytest.mark.parametrize("norm_pix", [True, False])
def test_mae_paints_hidden_patches_only(norm_pix, tmp_path):
    ours, _ = method("mae", tmp_path, method__norm_pix=norm_pix)
    data = batch(1)
    (images,) = data["views"]
    prediction, masking = ours.predict(images, data["seeds"])
    masked, painted = ours.reconstruct(images, data["seeds"])
    patches = [
        x.unfold(2, 4, 4).unfold(3, 4, 4).reshape(6, 16, 16) for x in (images, masked, painted)
    ]
    hidden = torch.zeros(6, 16, dtype=torch.bool).scatter_(1, masking.masked, True)
    assert torch.equal(patches[1][~hidden], patches[0][~hidden])
    assert torch.equal(patches[2][~hidden], patches[0][~hidden])
    assert (patches[1][hidden] == 0).all()
    row = patches[2].gather(1, masking.masked[..., None].expand(-1, -1, 16))
    if norm_pix:  # the patch's own mean and deviation are put back
        truth = patches[0].gather(1, masking.masked[..., None].expand(-1, -1, 16))
        row = (row - truth.mean(-1, keepdim=True)) / (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(row, prediction, rtol=1e-4, atol=1e-4)


def test_features_are_the_plain_encoders(tmp_path):
    ours, _ = method("mae", tmp_path)
    images = torch.randn(3, 1, 16, 16)
    features = ours.to(torch.bfloat16).features(images)
    assert features.dtype == torch.float32 and features.shape == (3, 32)


def test_a_mask_that_leaves_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mask_ratio=0.99 leaves 0 of 16"):
        method("mae", tmp_path, method__mask_ratio=0.99)
