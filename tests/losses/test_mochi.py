import pytest
import torch
from torch import nn

from fastssl.losses import MoCoLoss
from fastssl.losses.mochi import MoCHiLoss, mochi_reference
from fastssl.random import finish, uniform
from tests.covering import pairwise
from tests.losses.views import unit, views
from tests.oracle import DEVICE, UPSTREAM, assert_no_worse, grads, saved_elements
from tests.ranks import run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(step, rows, n):
    """The step's numbers for the images of these places in the joined batch."""
    return uniform(finish(step + 1) + rows, n)


def synthetic(q, keys, loss):
    """Row by row: (B, s + s_prime, D)."""
    s, s_prime, top_n = loss.s, loss.s_prime, loss.top_n
    draws = draw(loss.steps, torch.arange(len(q), device=q.device), 3 * s + 2 * s_prime)
    made = []
    for row, u in zip(q.detach(), draws, strict=True):
        hardest = keys[(keys @ row).argsort(descending=True)[:top_n]]
        i, j, a, at, b = u.split([s, s, s, s_prime, s_prime])
        n_i, n_j, n = (hardest[(place * top_n).long()] for place in (i, j, at))
        a, b = a.to(q)[:, None], b.to(q)[:, None] / 2
        made.append(unit(torch.cat([a * n_i + (1 - a) * n_j, b * row + (1 - b) * n])))
    return torch.stack(made)


def reference(query, key, keys, loss):
    drawn = synthetic(unit(query), keys.to(query), loss)
    return mochi_reference(query, key, keys, drawn, loss.temperature)


@pytest.mark.parametrize(
    **pairwise(
        {
            "B, D, size, sizes": [(1, 3, 1, (1, 1, 1)), (9, 16, 70, (20, 13, 5))],
            "dtype": DTYPES,
            "reduce": UPSTREAM,
        }
    )
)
def test_formula(B, D, size, sizes, dtype, reduce):
    top_n, s, s_prime = sizes
    loss = MoCHiLoss(D, 0.2, size, top_n=top_n, s=s, s_prime=s_prime).to(DEVICE).eval()
    query, key = views(B, D, dtype)
    keys = loss.queue.keys
    slack = 2 if dtype == torch.float32 else 8  # one number, or few: eager may be lucky
    either = lambda q: loss(q, key), lambda q: reference(q, key.to(q.dtype), keys, loss)  # noqa: E731
    assert_no_worse(*either, [query], reduce, slack)


@pytest.mark.parametrize("s, s_prime", [(7, 0), (0, 7)])
def test_one_kind_alone(s, s_prime):
    loss = MoCHiLoss(8, 0.2, 40, top_n=10, s=s, s_prime=s_prime).to(DEVICE).eval()
    query, key = (z.double() for z in views(6, 8))
    torch.testing.assert_close(loss(query, key), reference(query, key, loss.queue.keys, loss))


def test_without_mixes_it_is_moco():
    query, key = views(6, 8)
    plain = MoCHiLoss(8, 0.2, 40, top_n=10, s=0, s_prime=0).to(DEVICE)
    moco = MoCoLoss(8, 0.2, 40).to(DEVICE)
    for _ in range(2):
        ours, theirs = (grads(lambda q, f=f: f(q, key), [query]) for f in (plain, moco))
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(plain.queue.keys, moco.queue.keys)


def test_more_and_harder_negatives_cost_more():
    query, key = views(20, 8)

    def cost(top_n, s, s_prime):
        loss = MoCHiLoss(8, 0.2, 200, top_n=top_n, s=s, s_prime=s_prime)
        return loss.to(DEVICE)(query, key).item()

    none = cost(20, 0, 0)
    assert none < cost(200, 50, 0) < cost(20, 50, 0) < cost(20, 50, 50)
    assert cost(20, 50, 0) < cost(20, 0, 50)  # with the query itself mixed in


def test_draws_are_uniform_and_each_its_own():
    rows, step = torch.arange(60, device=DEVICE), torch.tensor(3, device=DEVICE)
    u = draw(step, rows, 500)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() < 1
    counts = torch.histc(u.float(), bins=20, min=0, max=1)
    assert (counts / counts.mean() - 1).abs().max() < 0.1  # five deviations
    others = [u[1:, :-1], draw(step + 1, rows, 500)[:-1, :-1]]
    together = torch.stack([u[:-1, :-1], u[:-1, 1:], *others]).flatten(1)
    assert (together.corrcoef() - torch.eye(4, device=DEVICE)).abs().max() < 0.03
    assert u.unique().numel() > 0.99 * u.numel()


def test_every_step_draws_anew_and_a_resumed_run_draws_the_same():
    query, key = views(6, 8)
    make = lambda: MoCHiLoss(8, 0.2, 40, top_n=10, s=9, s_prime=9).to(DEVICE)  # noqa: E731
    loss, other = make(), make()
    first = loss(query, key, update=False)
    assert torch.equal(loss(query, key), first)
    assert loss.steps == 1
    loss.queue.load_state_dict(other.queue.state_dict())
    assert loss(query, key, update=False) != first
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(query, key), loss(query, key))
    before = loss.eval().queue.keys
    loss(query, key)
    assert loss.steps == 2 and torch.equal(loss.queue.keys, before)


def test_backward_sees_the_queue_of_its_forward():
    query, key = views(6, 8)
    make = lambda: MoCHiLoss(8, 0.2, 6, top_n=3, s=9, s_prime=9).to(DEVICE)  # noqa: E731
    want = grads(lambda q: make()(q, key), [query], torch.sum)[1]
    loss, leaf = make(), query.clone().requires_grad_()
    value = loss(leaf, key)
    loss(key, query)  # every key of the queue has changed
    value.backward()
    torch.testing.assert_close(leaf.grad, want)


def test_the_key_gets_no_gradient_and_scores_are_not_kept():
    loss = MoCHiLoss(4, size=4096, top_n=5, s=3, s_prime=2).to(DEVICE)
    query, key = (z.requires_grad_() for z in views(256, 4))
    assert saved_elements(lambda: loss(query, key)) < 256 * 4096 // 16
    loss(query, key).backward()
    assert query.grad is not None and key.grad is None


def test_zero_vectors_are_finite_and_a_nan_shows():
    query, key = views(6, 8)
    query[1] = key[2] = 0
    make = lambda: MoCHiLoss(8, 0.2, 40, top_n=10, s=9, s_prime=9).to(DEVICE)  # noqa: E731
    assert all(x.isfinite().all() for x in grads(lambda q: make()(q, key), [query]))
    for given in (query, key):
        given[3, 1] = torch.nan
        assert make()(query, key).isnan()
        given[3, 1] = 0


@pytest.mark.parametrize(
    "options, words",
    [
        ({"top_n": 9}, "top_n must be at most size = 8, got 9"),
    ],
)
def test_refuses_options(options, words):
    with pytest.raises(ValueError, match=words):
        MoCHiLoss(**{"dim": 4, "size": 8, "top_n": 4, **options})


@pytest.mark.parametrize("query, key", [((3, 4), (3, 5)), ((3, 5), (3, 5)), ((3,), (3,))])
def test_refuses_shapes(query, key):
    with pytest.raises(ValueError, match=r"must (both )?be \(B, (D|4)\)"):
        MoCHiLoss(4, size=8, top_n=4)(torch.ones(query), torch.ones(key))


def made(world=1):
    return MoCHiLoss(4, 0.3, size=10, top_n=6, s=8, s_prime=5)


def step(data, loss):
    """Two steps, the queue moving; the second one's value and gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).to(data)
    for query, key in data:
        model.zero_grad()
        value = loss(model(query), model(key).detach())
        value.backward()
    return value.detach(), [p.grad for p in model.parameters()]


def data_of(rank):
    """(steps, views, B, inputs), different on every rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, 2, 3, 5, generator=generator) + 0.3 * rank


def each_rank(rank, world):
    value, gradients = step(data_of(rank), made())
    heard = []
    for which in range(2):
        given = [torch.ones(3 + (i == which and rank == 1), 4) for i in range(2)]
        try:
            heard.append(str(made()(*given)))
        except ValueError as error:
            heard.append(str(error))
    return value, gradients, heard


@pytest.mark.parametrize("W", [2])
def test_mean_over_ranks_is_the_joined_batch(W):
    seen = run_ranks(each_rank, W)
    joined = torch.cat([data_of(rank) for rank in range(W)], dim=2)
    value, gradients = step(joined.double(), made())
    mean = torch.stack([one[0] for one in seen]).mean()
    torch.testing.assert_close(mean.double(), value, rtol=2e-6, atol=2e-6)
    for i, want in enumerate(gradients):
        got = torch.stack([one[1][i] for one in seen]).mean(0).double()
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    for _, _, heard in seen:
        assert all("must have the same shape on every rank" in words for words in heard)
