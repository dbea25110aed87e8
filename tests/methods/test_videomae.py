"""VideoMAE: tubes in the encoder, half of the rest in the decoder, loss on that half alone."""

import pytest
import torch

from tests.methods.test_other_kinds import made


def cells(clips):
    """(B, L, prod(patch) C): tubelets of 2 x 4 x 4, row-major, channels last."""
    B, C, T, H, W = clips.shape
    x = clips.reshape(B, C, T // 2, 2, H // 4, 4, W // 4, 4)
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(B, -1, 32 * C)


def test_the_loss_is_over_the_decoded_tubelets(tmp_path):
    method, batch = made("videomae", tmp_path)
    (clips,) = batch["views"]
    dual = method.mask(batch["seeds"])
    prediction = method.predict(clips, dual.masking.visible, dual.decoded)
    truth = cells(clips).gather(1, dual.decoded[..., None].expand(-1, -1, 96))
    std = (truth.var(-1, keepdim=True) + 1e-6).sqrt()
    truth = (truth - truth.mean(-1, keepdim=True)) / std
    torch.testing.assert_close(method(batch)["loss"], (prediction - truth).square().mean())


def test_tubes_and_counts(tmp_path):
    method, batch = made("videomae", tmp_path)
    masking, decoded = method.mask(batch["seeds"])
    assert masking.visible.shape == (6, 8) and masking.masked.shape == (6, 24)
    frames = masking.visible.unflatten(1, (2, 4))
    assert torch.equal(frames[:, 0] + 16, frames[:, 1])  # the same places of both
    assert decoded.shape == (6, 12)
    for b in range(6):
        assert set(decoded[b].tolist()) <= set(masking.masked[b].tolist())
        assert len(set(decoded[b].tolist())) == 12


def test_hidden_tubelets_are_not_read(tmp_path):
    """What the encoder hides may be anything: the prediction is the same."""
    method, batch = made("videomae", tmp_path)
    (clips,) = batch["views"]
    dual = method.mask(batch["seeds"])
    hidden = torch.zeros(6, 32, dtype=torch.bool).scatter_(1, dual.masking.masked, True)
    where = hidden.view(6, 1, 2, 4, 4).repeat_interleave(2, 2)
    where = where.repeat_interleave(4, 3).repeat_interleave(4, 4)
    changed = torch.where(where, torch.randn_like(clips), clips)
    assert not torch.equal(changed, clips)
    args = dual.masking.visible, dual.decoded
    assert torch.equal(method.predict(changed, *args), method.predict(clips, *args))


def test_the_decoder_sees_no_more_than_it_must(tmp_path, monkeypatch):
    method, batch = made("videomae", tmp_path)
    lengths = []
    for block in method.decoder.blocks:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    method(batch)
    assert set(lengths) == {method.masked.prefix + 8 + 12}


def test_reconstructions_keep_what_is_visible(tmp_path):
    method, batch = made("videomae", tmp_path)
    (clips,) = batch["views"]
    gray, painted = method.reconstruct(clips, batch["seeds"])
    masking = method.mask(batch["seeds"]).masking
    hidden = torch.zeros(6, 32, dtype=torch.bool).scatter_(1, masking.masked, True)
    assert (cells(gray)[hidden] == 0).all()
    for shown in (gray, painted):
        assert torch.equal(cells(shown)[~hidden], cells(clips)[~hidden])
    truth, ours = cells(clips)[hidden], cells(painted)[hidden]
    assert not torch.equal(ours, truth)
    torch.testing.assert_close(method.reconstruct(clips, batch["seeds"])[1], painted)


def test_impossible_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"method.mask_ratio"):
        made("videomae", tmp_path, method__mask_ratio=0.99)
    with pytest.raises(ValueError, match="reads clips"):
        image = {"model__name": "vit_tiny_patch16_224", "data__source": {"name": "digits"}}
        made("videomae", tmp_path, data__augment="mae", data__overrides={}, **image)
