"""MAE on signals: spans are hidden, and their samples predicted."""

import pytest
import torch

from tests.methods.test_other_kinds import made


def test_the_loss_is_over_hidden_patches(tmp_path):
    method, batch = made("signal_mae", tmp_path)
    (x,) = batch["views"]
    prediction, masking = method.predict(x, batch["seeds"])
    assert masking.visible.shape == (6, 6) and prediction.shape == (6, 10, 8)
    truth = x.view(6, 16, 8).gather(1, masking.masked[..., None].expand(-1, -1, 8))
    std = (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    truth = (truth - truth.mean(-1, keepdim=True)) / std
    torch.testing.assert_close(method(batch)["loss"], (prediction - truth).square().mean())


@pytest.mark.parametrize("span", [1, 5])
def test_hidden_patches_come_in_runs(span, tmp_path):
    """On the ring: as many runs at most as hidden patches make spans."""
    method, batch = made("signal_mae", tmp_path, method__span=span)
    masked = method.mask(batch["seeds"], method.visible).masked
    hidden = torch.zeros(6, 16, dtype=torch.int64).scatter_(1, masked, 1)
    runs = (hidden.roll(1, 1) < hidden).sum(1)
    assert (runs <= 10 // span).all() and (span == 1) == (runs.double().mean() > 2)


def test_hidden_samples_are_not_read(tmp_path):
    method, batch = made("signal_mae", tmp_path)
    (x,) = batch["views"]
    prediction, masking = method.predict(x, batch["seeds"])
    changed = x.view(6, 16, 8).scatter(1, masking.masked[..., None].expand(-1, -1, 8), 9.0)
    again, _ = method.predict(changed.view_as(x), batch["seeds"])
    assert torch.equal(again, prediction)


def test_reconstructions_keep_what_is_visible(tmp_path):
    method, batch = made("signal_mae", tmp_path)
    (x,) = batch["views"]
    gray, painted = (y.view(6, 16, 8) for y in method.reconstruct(x, batch["seeds"]))
    masked = method.mask(batch["seeds"], method.visible).masked
    hidden = torch.zeros(6, 16, dtype=torch.bool).scatter_(1, masked, True)
    assert (gray[hidden] == 0).all() and not torch.equal(painted[hidden], gray[hidden])
    for shown in (gray, painted):
        assert torch.equal(shown[~hidden], x.view(6, 16, 8)[~hidden])


def test_impossible_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="span"):
        made("signal_mae", tmp_path, method__span=11)
    with pytest.raises(ValueError, match="mask_ratio"):
        made("signal_mae", tmp_path, method__mask_ratio=0.99)
