"""Methods made of parts of others: each computes its paper's loss, written out in float64."""

import pytest
import torch

from fastssl.methods.configs import SLAConfig
from fastssl.methods.turns import quarter_turns
from tests.methods.test_methods import assert_gradients_reach, batch, method


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
