import torch

from fastssl.losses import BarlowTwinsLoss, MixedBarlowTwinsLoss
from fastssl.random import uniform
from tests.methods.test_methods import assert_gradients_reach, batch, method


def test_mixes_images_as_it_mixes_embeddings(tmp_path):
    ours, _ = method("mixed_barlow_twins", tmp_path)
    data = batch(2)
    seen = []
    ours.encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    loss = ours(data)["loss"]
    x_a, x_b = data["views"]
    alpha, order = uniform(data["seeds"], 2)[0, 0], uniform(data["seeds"], 2)[:, 1].argsort()
    assert order.tolist() != list(range(6))
    torch.testing.assert_close(seen[2], alpha * x_a + (1 - alpha) * x_b[order])
    z_a, z_b, z_m = (ours.head(ours.encoder(x)) for x in seen[:3])
    want = MixedBarlowTwinsLoss(5e-3, 5.0)(z_a, z_b, z_m, order, alpha)
    torch.testing.assert_close(loss, want)
    assert loss > BarlowTwinsLoss(5e-3)(z_a, z_b)
    assert_gradients_reach(ours, ours(data)["loss"])


def test_other_seeds_mix_otherwise(tmp_path):
    ours, _ = method("mixed_barlow_twins", tmp_path)
    data = batch(2)
    first, again = ours(data)["loss"], ours(data)["loss"]
    assert torch.equal(first, again)
    assert ours({**data, "seeds": data["seeds"] + 1})["loss"] != first
