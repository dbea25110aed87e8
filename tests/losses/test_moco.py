import math

import pytest
import torch

from fastssl.losses import MoCoLoss, MoCoV3Loss
from fastssl.losses.moco import moco_reference, moco_v3_reference
from tests.covering import pairwise
from tests.losses.views import unit, views
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, saved_elements


@pytest.mark.parametrize(
    **pairwise(
        {"B, D, size": [(1, 3, 1), (33, 16, 300)], "temperature": [0.2, 0.07], "reduce": UPSTREAM}
    )
)
def test_moco_formula(B, D, size, temperature, reduce):
    loss = MoCoLoss(D, temperature, size).to(DEVICE).eval()
    queue = loss.queue.keys
    query, key = views(B, D)

    def eager(q):
        return moco_reference(q, key.to(q), queue, temperature)

    assert_no_worse(lambda q: loss(q, key), eager, [query], reduce)


@pytest.mark.parametrize(
    **pairwise({"B, D": [(1, 3), (65, 16)], "temperature": [1.0, 0.2, 0.05], "reduce": UPSTREAM})
)
def test_moco_v3_formula(B, D, temperature, reduce):
    query, key = views(B, D)
    eager = moco_v3_reference
    assert_no_worse(
        lambda q: MoCoV3Loss(temperature)(q, key),
        lambda q: eager(q, key.to(q), temperature),
        [query],
        reduce,
    )


@pytest.mark.parametrize("loss", [MoCoLoss(4, size=9), MoCoV3Loss()])
def test_the_key_gets_no_gradient(loss):
    query, key = (z.requires_grad_() for z in views(5, 4))
    loss.to(DEVICE)(query, key).backward()
    assert query.grad is not None and key.grad is None


def test_the_queue_takes_the_keys_after_the_loss():
    loss = MoCoLoss(4, 0.2, size=10).to(DEVICE)
    before = loss.queue.keys
    for start in (0, 4):
        query, key = views(4, 4)
        key = key + start
        want = moco_reference(query, key, loss.queue.keys, 0.2)
        torch.testing.assert_close(loss(query, key), want)
        torch.testing.assert_close(loss.queue.keys[start : start + 4], unit(key))
    assert torch.equal(loss.queue.keys[8:], before[8:])


def test_the_queue_stays_without_update_and_in_eval():
    loss = MoCoLoss(4, size=10).to(DEVICE)
    before = loss.queue.keys
    loss(*views(4, 4), update=False)
    loss.eval()(*views(4, 4))
    assert torch.equal(loss.queue.keys, before)


def test_backward_sees_the_queue_of_its_forward():
    query, key = views(6, 4)
    want = grads(lambda q: MoCoLoss(4, 0.2, size=6).to(DEVICE)(q, key), [query])[1]
    loss, leaf = MoCoLoss(4, 0.2, size=6).to(DEVICE), query.clone().requires_grad_()
    value = loss(leaf, key)
    loss(key, query)  # every key of the queue has changed
    (math.sin(0.7) * value).backward()
    torch.testing.assert_close(leaf.grad, want)


def test_the_queue_is_saved():
    loss, other = (MoCoLoss(4, size=10).to(DEVICE) for _ in range(2))
    loss(*views(4, 4))
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.queue.keys, loss.queue.keys)
    torch.testing.assert_close(other(*views(4, 4)), loss(*views(4, 4)))


def test_known_values():
    same = torch.ones(50, 4, device=DEVICE)
    assert MoCoV3Loss(0.2)(same, same).item() == pytest.approx(0.4 * math.log(50), rel=1e-6)
    loss = MoCoLoss(4, size=50).to(DEVICE)
    loss.queue.push(same)
    assert loss(same, same).item() == pytest.approx(math.log(51), rel=1e-6)
    one = torch.randn(1, 4, device=DEVICE)
    assert MoCoV3Loss()(one, -one).item() == 0


def test_near_perfect_matches_keep_their_digits():
    z = torch.eye(6, device=DEVICE) + 1e-3
    truth = MoCoV3Loss(0.05)(z.double(), z.double())
    assert 0 < truth < 1e-7
    torch.testing.assert_close(MoCoV3Loss(0.05)(z, z).double(), truth, rtol=1e-5, atol=0)


def test_scores_are_not_kept():
    loss = MoCoLoss(4, size=4096).to(DEVICE)
    query, key = (z.requires_grad_() for z in views(256, 4))
    assert saved_elements(lambda: loss(query, key)) < 256 * 4096 // 16


@pytest.mark.parametrize("shape", [(3, 5), (3,), (0, 4)])
def test_refuses_what_the_queue_does_not_fit(shape):
    with pytest.raises(ValueError, match=r"must (both )?be \(B, (4|D)\)[ ,]"):
        MoCoLoss(4, size=8)(torch.ones(shape), torch.ones(shape))
