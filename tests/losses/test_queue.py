import pytest
import torch
from lightly.models.modules.memory_bank import MemoryBankModule

from fastssl.losses.queue import Queue
from tests.losses.views import unit
from tests.oracle import DEVICE
from tests.ranks import run_ranks


def batches(n, B, D, rank=0):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(B, D, generator=generator).to(DEVICE) for _ in range(n)]


@pytest.mark.parametrize("size, B", [(7, 3), (6, 3), (5, 5), (1, 1), (5, 9), (5, 12)])
def test_first_in_first_out(size, B):
    queue, kept = Queue(size, 4).to(DEVICE), [None] * size
    place = 0
    for batch in batches(4, B, 4):
        queue.push(batch)
        for key in batch[-size:]:
            kept[place % size] = key
            place += 1
    for got, key in zip(queue.keys, kept, strict=True):
        if key is not None:
            torch.testing.assert_close(got, unit(key))
    assert queue.next.item() == place % size


@pytest.mark.parametrize("size, B", [(12, 4), (4, 4)])
def test_a_batch_that_divides_it_moves_it_as_lightly_does(size, B):
    ours, theirs = Queue(size, 3).to(DEVICE), MemoryBankModule((size, 3)).to(DEVICE)
    theirs.bank.copy_(ours.bank)
    for batch in batches(5, B, 3):
        ours.push(batch)
        theirs(unit(batch), update=True)
        torch.testing.assert_close(ours.bank, theirs.bank)
        assert ours.next == theirs.bank_ptr[0]


def test_begins_with_random_directions_the_same_everywhere():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    bank = Queue(500, 8).bank
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(Queue(500, 8).bank, bank)
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(500))
    assert bank.mean(0).abs().max() < 0.1 and (bank.std(0) - 8**-0.5).abs().max() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_keys_are_normalized_in_float32(dtype):
    queue = Queue(3, 4).to(DEVICE)
    keys = batches(1, 3, 4)[0].to(dtype)
    queue.push(keys)
    assert queue.keys.dtype == torch.float32
    torch.testing.assert_close(queue.keys, unit(keys.float()))


def test_keys_are_a_copy():
    queue = Queue(3, 2)
    keys = queue.keys
    queue.push(torch.ones(3, 2))
    assert not torch.equal(keys, queue.keys)
    x = torch.ones(3, 2, requires_grad=True)
    scores = (x * queue.keys).square().sum()
    queue.push(-torch.ones(1, 2))
    scores.backward()  # not refused for having changed
    queue.push(x)
    assert not queue.bank.requires_grad


def test_a_zero_key_stays_zero_and_a_nan_shows():
    queue = Queue(2, 2)
    queue.push(torch.tensor([[0.0, 0.0], [torch.nan, 1.0]]))
    assert (queue.keys[0] == 0).all() and queue.keys[1].isnan().all()


def test_takes_its_width_from_the_first_keys():
    queue = Queue(4)
    assert queue.dim is None
    with pytest.raises(ValueError, match="this queue has no width yet"):
        _ = queue.keys
    queue.fit(torch.ones(2, 3))
    assert queue.dim == 3 and torch.equal(queue.keys, Queue(4, 3).keys)
    queue.push(torch.ones(1, 3))
    queue.fit(torch.ones(2, 3))
    assert (queue.keys[0] == 3**-0.5).all()


@pytest.mark.parametrize("dim", [None, 3])
def test_is_saved(dim):
    queue, other = Queue(4, 3), Queue(4, dim)
    queue.push(torch.ones(3, 3))
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.push(torch.eye(3)[:2])
    assert torch.equal(other.bank, queue.bank) and other.next == queue.next == 1
    with pytest.raises(RuntimeError, match="size mismatch"):
        Queue(5, dim).load_state_dict(queue.state_dict())


@pytest.mark.parametrize("shape", [(2, 4), (3,), (0, 3), (1, 2, 3)])
def test_refuses_keys_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"keys must be \(B, 3\) with B > 0, got "):
        Queue(4, 3).push(torch.ones(shape))


def each_rank(rank, world):
    queue = Queue(7)
    for batch in batches(3, 2, 4, rank):
        queue.push(batch.cpu())
    try:
        queue.push(torch.ones(2 + (rank == 1), 4))
    except ValueError as error:
        return queue.bank, queue.next, str(error)
    return "not refused"


@pytest.mark.parametrize("W", [2])
def test_every_rank_has_the_queue_of_the_joined_batch(W):
    queue = Queue(7)
    for joined in zip(*(batches(3, 2, 4, rank) for rank in range(W)), strict=True):
        queue.push(torch.cat(joined).cpu())
    for bank, place, words in run_ranks(each_rank, W):
        torch.testing.assert_close(bank, queue.bank)
        assert place == queue.next
        assert words.startswith("keys must have the same shape on every rank")
