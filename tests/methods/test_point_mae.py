"""Point-MAE: hidden groups are predicted from visible ones, by the Chamfer distance; Point-CMAE."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.random import finish
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


@pytest.mark.parametrize("ratio", [0.6, 0.25])  # at 0.25 some clouds have no group hidden twice
def test_two_decoders_agree_on_what_both_masks_hide(ratio, tmp_path):
    method, batch = made("point_cmae", tmp_path, method__contrast=0.5, method__mask_ratio=ratio)
    groups, errors, seen = method.encoder.group(batch["views"][0]), [], []
    for decoder, seeds in (
        (method.decoder, batch["seeds"]),
        (method.second, finish(batch["seeds"])),
    ):
        x, masking = method.encode_visible(groups, seeds)
        points, whole = decoder(x, groups.centers, masking)
        seen.append((whole, [set(places.tolist()) for places in masking.masked]))
        truth = groups.points[torch.arange(6)[:, None], masking.masked]
        pairs = zip(points.flatten(0, 1), truth.flatten(0, 1), strict=True)
        errors.append(torch.stack([one_way(a, b) + one_way(b, a) for a, b in pairs]).mean())
    (first, hidden), (second, hidden_too) = seen
    assert hidden != hidden_too
    apart = torch.zeros(6, dtype=torch.float64)
    for b in range(6):
        both = sorted(hidden[b] & hidden_too[b])
        if both:
            cosines = F.cosine_similarity(first[b, both].double(), second[b, both].double(), dim=1)
            apart[b] = 1 - cosines.mean()
    assert (apart == 0).any() == (ratio < 0.5)
    out = method(batch)
    torch.testing.assert_close(out["apart"], apart.mean().float())
    want = errors[0] + errors[1] + 0.5 * apart.mean()
    torch.testing.assert_close(out["loss"], want.float())
    out["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())


def test_impossible_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="mask_ratio"):
        made("point_mae", tmp_path, method__mask_ratio=0.99)
    with pytest.raises(ValueError, match="trains a point_transformer, got TableTransformer"):
        kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2}
        source = {"name": "table", "dataset": "wine"}
        other = {"model__name": "table_transformer", "model__kwargs": kwargs}
        made("point_mae", tmp_path, data__augment="table", data__source=source, **other)
