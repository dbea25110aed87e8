"""Global-local contrast: an image finds its views, and a place the same place in another view."""

import pytest
import torch
from torch import nn

from fastssl.losses.dense import dense_info_nce_reference
from fastssl.losses.supcon import supcon_reference
from fastssl.methods.base import PARAMETERS
from fastssl.methods.configs import GlobalLocalConfig
from fastssl.methods.global_local import same_places
from fastssl.models import build_backbone, features_and_map, map_decoder
from fastssl.run.build import build
from tests.methods.test_methods import assert_gradients_reach, batch
from tests.runs import VIT, tiny


def made(**columns):
    """The parameters (1, P) of the whole image, and what is changed of it."""
    plain = {"width": 1.0, "height": 1.0, "cos": 1.0}
    return torch.tensor([[{**plain, **columns}.get(name, 0.0) for name in PARAMETERS]])


WHOLE, FLIPPED = made(), made(flip=1.0)
CORNER = made(left=0.5, width=0.5, height=0.5)  # at the top right
TURNED = made(cos=0.0, sin=1.0)  # a quarter, clockwise
NO = -1
OBLONG = {"patch_size": (8, 4)}


@pytest.mark.parametrize(
    "first, second, n, m, want",
    [
        (WHOLE, WHOLE, 2, 2, [0, 1, 2, 3]),
        (WHOLE, WHOLE, 2, 4, [5, 7, 13, 15]),
        (WHOLE, FLIPPED, 3, 3, [2, 1, 0, 5, 4, 3, 8, 7, 6]),
        (WHOLE, TURNED, 2, 2, [1, 3, 0, 2]),
        (WHOLE, CORNER, 4, 2, [NO, NO, 0, 1, NO, NO, 2, 3, *[NO] * 8]),
        (CORNER, WHOLE, 2, 2, [1, 1, 1, 1]),
        (CORNER, FLIPPED, 2, 4, [1, 0, 5, 4]),
    ],
)
def test_places_meet_where_they_show_the_same(first, second, n, m, want):
    assert same_places(first, second, n, m).tolist() == [want]


@pytest.mark.parametrize("by_label", [False, True])
def test_the_loss_is_both_contrasts(by_label, tmp_path):
    views = {"data__augment": "swav", "data__overrides": {"local_count": 1, "local_size": 8}}
    ours = build(tiny("global_local", tmp_path, **views, method__by_label=by_label), 1)
    data = batch(3)
    data["views"][2] = data["views"][2][..., :8, :8]
    crops = [WHOLE, made(left=0.25, width=0.5, height=0.75), CORNER]
    data["params"] = [p.expand(6, -1) for p in crops]
    out, encoded = ours(data), ours.encode(data)
    sides = [8, 8, 4]
    assert [y.shape[1] for _, y in encoded] == [side**2 for side in sides]
    for (f, _), view in zip(encoded, data["views"], strict=True):
        torch.testing.assert_close(f, ours.encoder(view))
    local = []
    for v, w in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)):
        match = same_places(crops[v], crops[w], sides[v], sides[w]).expand(6, -1)
        terms = encoded[v][1], encoded[w][1], match
        local.append(dense_info_nce_reference(*terms, 0.1, "image"))
    z = torch.stack([ours.head(f) for f, _ in encoded], 1)
    whole = supcon_reference(z, data["label"] if by_label else data["index"], 0.1)
    torch.testing.assert_close(out["global"], whole)
    torch.testing.assert_close(out["local"], torch.stack(local).mean())
    torch.testing.assert_close(out["loss"], whole + out["local"])
    assert_gradients_reach(ours, out["loss"])


@pytest.mark.parametrize(
    "name, side", [("resnet10t", 1), ("vit", 4), ("swin_tiny_patch4_window7_224", 1)]
)
def test_a_map_is_what_is_pooled(name, side):
    kwargs = {"vit": VIT, "resnet10t": {}}.get(name, {"depths": [1, 1, 1, 1], "window_size": 2})
    size, name = (16, "vit_tiny_patch16_224") if name == "vit" else (32, name)
    model = build_backbone(name, shape=(3, size, size), kwargs=kwargs).eval()
    images = torch.randn(2, 3, size, size)
    pooled, places = features_and_map(model, images)
    torch.testing.assert_close(pooled, model(images))
    assert places.shape == (2, model.num_features, side, side)
    torch.testing.assert_close(places.mean((2, 3)), pooled)
    assert map_decoder(model, 8, 5, 2)(places).shape == (2, 5, 4 * side, 4 * side)


def test_what_gives_no_map_or_has_no_labels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="places want one of timm's models, got Linear"):
        map_decoder(nn.Linear(2, 2), 8, 8, 1)
    oblong = build_backbone("vit_tiny_patch16_224", shape=(3, 16, 16), kwargs=VIT | OBLONG)
    with pytest.raises(ValueError, match="make a square, and the model has 8 tokens"):
        features_and_map(oblong, torch.zeros(1, 3, 16, 16))
    assert GlobalLocalConfig().fitted(9, None) == GlobalLocalConfig()
    with pytest.raises(ValueError, match="method.by_label=true .* has no labels"):
        GlobalLocalConfig(by_label=True).fitted(9, None)
