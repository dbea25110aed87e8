"""The point transformer: groups as defined, features that no order of points changes."""

import pytest
import timm
import torch

from fastssl.masking import random_masking
from fastssl.models import PointDecoder, PointTransformer, build_backbone, feature_dim
from fastssl.models.point import farthest_points, grouped

CLOUDS = torch.randn(3, 70, 3, generator=torch.Generator().manual_seed(0))


def made(**changes):
    torch.manual_seed(0)
    shape = {"groups": 9, "group_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return PointTransformer(**{**shape, **changes}).eval()


def test_each_center_is_the_farthest_from_those_before():
    for cloud, ids in zip(CLOUDS, farthest_points(CLOUDS, 12).tolist(), strict=True):
        assert len(set(ids)) == 12
        assert (cloud - cloud.mean(0)).norm(dim=1).argmax() == ids[0]
        for n in range(1, 12):
            gaps = torch.cdist(cloud, cloud[ids[:n]]).min(1).values
            assert gaps.argmax() == ids[n]


def test_groups_are_the_nearest_points_less_their_center():
    points, centers = grouped(CLOUDS, 5, 6)
    assert points.shape == (3, 5, 6, 3) and centers.shape == (3, 5, 3)
    for b in range(3):
        gaps = torch.cdist(centers[b], CLOUDS[b])
        for g in range(5):
            want = CLOUDS[b][gaps[g].argsort()[:6]]
            found = points[b, g] + centers[b, g]
            torch.testing.assert_close(found.sort(0).values, want.sort(0).values)
    assert points.norm(dim=-1).min(2).values.max() < 1e-3  # the center is in its group


def test_a_cloud_is_a_set_and_a_sample_its_own():
    model = made()
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    features = model(CLOUDS)
    assert features.shape == (3, 48) and feature_dim(model) == 48
    torch.testing.assert_close(model(CLOUDS[:, order]), features)
    torch.testing.assert_close(model.train()(CLOUDS[1:2]), features[1:2])


def test_groups_do_not_mind_the_order_of_their_points():
    model, (points, _) = made(), grouped(CLOUDS, 5, 6)
    torch.testing.assert_close(model.tokens(points.flip(2)), model.tokens(points))
    moved = points.clone()
    moved[0, 2] += 0.1
    changed = (model.tokens(moved) != model.tokens(points)).any(-1)
    assert changed.nonzero().tolist() == [[0, 2]]


def test_features_are_mean_and_maximum_of_the_groups():
    model = made()
    points, centers = model.group(CLOUDS)
    x = model.encode(model.tokens(points), centers)
    torch.testing.assert_close(model(CLOUDS), torch.cat([x.mean(1), x.max(1).values], 1))


def test_positions_enter_every_block():
    model = made()
    points, centers = model.group(CLOUDS)
    x = tokens = model.tokens(points)
    for block in model.blocks.blocks:
        x = block(x + model.blocks.position(centers))
    torch.testing.assert_close(model.encode(tokens, centers), model.blocks.norm(x))


def test_the_grouping_is_float32_in_bfloat16():
    model = made().to(torch.bfloat16)
    points, centers = model.group(CLOUDS)
    assert points.dtype == centers.dtype == torch.float32
    assert model(CLOUDS).dtype == torch.bfloat16


def test_checkpointing_changes_no_gradient():
    found = []
    for enabled in (False, True):
        model = made().train()
        model.set_grad_checkpointing(enabled)
        model(CLOUDS).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_decoder_predicts_hidden_groups_in_order():
    torch.manual_seed(0)
    decoder = PointDecoder(24, width=16, depth=2, heads=2, size=7)
    masking = random_masking(torch.arange(3), 9, 4)
    tokens, centers = torch.randn(3, 4, 24), torch.randn(3, 9, 3)
    x = decoder.mask_token.expand(3, 9, 16).scatter(
        1, masking.visible[..., None].expand(-1, -1, 16), decoder.embed(tokens)
    )
    x = decoder.blocks(x, centers)
    want = decoder.head(x.gather(1, masking.masked[..., None].expand(-1, -1, 16)))
    out, whole = decoder(tokens, centers, masking)
    torch.testing.assert_close(whole, x)
    assert out.shape == (3, 5, 7, 3)
    torch.testing.assert_close(out, want.view(3, 5, 7, 3))


def test_timm_and_recipes_find_it():
    kwargs = {"groups": 4, "group_size": 3, "embed_dim": 12, "depth": 1, "num_heads": 2}
    model = build_backbone("point_transformer", shape=(20, 3), kwargs=kwargs)
    assert isinstance(model, PointTransformer) and model(CLOUDS).shape == (3, 24)
    with pytest.raises(ValueError, match="does not take"):
        build_backbone("point_transformer", shape=(3, 3), kwargs=kwargs)


def test_what_it_cannot_be_is_refused():
    with pytest.raises(ValueError, match="count must lie between 1 and 70"):
        made(groups=71)(CLOUDS)
    with pytest.raises(ValueError, match="size must lie between 1 and 70"):
        made(group_size=71)(CLOUDS)
    with pytest.raises(ValueError, match=r"clouds must be \(B, N, 3\)"):
        made()(CLOUDS[..., :2])
    with pytest.raises(ValueError, match="num_classes=0"):
        made(num_classes=3)
    with pytest.raises(ValueError, match="pretrained"):
        timm.create_model("point_transformer", pretrained=True)
    with pytest.raises(ValueError, match="decoder_dim=16"):
        PointDecoder(24, width=16, depth=1, heads=3, size=7)
