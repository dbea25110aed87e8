"""Methods of two views or more: which pairs are compared, by one encoder of all sizes."""

import pytest
import timm
import torch

from fastssl.config import ConfigError
from fastssl.export import export, load_encoder
from fastssl.methods import build_method
from fastssl.methods.views import global_views, pairs
from fastssl.models import build_backbone
from fastssl.run.build import build
from fastssl.run.train import pretrain
from tests.runs import VIT, losses, tiny

MANY = (16, 8, 16, 8, 8)  # two global views and three local ones
PAIRS = [(0, 1), (0, 2), (1, 2), (0, 3), (2, 3), (0, 4), (2, 4)]
BY_PAIRS = ("simclr", "dcl", "groco", "barlow_twins", "vicreg")


def views(sizes):
    torch.manual_seed(1)
    return [torch.randn(6, 1, side, side) for side in sizes]


def method(name, tmp_path, sizes=MANY):
    cfg = tiny(name, tmp_path)
    torch.manual_seed(0)
    shapes = [(1, side, side) for side in sizes]
    model = {"shape": shapes[0], "others": shapes[1:], "kwargs": VIT}
    return build_method(build_backbone(cfg.model.name, **model), cfg.method)


def test_each_pair_with_a_global_view_is_met_once():
    assert global_views(views(MANY)) == [0, 2] and pairs(views(MANY)) == PAIRS
    assert pairs(views((8, 16))) == [(0, 1)] and pairs(views((8, 16, 8))) == [(0, 1), (1, 2)]
    assert global_views(views((8, 16))) == [0, 1]


def embeddings(ours, images):
    return [ours.head(ours.encoder(image)) for image in images]


@pytest.mark.parametrize("name", BY_PAIRS)
def test_the_loss_is_the_mean_over_pairs(name, tmp_path):
    ours = method(name, tmp_path)
    z = embeddings(ours, views(MANY))
    want = sum(ours.criterion(z[v], z[w]) for v, w in PAIRS) / 7
    torch.testing.assert_close(ours({"views": views(MANY)})["loss"], want)


@pytest.mark.parametrize("name", [*BY_PAIRS, "nnclr", "ssl_ey", "mocov3"])
@pytest.mark.parametrize("sizes", [(16, 16), (16, 8)])
def test_of_two_views_the_loss_is_the_criterion_to_the_bit(name, sizes, tmp_path):
    ours, images = method(name, tmp_path, sizes), views(sizes)
    got = ours({"views": images})["loss"]
    if name == "mocov3":
        q = [ours.predictor(ours.student(image)) for image in images]
        k = [ours.teacher.model(image) for image in images]
        want = ours.criterion(q[0], k[1]) + ours.criterion(q[1], k[0])
    else:
        z = embeddings(ours, images)
        more = {"update": False} if name == "nnclr" else {}
        predicted = [ours.predictor(x) for x in z] if name == "nnclr" else []
        want = ours.criterion(*([z] if name == "ssl_ey" else [*z, *predicted]), **more)
    assert torch.equal(got, want)


def test_nnclr_meets_neighbors_by_pairs_and_remembers_the_last_global_view(tmp_path):
    ours, images = method("nnclr", tmp_path), views(MANY)
    out, z = ours({"views": images}), embeddings(ours, images)
    p = [ours.predictor(x) for x in z]
    terms = [ours.criterion(z[v], z[w], p[v], p[w], update=False) for v, w in PAIRS]
    torch.testing.assert_close(out["loss"], sum(terms) / 7)
    torch.testing.assert_close(out["keep"], z[2])


def test_mocov3s_teacher_sees_global_views_alone(tmp_path):
    ours, images = method("mocov3", tmp_path), views(MANY)
    q = [ours.predictor(ours.student(image)) for image in images]
    k = {g: ours.teacher.model(images[g]) for g in (0, 2)}
    terms = [ours.criterion(q[v], k[g]) for v in range(5) for g in k if v != g]
    assert len(terms) == 8 and len(ours.targets({"views": images})) == 2
    torch.testing.assert_close(ours({"views": images})["loss"], 2 * sum(terms) / 8)


def test_ssl_ey_takes_all_views_at_once(tmp_path):
    ours, images = method("ssl_ey", tmp_path), views(MANY)
    want = ours.criterion(embeddings(ours, images))
    torch.testing.assert_close(ours({"views": images})["loss"], want)


def test_a_run_of_several_sizes_is_exported_as_a_plain_model(tmp_path):
    crops = {"local_count": 2, "local_size": 8, "hue": 0.0, "jitter": 0.0}
    many = {"data__augment": "swav", "data__overrides": crops}
    cfg = tiny("simclr", tmp_path, epochs=1, **many)
    assert cfg.views().count == 4
    pretrain(cfg)
    assert len(losses(cfg)) == 5
    where = export(cfg.directory, tmp_path / "out", "timm")
    plain = timm.create_model(f"local-dir:{where}", pretrained=True).eval()
    encoder, _, channels = load_encoder(cfg.directory, device="cpu")
    images = torch.randn(3, channels, 16, 16)
    torch.testing.assert_close(plain(images), encoder(images))
    assert not plain.dynamic_img_size
    with pytest.raises(ConfigError, match=r"sie reads 2 view\(s\) of an item, .*swav makes 4"):
        tiny("sie", tmp_path, **many)
    many["data__overrides"] = {**crops, "local_size": 6}
    with pytest.raises(ConfigError, match="sizes of 16 and 6, and .* not a multiple"):
        build(tiny("simclr", tmp_path, **many), 1)
