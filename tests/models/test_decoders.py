"""Decoders: laws that tie them to one another."""

import pytest
import torch

from fastssl.masking import Masking, random_masking
from fastssl.models import CrossDecoder, LatentPredictor, LatentRegressor, MAEDecoder, PlaceDecoder

SIZES = dict(width=12, depth=2, heads=2, patches=9, values=5)


def decoder(kind):
    torch.manual_seed(0)
    made = kind(8, **SIZES)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def given():
    torch.manual_seed(1)
    masking = random_masking(torch.arange(3), 9, 4)
    return torch.randn(3, 4 + 2, 8), masking  # two prefix tokens


def test_a_predictor_asked_for_all_that_is_hidden_is_the_mae_decoder():
    mae, predictor = decoder(MAEDecoder), decoder(LatentPredictor)
    predictor.load_state_dict(mae.state_dict())
    tokens, masking = given()
    got = predictor(tokens, masking.visible, masking.masked.unsqueeze(1))
    torch.testing.assert_close(got.squeeze(1), mae(tokens, masking), rtol=1e-5, atol=1e-5)


def test_groups_are_predicted_each_on_its_own():
    predictor, (tokens, masking) = decoder(LatentPredictor), given()
    groups = torch.stack([masking.masked[:, :2], masking.masked[:, 2:4]], 1)
    together = predictor(tokens, masking.visible, groups)
    assert together.shape == (3, 2, 2, 5)
    for m in range(2):
        alone = predictor(tokens, masking.visible, groups[:, m : m + 1])
        torch.testing.assert_close(together[:, m], alone[:, 0], rtol=1e-5, atol=1e-5)


def test_places_of_tokens_and_of_targets_matter():
    predictor, (tokens, masking) = decoder(LatentPredictor), given()
    targets = masking.masked[:, None, :2]
    first = predictor(tokens, masking.visible, targets)
    assert (predictor(tokens, masking.visible.flip(1), targets) - first).abs().max() > 1e-3
    swapped = predictor(tokens, masking.visible, targets.flip(2))
    torch.testing.assert_close(swapped.flip(2), first, rtol=1e-5, atol=1e-5)


def test_a_cross_decoder_that_sees_nothing_is_the_mae_decoder():
    cross, mae = decoder(CrossDecoder), decoder(MAEDecoder)
    with torch.no_grad():
        for block in cross.blocks:
            block.proj.weight.zero_()
            block.proj.bias.zero_()
    own = {k.replace(".own.", "."): v for k, v in cross.state_dict().items()}
    mae.load_state_dict({k: v for k, v in own.items() if k in mae.state_dict()})
    tokens, masking = given()
    reference = torch.randn(3, 9 + 2, 8)
    blind = cross(tokens, masking, reference)
    torch.testing.assert_close(blind, mae(tokens, masking), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for block in cross.blocks:
            block.proj.weight.normal_()
    seeing = cross(tokens, masking, reference)
    assert (seeing - blind).abs().max() > 1e-2
    moved = torch.cat([reference[:, :2], reference[:, 2:].flip(1)], 1)
    assert (cross(tokens, masking, moved) - seeing).abs().max() > 1e-3  # it knows where they stood


def test_attention_to_the_reference_is_softmax_attention():
    block = decoder(CrossDecoder).blocks[0]
    x, y = torch.randn(2, 3, 12), torch.randn(2, 7, 12)
    seen = []
    block.own.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(x, y)
    q = block.query(block.norm(x)).view(2, 3, 2, 6)
    k, v = block.key_value(block.norm_y(y)).view(2, 7, 2, 2, 6).unbind(2)
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / 6**0.5).softmax(-1)
    attended = torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(2, 3, 12)
    torch.testing.assert_close(seen[0], x + block.proj(attended), rtol=1e-5, atol=1e-5)


def test_a_regressor_and_a_place_decoder_go_by_places_not_by_order():
    regressor, (tokens, masking) = decoder(LatentRegressor), given()
    made = regressor(tokens, masking)
    assert made.shape == (3, 5, 5) and made.std(1).min() > 1e-2
    moved = Masking(masking.visible.flip(1), masking.masked.roll(1, 1), masking.restore)
    other = regressor(torch.cat([tokens[:, :2], tokens[:, 2:].flip(1)], 1), moved)
    torch.testing.assert_close(other, made.roll(1, 1), rtol=1e-4, atol=1e-5)
    places, z = decoder(PlaceDecoder), torch.randn(3, 5, 8)
    made = places(z, masking.masked)
    assert made.shape == (3, 5, 5)
    torch.testing.assert_close(places(z.roll(1, 1), moved.masked), made.roll(1, 1))
    assert (places(z, moved.masked) - made).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [MAEDecoder, LatentPredictor, CrossDecoder])
def test_a_width_that_heads_do_not_divide_is_refused(kind):
    with pytest.raises(ValueError, match="decoder_dim=10 is not a multiple of decoder_heads=4"):
        kind(8, **{**SIZES, "width": 10, "heads": 4})


@pytest.mark.parametrize("kind", [MAEDecoder, LatentPredictor, CrossDecoder])
def test_mask_token_and_positions_do_not_decay(kind):
    made = decoder(kind)
    assert made.no_weight_decay() == {"mask_token", "pos_embed"}
    assert made.no_weight_decay() < set(dict(made.named_parameters()))
