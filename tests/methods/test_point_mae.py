"""Point-MAE: hidden groups are predicted from visible ones, by the Chamfer distance."""

import pytest
import torch

from tests.methods.test_other_kinds import made


def one_way(a, b):
    return torch.cdist(a, b).square().min(1).values.mean()


def test_the_loss_is_the_chamfer_distance_of_hidden_groups(tmp_path):
    method, batch = made("point_mae", tmp_path)
    (clouds,) = batch["views"]
    prediction, masking, groups = method.predict(clouds, batch["seeds"])
    assert masking.visible.shape == (6, 3) and prediction.shape == (6, 5, 6, 3)
    errors = []
    for b in range(6):
        for place, ours in zip(masking.masked[b], prediction[b], strict=True):
            truth = groups.points[b, place]
            errors.append(one_way(ours, truth) + one_way(truth, ours))
    torch.testing.assert_close(method(batch)["loss"], torch.stack(errors).mean())


def test_the_encoder_reads_visible_groups_alone(tmp_path):
    method, batch = made("point_mae", tmp_path)
    (clouds,) = batch["views"]
    seen = []
    method.encoder.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    method.encoder.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    _, masking, groups = method.predict(clouds, batch["seeds"])
    rows = torch.arange(6)[:, None]
    torch.testing.assert_close(seen[0], groups.points[rows, masking.visible])
    torch.testing.assert_close(seen[1], groups.centers[rows, masking.visible])


def test_reconstructions_stand_where_their_centers_are(tmp_path):
    method, batch = made("point_mae", tmp_path)
    (clouds,) = batch["views"]
    seen, painted = method.reconstruct(clouds, batch["seeds"])
    assert seen.shape == (6, 18, 3) and painted.shape == (6, 48, 3)
    assert torch.equal(painted[:, :18], seen)
    assert torch.cdist(seen, clouds).min(2).values.max() < 1e-3  # they are the cloud's own points
    prediction, masking, groups = method.predict(clouds, batch["seeds"])
    hidden = groups.centers[torch.arange(6)[:, None], masking.masked]
    want = prediction + hidden[:, :, None]
    torch.testing.assert_close(painted[:, 18:].unflatten(1, (5, 6)), want)


def test_the_ratio_may_grow(tmp_path):
    method, batch = made("point_mae", tmp_path, method__mask_ratio=[0.25, 0.75])
    counts = []
    for progress in (0.0, 1.0):
        method.on_step(None, progress)
        counts.append(method.predict(batch["views"][0], batch["seeds"])[1].visible.shape[1])
    assert counts == [6, 2]


def test_impossible_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mask_ratio"):
        made("point_mae", tmp_path, method__mask_ratio=0.99)
    with pytest.raises(ValueError, match="trains a point_transformer, got TableTransformer"):
        kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2}
        source = {"name": "table", "dataset": "wine"}
        other = {"model__name": "table_transformer", "model__kwargs": kwargs}
        made("point_mae", tmp_path, data__augment="table", data__source=source, **other)
