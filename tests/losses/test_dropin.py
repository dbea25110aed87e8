"""One line is changed, the import: arguments by place as the libraries' users write them."""

import lightly.loss
import open_clip.loss
import pytest
import torch
import torch.nn.functional as F

from fastssl import losses

OF_LIGHTLY = {
    "BarlowTwinsLoss": (5e-3, False),
    "VICRegLoss": (24.0, 26.0, 2.0, False, 1e-3),
    "TiCoLoss": (0.8, 7.0, False),
    "NTXentLoss": (0.3, 0, False),
    "DCLLoss": (0.2, None, False),
    "DCLWLoss": (0.2, 0.4, False),
    "MMCRLoss": (4e-3,),
}
OF_OPEN_CLIP = {
    "ClipLoss": (False, False, False, 0, 1, False),
    "SigLipLoss": (False, 0, 1, None),
}


def views(n=12, d=8):
    torch.manual_seed(0)
    return [torch.randn(n, d) for _ in range(2)]


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # lightly's DCLWLoss
@pytest.mark.parametrize("name", OF_LIGHTLY)
def test_arguments_by_place_are_lightlys(name):
    ours, theirs = (getattr(m, name)(*OF_LIGHTLY[name]) for m in (losses, lightly.loss))
    z = views() if name != "MMCRLoss" else [x.unflatten(0, (6, 2)) for x in views()]
    torch.testing.assert_close(ours(*z), theirs(*z), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OF_OPEN_CLIP)
def test_arguments_by_place_are_open_clips(name):
    ours, theirs = (getattr(m, name)(*OF_OPEN_CLIP[name]) for m in (losses, open_clip.loss))
    arguments = [F.normalize(x) for x in views()] + [torch.tensor(5.0)]
    arguments += [torch.tensor(-3.0)] if name == "SigLipLoss" else []
    torch.testing.assert_close(ours(*arguments), theirs(*arguments))


@pytest.mark.parametrize("size, width", [(8, 8), ((8, 5), 5), (0, None), ((0, 5), None)])
def test_a_banks_width_may_be_that_of_the_first_batch(size, width):
    ours = losses.NTXentLoss(0.5, size)
    x, y = views(4, width or 8)
    loss = ours(x.requires_grad_(), y)
    bank = ours.memory_bank
    assert loss.isfinite() and (bank is None if width is None else bank.keys.shape == (8, width))
    again = losses.NTXentLoss(0.5, size)  # whether it has seen a batch or not
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x, y), ours(x, y))


def test_horovod_is_refused():
    with pytest.raises(ValueError, match="use_horovod=True: ranks meet through torch.distributed"):
        losses.CLIPLoss(use_horovod=True)
